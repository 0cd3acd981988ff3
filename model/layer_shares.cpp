#include "model/layer_shares.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <limits>

namespace stagecoach {

namespace {

constexpr double unreachable = std::numeric_limits<double>::infinity();
// Cuts as good as this are as good as the best: times are means of noisy ones, and each layer that
// stays where it is needs no copy.
constexpr double slack = 1.01;
// Beats bring news once a second; all cuts of many stages are not to be weighed at every message.
constexpr std::int64_t look_ms = 500;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

std::vector<double> prefix_sums(const std::vector<double>& values) {
  std::vector<double> sums{0.0};
  for (const double v : values) sums.push_back(sums.back() + v);
  return sums;
}

std::vector<double> weights_by_flops(const job_spec& spec) {
  const double layer = unit_cost(spec.model, spec.batch.sequence_tokens, 1);
  std::vector<double> weights;
  for (int unit = 0; unit < unit_count(spec.model); ++unit)
    weights.push_back(unit_cost(spec.model, spec.batch.sequence_tokens, unit) / layer);
  return weights;
}

double weight_of(const std::vector<double>& weights, const layout& shape, int stage) {
  double sum = 0;
  for (int unit = shape.unit_cuts[at(stage)]; unit < shape.unit_cuts[at(stage) + 1]; ++unit)
    sum += weights[at(unit)];
  return sum;
}

/// What the replicas of a stage take beyond its layers, in layers: the lower middle one's. None: it
/// has no layer to compare with.
std::optional<double> surplus_of(const layout& shape, const std::vector<seat_pace>& seats,
                                 int stage, int layers) {
  std::vector<double> surplus;
  for (int r = 0; r < shape.replica_count; ++r) {
    const seat_pace& s = seats[at(r * shape.stage_count + stage)];
    if (s.layer_us <= 0 || layers == 0) return std::nullopt;
    const auto layer_us = static_cast<double>(s.layer_us);
    surplus.push_back(std::max(0.0, static_cast<double>(s.leaf_us) / layer_us - layers));
  }
  std::sort(surplus.begin(), surplus.end());
  return surplus[(surplus.size() - 1) / 2];
}

/// Time of a layer on a stage, on the replica that holds a step up longest there.
std::vector<double> stage_factors(const layout& shape, const pace_table& paces) {
  std::vector<double> factors(at(shape.stage_count), 0);
  for (int rank = 0; rank < shape.worker_count(); ++rank) {
    const auto r = at(rank / shape.stage_count);
    const int leaves = shape.leaf_cuts[r + 1] - shape.leaf_cuts[r];
    double& slowest = factors[at(rank % shape.stage_count)];
    slowest = std::max(slowest, leaves * paces.layer_us[at(rank)]);
  }
  return factors;
}

/// Of the units into one non-empty contiguous part for each stage.
///   factors: time of a layer, by stage   weights: by unit   layers_most: by stage
class partition {
 public:
  partition(std::vector<double> factors, const std::vector<double>& weights,
            std::vector<int> layers_most)
      : factors_(std::move(factors)), sums_(prefix_sums(weights)), most_(std::move(layers_most)) {}

  /// The smallest possible time of the slowest stage; infinite: there are no parts.
  double best_time() const {
    std::vector<double> best(sums_.size(), unreachable);
    best[0] = 0;
    for (std::size_t s = 0; s < factors_.size(); ++s) {
      std::vector<double> next(sums_.size(), unreachable);
      for (std::size_t j = s + 1; j < sums_.size(); ++j)
        for (std::size_t i = j; i-- > s;)
          if (is_allowed(s, i, j)) next[j] = std::min(next[j], std::max(best[i], time(s, i, j)));
      best = std::move(next);
    }
    return best.back();
  }

  /// Of all cuts with no stage above the bound those that are nearest to `from`. Empty: there are
  /// none.
  std::vector<int> nearest(double bound, const std::vector<int>& from) const {
    const std::size_t stages = factors_.size(), n = sums_.size();
    std::vector<std::vector<int>> moved(stages + 1, std::vector<int>(n, -1)), left = moved;
    moved[0][0] = 0;
    for (std::size_t s = 0; s < stages; ++s)
      for (std::size_t j = s + 1; j < n; ++j)
        for (std::size_t i = j; i-- > s;) {
          if (moved[s][i] < 0 || !is_allowed(s, i, j) || time(s, i, j) > bound) continue;
          const int distance = moved[s][i] + std::abs(static_cast<int>(j) - from[s + 1]);
          if (moved[s + 1][j] >= 0 && moved[s + 1][j] <= distance) continue;
          moved[s + 1][j] = distance;
          left[s + 1][j] = static_cast<int>(i);
        }
    if (moved[stages][n - 1] < 0) return {};
    std::vector<int> cuts(stages + 1, 0);
    cuts[stages] = static_cast<int>(n) - 1;
    for (std::size_t s = stages; s > 0; --s) cuts[s - 1] = left[s][at(cuts[s])];
    return cuts;
  }

 private:
  double time(std::size_t s, std::size_t i, std::size_t j) const {
    return factors_[s] * (sums_[j] - sums_[i]);
  }
  bool is_allowed(std::size_t s, std::size_t i, std::size_t j) const {
    const int edges = (i == 0 ? 1 : 0) + (j + 1 == sums_.size() ? 1 : 0);
    return static_cast<int>(j - i) - edges <= most_[s];
  }

