#include "kernels/fixed_order.hpp"

#include "config/result.hpp"

namespace stagecoach {

precision precision_of(const std::string& word) {
  invariant(word == "fp32" || word == "bf16", "a job's precision is one that its reader takes");
  return word == "bf16" ? precision::bf16 : precision::fp32;
}

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
