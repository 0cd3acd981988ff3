#include "model/plan.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <cstddef>
#include <limits>

#include "config/limits.hpp"
#include "kernels/bf16_sizes.hpp"
#include "model/copies.hpp"
#include "model/leaf_tree.hpp"
#include "model/schedule.hpp"
#include "model/tensor_names.hpp"

namespace stagecoach {

namespace {

constexpr std::int64_t float_bytes = 4;
constexpr double unreachable_cost = std::numeric_limits<double>::infinity();

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

// Length first, so that no choice of characters in a name makes two plans one text.
std::string field(const std::string& text) { return fmt::format("{}:{};", text.size(), text); }

std::string joined(const std::vector<int>& numbers, const char* between) {
  std::string text;
  for (std::size_t i = 0; i < numbers.size(); ++i)
    text += (i == 0 ? "" : between) + std::to_string(numbers[i]);
  return text;
}

std::vector<double> unit_costs(const job_spec& spec) {
  std::vector<double> costs;
  for (int unit = 0; unit < unit_count(spec.model); ++unit)
    costs.push_back(unit_cost(spec.model, spec.batch.sequence_tokens, unit));
  return costs;
}

std::vector<double> prefix_sums(const std::vector<double>& values) {
  std::vector<double> sums{0.0};
  for (double v : values) sums.push_back(sums.back() + v);
  return sums;
}

// The smallest possible cost of the costliest of `stages` non-empty stages.
double bottleneck_cost(const std::vector<double>& sums, int stages) {
  const std::size_t n = sums.size() - 1;
  std::vector<double> best(sums);  // one stage: [0, j)
  best[0] = unreachable_cost;
  for (int k = 2; k <= stages; ++k) {
    std::vector<double> next(n + 1, unreachable_cost);
    for (std::size_t j = at(k); j <= n; ++j)
      // The last stage [i, j) only grows as i falls: beyond the best found it can't win.
      for (std::size_t i = j - 1; i >= at(k - 1) && sums[j] - sums[i] < next[j]; --i)
        next[j] = std::min(next[j], std::max(best[i], sums[j] - sums[i]));
    best = std::move(next);
  }
  return best[n];
}

// Of the partitions with the smallest bottleneck the one with the smallest sum of squares: the
// stages beside the bottleneck come out even too. Ties put more units into later stages, since
// earlier ones keep more activations under 1F1B.
std::vector<int> even_cuts(const std::vector<double>& costs, int stages) {
  const std::vector<double> sums = prefix_sums(costs);
  const std::size_t n = costs.size();
  const double bound = bottleneck_cost(sums, stages);
  std::vector<double> best(n + 1, unreachable_cost);
  best[0] = 0.0;
  std::vector<std::vector<int>> from(at(stages) + 1, std::vector<int>(n + 1, -1));
  for (int k = 1; k <= stages; ++k) {
    std::vector<double> next(n + 1, unreachable_cost);
    for (std::size_t j = at(k); j <= n; ++j)
      for (std::size_t i = j; i-- > at(k - 1);) {
        const double cost = sums[j] - sums[i];
        if (cost > bound) break;
        if (best[i] == unreachable_cost || best[i] + cost * cost > next[j]) continue;
        next[j] = best[i] + cost * cost;
        from[at(k)][j] = static_cast<int>(i);
      }
    best = std::move(next);
  }
  std::vector<int> cuts(at(stages) + 1);
  cuts[at(stages)] = static_cast<int>(n);
  for (int k = stages; k > 0; --k) cuts[at(k) - 1] = from[at(k)][at(cuts[at(k)])];
  invariant(cuts[0] == 0, "a partition starts at the first unit");
  return cuts;
}

// Blocks per stage as the job file gives them; the embedding joins the first stage, the head the
// last. Empty if they don't make `stages` non-empty stages.
std::vector<int> given_cuts(const job_spec& spec, int stages) {
  const std::vector<int>& layers = spec.parallelism.layers;
  if (layers.size() != at(stages)) return {};
  std::vector<int> cuts{0};
  std::int64_t end = 1;
  for (std::size_t s = 0; s < layers.size(); ++s) {
    if (layers[s] < 0 || layers[s] > limits::layer_count_max) return {};
    end += layers[s];
    const std::int64_t cut = end + (s + 1 == layers.size() ? 1 : 0);
    if (cut <= cuts.back() || cut > unit_count(spec.model)) return {};
    cuts.push_back(static_cast<int>(cut));
  }
  if (cuts.back() != unit_count(spec.model)) return {};
  return cuts;
}

struct stage_sizes {
  bool has_embedding = false;
  bool has_head = false;
  std::int64_t parameters = 0;  // held once each, the tied matrix too
  std::int64_t gradients = 0;   // floats: the tied matrix's two gradients stay apart (DESIGN 4)
};

stage_sizes sizes_of(const model_spec& m, int unit_begin, int unit_end) {
  stage_sizes sizes;
  sizes.has_embedding = unit_begin == 0;
  sizes.has_head = unit_end == unit_count(m);
  for (int unit = unit_begin; unit < unit_end; ++unit)
    sizes.gradients += unit_parameter_count(m, unit);
  sizes.parameters = sizes.gradients;
  if (sizes.has_embedding && sizes.has_head) sizes.parameters -= m.vocab_size * m.d_model;
  return sizes;
}

// Cost of a step beside the microbatches, in flops so that it adds to unit_cost. These are coarse
// weights for choosing between layouts, not measurements: an AdamW update moves 28 bytes for a
// dozen flops, a reduction moves up to twice 4 bytes through a link, a boundary 4 bytes per channel
// each way.
constexpr double optimizer_flops_per_parameter = 20;
constexpr double reduction_flops_per_parameter = 80;
constexpr double link_flops_per_channel = 40;

double predicted_step_cost(const job_spec& spec, const std::vector<double>& unit_cost_of,
                           const std::vector<int>& cuts, int replicas) {
  double slowest = 0;
  double largest_parameters = 0;
  for (std::size_t s = 0; s + 1 < cuts.size(); ++s) {
    double cost = 0;
    for (int unit = cuts[s]; unit < cuts[s + 1]; ++unit) cost += unit_cost_of[at(unit)];
    slowest = std::max(slowest, cost);
    const stage_sizes sizes = sizes_of(spec.model, cuts[s], cuts[s + 1]);
    largest_parameters = std::max(largest_parameters, static_cast<double>(sizes.gradients));
  }
  const auto stages = static_cast<double>(cuts.size() - 1);
  const double tokens = static_cast<double>(spec.batch.micro_sequences) *
                        static_cast<double>(spec.batch.sequence_tokens);
  const std::int64_t leaves_max = (spec.batch.leaf_count + replicas - 1) / replicas;
  const double microbatches =
      static_cast<double>(leaves_max * (spec.batch.microbatch_count() / spec.batch.leaf_count));
  const double fill =
      (stages - 1) * (slowest + link_flops_per_channel * static_cast<double>(spec.model.d_model));
  const double remote_share = static_cast<double>(replicas - 1) / static_cast<double>(replicas);
  return tokens * (microbatches * slowest + fill) +
         largest_parameters *
             (optimizer_flops_per_parameter + reduction_flops_per_parameter * remote_share);
}

layout make_layout(const job_spec& spec, std::vector<int> unit_cuts, int replicas) {
  layout shape;
  shape.stage_count = static_cast<int>(unit_cuts.size()) - 1;
  shape.replica_count = replicas;
  shape.schedule = spec.parallelism.schedule;
  shape.unit_cuts = std::move(unit_cuts);
  shape.leaf_cuts = partition_leaves(spec.batch.leaf_count, replicas);
  return shape;
}

layout best_layout(const job_spec& spec, int workers) {
  const std::vector<double> costs = unit_costs(spec);
  const int stages_max = std::min({workers, unit_count(spec.model), limits::stage_count_max});
  std::vector<int> best_cuts;
  int best_replicas = 0;
  double best_cost = unreachable_cost;
  // Stages and replicas rise and only a strictly better layout replaces one: ties go to fewer
  // stages, then to fewer workers.
  for (int stages = 1; stages <= stages_max; ++stages) {
    const std::vector<int> cuts = partition_units(spec, stages);
    const int replicas_max = static_cast<int>(std::min<std::int64_t>(
        {workers / stages, spec.batch.leaf_count, limits::replica_count_max}));
    for (int replicas = 1; replicas <= replicas_max; ++replicas) {
      const double cost = predicted_step_cost(spec, costs, cuts, replicas);
      if (cost >= best_cost) continue;
      best_cost = cost;
      best_cuts = cuts;
      best_replicas = replicas;
    }
  }
  return make_layout(spec, best_cuts, best_replicas);
}

// What planning divides by and allocates from; the job file's reader checks the same with line
// numbers.
result<void> check_plannable(const job_spec& spec) {
  const model_spec& m = spec.model;
  if (m.n_layer < 1 || m.n_layer > limits::layer_count_max)
    return make_error(errc::bad_spec, "model.n_layer is {}; expected 1 to {}", m.n_layer,
                      limits::layer_count_max);
  const batch_spec& b = spec.batch;
  if (b.micro_sequences < 1 || b.sequence_tokens < 1 || b.global_sequences < b.micro_sequences ||
      b.global_sequences % b.micro_sequences != 0)
    return make_error(
        errc::bad_spec,
        "batch: {} sequences per step in microbatches of {}, {} tokens each; expected "
        "whole microbatches of at least one token",
        b.global_sequences, b.micro_sequences, b.sequence_tokens);
  if (b.leaf_count < 1 || b.leaf_count > std::numeric_limits<int>::max() ||
      (b.leaf_count & (b.leaf_count - 1)) != 0 || b.microbatch_count() % b.leaf_count != 0)
    return make_error(
        errc::bad_spec,
        "batch.leaves is {}; expected a power of two that divides the {} microbatches",
        b.leaf_count, b.microbatch_count());
  // Of the names, those that suit any number of stages.
  if (!check_schedule_name(spec.parallelism.schedule, 0))
    return make_error(errc::bad_spec, "parallelism.schedule is \"{}\". fix: zb-h1, 1f1b or gpipe",
                      spec.parallelism.schedule);
  return ok();
}

result<void> check_explicit(const job_spec& spec) {
  const parallelism_spec& p = spec.parallelism;
  const int stages_max = std::min(unit_count(spec.model), limits::stage_count_max);
  if (p.stages < 1 || p.stages > stages_max)
    return make_error(errc::bad_spec,
                      "parallelism.stages is {}; expected 1 to {} ({} layers, embedding and head). "
                      "fix: stages: {} or fewer",
                      p.stages, stages_max, spec.model.n_layer, stages_max);
  const std::int64_t replicas_max =
      std::min<std::int64_t>(spec.batch.leaf_count, limits::replica_count_max);
  if (p.replicas < 1 || p.replicas > replicas_max)
    return make_error(
        errc::bad_spec,
        "parallelism.replicas is {}; expected 1 to {}, each replica needs a leaf of its "
        "own. fix: fewer replicas or more batch.leaves",
        p.replicas, replicas_max);
  if (!p.layers.empty() && given_cuts(spec, p.stages).empty())
    return make_error(errc::bad_spec,
                      "parallelism.layers [{}] does not fit {} stages and {} layers: expected one "
                      "number per stage, in sum {}, none empty (0 only beside embedding or head)",
                      joined(p.layers, ", "), p.stages, spec.model.n_layer, spec.model.n_layer);
  return ok();
}

bool rises_from_to(const std::vector<int>& cuts, int stretches, std::int64_t end) {
  if (stretches < 1 || cuts.size() != at(stretches) + 1 || cuts.front() != 0 || cuts.back() != end)
    return false;
  for (std::size_t i = 1; i < cuts.size(); ++i)
    if (cuts[i] <= cuts[i - 1]) return false;
  return true;
}

// Gradient buffers alive at once on a replica: the leaf being summed and the whole blocks below it
// on the stack. log2(count) + 1 for an aligned power of two, up to twice that for an odd range.
std::int64_t live_blocks_max(std::int64_t begin, std::int64_t end) {
  std::int64_t live = 0;
  std::int64_t most = 0;
  for (std::int64_t leaf = begin; leaf < end; ++leaf) {
    most = std::max(most, ++live);
    live -= merges_after_leaf(begin, end, leaf);
  }
  return most;
}

// Floats that a stage keeps of one microbatch of M = B*T rows, from forward to backward_weight.
std::int64_t kept_floats(const job_spec& spec, int unit) {
  const model_spec& m = spec.model;
  const std::int64_t rows = spec.batch.micro_sequences * spec.batch.sequence_tokens;
  const std::int64_t c = m.d_model;
  const std::int64_t f = m.d_ff;
  if (unit == 0) return rows;  // token ids
  // Input, norm output, its gradient and the input's; the norm's mean and 1/std; logits, which
  // become their own gradient, with two statistics a row; target ids.
  if (unit == unit_count(m) - 1) {
    const std::int64_t logits =
        spec.precision == "bf16" ? bf16_head_floats(rows, m.vocab_size) : rows * m.vocab_size;
    return rows * (4 * c + 4 + 1) + logits;
  }
  // Input, ln_1 out, qkv (3), attention out, residual after attention, ln_2 out and the residual's
  // gradient: 9 C. c_fc out (reused for two gradients, so at least 4 C), gelu out, c_fc's output
  // gradient. Both norms' mean and 1/std, log-sum-exp per head.
  return rows * (9 * c + std::max(f, 4 * c) + 2 * f + 4 + m.n_head);
}

// The packed copies that bf16 products keep beside the fp32 weights.
std::int64_t packed_bytes(const job_spec& spec, int unit) {
  const model_spec& m = spec.model;
  if (spec.precision != "bf16" || unit == 0) return 0;
  const std::int64_t c = m.d_model, f = m.d_ff;
  if (unit == unit_count(m) - 1) return bf16_head_bytes(c, m.vocab_size);
  return bf16_linear_bytes(c, 3 * c) + bf16_linear_bytes(c, c) + bf16_linear_bytes(c, f) +
         bf16_linear_bytes(f, c);
}

}  // namespace

std::uint64_t plan_hash(const plan& p) {
  std::string text = "stagecoach plan 1;";
  text += fmt::format("job={};generation={};stages={};replicas={};schedule=", value(p.job),
                      p.generation, p.shape.stage_count, p.shape.replica_count);
  text += field(p.shape.schedule);
  text += fmt::format("units={};leaves={};members={};", joined(p.shape.unit_cuts, ","),
                      joined(p.shape.leaf_cuts, ","), p.members.size());
  for (const plan_member& member : p.members)
    text += fmt::format("{};", value(member.worker)) + field(member.process) + field(member.name) +
            field(member.link_host) + fmt::format("{};", member.link_port);
  const std::uint64_t hash = XXH3_64bits(text.data(), text.size());
  return hash == 0 ? 1 : hash;  // 0 means "no plan" in a generation_id
}

int unit_count(const model_spec& m) { return static_cast<int>(m.n_layer) + 2; }

std::string unit_name(const model_spec& m, int unit) {
  if (unit == 0) return "embed";
  if (unit == unit_count(m) - 1) return "head";
  return fmt::format("h.{}", unit - 1);
}

double unit_cost(const model_spec& m, std::int64_t sequence_tokens, int unit) {
  const auto c = static_cast<double>(m.d_model);
  const auto f = static_cast<double>(m.d_ff);
  const auto t = static_cast<double>(sequence_tokens);
  // A lookup and its scatter: bound by memory, so weighed like a score of flops per channel.
  if (unit == 0) return 20 * c;
  // 2 flops per weight forward, 4 backward (input and weight gradient).
  if (unit == unit_count(m) - 1) return 6 * static_cast<double>(m.vocab_size) * c;
  // Attention: scores and weighted sum are 4 C T forward, three times that in all; half is masked.
  return 6 * (4 * c * c + 2 * c * f) + 12 * c * t / 2;
}

std::int64_t unit_parameter_count(const model_spec& m, int unit) {
  const std::int64_t c = m.d_model;
  const std::int64_t f = m.d_ff;
  if (unit == 0) return (m.vocab_size + m.context) * c;
  if (unit == unit_count(m) - 1) return m.vocab_size * c + 2 * c;
  const std::int64_t norms = 4 * c;
  const std::int64_t attention = (c * 3 * c + 3 * c) + (c * c + c);
  const std::int64_t mlp = (c * f + f) + (f * c + c);
  return norms + attention + mlp;
}

std::int64_t parameter_count(const model_spec& m) {
  return sizes_of(m, 0, unit_count(m)).parameters;
}

result<layout> choose_layout(const job_spec& spec, int workers) {
  if (auto plannable = check_plannable(spec); !plannable) return plannable.err();
  if (workers < 1) return make_error(errc::unplaceable, "no worker to lay the job out on");
  const parallelism_spec& p = spec.parallelism;
  if (!p.is_explicit) return best_layout(spec, workers);
  if (auto fits = check_explicit(spec); !fits) return fits.err();
  const int wanted = p.stages * p.replicas;
  if (wanted <= workers) return make_layout(spec, partition_units(spec, p.stages), p.replicas);
  if (spec.elasticity.on_loss == "wait")
    return make_error(
        errc::unplaceable,
        "{} stages x {} replicas need {} workers, {} given, and elasticity.on_loss is "
        "wait. fix: attach {} more, or on_loss: shrink",
        p.stages, p.replicas, wanted, workers, wanted - workers);
  if (workers < spec.elasticity.workers_min)
    return make_error(errc::unplaceable,
                      "{} stages x {} replicas need {} workers, {} given, fewer than "
                      "elasticity's minimum of {}. fix: attach more, or a smaller minimum",
                      p.stages, p.replicas, wanted, workers, spec.elasticity.workers_min);
  return best_layout(spec, workers);
}

std::vector<int> partition_units(const job_spec& spec, int stages) {
  invariant(stages >= 1 && stages <= unit_count(spec.model), "every stage has at least one unit");
  if (std::vector<int> given = given_cuts(spec, stages); !given.empty()) return given;
  return even_cuts(unit_costs(spec), stages);
}

std::vector<int> partition_leaves(std::int64_t leaf_count, int replicas) {
  invariant(
      replicas >= 1 && replicas <= leaf_count && leaf_count <= std::numeric_limits<int>::max(),
      "every replica has at least one leaf");
  std::vector<int> cuts;
  for (std::int64_t r = 0; r <= replicas; ++r)
    cuts.push_back(static_cast<int>(leaf_count * r / replicas));
  return cuts;
}

result<void> check_layout(const job_spec& spec, const layout& shape) {
  if (auto plannable = check_plannable(spec); !plannable) return plannable.err();
  if (shape.stage_count > limits::stage_count_max ||
      shape.replica_count > limits::replica_count_max)
    return make_error(
        errc::bad_input, "layout of {} stages x {} replicas; the limits are {} and {}",
        shape.stage_count, shape.replica_count, limits::stage_count_max, limits::replica_count_max);
  if (!rises_from_to(shape.unit_cuts, shape.stage_count, unit_count(spec.model)))
    return make_error(
        errc::bad_input,
        "layout: unit cuts [{}] do not give each of {} stages its own part of {} units",
        joined(shape.unit_cuts, ", "), shape.stage_count, unit_count(spec.model));
  if (!rises_from_to(shape.leaf_cuts, shape.replica_count, spec.batch.leaf_count))
    return make_error(
        errc::bad_input,
        "layout: leaf cuts [{}] do not give each of {} replicas its own part of {} leaves",
        joined(shape.leaf_cuts, ", "), shape.replica_count, spec.batch.leaf_count);
  if (auto named = check_schedule_name(shape.schedule, shape.stage_count); !named)
    return make_error(errc::bad_input, "layout: {}", named.err().message);
  return ok();
}

stage_memory predict_memory(const job_spec& spec, const layout& shape, int stage, int replica) {
  invariant(
      0 <= stage && stage < shape.stage_count && 0 <= replica && replica < shape.replica_count,
      "the stage is in the layout");
  const int unit_begin = shape.unit_cuts[at(stage)];
  const int unit_end = shape.unit_cuts[at(stage) + 1];
  const stage_sizes sizes = sizes_of(spec.model, unit_begin, unit_end);
  const std::int64_t leaf_begin = shape.leaf_cuts[at(replica)];
  const std::int64_t leaf_end = shape.leaf_cuts[at(replica) + 1];
  const std::int64_t microbatches =
      (leaf_end - leaf_begin) * (spec.batch.microbatch_count() / spec.batch.leaf_count);

  stage_memory memory;
  memory.weights = float_bytes * sizes.parameters;
  for (int unit = unit_begin; unit < unit_end; ++unit) memory.weights += packed_bytes(spec, unit);
  const std::vector<tensor_size> all = all_tensor_sizes(spec.model);
  for (const int t : kept_moments(spec, unit_begin, unit_end, replica, shape.replica_count))
    memory.optimizer += 2 * float_bytes * all[at(t)].count;
  // The reduced gradient of a step is kept until the next one is voted (DESIGN 5).
  memory.gradients = float_bytes * sizes.gradients * (live_blocks_max(leaf_begin, leaf_end) + 1);

  const std::int64_t live =
      live_microbatches(shape.schedule, shape.stage_count, stage, static_cast<int>(microbatches));
  std::int64_t kept = 0;
  for (int unit = unit_begin; unit < unit_end; ++unit) kept += kept_floats(spec, unit);
  // A stage without the head keeps the gradient that its neighbour sent.
  if (!sizes.has_head)
    kept += spec.batch.micro_sequences * spec.batch.sequence_tokens * spec.model.d_model;
  memory.activations = float_bytes * live * kept;

  // Links: an activation and a gradient buffer per neighbour, twice, since one is filled while the
  // other is on its way.
  const std::int64_t neighbours = (stage > 0 ? 1 : 0) + (stage + 1 < shape.stage_count ? 1 : 0);
  const std::int64_t boundary =
      spec.batch.micro_sequences * spec.batch.sequence_tokens * spec.model.d_model;
  memory.buffers = float_bytes * neighbours * 4 * boundary;
  // Reduction: the owner of 1/N of the parameters collects the other replicas' blocks of its range.
  std::int64_t blocks_of_others = 0;
  for (int other = 0; other < shape.replica_count; ++other)
    if (other != replica)
      blocks_of_others += static_cast<std::int64_t>(
          maximal_blocks(shape.leaf_cuts[at(other)], shape.leaf_cuts[at(other) + 1]).size());
  const std::int64_t range = (sizes.gradients + shape.replica_count - 1) / shape.replica_count;
  memory.buffers += float_bytes * blocks_of_others * range;
  // The tied matrix's gradient travels between the first and the last stage.
  if (sizes.has_embedding != sizes.has_head)
    memory.buffers += float_bytes * spec.model.vocab_size * spec.model.d_model;
  if (spec.elasticity.copies > 0 && shape.replica_count == 1) {
    // Whose stage it keeps depends on the hosts; here as if all stood on one.
    const std::vector<tensor_size> tensors = all_tensor_sizes(spec.model);
    const std::vector<std::string> hosts(at(shape.worker_count()));
    for (const kept_copy& copy : copies_kept(spec, shape, hosts, stage))
      for (const int tensor : copy.tensors)
        memory.copies += 4 * float_bytes * tensors[at(tensor)].count;
  }
  return memory;
}

}  // namespace stagecoach
