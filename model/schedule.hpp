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

/// What one stage of the (warm-up depth, weight delay) family does: `warm_up` forwards first, then
/// again and again an input gradient, the weight gradient of `delay` microbatches before, a
/// forward; the weight gradients that are left come at the end. At most warm_up + delay
/// microbatches are alive. On stage s of p, 1F1B is (p - s, 0) and ZB-H1 (p - s, s): Qi et al.
/// 2023, arXiv:2401.10241.
struct stage_rhythm {
  int warm_up = 1, delay = 0;
  bool operator==(const stage_rhythm&) const = default;
};

/// A schedule's name, in job files and plans: "gpipe"; "1f1b"; "zb-h1"; or a member of the family,
/// stage by stage, "zb:4.0,3.1,2.2,1.3" (warm-up, point, delay). Fails: bad_spec (the words are not
/// one of these, or name another number of stages).
result<void> check_schedule_name(const std::string& schedule, int stage_count);
/// The name of what search_schedule found.
std::string schedule_name(const std::vector<stage_rhythm>& stages);

/// schedule: a name as above.  microbatch_count: of this replica.
result<schedule_table> make_schedule(const std::string& schedule, int stage_count,
                                     int microbatch_count);

/// Microbatches whose activations a stage keeps at once, as check_schedule counts them. The name
/// must be a valid one.
int live_microbatches(const std::string& schedule, int stage_count, int stage,
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

/// The same with a time for every instruction of the table, as measured; what is no computation
/// counts as its time says.
result<schedule_facts> replay_schedule(const schedule_table& table, int microbatch_count,
                                       const std::vector<std::vector<double>>& seconds,
                                       double link_seconds = 0);

/// The schedule of the family that ends first on these times, where stage s may keep live_max[s]
/// microbatches (at least one); of two that end together the one that keeps less. Measured times
/// make it worth while; for equal ones it finds ZB-H1 or better. Pure, some 10 to 100 ms. Fails:
/// bad_spec (sizes).
struct found_schedule {
  std::string name;
  schedule_facts facts;
};
result<found_schedule> search_schedule(int microbatch_count, const std::vector<stage_times>& times,
                                       double link_seconds, const std::vector<int>& live_max);

std::string to_string(op what);

}  // namespace stagecoach
