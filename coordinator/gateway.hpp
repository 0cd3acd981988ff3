// The coordinator's one port: HTTP/JSON for people, a WebSocket per worker at /control.
//
// Bounds, checks and authenticates everything before a callback sees it: sizes, deadlines, host and
// origin rules without TLS, certificate, role and bearer token with it. Knows no job and no
// message: a request is handed to `on_request`, a text frame to `on_message`.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "config/limits.hpp"
#include "config/result.hpp"
#include "config/tls.hpp"

namespace stagecoach {

/// Who sent a request or opened a control channel.
struct gateway_peer {
  std::string address;  // "127.0.0.1:51234"
  bool is_tls = false;
  std::string name;                // CN of its certificate; empty without one
  tls_role what = tls_role::none;  // role of its certificate; none without one
  bool has_token = false;          // showed the read-only bearer token, over TLS
};

struct http_request {
  std::string method;  // "GET", "POST", ...
  std::string path;    // percent-decoded, without the query: "/api/v1/jobs/j-000001"
  std::map<std::string, std::string> query;  // percent-decoded; of a repeated key the last one
  std::string content_type;                  // lower case, without parameters
  std::string accept;
  std::string body{};  // at most limits::http_body_bytes_max
  gateway_peer peer;
  /// The query's value for key, or fallback.
  std::string query_or(const std::string& key, const std::string& fallback = {}) const;
};

struct http_response {
  int status = 200;
  std::string content_type = "application/json";
  std::string body{};
  std::vector<std::pair<std::string, std::string>> headers{};  // extra ones
};

/// Call once, from any thread, now or later; calling it after the client left is harmless. When it
/// is dropped uncalled, the client gets a 500.
using http_reply_function = std::function<void(http_response)>;

/// Never reused in the life of a gateway; 0 is "none".
enum class connection_id : std::uint64_t {};
inline std::uint64_t value(connection_id id) { return static_cast<std::uint64_t>(id); }

/// {"error": {"code": ..., "message": ...}}: the body of every refusal that the gateway itself
/// sends.
http_response error_response(int status, const std::string& code, const std::string& message);

class gateway {
 public:
  /// All called on the gateway's io thread: they must not block and may call any method but stop().
  struct callbacks {
    std::function<void(http_request, http_reply_function)> on_request;
    std::function<void(connection_id, const gateway_peer&)> on_open;  // a control channel stands
    std::function<void(connection_id, std::string)> on_message;       // one text frame, in order
    std::function<void(connection_id, const std::string&)> on_close;  // once per on_open; why
  };

  struct options {
    std::string host = "127.0.0.1";
    std::uint16_t port = 0;  // 0: any free one
    tls_files tls{};         // empty: plain, loopback only
    std::string token{};     // read-only bearer token; only over TLS; empty: none
    bool insecure = false;   // allows a plain port on other than loopback
    // Bounds; the defaults are the house's, tests set smaller ones.
    std::size_t header_bytes_max = limits::http_header_bytes_max;
    std::size_t body_bytes_max = limits::http_body_bytes_max;
    std::size_t message_bytes_max = limits::control_message_bytes_max;
    std::size_t queue_bytes_max = std::size_t{64} << 20;  // a control peer further behind is closed
    std::size_t connection_count_max = 1024;
    std::chrono::milliseconds request_within{
        10'000};                                      // handshake, and a whole request (slow loris)
    std::chrono::milliseconds reply_within{120'000};  // a handler's answer; then 504
    std::chrono::milliseconds write_within{30'000};   // a client that does not read its answer
    std::chrono::milliseconds keep_alive{60'000};     // between requests on one connection
    std::chrono::milliseconds control_idle{10'000};   // no frame and no pong: closed; pings at half
  };

  /// Binds, listens and starts the io thread; callbacks may come before this has returned.
  /// Fails: usage (a host wider than loopback without TLS and without insecure; a token without
  /// TLS), bad_input and not_found (TLS files), conflict (port in use), io (host can't be bound).
  static result<std::unique_ptr<gateway>> start(const options& o, callbacks c);
  virtual ~gateway() = default;  // as stop()

  virtual std::uint16_t port() const = 0;

  /// Queues one text frame; false if the connection is gone or was closed for being too far behind.
  virtual bool send(connection_id connection, std::string text) = 0;
  /// Sends what is queued, then the close frame. Code 1000 normal, 1008 policy, 1002 protocol, ...
  virtual void close(connection_id connection, std::uint16_t code, const std::string& reason) = 0;
  /// Closes everything and joins the io thread; no callback runs after it. Not from a callback.
  virtual void stop() = 0;

  virtual std::uint64_t refused_handshakes() const = 0;
  virtual std::size_t connection_count() const = 0;
};

}  // namespace stagecoach
