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

/// Of the others; the lower one of an even count.
double peers_median(const std::vector<replica_pace>& paces, std::size_t r) {
  std::vector<double> others;
  for (std::size_t i = 0; i < paces.size(); ++i)
    if (i != r) others.push_back(paces[i].leaf_us);
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

void leaf_watch::restart(std::int64_t now_ms) {
  started_ms_ = now_ms;
  seen_ = view::even_enough;
}

std::optional<leaf_change> leaf_watch::look(std::int64_t now_ms, std::uint64_t step,
                                            const std::vector<replica_pace>& paces) {
  const bool is_known = std::all_of(paces.begin(), paces.end(),
                                    [](const auto& p) { return p.leaf_us > 0 && p.leaves > 0; });
  if (paces.size() < 2 || !is_known) {
    seen_ = view::even_enough;
    return std::nullopt;
  }
  leaf_change change;
  double farthest = 0;
  std::int64_t leaf_count = 0;
  std::vector<double> leaf_us;
  std::vector<int> now;
  for (std::size_t r = 0; r < paces.size(); ++r) {
    const double ratio = paces[r].leaf_us / peers_median(paces, r);
    // A slow one before a fast one that is as far off: of two they are the same fact.
    if (std::abs(std::log(ratio)) + (ratio > 1 ? 1e-9 : 0) > farthest) {
      farthest = std::abs(std::log(ratio)) + (ratio > 1 ? 1e-9 : 0);
      change.replica = static_cast<int>(r);
      change.ratio = ratio;
    }
    leaf_count += paces[r].leaves;
    leaf_us.push_back(paces[r].leaf_us);
    now.push_back(paces[r].leaves);
  }
  const auto [least, most] = std::minmax_element(now.begin(), now.end());
  view seen = view::even_enough;
  if (farthest > std::log(rules_.slow_above)) {
    seen = view::uneven_pace;
  } else if (farthest < std::log(rules_.even_below) && *most - *least > 1) {
    seen = view::uneven_shares;
  }
  if (seen != seen_) {
    seen_ = seen;
    since_ms_ = now_ms;
    since_step_ = step;
  }
  const bool is_lasting = seen != view::even_enough && now_ms - since_ms_ >= rules_.ms &&
                          step >= since_step_ + static_cast<std::uint64_t>(rules_.steps);
  if (!is_lasting || now_ms - started_ms_ < rules_.cool_down_ms) return std::nullopt;
  change.leaves = share_leaves(leaf_count, leaf_us);
  change.gain = 1 - slowest_us(change.leaves, paces) / slowest_us(now, paces);
  if (change.gain < rules_.gain_min) return std::nullopt;
  return change;
}

}  // namespace stagecoach
