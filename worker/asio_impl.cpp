// The compiled body of Asio and its TLS streams, once per program.
//
// Whoever links sc_asio sees Asio's declarations only (BOOST_ASIO_SEPARATE_COMPILATION is public on
// it).
#include <boost/asio/impl/src.hpp>
#include <boost/asio/ssl/impl/src.hpp>
