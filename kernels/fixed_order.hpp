// Orders of summation that shape alone fixes, shared by all backends: vocabulary blocks of the head
// and the full binary tree.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/backend.hpp"
#include "kernels/math.hpp"

namespace stagecoach {

inline constexpr std::int64_t loss_block_rows = 64;
inline constexpr std::int64_t square_block_elements = 4096;

struct index_range {
  std::int64_t begin, end;
  std::int64_t count() const { return end - begin; }
};

/// Block b of n over [0, total): [total*b/n, total*(b+1)/n).
inline index_range block_of(std::int64_t total, std::int64_t b, std::int64_t n) {
  return {total * b / n, total * (b + 1) / n};
}

/// Merges values[0..count) by the full binary tree over their index into values[0]: neighbours (2i,
/// 2i+1) first; a last one without a neighbour moves up unchanged. An aligned run of a power of two
/// of them is a subtree, so it can be summed elsewhere with the same bits. 0 of nothing.
template <class T, class Merge>
T merge_tree(T* values, std::int64_t count, Merge merge) {
  if (count == 0) return T{};
  while (count > 1) {
    const std::int64_t pairs = count / 2;
    for (std::int64_t i = 0; i < pairs; ++i) values[i] = merge(values[2 * i], values[2 * i + 1]);
    if (count % 2 != 0) values[pairs] = values[count - 1];
    count = pairs + count % 2;
  }
  return values[0];
}

inline double sum_tree(double* values, std::int64_t count) {
  return merge_tree(values, count, [](double a, double b) { return a + b; });
}

/// Maximum of some logits and the sum of exp(logit - maximum).
struct softmax_part {
  float max = 0, sum = 0;
};

/// The one formula by which parts of a softmax merge.
inline softmax_part merge_softmax(softmax_part a, softmax_part b) {
  const float max = a.max > b.max ? a.max : b.max;
  return {max, a.sum * math::exp(a.max - max) + b.sum * math::exp(b.max - max)};
}

/// -log softmax(target) of a row.
inline float row_loss(softmax_part row, float target_logit) {
  return math::log(row.sum) + (row.max - target_logit);
}

/// Sum of the rows' losses: fp64, in row order inside blocks of 64, then the tree. `blocks` is
/// scratch of (count + 63) / 64 values.
double sum_losses(const float* losses, std::int64_t count, double* blocks);

}  // namespace stagecoach
