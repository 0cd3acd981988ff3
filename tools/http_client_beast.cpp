// One blocking call on Boost.Beast: an io context of its own, run until the call is over.
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <optional>
#include <vector>

#include "config/byte_stream_beast.hpp"
#include "tools/http_client.hpp"

namespace stagecoach {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;
using tcp = asio::ip::tcp;

// A reply is ours or garbage; the longest true one is a metric series.
constexpr std::uint64_t reply_bytes_max = 64u << 20;

std::string place_of(const http_server& server) {
  return server.host.find(':') != std::string::npos && server.host.front() != '['
             ? fmt::format("[{}]:{}", server.host, server.port)
             : fmt::format("{}:{}", server.host, server.port);
}

class call {
 public:
  call(asio::io_context& io, asio::ssl::context* tls, const http_server& server)
      : server_(server), resolver_(io), deadline_(io), stream_(tcp::socket(io), tls) {}

  void run(http::request<http::string_body> request, std::chrono::milliseconds within) {
    request_ = std::move(request);
    parser_.body_limit(reply_bytes_max);
    if (request_.method() == http::verb::head) parser_.skip(true);
    deadline_.expires_after(within);
    deadline_.async_wait([this, within](error_code ec) {
      if (ec) return;
      end(make_error(errc::timed_out, "{} did not answer within {} ms", place_of(server_),
                     within.count()));
    });
    error_code ec;
    const auto address = asio::ip::make_address(server_.host, ec);
    if (!ec) return connect({tcp::endpoint(address, server_.port)});
    resolver_.async_resolve(server_.host, std::to_string(server_.port),
                            [this](error_code failed, const tcp::resolver::results_type& found) {
                              if (failed)
                                return end(make_error(errc::unreachable, "unknown host {}: {}",
                                                      server_.host, failed.message()));
                              std::vector<tcp::endpoint> endpoints;
                              for (const auto& entry : found) endpoints.push_back(entry.endpoint());
                              connect(std::move(endpoints));
                            });
  }

  std::optional<result<http_reply>> outcome;

 private:
  beast::tcp_stream& socket() { return stream_.next_layer(); }

  void end(result<http_reply> with) {
    if (outcome) return;
    outcome.emplace(std::move(with));
    deadline_.cancel();
    resolver_.cancel();
    socket().close();
  }

  void fail(error_code ec, const char* during) {
    if (outcome) return;
    if (ec.category() == asio::error::get_ssl_category()) {
      return end(make_error(errc::unauthorised, "TLS with {}: {}", place_of(server_),
                            tls_failure(stream_.native_tls(), ec.message())));
    }
    if (ec == asio::error::connection_refused)
      return end(make_error(errc::unreachable,
                            "nobody listens at {} (connection refused). fix: start the coordinator "
                            "there, or check the address",
                            place_of(server_)));
    if (ec == http::error::body_limit)
      return end(make_error(errc::too_large, "reply of {} is over {} bytes", place_of(server_),
                            reply_bytes_max));
    if (ec.category() == make_error_code(http::error::bad_version).category() &&
        ec != http::error::end_of_stream && ec != http::error::partial_message)
      return end(make_error(errc::bad_input, "{} does not speak HTTP: {}", place_of(server_),
                            ec.message()));
    if (ec == http::error::end_of_stream || ec == http::error::partial_message ||
        ec == asio::error::eof || ec == asio::ssl::error::stream_truncated)
      return end(make_error(
          errc::unreachable, "{} closed the connection while {}{}", place_of(server_), during,
          server_.tls.empty() ? "; if it has certificates, give them here too" : ""));
    end(make_error(errc::unreachable, "{} while {}: {}", place_of(server_), during, ec.message()));
  }

