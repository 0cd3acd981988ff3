#include "model/virtual_time.hpp"

#include <algorithm>
#include <cstddef>

#include "model/leaf_tree.hpp"

namespace stagecoach {

namespace {

constexpr double float_bytes = 4;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

const stage_times& times_of(const job_spec& spec, int unit, const unit_times& times) {
  if (unit == 0) return times.embedding;
  return unit == unit_count(spec.model) - 1 ? times.head : times.block;
}

stage_times times_of_stage(const job_spec& spec, const layout& shape, int stage,
                           const unit_times& times) {
  stage_times sum{0, 0, 0};
  for (int unit = shape.unit_cuts[at(stage)]; unit < shape.unit_cuts[at(stage) + 1]; ++unit) {
    const stage_times& one = times_of(spec, unit, times);
    sum.forward += one.forward;
    sum.backward_input += one.backward_input;
    sum.backward_weight += one.backward_weight;
  }
  return sum;
}

/// Floats of a stage's gradient: the tied matrix's two gradients are kept apart.
double gradient_floats(const job_spec& spec, const layout& shape, int stage) {
  std::int64_t floats = 0;
  for (int unit = shape.unit_cuts[at(stage)]; unit < shape.unit_cuts[at(stage) + 1]; ++unit)
    floats += unit_parameter_count(spec.model, unit);
  return static_cast<double>(floats);
}

std::int64_t microbatches_per_leaf(const job_spec& spec) {
  return spec.batch.microbatch_count() / spec.batch.leaf_count;
}

std::vector<std::size_t> block_counts(const layout& shape) {
  std::vector<std::size_t> counts;
  for (int r = 0; r < shape.replica_count; ++r)
    counts.push_back(maximal_blocks(shape.leaf_cuts[at(r)], shape.leaf_cuts[at(r) + 1]).size());
  return counts;
}

double frame_seconds(const unit_times& times, double floats) {
  return times.link_seconds + floats * float_bytes * times.link_seconds_per_byte;
}

/// The reduction of one stage among its replicas: the busiest replica's. Ranges are cut evenly.
double reduction_seconds(const layout& shape, double floats, const unit_times& times) {
  if (shape.replica_count == 1) return 0;
  const std::vector<std::size_t> blocks = block_counts(shape);
  std::size_t all = 0;
  for (const std::size_t n : blocks) all += n;
  const double range = floats / shape.replica_count;
  const double others = shape.replica_count - 1;
  double slowest = 0;
  for (const std::size_t mine : blocks) {
    const double sent = static_cast<double>(mine) * others;
    const auto received = static_cast<double>(all - mine);
    const double gather = std::max(sent, received) * frame_seconds(times, range);
    const double merge = static_cast<double>(all - 1) * range * times.merge_seconds_per_parameter;
    const double spread = others * frame_seconds(times, range);
    slowest = std::max(slowest, gather + merge + spread);
  }
  return slowest;
}

/// Additions of a replica's own leaves into its maximal blocks, beside the microbatches.
double own_merge_seconds(const layout& shape, int replica, double floats, const unit_times& times) {
  const int first = shape.leaf_cuts[at(replica)], last = shape.leaf_cuts[at(replica) + 1];
  const auto merges =
      static_cast<double>(last - first) - static_cast<double>(maximal_blocks(first, last).size());
  return merges * floats * times.merge_seconds_per_parameter;
}

}  // namespace

result<double> predicted_step_seconds(const job_spec& spec, const layout& shape,
                                      const unit_times& times) {
  if (auto fits = check_layout(spec, shape); !fits) return fits.err();
  std::vector<stage_times> stages;
  double largest_floats = 0, update = 0, reduction = 0;
  for (int s = 0; s < shape.stage_count; ++s) {
    stages.push_back(times_of_stage(spec, shape, s, times));
    const double floats = gradient_floats(spec, shape, s);
    largest_floats = std::max(largest_floats, floats);
    update = std::max(update, floats * times.optimizer_seconds_per_parameter);
    reduction = std::max(reduction, reduction_seconds(shape, floats, times));
  }
  const double boundary = static_cast<double>(spec.batch.micro_sequences) *
                          static_cast<double>(spec.batch.sequence_tokens) *
                          static_cast<double>(spec.model.d_model);
  double slowest = 0;
  for (int r = 0; r < shape.replica_count; ++r) {
    const int leaves = shape.leaf_cuts[at(r) + 1] - shape.leaf_cuts[at(r)];
    const auto microbatches = static_cast<int>(leaves * microbatches_per_leaf(spec));
    auto table = make_schedule(shape.schedule, shape.stage_count, microbatches);
    if (!table) return table.err();
    auto facts = check_schedule(*table, microbatches, stages, frame_seconds(times, boundary));
    if (!facts) return facts.err();
    slowest =
        std::max(slowest, facts->makespan + own_merge_seconds(shape, r, largest_floats, times));
  }
  const double tied = shape.stage_count == 1
                          ? 0
                          : frame_seconds(times, static_cast<double>(spec.model.vocab_size) *
                                                     static_cast<double>(spec.model.d_model));
  return slowest + reduction + tied + times.vote_seconds + update;
}

double predicted_leaf_seconds(const job_spec& spec, const layout& shape, int stage,
                              const unit_times& times) {
  const stage_times one = times_of_stage(spec, shape, stage, times);
  return static_cast<double>(microbatches_per_leaf(spec)) *
         (one.forward + one.backward_input + one.backward_weight);
}

namespace {

result<layout> layout_along(const job_spec& spec, int workers, stretch along) {
  if (along == stretch::chosen) return choose_layout(spec, workers);
  layout shape;
  shape.stage_count = along == stretch::pipeline ? workers : 1;
  shape.replica_count = along == stretch::replicas ? workers : 1;
  shape.schedule = spec.parallelism.schedule;
  if (workers < 1 || shape.replica_count > spec.batch.leaf_count ||
      shape.stage_count > unit_count(spec.model))
    return make_error(errc::unplaceable, "{} workers in one {}: the job has {} leaves and {} units",
                      workers, along == stretch::pipeline ? "pipeline" : "row of replicas",
                      spec.batch.leaf_count, unit_count(spec.model));
  shape.unit_cuts = partition_units(spec, shape.stage_count);
  shape.leaf_cuts = partition_leaves(spec.batch.leaf_count, shape.replica_count);
  return shape;
}

}  // namespace

result<std::vector<throughput_point>> predicted_throughput(const job_spec& spec, int workers_most,
                                                           int workers_least, stretch along,
                                                           const unit_times& times) {
  std::vector<throughput_point> points;
  const double tokens = static_cast<double>(spec.batch.global_sequences) *
                        static_cast<double>(spec.batch.sequence_tokens);
  for (int workers = workers_most; workers >= std::max(workers_least, 1); --workers) {
    auto shape = layout_along(spec, workers, along);
    if (!shape) return shape.err();
    auto seconds = predicted_step_seconds(spec, *shape, times);
    if (!seconds) return seconds.err();
    throughput_point p;
    p.workers = workers;
    p.shape = std::move(*shape);
    p.step_seconds = *seconds;
    p.tokens_per_second = *seconds > 0 ? tokens / *seconds : 0;
    const throughput_point& whole = points.empty() ? p : points.front();
    const double fair = static_cast<double>(workers) / static_cast<double>(workers_most);
    p.share_kept = p.step_seconds > 0 ? whole.step_seconds / p.step_seconds / fair : 0;
    points.push_back(std::move(p));
  }
  return points;
}

}  // namespace stagecoach
