#include "kernels/fixed_order.hpp"

namespace stagecoach {

std::int64_t head_block_count(std::int64_t vocab) { return vocab < 2048 ? 1 : 8; }

double sum_losses(const float* losses, std::int64_t count, double* blocks) {
  std::int64_t block_count = 0;
  for (std::int64_t begin = 0; begin < count; begin += loss_block_rows) {
    double sum = 0;
    for (std::int64_t i = begin; i < count && i < begin + loss_block_rows; ++i)
      sum += static_cast<double>(losses[i]);
    blocks[block_count++] = sum;
  }
  return sum_tree(blocks, block_count);
}

}  // namespace stagecoach
