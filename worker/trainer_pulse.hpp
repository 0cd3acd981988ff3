// Where the trainer's thread is, as beats tell it: a thread that stands still must be told from one
// that waits for another worker.
#pragma once

#include <cstdint>

#include "coordinator/messages.hpp"

namespace stagecoach {

struct trainer_pulse {
  std::uint64_t op = 0;  // instructions and frames done since the process started
  trainer_activity activity = trainer_activity::idle;
  std::uint64_t waits_for = 0;  // worker_id, while activity is wait
  bool operator==(const trainer_pulse&) const = default;
};

}  // namespace stagecoach
