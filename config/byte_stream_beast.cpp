#include "config/byte_stream_beast.hpp"

#include <boost/asio/ssl/stream_base.hpp>
#include <boost/beast/ssl/ssl_stream.hpp>
#include <optional>

namespace stagecoach {

namespace asio = boost::asio;
namespace beast = boost::beast;
using boost::system::error_code;

struct byte_stream::parts {
  std::optional<beast::tcp_stream> plain;
  // Beast's and not Asio's: it joins small buffers into one TLS record.
  std::optional<beast::ssl_stream<beast::tcp_stream>> secure;
};

namespace {

struct drain_until_end : std::enable_shared_from_this<drain_until_end> {
  drain_until_end(beast::tcp_stream& s, io_completion d) : socket(s), done(std::move(d)) {}
  void run() {
    error_code ignored;
    socket.socket().shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
    read();
  }
  void read() {
    socket.async_read_some(asio::buffer(scrap),
                           [self = shared_from_this()](error_code ec, std::size_t) {
                             if (!ec) return self->read();
                             self->done(ec == asio::error::eof ? error_code() : ec);
                           });
  }
  beast::tcp_stream& socket;
  io_completion done;
  std::array<char, 16384> scrap;
};

}  // namespace

byte_stream::byte_stream(asio::ip::tcp::socket socket, asio::ssl::context* tls)
    : parts_(std::make_unique<parts>()) {
  if (tls != nullptr) {
    parts_->secure.emplace(beast::tcp_stream(std::move(socket)), *tls);
  } else {
    parts_->plain.emplace(std::move(socket));
  }
}
byte_stream::~byte_stream() = default;
byte_stream::byte_stream(byte_stream&&) noexcept = default;
byte_stream& byte_stream::operator=(byte_stream&&) noexcept = default;

beast::tcp_stream& byte_stream::next_layer() {
  return parts_->plain ? *parts_->plain : parts_->secure->next_layer();
}
const beast::tcp_stream& byte_stream::next_layer() const {
  return parts_->plain ? *parts_->plain : parts_->secure->next_layer();
}
bool byte_stream::is_secure() const { return parts_->secure.has_value(); }
SSL* byte_stream::native_tls() {
  return parts_->secure ? parts_->secure->native_handle() : nullptr;
}

void byte_stream::handshake(tls_side side, io_completion done) {
  parts_->secure->async_handshake(
      side == tls_side::server ? asio::ssl::stream_base::server : asio::ssl::stream_base::client,
      [done = std::move(done)](error_code ec) mutable { done(ec); });
}

void byte_stream::shutdown(io_completion done) {
  parts_->secure->async_shutdown([done = std::move(done)](error_code ec) mutable { done(ec); });
}

// Beast's own teardown (1.81) stops after the first 2 KiB of unread input; closing then resets the
// connection, and the reset overtakes the close frame that says why. So take what comes until the
// other side's end; the WebSocket's deadline closes the socket if that never comes.
void byte_stream::teardown(io_completion done) {
  auto drain = std::make_shared<drain_until_end>(next_layer(), std::move(done));
  if (!is_secure()) return drain->run();
  shutdown([drain](error_code) { drain->run(); });
}

void byte_stream::read_some(asio::mutable_buffer into, io_completion done) {
  auto relay = [done = std::move(done)](error_code ec, std::size_t bytes) mutable {
    done(ec, bytes);
  };
  if (parts_->plain) return parts_->plain->async_read_some(into, std::move(relay));
  parts_->secure->async_read_some(into, std::move(relay));
}

void byte_stream::write_some(const const_buffer_list& from, io_completion done) {
  auto relay = [done = std::move(done)](error_code ec, std::size_t bytes) mutable {
    done(ec, bytes);
  };
  if (parts_->plain) return parts_->plain->async_write_some(from, std::move(relay));
  parts_->secure->async_write_some(from, std::move(relay));
}

}  // namespace stagecoach
