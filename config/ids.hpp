// Ids of the house: a worker_id never becomes a job_id.
#pragma once

#include <cstdint>
#include <string>

namespace stagecoach {

enum class job_id : std::uint64_t {};     // j-000012 on screen; 0 is "none"
enum class worker_id : std::uint64_t {};  // given by the coordinator at registration; 0 is "none"

/// Random per start of a worker process, so that a restarted worker is never taken for its former
/// self.
using process_id = std::string;  // 32 hex digits

/// Membership epoch of a job; only grows. Every message carries it with the plan's hash.
struct generation_id {
  std::uint64_t number = 0;
  std::uint64_t plan_hash = 0;
  bool operator==(const generation_id&) const = default;
};

inline std::uint64_t value(job_id id) { return static_cast<std::uint64_t>(id); }
inline std::uint64_t value(worker_id id) { return static_cast<std::uint64_t>(id); }

}  // namespace stagecoach
