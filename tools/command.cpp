#include "tools/command.hpp"

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "config/tls.hpp"

namespace stagecoach {
namespace {
std::atomic<bool> interrupted{false};
void on_signal(int) { interrupted.store(true); }
}  // namespace

result<host_port> parse_host_port(const std::string& text, std::uint16_t default_port) {
  host_port out;
  std::string port_text;
  if (!text.empty() && text.front() == '[') {
    const auto end = text.find(']');
    if (end == std::string::npos)
      return make_error(errc::usage, "\"{}\" is not HOST:PORT. fix: [::1]:7070", text);
    out.host = text.substr(1, end - 1);
    if (end + 1 < text.size() && text[end + 1] == ':') port_text = text.substr(end + 2);
  } else {
    const auto colon = text.rfind(':');
    out.host = text.substr(0, colon);
    if (colon != std::string::npos) port_text = text.substr(colon + 1);
  }
  if (out.host.empty()) out.host = "127.0.0.1";
  if (port_text.empty()) {
    out.port = default_port;
    return out;
  }
  char* end = nullptr;
  const unsigned long port = std::strtoul(port_text.c_str(), &end, 10);
  if (*end != 0 || port > 65535)
    return make_error(errc::usage, "\"{}\": {} is no port. fix: HOST:PORT, as 127.0.0.1:7070", text,
                      port_text);
  out.port = static_cast<std::uint16_t>(port);
  return out;
}

result<api_client> global_flags::client() const {
  std::string where = coordinator;
  if (where.empty())
    if (const char* set = std::getenv("STAGECOACH_COORDINATOR")) where = set;
  auto parsed = parse_host_port(where, 7070);
  if (!parsed) return parsed.err();
  http_server server;
  server.host = parsed->host;
  server.port = parsed->port;
  server.tls = tls();
  server.token = token;
  return api_client(std::move(server));
}

exit_code complain(const global_flags& flags, const error& e) {
  if (flags.is_json()) {
    nlohmann::json out = {{"error", {{"code", to_string(e.code)}, {"message", e.message}}}};
    std::printf("%s\n", out.dump(2).c_str());
  } else {
    std::fprintf(stderr, "error: %s\n", e.message.c_str());
  }
  return exit_code_of(e.code);
}

exit_code complain(const global_flags& flags, const std::string& formatted,
                   const nlohmann::json& problems) {
  if (flags.is_json()) {
    nlohmann::json out = {
        {"error", {{"code", "bad_spec"}, {"message", "the job file has problems"}}},
        {"problems", problems}};
    std::printf("%s\n", out.dump(2).c_str());
  } else {
    std::fputs(formatted.c_str(), stderr);
  }
  return exit_code::bad_spec;
}

bool is_terminal(int descriptor) { return isatty(descriptor) == 1; }

bool wants_color(const global_flags& flags, int descriptor) {
  if (flags.color == "always") return true;
  if (flags.color == "never") return false;
  const char* no_color = std::getenv("NO_COLOR");
  if (no_color != nullptr && *no_color != 0) return false;
  const char* term = std::getenv("TERM");
  if (term != nullptr && std::string(term) == "dumb") return false;
  return is_terminal(descriptor);
}

void watch_interrupts() {
  struct sigaction action {};
  action.sa_handler = on_signal;  // no SA_RESTART: a sleep ends at once
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}
bool is_interrupted() { return interrupted.load(); }
void clear_interrupt() { interrupted.store(false); }

}  // namespace stagecoach
