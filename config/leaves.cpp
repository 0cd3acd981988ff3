#include "config/leaves.hpp"

#include <algorithm>

namespace stagecoach {

namespace {

std::int64_t leaves_of_busiest(std::int64_t leaf_count, std::int64_t replicas) {
  return leaf_count / replicas + (leaf_count % replicas != 0 ? 1 : 0);
}

// In integers: 0.9 has no exact double, and this choice decides bits.
bool is_balanced(std::int64_t leaf_count, std::int64_t replicas) {
  return 10 * leaf_count >= 9 * replicas * leaves_of_busiest(leaf_count, replicas);
}

}  // namespace

std::int64_t resolve_leaf_count(std::int64_t microbatch_count, int workers_min, int workers_max) {
  const std::int64_t microbatches = std::max<std::int64_t>(microbatch_count, 1);
  const std::int64_t fewest = std::max(workers_min, 1);
  const std::int64_t most = std::max<std::int64_t>(workers_max, fewest);
  const std::int64_t largest = microbatches & -microbatches;
  // Ends early whatever the microbatch count is: from 9 leaves per replica on, the balance is 0.90.
  for (std::int64_t leaf_count = 1; leaf_count < largest; leaf_count *= 2) {
    if (leaf_count < most) continue;
    bool balanced = true;
    for (std::int64_t n = fewest; n <= most && balanced; ++n) balanced = is_balanced(leaf_count, n);
    if (balanced) return leaf_count;
  }
  return largest;
}

bool are_leaves_balanced(std::int64_t microbatch_count, int workers_min, int workers_max) {
  const std::int64_t leaves = resolve_leaf_count(microbatch_count, workers_min, workers_max);
  const std::int64_t fewest = std::max(workers_min, 1);
  for (std::int64_t n = fewest; n <= std::max<std::int64_t>(workers_max, fewest); ++n)
    if (leaves < n || !is_balanced(leaves, n)) return false;
  return true;
}

double leaf_balance(std::int64_t leaf_count, int replicas) {
  const std::int64_t leaves = std::max<std::int64_t>(leaf_count, 1);
  const std::int64_t n = std::max(replicas, 1);
  return static_cast<double>(leaves) / static_cast<double>(n) /
         static_cast<double>(leaves_of_busiest(leaves, n));
}

}  // namespace stagecoach
