// One TCP connection between two workers, plain or TLS: how it is dialled, and how it reads and
// writes.
//
// Knows neither links nor lines; greets nobody. To be used on the io thread of its io_context only;
// handlers hold a shared_ptr to it and look at `closed` first.
#pragma once

#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/asio/write.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "config/result.hpp"
#include "config/tls.hpp"
#include "worker/link_frame.hpp"

namespace stagecoach {

class connection : public std::enable_shared_from_this<connection> {
 public:
  using error_code = boost::system::error_code;
  using io_done = std::function<void(error_code, std::size_t)>;

  explicit connection(boost::asio::io_context& io) : socket(io) {}

  boost::asio::ip::tcp::socket socket;
  std::optional<boost::asio::ssl::stream<boost::asio::ip::tcp::socket&>> tls;
  std::string far;             // "127.0.0.1:5000", for messages
  std::string certified_name;  // common name of the peer's certificate, under TLS
  bool closed = false;
  std::chrono::steady_clock::time_point since = std::chrono::steady_clock::now();
  std::array<std::byte, line_greeting_bytes> greeting_buffer{};  // the longer of the two
  std::array<std::byte, reply_bytes> reply_buffer{};
  std::array<std::byte, offer_bytes> offer_buffer{};

  void close() {
    closed = true;
    error_code ignored;
    socket.close(ignored);
  }
  void finish_sending() {
    error_code ignored;
    socket.shutdown(boost::asio::ip::tcp::socket::shutdown_send, ignored);
  }
  void read_some(boost::asio::mutable_buffer into, io_done done) {
    if (tls)
      tls->async_read_some(into, std::move(done));
    else
      socket.async_read_some(into, std::move(done));
  }
  void read_all(boost::asio::mutable_buffer into, io_done done) {
    if (tls)
      boost::asio::async_read(*tls, into, std::move(done));
    else
      boost::asio::async_read(socket, into, std::move(done));
  }
  template <class Buffers>
  void write_all(const Buffers& from, io_done done) {
    if (tls)
      boost::asio::async_write(*tls, from, std::move(done));
    else
      boost::asio::async_write(socket, from, std::move(done));
  }

  /// After connect or accept.
  void tune();
};

using connection_ptr = std::shared_ptr<connection>;

/// "connection reset by peer": lower case, to stand inside a message.
std::string reason_of(const boost::system::error_code& ec);
/// Why TLS ended this connection, by the rules of config/tls.hpp.
std::string tls_reason(connection& c, const boost::system::error_code& ec);
bool is_tls_error(const boost::system::error_code& ec);
result<std::unique_ptr<boost::asio::ssl::context>> make_tls(const tls_files& files, tls_side side);

struct dial_failure {
  errc code = errc::unreachable;  // or unauthorised
  std::string cause;
  bool is_refused = false;     // the host is there, and nobody listens on the port
  bool is_other_name = false;  // a worker answered, of another name
};

/// Connects, shakes hands where tls is not null, and checks that the certificate is of a worker of
/// this name (empty: any). done comes once, but not after c was closed. Has no time limit.
void dial(boost::asio::io_context& io, const connection_ptr& c, const std::string& host,
          std::uint16_t port, boost::asio::ssl::context* tls, const std::string& name,
          std::function<void(std::optional<dial_failure>)> done);

}  // namespace stagecoach
