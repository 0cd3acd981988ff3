// Every operation of kernels/backend.hpp again, in fp64 with the standard library, straight from
// the formulas: what the tests compare with. Shares no code with any backend.
//
// Also the tests' tensors: filled with NaN before use, misaligned on purpose, with guards on both
// sides.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.hpp"

namespace stagecoach::oracle {

using doubles = std::vector<double>;

/// A tensor `shift` floats away from a 64-byte border; poisoned with NaN; its guards must stay
/// untouched.
class tensor {
 public:
  explicit tensor(std::int64_t count, std::int64_t shift = 0)
      : count_(count), shift_(shift), store_(count + shift + 2 * guard + 16) {
    const auto address = reinterpret_cast<std::uintptr_t>(store_.data() + guard);
    aligned_ = guard + ((64 - address % 64) % 64) / 4;
    for (float& x : store_) x = sentinel;
    for (std::int64_t i = 0; i < count; ++i) data()[i] = NAN;
  }
  tensor(const tensor&) = delete;  // a copy would be aligned differently
  tensor(tensor&& other) = default;

  float* data() { return store_.data() + aligned_ + shift_; }
  const float* data() const { return store_.data() + aligned_ + shift_; }
  operator float*() { return data(); }
  operator const float*() const { return data(); }
  float& operator[](std::int64_t i) { return data()[i]; }
  float operator[](std::int64_t i) const { return data()[i]; }
  std::int64_t count() const { return count_; }
  doubles wide() const { return doubles(data(), data() + count_); }

  bool has_intact_guards() const {
    const float* begin = data();
    for (const float* p = store_.data(); p < store_.data() + store_.size(); ++p)
      if ((p < begin || p >= begin + count_) && *p != sentinel) return false;
    return true;
  }
  bool same_bits(const tensor& other) const {
    return count_ == other.count_ && std::memcmp(data(), other.data(), sizeof(float) * count_) == 0;
  }
  void assign(const tensor& other) { std::memcpy(data(), other.data(), sizeof(float) * count_); }
  void poison() {
    for (std::int64_t i = 0; i < count_; ++i) data()[i] = NAN;
  }

 private:
  static constexpr std::int64_t guard = 32;
  static constexpr float sentinel = 1234.5f;
  std::int64_t count_, shift_, aligned_ = 0;
  std::vector<float> store_;
};

/// Fresh normal values.
inline tensor normal(std::mt19937& generator, std::int64_t count, double scale = 1,
                     std::int64_t shift = 0) {
  tensor t(count, shift);
  std::normal_distribution<double> distribution(0, scale);
  for (std::int64_t i = 0; i < count; ++i) t[i] = static_cast<float>(distribution(generator));
  return t;
}

inline std::vector<std::int32_t> random_tokens(std::mt19937& generator, std::int64_t count,
                                               std::int64_t vocab) {
  std::uniform_int_distribution<std::int32_t> uniform(0, static_cast<std::int32_t>(vocab - 1));
  std::vector<std::int32_t> tokens(count);
  for (auto& token : tokens) token = uniform(generator);
  return tokens;
}

/// Largest difference over the largest wanted magnitude; infinite if anything is not a number or a
/// guard was written.
inline double max_error(const tensor& got, const doubles& want) {
  if (got.count() != static_cast<std::int64_t>(want.size()) || !got.has_intact_guards())
    return INFINITY;
  double largest = 1e-30, worst = 0;
  for (double w : want) largest = std::max(largest, std::abs(w));
  for (std::int64_t i = 0; i < got.count(); ++i) {
    if (!std::isfinite(got[i])) return INFINITY;
    worst = std::max(worst, std::abs(got[i] - want[i]));
  }
  return worst / largest;
}

// ---- formulas -------------------------------------------------------------------------------

/// y [M,N] = a [M,K] * b [K,N], with either operand stored transposed.
inline doubles product(const doubles& a, const doubles& b, std::int64_t m, std::int64_t k,
                       std::int64_t n, bool a_transposed = false, bool b_transposed = false) {
  doubles y(m * n);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t l = 0; l < k; ++l) {
      const double x = a_transposed ? a[l * m + i] : a[i * k + l];
      for (std::int64_t j = 0; j < n; ++j)
        y[i * n + j] += x * (b_transposed ? b[j * k + l] : b[l * n + j]);
    }
  return y;
}

inline doubles column_sums(const doubles& a, std::int64_t m, std::int64_t n) {
  doubles y(n);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) y[j] += a[i * n + j];
  return y;
}

inline doubles layernorm(const doubles& x, const doubles& gain, const doubles& bias, std::int64_t m,
                         std::int64_t c, doubles* mean = nullptr, doubles* rstd = nullptr) {
  doubles y(m * c);
  for (std::int64_t i = 0; i < m; ++i) {
    double mu = 0, variance = 0;
    for (std::int64_t j = 0; j < c; ++j) mu += x[i * c + j] / static_cast<double>(c);
    for (std::int64_t j = 0; j < c; ++j)
      variance += (x[i * c + j] - mu) * (x[i * c + j] - mu) / static_cast<double>(c);
    const double r = 1 / std::sqrt(variance + 1e-5);
    for (std::int64_t j = 0; j < c; ++j) y[i * c + j] = (x[i * c + j] - mu) * r * gain[j] + bias[j];
    if (mean != nullptr) mean->push_back(mu);
    if (rstd != nullptr) rstd->push_back(r);
  }
  return y;
}

