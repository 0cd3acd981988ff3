// Schedules as tables of instructions, one list per stage, and the checker that proves a table.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "config/result.hpp"

namespace stagecoach {

enum class op : std::uint8_t {
  receive_activation,  // from stage-1, microbatch
  forward,
  send_activation,   // to stage+1
  receive_gradient,  // from stage+1
  backward_input,
  send_gradient,  // to stage-1
  backward_weight,
  reduce,  // leaf blocks of all parameters among the replicas of this stage
  step,    // vote and apply
};

struct instruction {
  op what;
  int microbatch = 0;  // index within this replica's share of the step, from 0
  bool operator==(const instruction&) const = default;
};

/// One list per stage. backward_weight of a stage is in microbatch order in every schedule.
using schedule_table = std::vector<std::vector<instruction>>;

/// schedule: "gpipe" or "1f1b".  microbatch_count: of this replica.
result<schedule_table> make_schedule(const std::string& schedule, int stage_count,
                                     int microbatch_count);

struct schedule_facts {
  std::vector<int> live_microbatches_max;  // per stage: activations kept at once
  double makespan = 0;                     // in units of the given times
  double bubble = 0;                       // idle share of the busiest stage
};

/// Replays the table: proves it free of deadlock, complete (each microbatch once through F, B, W on
/// each stage, sends matched by receives in order), input and weight gradients in microbatch order,
/// and counts live activations (from arrival, or forward, to backward_weight). Sends never block.
/// times: per stage seconds of {forward, backward_input, backward_weight}; link: seconds. Fails:
/// bad_spec, naming stage and instruction.
struct stage_times {
  double forward = 1, backward_input = 1, backward_weight = 1;
};
result<schedule_facts> check_schedule(const schedule_table& table, int microbatch_count,
                                      const std::vector<stage_times>& times = {},
                                      double link_seconds = 0);

std::string to_string(op what);

}  // namespace stagecoach
