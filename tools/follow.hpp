// Watching one job through the API: progress line with ETA on a terminal, plain lines on a pipe.
#pragma once

#include <string>

#include "tools/command.hpp"

namespace stagecoach {

struct follow_outcome {
  exit_code code = exit_code::success;
  nlohmann::json job;  // last answer of GET /jobs/JOB
};

/// Prints progress until the job ends, Ctrl-C (130: the job keeps running), or the coordinator
/// stays away for `patience` (then exit 4). log_every: steps between plain lines.
follow_outcome follow_job(const global_flags& flags, const api_client& api, const std::string& job,
                          std::int64_t log_every,
                          std::chrono::milliseconds patience = std::chrono::seconds(60));

/// "1h02m", "3m10s", "4.2s"
std::string format_duration(double seconds);
/// "1.16M", "212k", "97"
std::string format_count(double value);
std::string format_bytes(double bytes);
/// exit code of a job's end state
exit_code exit_code_of_state(const std::string& state);
bool is_end_state(const std::string& state);

}  // namespace stagecoach
