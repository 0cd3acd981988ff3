// 8 by 8 elements of 4 bytes, turned over. For the bodies of the kernels: in an anonymous namespace
// and without the standard library, like them (row_kernels_body.hpp says why).
#pragma once

#include <cstdint>

#include "kernels/math.hpp"

namespace stagecoach {
namespace {

/// to[j * ld_to + i] = from[i * ld_from + j]: by pairs of lanes, pairs of pairs, and halves, one
/// instruction each. Element: float or uint32_t; nothing is computed.
template <class Element>
STAGECOACH_INLINE void transpose_8x8(Element* to, std::int64_t ld_to, const Element* from,
                                     std::int64_t ld_from) {
  static_assert(sizeof(Element) == 4);
  typedef std::uint32_t eight __attribute__((vector_size(32)));
  typedef std::uint32_t loose_eight __attribute__((vector_size(32), aligned(4), may_alias));
  eight a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const loose_eight*>(from + i * ld_from);
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] =
          __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    const eight low = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const eight high = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    *reinterpret_cast<loose_eight*>(to + i * ld_to) = low;
    *reinterpret_cast<loose_eight*>(to + (i + 4) * ld_to) = high;
  }
}

}  // namespace
}  // namespace stagecoach
