// One blocking HTTP/JSON call to the coordinator: connect, ask, read, close.
//
// Every call has one deadline for everything and a bound on what it reads. Mapping statuses to exit
// codes is the command line's business.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "config/result.hpp"
#include "config/tls.hpp"

namespace stagecoach {

struct http_server {
  std::string host = "127.0.0.1";
  std::uint16_t port = 7070;
  tls_files tls{};      // empty: plain; with only `ca`: TLS without a certificate of our own
  std::string token{};  // sent as bearer token; only over TLS
};

struct http_reply {
  int status = 0;
  std::string content_type;
  std::string body;  // at most 64 MiB
};

/// One call; target is "/api/v1/jobs?since=3" (the caller percent-encodes); a body is sent as
/// application/json. Any HTTP status is a reply, not an error.
/// Fails: unreachable (refused, unknown host, reset), timed_out, unauthorised (the TLS handshake:
/// whose certificate was not taken and why), bad_input (no HTTP), too_large, not_found (TLS files).
result<http_reply> http_call(const http_server& server, const std::string& method,
                             const std::string& target, const std::string& body = {},
                             std::chrono::milliseconds within = std::chrono::seconds(30));

/// Percent-encodes one path segment or query value.
std::string percent_encode(const std::string& text);

}  // namespace stagecoach
