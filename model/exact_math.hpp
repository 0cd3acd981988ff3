// Elementary functions whose bits are the same on every IEEE machine.
//
// Only + - * / on doubles in a fixed order: libm picks another algorithm by instruction set, and
// one changed bit in a learning rate or an initial value changes every hash after it (DESIGN 4
// "Arithmetic"). Errors are a few units in the last place. Not for tensors: slow and in double.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace stagecoach::exact {

namespace series {
// Reciprocals, rounded once by the compiler: a division per term would cost more than all the rest.
template <int first, int last, class F>
constexpr std::array<double, (first - last) / 2 + 1> reciprocals(F of) {
  std::array<double, (first - last) / 2 + 1> list{};
  for (int k = first, i = 0; k >= last; k -= 2) list[static_cast<std::size_t>(i++)] = 1.0 / of(k);
  return list;
}
inline constexpr auto odd = reciprocals<23, 3>([](int k) { return k; });
inline constexpr auto sine = reciprocals<18, 2>([](int k) { return k * (k + 1); });
inline constexpr auto cosine = reciprocals<17, 1>([](int k) { return k * (k + 1); });
}  // namespace series

/// Natural logarithm of a positive normal number.
/// x = m * 2^e with m in [0.70, 1.42]; log m = 2 atanh f, f = (m-1)/(m+1), |f| < 0.172.
inline double log(double x) {
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(x);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  double m = std::bit_cast<double>((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    exponent += 1;
  }
  const double f = (m - 1.0) / (m + 1.0);
  const double f2 = f * f;
  double tail = 0;  // f^2/3 + f^4/5 + ...; the first term left out is below 2^-56 of the sum
  for (const double c : series::odd) tail = (tail + c) * f2;
  // ln 2 in two parts: the first has 32 trailing zero bits, so that exponent * part is exact.
  constexpr double ln2_high = 0x1.62e42feep-1;
  constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  return exponent * ln2_high + (2.0 * f + (2.0 * f * tail + exponent * ln2_low));
}

/// e^x for x in [-700, 700]; 0 below.
inline double exp(double x) {
  if (!(x >= -700.0)) return x != x ? x : 0.0;
  if (x > 700.0) x = 700.0;
  const double scaled = x * 1.4426950408889634;
  const int n = static_cast<int>(scaled + (scaled < 0 ? -0.5 : 0.5));
  constexpr double ln2_high = 0x1.62e42feep-1;
  constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  const double r = (x - n * ln2_high) - n * ln2_low;  // |r| < 0.35
  double sum = 1.0;                                   // Horner: 1 + r(1 + r/2(1 + r/3(...)))
  for (int k = 14; k >= 1; --k) sum = 1.0 + sum * r / k;
  return sum * std::bit_cast<double>(static_cast<std::uint64_t>(n + 1023) << 52);
}

struct sine_cosine {
  double sine, cosine;
};

/// Sine and cosine of a fraction of a full turn, 0 <= turns <= 1. The reduction to an eighth of a
/// turn is exact, because it takes away a multiple of a quarter.
inline sine_cosine of_turns(double turns) {
  const int quarter = static_cast<int>(turns * 4.0 + 0.5);
  const double x = (turns - quarter * 0.25) * 6.283185307179586;  // |x| <= pi/4
  const double x2 = x * x;
  double sine = 1.0;  // Taylor, Horner form; the first terms left out are below 1e-17
  for (const double c : series::sine) sine = 1.0 - sine * (x2 * c);
  sine *= x;
  double cosine = 1.0;
  for (const double c : series::cosine) cosine = 1.0 - cosine * (x2 * c);
  switch (quarter & 3) {
    case 0:
      return {sine, cosine};
    case 1:
      return {cosine, -sine};
    case 2:
      return {-sine, -cosine};
    default:
      return {-cosine, sine};
  }
}

/// base^exponent by squaring: about 2 log2(exponent) multiplications in an order that the exponent
/// alone fixes.
inline double power(double base, std::uint64_t exponent) {
  double result = 1.0;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

}  // namespace stagecoach::exact
