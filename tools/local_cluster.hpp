// A coordinator and workers as child processes of this command, for train, up, prove, bench and
// tests.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "config/result.hpp"
#include "tools/api_client.hpp"
#include "tools/process.hpp"

namespace stagecoach {

class local_cluster {
 public:
  struct options {
    std::string folder;  // state in folder/state, logs in folder/logs; made if missing
    std::string listen = "127.0.0.1:0";
    int threads = 1;  // per worker
    std::string isa;
  };
  explicit local_cluster(options o) : options_(std::move(o)) {}
  ~local_cluster();  // stops what runs

  /// Starts the coordinator (again, after it was killed: on the same port) and waits until it
  /// answers.
  result<void> start_coordinator();
  /// Starts one more worker; returns its name ("w1", "w2", ...).
  result<std::string> start_worker(const std::vector<std::string>& extra_arguments = {});

  child_process& coordinator() { return coordinator_; }
  child_process& worker(const std::string& name) { return workers_.at(name); }
  /// Names of the workers whose process runs (frozen ones too).
  std::vector<std::string> workers();
  void forget_worker(const std::string& name) { workers_.erase(name); }
  /// Ends workers, then the coordinator, in an orderly way.
  void stop();

  api_client api() const;
  std::uint16_t port() const { return port_; }
  const options& settings() const { return options_; }
  std::string log_of(const std::string& name) const;

 private:
  options options_;
  std::uint16_t port_ = 0;
  int started_workers_ = 0;
  child_process coordinator_;
  std::map<std::string, child_process> workers_;
};

/// Waits until `condition` is true, asking every `period`; false after `within`.
bool wait_until(const std::function<bool()>& condition, std::chrono::milliseconds within,
                std::chrono::milliseconds period = std::chrono::milliseconds(50));

}  // namespace stagecoach
