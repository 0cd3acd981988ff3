// Matrix products of operands rounded to bf16, with fp32 sums: the work of one task.
//
// One definition for every instruction set, so that bf16 has the same bits on all of them:
//  - An operand is rounded to the nearest bf16, ties to even; what is below the smallest normal
//    number becomes zero, NaN stays NaN.
//  - Two neighbours along the summed dimension are a pair. A sum takes the pairs in order, and of
//    each pair the odd member first:  s = fma(a1, b1, s);  s = fma(a0, b0, s).  Denormal sums
//    become zero. An odd count is filled up with zeros.
// That is what VDPBF16PS computes (96 million sums of small and 48 million of usual size compared:
// none differed), and what the other tables do with two multiply-adds. Whoever uses the native
// table asks agrees_with first.
#pragma once

#include <cstdint>

namespace stagecoach {

/// A product c [rows, columns] = start + a * b of one panel of b, `columns` at most its width.
/// start: c where accumulate, else bias [columns], or 0 where that is null.  With row_factor [rows]
/// the sums start at 0, and c = or += row_factor[row] * sum; bias is null then.
/// Element (row, pair) of a is a[row * a_row + pair * a_pair]; b is a panel [pairs, panel_width].
struct bf16_product {
  float* c;
  std::int64_t ldc;
  const std::uint32_t* a;
  std::int64_t a_row, a_pair;
  const std::uint32_t* b;
  std::int64_t panel_width;  // 16, 32, 48 or 64
  std::int64_t rows, columns, pairs;
  const float* bias;
  bool accumulate;
  const float* row_factor = nullptr;
};

struct bf16_kernels {
  /// to [rows, ld_to] = pairs of neighbours in each row of from [rows, ld], (columns + 1) / 2 each
  void (*pairs_in_rows)(std::uint32_t* to, std::int64_t ld_to, const float* from, std::int64_t ld,
                        std::int64_t rows, std::int64_t columns);
  /// Panel to [(rows + 1) / 2, width] = pairs of rows of from [rows, ld], `columns` of them valid,
  /// the rest 0. Row r is multiplied by factor[r] before it is rounded; factor may be null.
  void (*pairs_of_rows)(std::uint32_t* to, std::int64_t width, const float* from, std::int64_t ld,
                        std::int64_t rows, std::int64_t columns, const float* factor);
  /// The same of what pairs_in_rows gave: from [rows, ld] words, of rows of `columns` numbers. All
  /// panels at once, `step` words apart, so that `from` is read as it lies.
  void (*pairs_across)(std::uint32_t* to, std::int64_t width, std::int64_t step,
                       const std::uint32_t* from, std::int64_t ld, std::int64_t rows,
                       std::int64_t columns);
  /// Panel to [(columns + 1) / 2, width] = pairs_in_rows of from [rows, ld], turned over: row r is
  /// column r of the panel, columns at and beyond `rows` are 0.
  void (*pairs_in_rows_turned)(std::uint32_t* to, std::int64_t width, const float* from,
                               std::int64_t ld, std::int64_t rows, std::int64_t columns);
  void (*product)(const bf16_product& p);
};

extern const bf16_kernels bf16_kernels_avx2;
extern const bf16_kernels bf16_kernels_avx512;
extern const bf16_kernels bf16_kernels_avx512_bf16;

/// True if both give the same bits for a fixed product of all kinds of numbers.
bool agrees_with(const bf16_kernels& a, const bf16_kernels& b);

}  // namespace stagecoach
