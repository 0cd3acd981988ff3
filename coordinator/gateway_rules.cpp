#include "coordinator/gateway_rules.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace stagecoach {
namespace {

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::optional<std::string> percent_decode(std::string_view text, bool plus_is_space) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (c == '%') {
      if (i + 2 >= text.size()) return std::nullopt;
      const int high = hex_digit(text[i + 1]);
      const int low = hex_digit(text[i + 2]);
      if (high < 0 || low < 0) return std::nullopt;
      c = static_cast<char>(high * 16 + low);
      i += 2;
    } else if (c == '+' && plus_is_space) {
      c = ' ';
    }
    // Control characters have no business in names, and would forge lines in a log.
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) return std::nullopt;
    out.push_back(c);
  }
  return out;
}

bool is_one_of(std::string_view text, std::initializer_list<std::string_view> list) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

// Takes as long for a wrong token as for a right one of the same length, so that its bytes can't be
// found one by one by timing.
bool equal_secret(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  return difference == 0;
}

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

bool is_same_or_loopback_origin(const port_rules& rules, const request_head& head) {
  const std::string origin = lower(head.origin);
  const std::string scheme = rules.is_tls ? "https://" : "http://";
  // The page that the coordinator itself served.
  if (!head.host.empty() && origin == scheme + lower(head.host)) {
    return rules.is_tls || !rules.is_loopback || is_loopback_host(host_name_of(head.host));
  }
  if (rules.is_tls || !rules.is_loopback) return false;
  for (const std::string_view start : {"http://", "https://"}) {
    if (origin.rfind(start, 0) == 0)
      return is_loopback_host(host_name_of(origin.substr(start.size())));
  }
  return false;
}

}  // namespace

std::string http_request::query_or(const std::string& key, const std::string& fallback) const {
  const auto found = query.find(key);
  return found == query.end() ? fallback : found->second;
}

http_response error_response(int status, const std::string& code, const std::string& message) {
  http_response response;
  response.status = status;
  const nlohmann::json body = {{"error", {{"code", code}, {"message", message}}}};
  // replace: a message may quote bytes from outside that are no UTF-8.
  response.body = body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  return response;
}

std::string refusal_text(const http_response& response) {
  const auto body = nlohmann::json::parse(response.body, nullptr, false);
  if (!body.is_object() || !body.contains("error") || !body["error"].is_object()) return {};
  return body["error"].value("message", std::string()).substr(0, 400);
}

std::optional<parsed_target> parse_target(std::string_view target) {
  if (target.empty() || target.front() != '/') return std::nullopt;
  target = target.substr(0, target.find('#'));
  const std::size_t mark = target.find('?');
  parsed_target parsed;
  auto path = percent_decode(target.substr(0, mark), false);
  if (!path) return std::nullopt;
  parsed.path = std::move(*path);
  if (mark == std::string_view::npos) return parsed;
  std::string_view rest = target.substr(mark + 1);
  while (!rest.empty()) {
    const std::string_view pair = rest.substr(0, rest.find('&'));
    rest.remove_prefix(std::min(rest.size(), pair.size() + 1));
    if (pair.empty()) continue;
    const std::size_t equals = pair.find('=');
    auto key = percent_decode(pair.substr(0, equals), true);
    auto text = equals == std::string_view::npos ? std::optional<std::string>(std::string())
                                                 : percent_decode(pair.substr(equals + 1), true);
    if (!key || !text) return std::nullopt;
    parsed.query[std::move(*key)] = std::move(*text);
  }
  return parsed;
}

std::string host_name_of(std::string_view host_header) {
  std::string_view name, port;
  if (!host_header.empty() && host_header.front() == '[') {
    const std::size_t end = host_header.find(']');
    if (end == std::string_view::npos) return {};
    name = host_header.substr(1, end - 1);
    port = host_header.substr(end + 1);
  } else {
    name = host_header.substr(0, host_header.find(':'));
    port = host_header.substr(name.size());
  }
  if (!port.empty()) {
    if (port.front() != ':') return {};
    port.remove_prefix(1);
    if (!std::all_of(port.begin(), port.end(), [](char c) { return c >= '0' && c <= '9'; }))
      return {};
  }
  return std::string(name);
}

