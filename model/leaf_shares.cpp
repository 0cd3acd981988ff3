#include "model/leaf_shares.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "config/result.hpp"

namespace stagecoach {

namespace {

double slowest_us(const std::vector<int>& leaves, const std::vector<replica_pace>& paces) {
  double slowest = 0;
  for (std::size_t r = 0; r < paces.size(); ++r)
    slowest = std::max(slowest, leaves[r] * paces[r].leaf_us);
  return slowest;
}

double peers_median(const std::vector<double>& us, std::size_t r) {
  std::vector<double> others;
  for (std::size_t i = 0; i < us.size(); ++i)
    if (i != r) others.push_back(us[i]);
  const auto middle = others.begin() + static_cast<std::ptrdiff_t>((others.size() - 1) / 2);
  std::nth_element(others.begin(), middle, others.end());
  return *middle;
}

}  // namespace

std::vector<int> share_leaves(std::int64_t leaf_count, const std::vector<double>& leaf_us) {
  invariant(!leaf_us.empty() && static_cast<std::int64_t>(leaf_us.size()) <= leaf_count,
            "every replica has at least one leaf");
  // One leaf after the other to whoever would be done with it first: leaves are all alike, and for
  // those no other order ends sooner.
  std::vector<int> leaves(leaf_us.size(), 1);
  for (auto left = leaf_count - static_cast<std::int64_t>(leaf_us.size()); left > 0; --left) {
    std::size_t next = 0;
    for (std::size_t r = 1; r < leaf_us.size(); ++r)
      if ((leaves[r] + 1) * leaf_us[r] < (leaves[next] + 1) * leaf_us[next]) next = r;
    ++leaves[next];
  }
  return leaves;
}

std::vector<int> cuts_of(const std::vector<int>& leaves) {
  std::vector<int> cuts{0};
  for (const int n : leaves) cuts.push_back(cuts.back() + n);
  return cuts;
}

outlier farthest_from_peers(const std::vector<double>& us) {
  outlier found;
  double farthest = 0;
  for (std::size_t i = 0; i < us.size(); ++i) {
    const double ratio = us[i] / peers_median(us, i);
    const double distance = std::abs(std::log(ratio)) + (ratio > 1 ? 1e-9 : 0);
    if (distance <= farthest) continue;
    farthest = distance;
    found = {static_cast<int>(i), ratio, std::abs(std::log(ratio))};
  }
  return found;
}

void pace_view::restart(std::int64_t now_ms) {
  started_ms_ = now_ms;
  seen_ = kind::even_enough;
}

bool pace_view::lasts(kind seen, std::int64_t now_ms, std::uint64_t step,
                      const balance_rules& rules) {
  if (seen != seen_) {
    seen_ = seen;
    since_ms_ = now_ms;
    since_step_ = step;
  }
  return seen != kind::even_enough && now_ms - since_ms_ >= rules.ms &&
         step >= since_step_ + static_cast<std::uint64_t>(rules.steps) &&
         now_ms - started_ms_ >= rules.cool_down_ms;
}

std::optional<leaf_change> leaf_watch::look(std::int64_t now_ms, std::uint64_t step,
                                            const std::vector<replica_pace>& paces) {
  const bool is_known = std::all_of(paces.begin(), paces.end(),
                                    [](const auto& p) { return p.leaf_us > 0 && p.leaves > 0; });
  if (paces.size() < 2 || !is_known) {
    (void)view_.lasts(pace_view::kind::even_enough, now_ms, step, rules_);
    return std::nullopt;
  }
  std::int64_t leaf_count = 0;
  std::vector<double> leaf_us;
  std::vector<int> now;
  for (const replica_pace& p : paces) {
    leaf_count += p.leaves;
    leaf_us.push_back(p.leaf_us);
    now.push_back(p.leaves);
  }
  const outlier far = farthest_from_peers(leaf_us);
  const auto [least, most] = std::minmax_element(now.begin(), now.end());
  auto seen = pace_view::kind::even_enough;
  if (far.distance > std::log(rules_.slow_above)) {
    seen = pace_view::kind::uneven_pace;
  } else if (far.distance < std::log(rules_.even_below) && *most - *least > 1) {
    seen = pace_view::kind::uneven_shares;
  }
  if (!view_.lasts(seen, now_ms, step, rules_)) return std::nullopt;
  leaf_change change;
  change.replica = far.index;
  change.ratio = far.ratio;
  change.leaves = share_leaves(leaf_count, leaf_us);
  change.gain = 1 - slowest_us(change.leaves, paces) / slowest_us(now, paces);
  if (change.gain < rules_.gain_min) return std::nullopt;
  return change;
}

}  // namespace stagecoach
