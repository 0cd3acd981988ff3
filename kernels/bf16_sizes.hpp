// What bf16 products keep in memory, for those who plan: the CPU backend's packed weights and what
// its head leaves between forward and backward. Within a percent; the backend itself says exactly.
#pragma once

#include <cstdint>

namespace stagecoach {

/// Columns of a packed panel, filled up with zeros.
inline constexpr std::int64_t bf16_panel = 48;

/// Packed copies of a linear layer's w [K, N]: one for each of its two products.
inline std::int64_t bf16_linear_bytes(std::int64_t k, std::int64_t n) {
  const auto side = [](std::int64_t pairs_of, std::int64_t columns) {
    return 4 * ((pairs_of + 1) / 2) * ((columns + bf16_panel - 1) / bf16_panel * bf16_panel);
  };
  return side(k, n) + side(n, k);
}

/// Of the head's wte [V, C].
inline std::int64_t bf16_head_bytes(std::int64_t channels, std::int64_t vocab) {
  return bf16_linear_bytes(channels, vocab);
}

/// Floats per microbatch: exponentials of all logits in bf16, factors of each row and piece.
inline std::int64_t bf16_head_floats(std::int64_t rows, std::int64_t vocab) {
  return rows * (vocab / 2 + vocab / 700 + 2);
}

}  // namespace stagecoach
