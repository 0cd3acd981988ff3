// A plan: pure data that says, for one generation, who runs which stage of which replica, which
// leaves and by which schedule. Everything here is a pure function, so any party computes the same
// plan.
//
// Units are what a stage is made of: unit 0 is the embedding, units 1..n_layer the blocks, unit
// n_layer+1 the head (final norm + tied matrix). Rank = replica * stage_count + stage.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "config/ids.hpp"
#include "config/job_spec.hpp"
#include "config/leaves.hpp"  // resolve_leaf_count, leaf_balance
#include "config/result.hpp"

namespace stagecoach {

struct plan_member {
  worker_id worker{};
  process_id process;
  std::string name;  // the worker's name, for people
  std::string link_host;
  std::uint16_t link_port = 0;
  bool operator==(const plan_member&) const = default;
};

/// The shape of a plan, without members.
struct layout {
  int stage_count = 1;
  int replica_count = 1;
  std::string schedule = "1f1b";  // a name of model/schedule.hpp
  std::vector<int> unit_cuts;  // stage_count + 1 entries; stage s runs units [cuts[s], cuts[s+1])
  std::vector<int>
      leaf_cuts;  // replica_count + 1 entries; replica r owns leaves [cuts[r], cuts[r+1])
  int worker_count() const { return stage_count * replica_count; }
  bool operator==(const layout&) const = default;
};

struct plan {
  job_id job{};
  std::uint64_t generation = 0;
  layout shape;
  std::vector<plan_member> members;  // by rank
  int rank_of(int stage, int replica) const { return replica * shape.stage_count + stage; }
  int stage_of(int rank) const { return rank % shape.stage_count; }
  int replica_of(int rank) const { return rank / shape.stage_count; }
  bool operator==(const plan&) const = default;
};

/// XXH3-64 of a canonical text of the plan; never 0.
std::uint64_t plan_hash(const plan& p);
inline generation_id identity(const plan& p) { return {p.generation, plan_hash(p)}; }

int unit_count(const model_spec& m);                   // n_layer + 2
std::string unit_name(const model_spec& m, int unit);  // "embed", "h.3", "head"

/// Relative forward+backward cost of a unit (flops of one token), the partition's measure.
double unit_cost(const model_spec& m, std::int64_t sequence_tokens, int unit);
std::int64_t unit_parameter_count(const model_spec& m, int unit);  // head counts its copy of wte
/// 124,439,808 for gpt2: wte counted once.
std::int64_t parameter_count(const model_spec& m);

/// The layout for exactly `workers` workers or fewer (never more): maximises predicted throughput,
/// ties to fewer stages. Fails (unplaceable) if the spec's explicit layout needs more workers than
/// given. Pure: the same arguments give the same layout everywhere. Every count from workers_min to
/// workers_max gives a valid layout (tested).
result<layout> choose_layout(const job_spec& spec, int workers);

/// Contiguous min-max partition of all units into `stages` non-empty stages; returns unit_cuts.
std::vector<int> partition_units(const job_spec& spec, int stages);

/// leaves split as evenly as possible in order; returns leaf_cuts.
std::vector<int> partition_leaves(std::int64_t leaf_count, int replicas);

/// Is this layout one of this job: every unit and every leaf covered exactly once, in order, within
/// limits? For plans that come over the wire. Fails: bad_spec (the job can't be planned), bad_input
/// (the layout).
result<void> check_layout(const job_spec& spec, const layout& shape);

/// Predicted bytes of one stage of a layout, by part.
struct stage_memory {
  std::int64_t weights = 0, optimizer = 0, gradients = 0, activations = 0, buffers = 0;
  std::int64_t copies = 0;  // of other stages: state and the reduced gradient of a step
  std::int64_t total() const {
    return weights + optimizer + gradients + activations + buffers + copies;
  }
};
stage_memory predict_memory(const job_spec& spec, const layout& shape, int stage, int replica);

}  // namespace stagecoach
