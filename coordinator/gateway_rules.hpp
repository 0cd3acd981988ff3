// Who may ask what on the coordinator's port: pure functions over a request's head.
//
// Decides from the rules of DESIGN 10 alone; knows no socket, no Beast and no handler, so that
// every rule is tested without a network.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "coordinator/gateway.hpp"

namespace stagecoach {

struct port_rules {
  bool is_tls = false;
  bool is_loopback = true;  // the bound address
  std::string token;
};

struct request_head {
  std::string method, target, host, origin, content_type, authorization;
  bool is_upgrade = false;  // asks to become a WebSocket
};

struct parsed_target {
  std::string path;
  std::map<std::string, std::string> query;
};

/// Splits and percent-decodes an origin-form target ("/a/b?x=1&y=%20"; '+' is a space in the
/// query). Nothing for one that does not begin with '/', has a broken escape, or holds control
/// characters.
std::optional<parsed_target> parse_target(std::string_view target);

/// Host without its port: "[::1]:7070" is "::1", "localhost:1" is "localhost". Empty if it is
/// malformed.
std::string host_name_of(std::string_view host_header);

/// The refusal this request earns, or nothing. Sets peer.has_token when the bearer token is right.
std::optional<http_response> refuse(const port_rules& rules, const request_head& head,
                                    std::string_view path, gateway_peer& peer);

/// The words of an error_response, for the log; empty for another body.
std::string refusal_text(const http_response& response);

/// The path that a control channel upgrades on.
inline constexpr std::string_view control_path = "/control";

}  // namespace stagecoach