  void connect(std::vector<tcp::endpoint> endpoints) {
    if (outcome) return;
    endpoints_ = std::move(endpoints);
    socket().async_connect(endpoints_, [this](error_code ec, const tcp::endpoint&) {
      if (ec) return fail(ec, "connecting");
      error_code ignored;
      socket().socket().set_option(tcp::no_delay(true), ignored);
      if (!stream_.is_secure()) return write();
      error_code is_name;
      asio::ip::make_address(server_.host, is_name);
      if (is_name) SSL_set_tlsext_host_name(stream_.native_tls(), server_.host.c_str());
      stream_.handshake(tls_side::client, [this](error_code refused) {
        if (refused) return fail(refused, "agreeing on TLS");
        check_server();
      });
    });
  }

  void check_server() {
    const peer_identity who = peer_of(stream_.native_tls());
    if (who.what != tls_role::coordinator)
      return end(
          make_error(errc::unauthorised,
                     "certificate \"{}\" at {} has role \"{}\", expected coordinator. fix: check "
                     "the address",
                     who.name, place_of(server_), to_string(who.what)));
    if (!peer_has_host(stream_.native_tls(), server_.host))
      return end(make_error(errc::unauthorised,
                            "certificate \"{}\" is not for host {}. fix: make the coordinator's "
                            "certificate with that host among its names",
                            who.name, server_.host));
    write();
  }

  void write() {
    if (outcome) return;
    http::async_write(stream_, request_, [this](error_code, std::size_t) {
      // A server that refuses a long body answers before it has read it: look for the answer even
      // when the writing failed.
      http::async_read(stream_, buffer_, parser_, [this](error_code ec, std::size_t) {
        if (ec) return fail(ec, "it was asked");
        auto message = parser_.release();
        http_reply reply;
        reply.status = static_cast<int>(message.result_int());
        reply.content_type = std::string(message[http::field::content_type]);
        reply.body = std::move(message.body());
        end(std::move(reply));
      });
    });
  }

  const http_server& server_;
  tcp::resolver resolver_;
  asio::steady_timer deadline_;
  byte_stream stream_;
  std::vector<tcp::endpoint> endpoints_;
  http::request<http::string_body> request_;
  beast::flat_buffer buffer_;
  http::response_parser<http::string_body> parser_;
};

}  // namespace

result<http_reply> http_call(const http_server& server, const std::string& method,
                             const std::string& target, const std::string& body,
                             std::chrono::milliseconds within) {
  const http::verb verb = http::string_to_verb(method);
  if (verb == http::verb::unknown) return make_error(errc::usage, "no HTTP method \"{}\"", method);
  if (target.empty() || target.front() != '/' ||
      target.find_first_of(" \r\n\t") != std::string::npos)
    return make_error(errc::usage, "no HTTP target: \"{}\"; expected a path with escapes", target);
  std::optional<asio::ssl::context> tls;
  if (!server.tls.empty()) {
    auto made = make_tls_context(server.tls, tls_side::client);
    if (!made) return made.err();
    tls.emplace(*made);
  }
  http::request<http::string_body> request{verb, target, 11};
  request.set(http::field::host, place_of(server));
  request.set(http::field::user_agent, "stagecoach");
  request.set(http::field::accept, "application/json");
  request.keep_alive(false);
  if (verb != http::verb::get && verb != http::verb::head)
    request.set(http::field::content_type, "application/json");
  if (!server.token.empty() && tls)
    request.set(http::field::authorization, "Bearer " + server.token);
  request.body() = body;
  request.prepare_payload();

  asio::io_context io{1};
  call one(io, tls ? &*tls : nullptr, server);
  one.run(std::move(request), within);
  io.run();
  if (!one.outcome)
    return make_error(errc::unexpected, "call to {} ended without a result", place_of(server));
  return std::move(*one.outcome);
}

std::string percent_encode(const std::string& text) {
  static constexpr char digits[] = "0123456789ABCDEF";
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       c == '-' || c == '_' || c == '.' || c == '~';
    if (plain) {
      out.push_back(c);
    } else {
      out.push_back('%');
      out.push_back(digits[byte >> 4]);
      out.push_back(digits[byte & 15]);
    }
  }
  return out;
}

}  // namespace stagecoach