  std::vector<double> factors_, sums_;
  std::vector<int> most_;
};

/// The first stage that is more than the memory of one of its workers; -1: all fit.
int stage_too_large(const job_spec& spec, const layout& shape, const pace_table& paces) {
  for (int rank = 0; rank < shape.worker_count(); ++rank) {
    const int stage = rank % shape.stage_count;
    const std::uint64_t most = paces.memory_bytes[at(rank)];
    if (most == 0) continue;
    const auto bytes = predict_memory(spec, shape, stage, rank / shape.stage_count).total();
    if (static_cast<std::uint64_t>(bytes) > most) return stage;
  }
  return -1;
}

/// Of the slowest replica's slowest stage, the leaves shared out as well as can be.
double slowest_us(const pace_table& paces, const layout& shape) {
  std::vector<double> leaf_us(at(shape.replica_count), 0);
  for (int rank = 0; rank < shape.worker_count(); ++rank) {
    double& slowest = leaf_us[at(rank / shape.stage_count)];
    slowest = std::max(slowest, predicted_leaf_us(paces, shape, rank));
  }
  const std::vector<int> leaves = share_leaves(shape.leaf_cuts.back(), leaf_us);
  double slowest = 0;
  for (std::size_t r = 0; r < leaves.size(); ++r)
    slowest = std::max(slowest, leaves[r] * leaf_us[r]);
  return slowest;
}

}  // namespace

std::vector<int> layers_of(const model_spec& model, const std::vector<int>& unit_cuts) {
  std::vector<int> layers;
  for (std::size_t s = 0; s + 1 < unit_cuts.size(); ++s) {
    const int first = std::max(unit_cuts[s], 1);
    layers.push_back(std::max(0, std::min(unit_cuts[s + 1], unit_count(model) - 1) - first));
  }
  return layers;
}

std::optional<pace_table> read_paces(const job_spec& spec, const layout& shape,
                                     const std::vector<seat_pace>& seats) {
  if (static_cast<int>(seats.size()) != shape.worker_count()) return std::nullopt;
  pace_table table;
  table.weights = weights_by_flops(spec);
  const std::vector<int> layers = layers_of(spec.model, shape.unit_cuts);
  const auto first = surplus_of(shape, seats, 0, layers.front());
  const auto last = surplus_of(shape, seats, shape.stage_count - 1, layers.back());
  double& embedding = table.weights.front();
  double& head = table.weights.back();
  if (shape.stage_count == 1) {
    const double share = embedding / (embedding + head);
    if (first) head = *first * (1 - share), embedding = *first * share;
  } else {
    embedding = first.value_or(embedding);
    head = last.value_or(head);
  }
  for (std::size_t rank = 0; rank < seats.size(); ++rank) {
    const seat_pace& s = seats[rank];
    if (s.leaf_us <= 0) return std::nullopt;
    const int stage = static_cast<int>(rank) % shape.stage_count;
    const double weight = weight_of(table.weights, shape, stage);
    if (s.layer_us <= 0 && weight <= 0) return std::nullopt;
    table.layer_us.push_back(s.layer_us > 0 ? static_cast<double>(s.layer_us)
                                            : static_cast<double>(s.leaf_us) / weight);
    table.memory_bytes.push_back(s.memory_bytes);
  }
  return table;
}

double predicted_leaf_us(const pace_table& paces, const layout& shape, int rank) {
  return paces.layer_us[at(rank)] * weight_of(paces.weights, shape, rank % shape.stage_count);
}

std::optional<std::vector<int>> choose_cuts(const job_spec& spec, const layout& shape,
                                            const pace_table& paces) {
  const std::vector<double> factors = stage_factors(shape, paces);
  std::vector<int> layers_most(at(shape.stage_count), unit_count(spec.model));
  for (;;) {
    const partition parts(factors, paces.weights, layers_most);
    const double best = parts.best_time();
    if (best == unreachable) return std::nullopt;
    layout chosen = shape;
    chosen.unit_cuts = parts.nearest(best * slack, shape.unit_cuts);
    const int stage = stage_too_large(spec, chosen, paces);
    if (stage < 0) return chosen.unit_cuts;
    layers_most[at(stage)] = layers_of(spec.model, chosen.unit_cuts)[at(stage)] - 1;
    if (layers_most[at(stage)] < 0) return std::nullopt;
  }
}

std::optional<layer_change> layer_watch::look(std::int64_t now_ms, std::uint64_t step,
                                              const job_spec& spec, const layout& shape,
                                              const std::vector<seat_pace>& seats) {
  if (now_ms < next_look_ms_) return std::nullopt;
  next_look_ms_ = now_ms + look_ms;
  std::optional<pace_table> paces;
  if (shape.stage_count > 1 && spec.parallelism.layers.empty())
    paces = read_paces(spec, shape, seats);
  auto seen = pace_view::kind::even_enough;
  outlier far;
  if (paces) far = farthest_from_peers(paces->layer_us);
  if (far.distance > std::log(rules_.slow_above)) {
    seen = pace_view::kind::uneven_pace;
  } else if (paces && far.distance < std::log(rules_.even_below) &&
             shape.unit_cuts != partition_units(spec, shape.stage_count)) {
    seen = pace_view::kind::uneven_shares;
  }
  if (!view_.lasts(seen, now_ms, step, rules_)) return std::nullopt;
  const auto cuts = choose_cuts(spec, shape, *paces);
  if (!cuts || *cuts == shape.unit_cuts) return std::nullopt;
  layout moved = shape;
  moved.unit_cuts = *cuts;
  layer_change change{*cuts, far.index, far.ratio,
                      1 - slowest_us(*paces, moved) / slowest_us(*paces, shape)};
  if (change.gain < rules_.gain_min) return std::nullopt;
  return change;
}

}  // namespace stagecoach
