// The head's vocabulary, cut into its blocks and the blocks into pieces that a cache holds; and how
// what was computed of the pieces becomes one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/scratch_buffer.hpp"
#include "kernels/fixed_order.hpp"

namespace stagecoach {

inline constexpr std::int64_t head_columns = 768;

/// Each of the head's blocks cut into the same number of pieces of about head_columns; all but the
/// last of a block start at a multiple of `step` from its start. step at most 64.
inline std::vector<index_range> vocabulary_pieces(std::int64_t vocab, std::int64_t step) {
  const std::int64_t blocks = head_block_count(vocab);
  const std::int64_t per_block = std::max<std::int64_t>(1, divide_up(vocab / blocks, head_columns));
  std::vector<index_range> pieces;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const index_range block = block_of(vocab, b, blocks);
    // Rounded down from the block's start; no piece is empty, for several have 384 or more each.
    const auto border = [&](std::int64_t i) {
      return i == per_block ? block.end : block.begin + block.count() * i / per_block / step * step;
    };
    for (std::int64_t i = 0; i < per_block; ++i) pieces.push_back({border(i), border(i + 1)});
  }
  return pieces;
}

/// Maximum and sum of exponentials per row, of each piece: max and sum are [piece, row].
struct piece_stats {
  float *max, *sum;
};

/// Pieces merge to blocks and blocks to the row by the same formula and tree. stats [2, rows];
/// losses [rows], given the logit of each row's target.
template <class TargetLogit>
void merge_pieces(float* stats, float* losses, piece_stats parts, std::int64_t piece_count,
                  std::int64_t blocks, std::int64_t rows, TargetLogit target_logit) {
  const std::int64_t per_block = piece_count / blocks;
  std::vector<softmax_part> pieces(per_block), block_parts(blocks);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (std::int64_t i = 0; i < per_block; ++i) {
        const std::int64_t at = (b * per_block + i) * rows + row;
        pieces[i] = {parts.max[at], parts.sum[at]};
      }
      block_parts[b] = merge_tree(pieces.data(), per_block, merge_softmax);
    }
    const softmax_part whole = merge_tree(block_parts.data(), blocks, merge_softmax);
    stats[row] = whole.max;
    stats[rows + row] = whole.sum;
    losses[row] = row_loss(whole, target_logit(row));
  }
}

/// The full binary tree over the blocks' partial gradients [block, size] for elements [begin, begin
/// + count), a level at a time and in place; the last sum goes to `to`. At least 2 blocks.
template <class Add>
void merge_partials(float* to, float* partial, std::int64_t blocks, std::int64_t size,
                    std::int64_t begin, std::int64_t count, Add add) {
  for (std::int64_t step = 1; step < blocks; step *= 2)
    for (std::int64_t b = 0; b + step < blocks; b += 2 * step) {
      float *left = partial + b * size + begin, *right = partial + (b + step) * size + begin;
      add(2 * step == blocks ? to + begin : left, left, right, count);
    }
}

}  // namespace stagecoach
