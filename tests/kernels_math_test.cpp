#include "kernels/math.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>

using namespace stagecoach;

namespace {

double ulps(float got, double want) {
  const float rounded = static_cast<float>(want);
  const double ulp = std::abs(static_cast<double>(std::nextafter(rounded, INFINITY)) - rounded);
  return std::abs(got - want) / ulp;
}

}  // namespace

TEST_CASE("exp is within 1.5 ulp where the result is a normal number") {
  double worst = 0;
  for (double x = -87.33; x < 88.72; x += 0.000731) {
    const float f = static_cast<float>(x);
    worst = std::max(worst, ulps(math::exp(f), std::exp(static_cast<double>(f))));
  }
  MESSAGE("worst ", worst);
  CHECK(worst < 1.5);
}

TEST_CASE("exp has exact ends: 1 at 0, 0 far below, infinity far above, NaN of NaN") {
  CHECK(math::exp(0.0f) == 1.0f);
  CHECK(math::exp(-0.0f) == 1.0f);
  CHECK(math::exp(-87.4f) == 0.0f);
  CHECK(math::exp(-INFINITY) == 0.0f);
  CHECK(math::exp(-1e30f) == 0.0f);
  CHECK(math::exp(88.8f) == INFINITY);
  CHECK(math::exp(INFINITY) == INFINITY);
  CHECK(std::isnan(math::exp(NAN)));
}

TEST_CASE("log is within 1 ulp, or 1e-7 absolute next to 1") {
  double worst = 0;
  for (double x = 1e-30; x < 1e30; x *= 1.00037) {
    const float f = static_cast<float>(x);
    const double want = std::log(static_cast<double>(f));
    if (std::abs(math::log(f) - want) > 1e-9) worst = std::max(worst, ulps(math::log(f), want));
  }
  MESSAGE("worst ", worst);
  CHECK(worst < 1.0);
  CHECK(math::log(1.0f) == 0.0f);
  CHECK(math::log(0.0f) == -INFINITY);
  CHECK(math::log(INFINITY) == INFINITY);
  CHECK(std::isnan(math::log(-1.0f)));
  CHECK(std::isnan(math::log(NAN)));
}

TEST_CASE("gelu and its slope are within 4e-7 of the tanh form, also in the tails") {
  const double k = std::sqrt(2 / M_PI);
  for (double x = -12; x < 12; x += 0.00117) {
    const float f = static_cast<float>(x);
    const double w = f, t = std::tanh(k * (w + 0.044715 * w * w * w));
    const double slope = 0.5 * (1 + t) + 0.5 * w * (1 - t * t) * k * (1 + 3 * 0.044715 * w * w);
    CHECK(std::abs(math::gelu(f) - 0.5 * w * (1 + t)) <= 4e-7 * std::max(1.0, std::abs(w)));
    CHECK(std::abs(math::gelu_slope(f) - slope) <= 4e-7);
  }
  CHECK(math::gelu(-1e4f) == doctest::Approx(0).epsilon(1e-20));
  CHECK(math::gelu(1e4f) == 1e4f);
  CHECK(math::gelu_slope(1e4f) == 1.0f);
  CHECK(std::isnan(math::gelu(NAN)));
}

TEST_CASE("vectors give the bits of scalars") {
  typedef float vector __attribute__((vector_size(64)));
  for (int start = -1000; start < 1000; ++start) {
    vector x;
    for (int i = 0; i < 16; ++i)
      x[i] = static_cast<float>(start) * 0.11f + static_cast<float>(i) * 0.0061f;
    const vector e = math::exp(x), g = math::gelu(x), s = math::gelu_slope(x);
    for (int i = 0; i < 16; ++i) {
      CHECK(e[i] == math::exp(float{x[i]}));
      CHECK(g[i] == math::gelu(float{x[i]}));
      CHECK(s[i] == math::gelu_slope(float{x[i]}));
    }
  }
}
