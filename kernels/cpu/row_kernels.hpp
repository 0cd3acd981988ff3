// Everything of the CPU backend that is no matrix product: rows, columns and elements of one task.
//
// One source (row_kernels_body.hpp), compiled once per instruction set; the table is chosen at run
// time. Sums run in 16 or 64 fixed lanes and a fixed tree whatever the width of the machine's
// vectors, so each table gives the same bits. Nothing here knows threads. Pointers may have any
// alignment of a float.
#pragma once

#include <cstdint>

namespace stagecoach {

/// adamw_scalars without the header that brings the standard library (see math.hpp).
struct adamw_factors {
  float lr, beta1, beta2, eps, weight_decay, bias1, bias2, grad_scale;
};

struct row_kernels {
  /// y [rows, ld] += bias [columns]
  void (*add_bias)(float* y, std::int64_t ld, const float* bias, std::int64_t rows,
                   std::int64_t columns);
  /// out [columns] = or += sums over m rows of x [m, ld], in blocks of 64 rows
  void (*column_sums)(float* out, const float* x, std::int64_t ld, std::int64_t m,
                      std::int64_t columns, bool accumulate);

  void (*layernorm_forward)(float* y, float* mean, float* rstd, const float* x, const float* gain,
                            const float* bias, std::int64_t rows, std::int64_t c);
  void (*layernorm_backward_input)(float* dx, const float* residual, const float* dy,
                                   const float* x, const float* gain, const float* mean,
                                   const float* rstd, std::int64_t rows, std::int64_t c);
  /// Like column_sums, of dy * normalised x and of dy; dy and x are [m, ld].
  void (*layernorm_backward_weight)(float* dgain, float* dbias, const float* dy, const float* x,
                                    const float* mean, const float* rstd, std::int64_t ld,
                                    std::int64_t m, std::int64_t columns, bool accumulate);

  void (*gelu_forward)(float* y, const float* x, std::int64_t count);
  void (*gelu_backward)(float* dx, const float* dy, const float* x, std::int64_t count);
  void (*add)(float* y, const float* a, const float* b, std::int64_t count);
  /// y += factor * x, rounded twice
  void (*add_scaled)(float* y, const float* x, float factor, std::int64_t count);

  /// Scores [rows, ld] become exp(score - maximum); row i has first_valid + i columns, the rest up
  /// to `columns` become 0. inverse [rows] = 1 / sum; lse [rows] = maximum + log(sum).
  void (*causal_softmax)(float* scores, std::int64_t ld, std::int64_t rows, std::int64_t columns,
                         std::int64_t first_valid, float* inverse, float* lse);
  /// x [rows, ld] row i *= factor[i]
  void (*scale_rows)(float* x, std::int64_t ld, const float* factor, std::int64_t rows,
                     std::int64_t columns);
  /// Scores become p = exp(score - lse), dp becomes scale * p * (dp - delta), delta = dot(dout,
  /// out) of the row (both [rows, ld_out], d columns). Beyond the valid columns both become 0.
  void (*causal_softmax_backward)(float* scores, float* dp, std::int64_t ld, std::int64_t rows,
                                  std::int64_t columns, std::int64_t first_valid, const float* lse,
                                  const float* dout, const float* out, std::int64_t ld_out,
                                  std::int64_t d, float scale);

  /// Per row of logits [rows, ld]: the maximum of `columns` values and the sum of exp(logit -
  /// maximum).
  void (*softmax_stats)(float* max, float* sum, const float* logits, std::int64_t ld,
                        std::int64_t rows, std::int64_t columns);
  /// The same, and logits [rows, ld] become exp(logit - maximum).
  void (*softmax_exponentials)(float* max, float* sum, float* logits, std::int64_t ld,
                               std::int64_t rows, std::int64_t columns);
  /// logits [rows, ld] become exp(logit - max[i]) * factor[i]
  void (*softmax_gradient)(float* logits, std::int64_t ld, const float* max, const float* factor,
                           std::int64_t rows, std::int64_t columns);

  /// to [columns, ld_to] = from [rows, ld_from] turned over
  void (*transpose)(float* to, std::int64_t ld_to, const float* from, std::int64_t ld_from,
                    std::int64_t rows, std::int64_t columns);
  /// fp64; count at most a block of kernels/fixed_order.hpp
  double (*sum_of_squares)(const float* x, std::int64_t count);
  void (*adamw)(float* param, float* m, float* v, const float* grad, std::int64_t count,
                adamw_factors f);
};

extern const row_kernels row_kernels_avx2;
extern const row_kernels row_kernels_avx512;

}  // namespace stagecoach