std::optional<http_response> refuse(const port_rules& rules, const request_head& head,
                                    std::string_view path, gateway_peer& peer) {
  const bool reads = is_one_of(head.method, {"GET", "HEAD"});
  const bool writes = is_one_of(head.method, {"POST", "PUT", "PATCH", "DELETE"});
  if (!reads && !writes) {
    auto response = error_response(405, "usage",
                                   "method " + head.method +
                                       " is not served; expected GET, HEAD, "
                                       "POST, PUT, PATCH or DELETE");
    response.headers.emplace_back("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE");
    return response;
  }
  // A name that an attacker's DNS points at 127.0.0.1 would make a web page of his same-origin with
  // us.
  if (!rules.is_tls && rules.is_loopback && !is_loopback_host(host_name_of(head.host))) {
    return error_response(
        421, "unauthorised",
        "Host header \"" + head.host +
            "\" is no loopback name; without TLS this "
            "port answers to 127.0.0.1, localhost and [::1] only. fix: use one of them, "
            "or give the coordinator certificates");
  }
  if (!head.origin.empty()) {
    if (head.is_upgrade)
      return error_response(
          403, "unauthorised",
          "the control channel is for workers, not for web pages (Origin \"" + head.origin + "\")");
    if (!is_same_or_loopback_origin(rules, head))
      return error_response(403, "unauthorised",
                            "Origin \"" + head.origin + "\" may not use this port");
  }
  if (rules.is_tls) {
    const bool is_control = path == control_path;
    if (peer.what == tls_role::none) {
      constexpr std::string_view scheme = "bearer ";
      const bool shows_token = head.authorization.size() > scheme.size() &&
                               lower(head.authorization.substr(0, scheme.size())) == scheme;
      peer.has_token =
          shows_token && !rules.token.empty() &&
          equal_secret(std::string_view(head.authorization).substr(scheme.size()), rules.token);
      if (!peer.has_token) {
        std::string found = "no certificate shown";
        if (!peer.name.empty()) found = "certificate \"" + peer.name + "\" has no role we know";
        if (shows_token) found = "wrong bearer token";
        auto response = error_response(
            401, "unauthorised",
            found +
                "; expected a certificate of this cluster's CA or the bearer token. fix: "
                "--tls-ca, --tls-cert and --tls-key, see `stagecoach certs`");
        response.headers.emplace_back("WWW-Authenticate", "Bearer");
        return response;
      }
    }
    const std::string who =
        peer.has_token ? "the bearer token"
                       : "certificate \"" + peer.name + "\" (role " + to_string(peer.what) + ")";
    if (peer.what == tls_role::coordinator)
      return error_response(403, "unauthorised",
                            who + " is a server's; use an operator's or a worker's");
    if (peer.what == tls_role::worker && !is_control)
      return error_response(403, "unauthorised",
                            who + " may only open /control; the API needs role operator or reader");
    // Who may change jobs may not pose as a machine: it would be sent weights, and its hashes
    // taken.
    if (peer.what == tls_role::operator_ && is_control)
      return error_response(403, "unauthorised",
                            who + " may not open /control; this needs role worker");
    if ((peer.what == tls_role::reader || peer.has_token) && (writes || is_control))
      return error_response(
          403, "unauthorised",
          who + " may only read; this needs role " + (is_control ? "worker" : "operator"));
  }
  // A page can make a browser send forms and text across origins, JSON only after we agreed
  // (preflight).
  if (writes && head.content_type != "application/json")
    return error_response(415, "usage",
                          "Content-Type is \"" + head.content_type +
                              "\", expected application/json "
                              "for " +
                              head.method + ". fix: -H 'Content-Type: application/json'");
  return std::nullopt;
}

}  // namespace stagecoach
