// Exponential, logarithm, logistic and GELU: polynomials of our own, for floats and for vectors of
// floats.
//
// libm may not be used for anything that reaches weights: glibc's exp and log change bits with the
// instruction set (DESIGN 4). Here are multiplications, additions, one division and bit moves only,
// in written order, so each instruction set gives the same bits (with -ffp-contract=off).
// Everything is forced inline with internal linkage: the vector files are compiled for newer
// instruction sets than the rest, and a shared out-of-line copy could be theirs and stop an older
// CPU. For that reason this header also includes nothing of the standard library but sizes.
#pragma once

#include <cstdint>

#define STAGECOACH_INLINE static inline __attribute__((always_inline))

namespace stagecoach::math {

/// The integer type with as many lanes as F.
template <class F>
struct lanes {
  using integer = decltype(F{} < F{});  // vector types: a comparison gives it
};
template <>
struct lanes<float> {
  using integer = std::int32_t;
};

/// c in every lane.
template <class F>
STAGECOACH_INLINE F splat(float c) {
  return F{} + c;
}

/// exp(x) within 1.5 ulp; 0 below -87.3 (results under 2^-126 would be denormal, and slow),
/// infinity above 88.73, NaN of NaN.  Source of the polynomial: Moshier, Cephes, expf.c.
template <class F>
STAGECOACH_INLINE F exp(F x) {
  using I = typename lanes<F>::integer;
  const F in = x;
  x = x > splat<F>(89.0f) ? splat<F>(89.0f) : x;
  x = x < splat<F>(-88.0f) ? splat<F>(-88.0f) : x;
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the sum.
  const F magic = splat<F>(12582912.0f);
  const F shifted = x * 1.44269504088896341f + magic;
  const F whole = shifted - magic;
  // ln 2 in two pieces: the first has 9 bits, so whole * piece is exact.
  F r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  // 2^n in two factors, for n = 128 has no float and the product must still reach infinity.
  const I n = __builtin_bit_cast(I, shifted) - 0x4B400000;
  const I half = n >> 1;
  const F low = __builtin_bit_cast(F, (half + 127) << 23);
  const F high = __builtin_bit_cast(F, (n - half + 127) << 23);
  p = p * low * high;
  return in < splat<F>(-87.33654f) ? splat<F>(0.0f) : p;
}

/// log(x) within 1 ulp for normal x > 0; -infinity at 0, NaN below 0, x itself for infinity and
/// NaN. Source of the polynomial: Moshier, Cephes, logf.c.
STAGECOACH_INLINE float log(float x) {
  if (!(x > 0.0f)) return x == 0.0f ? -__builtin_inff() : __builtin_nanf("");
  if (x == __builtin_inff()) return x;
  const std::int32_t bits = __builtin_bit_cast(std::int32_t, x);
  std::int32_t e = (bits >> 23) - 126;
  float m = __builtin_bit_cast(float, (bits & 0x007FFFFF) | 0x3F000000);  // [0.5, 1)
  if (m < 0.707106781186547524f) {
    e -= 1;
    m = m + m - 1.0f;
  } else {
    m = m - 1.0f;
  }
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  const float whole = static_cast<float>(e);
  p = p + whole * -2.12194440e-4f;
  p = p - 0.5f * z;
  float result = m + p;
  return result + whole * 0.693359375f;
}

// GELU, tanh form: 0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3)  (Hendrycks, Gimpel
// 2016). 0.5 (1 + tanh(u)) is the logistic function of 2u: one exponential, and no cancellation
// where tanh comes near -1.
inline constexpr float gelu_2k = 1.5957691216057308f;  // 2 sqrt(2/pi)
inline constexpr float gelu_cubic = 0.044715f;
inline constexpr float gelu_exponent_max = 80.0f;  // e and 1/(1+e) both stay normal

template <class F>
STAGECOACH_INLINE F gelu(F x) {
  const F t = (x * x * gelu_cubic + 1.0f) * x * -gelu_2k;  // -2u
  const F e = exp(t > splat<F>(gelu_exponent_max) ? splat<F>(gelu_exponent_max) : t);
  return x / (e + 1.0f);
}

template <class F>
STAGECOACH_INLINE F gelu_slope(F x) {
  const F square = x * x;
  const F t = (square * gelu_cubic + 1.0f) * x * -gelu_2k;
  const F e = exp(t > splat<F>(gelu_exponent_max) ? splat<F>(gelu_exponent_max) : t);
  const F s = splat<F>(1.0f) / (e + 1.0f);
  // s + x s (1-s) d(2u)/dx;  1-s is e*s, exact where s is near 1.
  const F du = (square * (3.0f * gelu_cubic) + 1.0f) * gelu_2k;
  return s + x * s * (e * s) * du;
}

}  // namespace stagecoach::math
