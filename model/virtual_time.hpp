// How long a step takes on a layout, from measured times of its pieces: throughput on virtual time.
//
// Pure. For layouts that this machine has too few cores to run side by side (`bench elastic`, the
// table of throughput at N of N0 workers), and to say what a move would gain. Which layout is
// chosen is model/plan.hpp's business; nothing here enters a plan.
//
// How to use it:
//   unit_times measured = ...;                       // one worker, alone on its cores
//   job_spec spec = ...;                             // leaves resolved for [N0/2, N0] workers
//   auto points = predicted_throughput(spec, N0, N0 / 2, stretch::replicas, measured);
//   for (const throughput_point& p : *points) print(p.workers, p.share_kept);  // 1 = N/N0
#pragma once

#include <cstdint>
#include <vector>

#include "config/job_spec.hpp"
#include "config/result.hpp"
#include "model/plan.hpp"
#include "model/schedule.hpp"

namespace stagecoach {

/// Measured seconds of the pieces of a step. What is not measured stays 0 and costs nothing.
struct unit_times {
  // Of one microbatch (micro_sequences x sequence_tokens) through one unit.
  stage_times embedding{0, 0, 0}, block{0, 0, 0}, head{0, 0, 0};
  double link_seconds = 0;                 // a frame's fixed part
  double link_seconds_per_byte = 0;        // of a frame, one direction
  double merge_seconds_per_parameter = 0;  // one addition of two leaf blocks
  double optimizer_seconds_per_parameter = 0;
  double vote_seconds = 0;  // norms, ballots, their counting
};

/// Seconds of one step: the slowest replica's schedule, replayed instruction by instruction, then
/// the reduction among replicas (every range's blocks to its owner, merges, ranges back to all; a
/// worker's frames one after the other in each direction), the tied matrix's exchange between first
/// and last stage, the vote and the update. Nothing overlaps that the trainer does not overlap.
/// Fails: as check_layout and make_schedule.
result<double> predicted_step_seconds(const job_spec& spec, const layout& shape,
                                      const unit_times& times);

/// Seconds that one leaf takes on a stage, without waits: what a worker's beat calls leaf_us.
double predicted_leaf_seconds(const job_spec& spec, const layout& shape, int stage,
                              const unit_times& times);

/// Which layouts a row of worker counts uses.
enum class stretch {
  chosen,    // choose_layout's
  replicas,  // one stage, as many replicas as workers
  pipeline,  // one replica, as many stages as workers
};

struct throughput_point {
  int workers = 0;
  layout shape;
  double step_seconds = 0;
  double tokens_per_second = 0;
  /// (throughput here / throughput at the most workers) / (workers here / the most workers).
  double share_kept = 0;
};

/// From workers_most down to workers_least. Fails where a count has no such layout (more replicas
/// than leaves, more stages than units), naming it.
result<std::vector<throughput_point>> predicted_throughput(const job_spec& spec, int workers_most,
                                                           int workers_least, stretch along,
                                                           const unit_times& times);

}  // namespace stagecoach
