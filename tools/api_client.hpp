// The coordinator's API as the commands see it: JSON in, JSON out, errors with an exit code.
#pragma once

#include <nlohmann/json.hpp>

#include <chrono>
#include <string>

#include "config/result.hpp"
#include "tools/http_client.hpp"

namespace stagecoach {

/// Exit codes of the command line, stable (README lists them).
enum class exit_code : int {
  success = 0,
  failed = 1,  // job FAILED, or an unexpected error
  usage = 2,
  bad_spec = 3,
  unreachable = 4,
  not_found = 5,
  conflict = 6,
  unplaceable = 7,
  timed_out = 8,
  unauthorised = 9,
  cancelled = 10,
  interrupted = 130,
};
exit_code exit_code_of(errc code);

/// A call that succeeded has a JSON body; everything else is an error with the server's words.
class api_client {
 public:
  explicit api_client(http_server server) : server_(std::move(server)) {}
  const http_server& server() const { return server_; }
  std::string address() const;

  result<nlohmann::json> get(const std::string& path,
                             std::chrono::milliseconds within = std::chrono::seconds(30)) const;
  result<nlohmann::json> post(const std::string& path, const nlohmann::json& body,
                              nlohmann::json* problems = nullptr) const;
  /// Plain text (metrics, healthz); path without the /api/v1 prefix.
  result<std::string> text(const std::string& path) const;

 private:
  http_server server_;
};

}  // namespace stagecoach
