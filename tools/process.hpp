// Child processes of the commands that run a whole cluster on this machine (train, up, prove,
// bench).
//
// A child dies with its parent (PR_SET_PDEATHSIG), so a killed command leaves nothing behind.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "config/result.hpp"

namespace stagecoach {

class child_process {
 public:
  /// Starts program with arguments; output: file that stdout and stderr are appended to (empty:
  /// inherited).
  static result<child_process> start(const std::string& program,
                                     const std::vector<std::string>& arguments,
                                     const std::string& output);
  child_process() = default;
  child_process(child_process&& other) noexcept { *this = std::move(other); }
  child_process& operator=(child_process&& other) noexcept;
  ~child_process();  // SIGKILL and reap, if it still runs

  pid_t pid() const { return pid_; }
  bool is_running();
  void signal(int number) const;
  /// Exit code (128 + signal if killed); empty if it still runs after `within`.
  std::optional<int> wait(std::chrono::milliseconds within);
  /// SIGTERM, a grace time, then SIGKILL.
  void terminate(std::chrono::milliseconds grace = std::chrono::seconds(5));

 private:
  pid_t pid_ = 0;
  std::optional<int> status_;
};

/// Path of the running program, to start itself again.
std::string own_program();

}  // namespace stagecoach
