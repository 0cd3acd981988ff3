#include "worker/connection_asio.hpp"

#include <fcntl.h>

#include <boost/asio/connect.hpp>
#include <cctype>
#include <utility>

namespace stagecoach {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

void connection::tune() {
  error_code ignored;
  socket.set_option(tcp::no_delay(true), ignored);
  // SO_SNDBUF and SO_RCVBUF are left alone on purpose: setting them turns off the kernel's own
  // sizing, which grows to tcp_rmem's maximum (6 MiB and more), while a set value stops at rmem_max
  // (208 KiB on a stock Debian).
  ::fcntl(socket.native_handle(), F_SETFD, FD_CLOEXEC);
  const auto end = socket.remote_endpoint(ignored);
  if (!ignored) far = fmt::format("{}:{}", end.address().to_string(), end.port());
}

std::string reason_of(const error_code& ec) {
  if (ec == asio::error::eof || ec == asio::ssl::error::stream_truncated)
    return "connection closed by the peer";
  std::string text = ec.message();
  if (!text.empty()) text[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(text[0])));
  return text;
}

std::string tls_reason(connection& c, const error_code& ec) {
  return "TLS: " + tls_failure(c.tls->native_handle(), reason_of(ec));
}

bool is_tls_error(const error_code& ec) { return ec.category() == asio::error::get_ssl_category(); }

result<std::unique_ptr<asio::ssl::context>> make_tls(const tls_files& files, tls_side side) {
  auto made = make_tls_context(files, side);
  if (!made) return made.err();
  return std::make_unique<asio::ssl::context>(*made);  // takes ownership
}

namespace {

/// One call of dial().
struct attempt : std::enable_shared_from_this<attempt> {
  connection_ptr c;
  asio::ssl::context* tls = nullptr;
  std::string name;
  std::function<void(std::optional<dial_failure>)> done;

  void fail(const error_code& ec) {
    done(dial_failure{errc::unreachable, reason_of(ec), ec == asio::error::connection_refused,
                      false});
  }

  void connected(error_code ec) {
    if (c->closed) return;
    if (ec) return fail(ec);
    // A connect to a free port of the ephemeral range can meet itself when the kernel picks that
    // very port as its source; it would then hold the port that the peer wants to listen on.
    error_code ignored;
    if (c->socket.local_endpoint(ignored) == c->socket.remote_endpoint(ignored))
      return fail(asio::error::connection_refused);
    c->tune();
    if (tls == nullptr) return done(std::nullopt);
    c->tls.emplace(c->socket, *tls);
    c->tls->async_handshake(asio::ssl::stream_base::client,
                            [self = shared_from_this()](error_code ec) { self->shaken(ec); });
  }

  void shaken(error_code ec) {
    if (c->closed) return;
    if (ec)
      return done(dial_failure{is_tls_error(ec) ? errc::unauthorised : errc::unreachable,
                               tls_reason(*c, ec), false, false});
    const peer_identity who = peer_of(c->tls->native_handle());
    const bool is_worker = who.what == tls_role::worker;
    if (is_worker && (name.empty() || who.name == name)) return done(std::nullopt);
    done(dial_failure{errc::unauthorised,
                      fmt::format("its certificate is of '{}' with role '{}'; expected '{}' with "
                                  "role 'worker'",
                                  who.name, to_string(who.what), name),
                      false, is_worker});
  }
};

}  // namespace

void dial(asio::io_context& io, const connection_ptr& c, const std::string& host,
          std::uint16_t port, asio::ssl::context* tls, const std::string& name,
          std::function<void(std::optional<dial_failure>)> done) {
  auto self = std::make_shared<attempt>();
  self->c = c;
  self->tls = tls;
  self->name = name;
  self->done = std::move(done);
  error_code ec;
  const auto address = asio::ip::make_address(host, ec);
  if (!ec) {
    c->socket.async_connect(tcp::endpoint(address, port),
                            [self](error_code ec) { self->connected(ec); });
    return;
  }
  auto resolver = std::make_shared<tcp::resolver>(io);
  resolver->async_resolve(
      host, std::to_string(port),
      [self, resolver](error_code ec, const tcp::resolver::results_type& found) {
        if (self->c->closed) return;
        if (ec) return self->fail(ec);
        asio::async_connect(self->c->socket, found,
                            [self](error_code ec, const auto&) { self->connected(ec); });
      });
}

}  // namespace stagecoach