/// Gradients of sum(dy * layernorm(x)): {dx, dgain, dbias}.
struct layernorm_gradients {
  doubles dx, dgain, dbias;
};
inline layernorm_gradients layernorm_backward(const doubles& dy, const doubles& x,
                                              const doubles& gain, std::int64_t m, std::int64_t c) {
  doubles mean, rstd;
  layernorm(x, gain, doubles(c), m, c, &mean, &rstd);
  layernorm_gradients g{doubles(m * c), doubles(c), doubles(c)};
  for (std::int64_t i = 0; i < m; ++i) {
    double a = 0, b = 0;
    for (std::int64_t j = 0; j < c; ++j) {
      const double normal = (x[i * c + j] - mean[i]) * rstd[i], d = dy[i * c + j];
      g.dgain[j] += d * normal;
      g.dbias[j] += d;
      a += d * gain[j] / static_cast<double>(c);
      b += d * gain[j] * normal / static_cast<double>(c);
    }
    for (std::int64_t j = 0; j < c; ++j)
      g.dx[i * c + j] =
          rstd[i] * (dy[i * c + j] * gain[j] - a - (x[i * c + j] - mean[i]) * rstd[i] * b);
  }
  return g;
}

inline double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
inline double gelu_slope(double x) {
  const double k = std::sqrt(2 / M_PI), t = std::tanh(k * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x);
}

inline doubles attention(const doubles& qkv, attention_shape s, doubles* lse = nullptr) {
  const std::int64_t c = s.channels, d = c / s.n_head, t = s.tokens;
  doubles out(s.batch * t * c), p(t);
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t h = 0; h < s.n_head; ++h)
      for (std::int64_t i = 0; i < t; ++i) {
        double max = -INFINITY, sum = 0;
        for (std::int64_t j = 0; j <= i; ++j) {
          p[j] = 0;
          for (std::int64_t l = 0; l < d; ++l)
            p[j] += qkv[(b * t + i) * 3 * c + h * d + l] * qkv[(b * t + j) * 3 * c + c + h * d + l];
          p[j] /= std::sqrt(static_cast<double>(d));
          max = std::max(max, p[j]);
        }
        for (std::int64_t j = 0; j <= i; ++j) sum += std::exp(p[j] - max);
        if (lse != nullptr) lse->push_back(max + std::log(sum));
        for (std::int64_t j = 0; j <= i; ++j)
          for (std::int64_t l = 0; l < d; ++l)
            out[(b * t + i) * c + h * d + l] +=
                std::exp(p[j] - max) / sum * qkv[(b * t + j) * 3 * c + 2 * c + h * d + l];
      }
  return out;
}

inline doubles attention_backward(const doubles& dout, const doubles& qkv, attention_shape s) {
  const std::int64_t c = s.channels, d = c / s.n_head, t = s.tokens;
  doubles lse;
  const doubles out = attention(qkv, s, &lse);
  doubles dqkv(s.batch * t * 3 * c);
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t h = 0; h < s.n_head; ++h)
      for (std::int64_t i = 0; i < t; ++i) {
        const std::int64_t o = (b * t + i) * c + h * d, q = (b * t + i) * 3 * c + h * d;
        double delta = 0;
        for (std::int64_t l = 0; l < d; ++l) delta += dout[o + l] * out[o + l];
        for (std::int64_t j = 0; j <= i; ++j) {
          const std::int64_t k = (b * t + j) * 3 * c + c + h * d, v = k + c;
          double score = 0, dp = 0;
          for (std::int64_t l = 0; l < d; ++l) {
            score += qkv[q + l] * qkv[k + l] * scale;
            dp += dout[o + l] * qkv[v + l];
          }
          const double p = std::exp(score - lse[(b * s.n_head + h) * t + i]);
          const double ds = p * (dp - delta) * scale;
          for (std::int64_t l = 0; l < d; ++l) {
            dqkv[q + l] += ds * qkv[k + l];
            dqkv[k + l] += ds * qkv[q + l];
            dqkv[v + l] += p * dout[o + l];
          }
        }
      }
  return dqkv;
}

/// Sum over rows of -log softmax(target); fills probabilities [M,V] if asked.
inline double cross_entropy(const doubles& logits, const std::vector<std::int32_t>& targets,
                            std::int64_t rows, std::int64_t vocab,
                            doubles* probabilities = nullptr) {
  double loss = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    double max = -INFINITY, sum = 0;
    for (std::int64_t j = 0; j < vocab; ++j) max = std::max(max, logits[i * vocab + j]);
    for (std::int64_t j = 0; j < vocab; ++j) sum += std::exp(logits[i * vocab + j] - max);
    loss += max + std::log(sum) - logits[i * vocab + targets[i]];
    if (probabilities != nullptr)
      for (std::int64_t j = 0; j < vocab; ++j)
        probabilities->push_back(std::exp(logits[i * vocab + j] - max) / sum);
  }
  return loss;
}

/// Gradient of f at x by central differences in fp64: h = 1e-5 leaves an error of about 1e-9.
template <class F>
doubles numeric_gradient(F f, doubles x) {
  doubles g(x.size());
  const double h = 1e-5;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double keep = x[i];
    x[i] = keep + h;
    const double above = f(x);
    x[i] = keep - h;
    g[i] = (above - f(x)) / (2 * h);
    x[i] = keep;
  }
  return g;
}

inline double dot(const doubles& a, const doubles& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace stagecoach::oracle
