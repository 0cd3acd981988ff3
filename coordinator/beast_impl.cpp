// Boost.Beast's own code, compiled once (BOOST_BEAST_SEPARATE_COMPILATION) for all three Beast
// files.
#include <boost/beast/src.hpp>
