// Where a command asks about jobs: the coordinator that runs, or a state folder that none holds.
//
// A run of `train` or `prove` leaves its store behind without a coordinator. For such a folder one
// is started as a child on a free loopback port, and ended with this object.
#pragma once

#include <string>

#include "tools/api_client.hpp"
#include "tools/command.hpp"
#include "tools/process.hpp"

namespace stagecoach {

class state_api {
 public:
  /// state empty: the coordinator that the global flags name. Else the folder of `coordinator
  /// --state`, or of `train --state`, `up --state`, `prove --state`.
  /// Fails: usage, not_found (no store there), conflict (another coordinator holds it), unexpected.
  static result<state_api> open(const global_flags& flags, const std::string& state);

  const api_client& api() const { return api_; }

 private:
  explicit state_api(api_client api) : api_(std::move(api)) {}
  api_client api_;
  child_process coordinator_;
};

}  // namespace stagecoach
