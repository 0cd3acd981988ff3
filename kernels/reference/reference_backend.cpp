// The definition of every operation: plain loops on one thread, fp32 storage, sums in fp64 and
// rounded once.
//
// The oracle for the other backends, and enough for tests of small models. It takes the exponential
// and logarithm of kernels/math.hpp and the orders of kernels/fixed_order.hpp, no library.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "config/result.hpp"
#include "kernels/backend.hpp"
#include "kernels/fixed_order.hpp"
#include "kernels/math.hpp"

namespace stagecoach {
namespace {

constexpr double layernorm_eps = 1e-5;

/// out[j] = or += sum, for a row of fp64 sums.
void store(float* out, const std::vector<double>& sums, bool accumulate) {
  for (std::size_t j = 0; j < sums.size(); ++j)
    out[j] = accumulate ? out[j] + static_cast<float>(sums[j]) : static_cast<float>(sums[j]);
}

/// To the nearest bf16, ties to even; below the smallest normal number to zero.
float round_to(precision p, float x) {
  if (p == precision::fp32 || std::isnan(x)) return x;
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7F800000) == 0) bits &= 0x80000000;
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}
std::vector<float> rounded(precision p, const float* x, std::int64_t count) {
  std::vector<float> to(x, x + count);
  for (float& value : to) value = round_to(p, value);
  return to;
}

double dot(const float* a, const float* b, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += double{a[i]} * b[i];
  return sum;
}

/// sums += factor * row
void add_scaled(std::vector<double>& sums, double factor, const float* row) {
  for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += factor * double{row[j]};
}

class reference_backend final : public backend {
 public:
  std::string name() const override { return "reference"; }

  void linear_forward(float* y, const float* x, const float* w, const float* bias, std::int64_t m,
                      std::int64_t k, std::int64_t n, precision p) override {
    if (p != precision::fp32)
      return linear_forward(y, rounded(p, x, m * k).data(), rounded(p, w, k * n).data(), bias, m, k,
                            n, precision::fp32);
    std::vector<double> sums(n);
    for (std::int64_t i = 0; i < m; ++i) {
      sums.assign(n, 0);
      for (std::int64_t l = 0; l < k; ++l) add_scaled(sums, x[i * k + l], w + l * n);
      if (bias != nullptr) add_scaled(sums, 1, bias);
      store(y + i * n, sums, false);
    }
  }

  void linear_backward_input(float* dx, const float* dy, const float* w, std::int64_t m,
                             std::int64_t k, std::int64_t n, precision p) override {
    if (p != precision::fp32)
      return linear_backward_input(dx, rounded(p, dy, m * n).data(), rounded(p, w, k * n).data(), m,
                                   k, n, precision::fp32);
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t l = 0; l < k; ++l)
        dx[i * k + l] = static_cast<float>(dot(dy + i * n, w + l * n, n));
  }

  void linear_backward_weight(float* dw, float* dbias, const float* x, const float* dy,
                              std::int64_t m, std::int64_t k, std::int64_t n, bool accumulate,
                              precision p) override {
    const std::vector<float> left = rounded(p, x, m * k), right = rounded(p, dy, m * n);
    std::vector<double> sums(n);
    for (std::int64_t l = 0; l < k; ++l) {
      sums.assign(n, 0);
      for (std::int64_t i = 0; i < m; ++i) add_scaled(sums, left[i * k + l], right.data() + i * n);
      store(dw + l * n, sums, accumulate);
    }
    if (dbias == nullptr) return;
    sums.assign(n, 0);
    for (std::int64_t i = 0; i < m; ++i) add_scaled(sums, 1, dy + i * n);
    store(dbias, sums, accumulate);
  }

  void layernorm_forward(float* y, float* mean, float* rstd, const float* x, const float* gain,
                         const float* bias, std::int64_t m, std::int64_t c) override {
    for (std::int64_t i = 0; i < m; ++i) {
      const float* row = x + i * c;
      double sum = 0;
      for (std::int64_t j = 0; j < c; ++j) sum += double{row[j]};
      const double middle = sum / static_cast<double>(c);
      double squares = 0;
      for (std::int64_t j = 0; j < c; ++j) squares += (row[j] - middle) * (row[j] - middle);
      const double inverse = 1 / std::sqrt(squares / static_cast<double>(c) + layernorm_eps);
      for (std::int64_t j = 0; j < c; ++j)
        y[i * c + j] = static_cast<float>((row[j] - middle) * inverse * gain[j] + bias[j]);
      mean[i] = static_cast<float>(middle);
      rstd[i] = static_cast<float>(inverse);
    }
  }

  void layernorm_backward_input(float* dx, const float* residual, const float* dy, const float* x,
                                const float* gain, const float* mean, const float* rstd,
                                std::int64_t m, std::int64_t c) override {
    for (std::int64_t i = 0; i < m; ++i) {
      double sum = 0, product = 0;  // of g = gain * dy, and of g * xhat
      const auto normal = [&](std::int64_t j) {
        return (double{x[i * c + j]} - mean[i]) * rstd[i];
      };
      const auto g = [&](std::int64_t j) { return double{gain[j]} * dy[i * c + j]; };
      for (std::int64_t j = 0; j < c; ++j) {
        sum += g(j);
        product += g(j) * normal(j);
      }
      sum /= static_cast<double>(c);
      product /= static_cast<double>(c);
      for (std::int64_t j = 0; j < c; ++j) {
        const double through = (g(j) - sum - normal(j) * product) * rstd[i];
        const double before = residual != nullptr ? double{residual[i * c + j]} : 0.0;
        dx[i * c + j] = static_cast<float>(before + through);
      }
    }
  }

  void layernorm_backward_weight(float* dgain, float* dbias, const float* dy, const float* x,
                                 const float* mean, const float* rstd, std::int64_t m,
                                 std::int64_t c, bool accumulate) override {
    std::vector<double> gains(c), biases(c);
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < c; ++j) {
        gains[j] += double{dy[i * c + j]} * ((double{x[i * c + j]} - mean[i]) * rstd[i]);
        biases[j] += double{dy[i * c + j]};
      }
    store(dgain, gains, accumulate);
    store(dbias, biases, accumulate);
  }

  void gelu_forward(float* y, const float* x, std::int64_t count) override {
    for (std::int64_t i = 0; i < count; ++i) y[i] = math::gelu(x[i]);
  }

  void gelu_backward(float* dx, const float* dy, const float* x, std::int64_t count) override {
    for (std::int64_t i = 0; i < count; ++i) dx[i] = dy[i] * math::gelu_slope(x[i]);
  }

  void add(float* y, const float* a, const float* b, std::int64_t count) override {
    for (std::int64_t i = 0; i < count; ++i) y[i] = a[i] + b[i];
  }

  void attention_forward(float* out, float* lse, const float* unrounded, attention_shape s,
                         precision kind) override {
    const std::int64_t c = s.channels, d = c / s.n_head, t = s.tokens;
    const double scale = 1 / std::sqrt(static_cast<double>(d));
    const std::vector<float> operands = rounded(kind, unrounded, s.batch * t * 3 * c);
    const float* qkv = operands.data();
    std::vector<float> p(t);
    std::vector<double> sums(d);
    for (std::int64_t b = 0; b < s.batch; ++b)
      for (std::int64_t h = 0; h < s.n_head; ++h)
        for (std::int64_t i = 0; i < t; ++i) {
          const float* q = qkv + (b * t + i) * 3 * c + h * d;
          const float* k = qkv + b * t * 3 * c + c + h * d;
          const float* v = k + c;
          float max = -INFINITY;
          for (std::int64_t j = 0; j <= i; ++j) {
            p[j] = static_cast<float>(dot(q, k + j * 3 * c, d) * scale);
            if (p[j] > max) max = p[j];
          }
          double sum = 0;
          sums.assign(d, 0);
          for (std::int64_t j = 0; j <= i; ++j) {
            const float e = math::exp(p[j] - max);
            sum += double{e};
            add_scaled(sums, round_to(kind, e), v + j * 3 * c);
          }
          for (double& x : sums) x /= sum;
          store(out + (b * t + i) * c + h * d, sums, false);
          lse[(b * s.n_head + h) * t + i] = max + math::log(static_cast<float>(sum));
        }
  }

  void attention_backward(float* dqkv, const float* dout, const float* unrounded, const float* out,
                          const float* lse, attention_shape s, precision kind) override {
    const std::int64_t c = s.channels, d = c / s.n_head, t = s.tokens;
    const std::vector<float> operands = rounded(kind, unrounded, s.batch * t * 3 * c);
    const std::vector<float> slopes = rounded(kind, dout, s.batch * t * c);
    const float* qkv = operands.data();
    const double scale = 1 / std::sqrt(static_cast<double>(d));
    std::vector<double> dq(d), dk(t * d), dv(t * d);
    for (std::int64_t b = 0; b < s.batch; ++b)
      for (std::int64_t h = 0; h < s.n_head; ++h) {
        dk.assign(t * d, 0);
        dv.assign(t * d, 0);
        for (std::int64_t i = 0; i < t; ++i) {
          const std::int64_t at = (b * t + i) * c + h * d;
          const float* q = qkv + (b * t + i) * 3 * c + h * d;
          const double delta = dot(dout + at, out + at, d);
          dq.assign(d, 0);
          for (std::int64_t j = 0; j <= i; ++j) {
            const float* k = qkv + (b * t + j) * 3 * c + c + h * d;
            const float score = static_cast<float>(dot(q, k, d) * scale);
            const double p = math::exp(score - lse[(b * s.n_head + h) * t + i]);
            const double exact = p * (dot(slopes.data() + at, k + c, d) - delta) * scale;
            const bool is_exact = kind == precision::fp32;
            const double ds = is_exact ? exact : round_to(kind, static_cast<float>(exact));
            const double weight = is_exact ? p : round_to(kind, static_cast<float>(p));
            add_scaled(dq, ds, k);
            for (std::int64_t l = 0; l < d; ++l) {
              dk[j * d + l] += ds * q[l];
              dv[j * d + l] += weight * slopes[at + l];
            }
          }
          store(dqkv + (b * t + i) * 3 * c + h * d, dq, false);
        }
        for (std::int64_t j = 0; j < t; ++j)
          for (std::int64_t l = 0; l < d; ++l) {
            float* to = dqkv + (b * t + j) * 3 * c + c + h * d + l;
            to[0] = static_cast<float>(dk[j * d + l]);
            to[c] = static_cast<float>(dv[j * d + l]);
          }
      }
  }

  void embedding_forward(float* y, const std::int32_t* tokens, const float* wte, const float* wpe,
                         std::int64_t batch, std::int64_t t, std::int64_t c) override {
    for (std::int64_t row = 0; row < batch * t; ++row)
      for (std::int64_t j = 0; j < c; ++j)
        y[row * c + j] = wte[tokens[row] * c + j] + wpe[row % t * c + j];
  }

  void embedding_backward(float* dwte, float* dwpe, const float* dy, const std::int32_t* tokens,
                          std::int64_t batch, std::int64_t t, std::int64_t c, std::int64_t vocab,
                          std::int64_t context_rows, bool accumulate) override {
    if (!accumulate) {
      std::memset(dwte, 0, sizeof(float) * vocab * c);
      std::memset(dwpe, 0, sizeof(float) * context_rows * c);
    }
    for (std::int64_t row = 0; row < batch * t; ++row)
      for (std::int64_t j = 0; j < c; ++j) {
        dwte[tokens[row] * c + j] += dy[row * c + j];
        dwpe[row % t * c + j] += dy[row * c + j];
      }
  }

  double head_forward(float* logits, float* stats, const float* x, const float* wte,
                      const std::int32_t* targets, head_shape s, precision p) override {
    head_logits(logits, x, wte, s, p);
    const std::int64_t n = head_block_count(s.vocab);
    std::vector<softmax_part> parts(n);
    std::vector<float> losses(s.rows);
    for (std::int64_t i = 0; i < s.rows; ++i) {
      const float* row = logits + i * s.vocab;
      for (std::int64_t b = 0; b < n; ++b) {
        const index_range block = block_of(s.vocab, b, n);
        float max = -INFINITY;
        for (std::int64_t j = block.begin; j < block.end; ++j)
          if (row[j] > max) max = row[j];
        double sum = 0;
        for (std::int64_t j = block.begin; j < block.end; ++j)
          sum += double{math::exp(row[j] - max)};
        parts[b] = {max, static_cast<float>(sum)};
      }
      const softmax_part whole = merge_tree(parts.data(), n, merge_softmax);
      stats[i] = whole.max;
      stats[s.rows + i] = whole.sum;
      losses[i] = row_loss(whole, row[targets[i]]);
    }
    std::vector<double> blocks((s.rows + loss_block_rows - 1) / loss_block_rows);
    return sum_losses(losses.data(), s.rows, blocks.data());
  }

  void head_backward_input(float* dx, float* logits, const float* stats, const float* wte,
                           const std::int32_t* targets, float scale, head_shape s,
                           precision p) override {
    const std::int64_t n = head_block_count(s.vocab);
    const std::vector<float> weights = rounded(p, wte, s.vocab * s.channels);
    std::vector<float> parts(n);
    std::vector<double> sums(s.channels);
    std::vector<std::vector<float>> partial(n, std::vector<float>(s.channels));
    for (std::int64_t i = 0; i < s.rows; ++i) {
      float* row = logits + i * s.vocab;
      const float factor = scale / stats[s.rows + i];
      for (std::int64_t j = 0; j < s.vocab; ++j) row[j] = math::exp(row[j] - stats[i]) * factor;
      row[targets[i]] -= scale;
      for (std::int64_t b = 0; b < n; ++b) {
        const index_range block = block_of(s.vocab, b, n);
        sums.assign(s.channels, 0);
        for (std::int64_t j = block.begin; j < block.end; ++j)
          add_scaled(sums, round_to(p, row[j]), weights.data() + j * s.channels);
        store(partial[b].data(), sums, false);
      }
      for (std::int64_t l = 0; l < s.channels; ++l) {
        for (std::int64_t b = 0; b < n; ++b) parts[b] = partial[b][l];
        dx[i * s.channels + l] =
            merge_tree(parts.data(), n, [](float a, float b) { return a + b; });
      }
    }
  }

  void head_backward_weight(float* dwte, const float* logits, const float* x, head_shape s,
                            bool accumulate, precision p) override {
    const std::vector<float> inputs = rounded(p, x, s.rows * s.channels);
    std::vector<double> sums(s.channels);
    for (std::int64_t j = 0; j < s.vocab; ++j) {
      sums.assign(s.channels, 0);
      for (std::int64_t i = 0; i < s.rows; ++i)
        add_scaled(sums, round_to(p, logits[i * s.vocab + j]), inputs.data() + i * s.channels);
      store(dwte + j * s.channels, sums, accumulate);
    }
  }

  void head_logits(float* logits, const float* x, const float* wte, head_shape s,
                   precision p) override {
    if (p != precision::fp32)
      return head_logits(logits, rounded(p, x, s.rows * s.channels).data(),
                         rounded(p, wte, s.vocab * s.channels).data(), s, precision::fp32);
    for (std::int64_t i = 0; i < s.rows; ++i)
      for (std::int64_t j = 0; j < s.vocab; ++j)
        logits[i * s.vocab + j] =
            static_cast<float>(dot(x + i * s.channels, wte + j * s.channels, s.channels));
  }

  double sum_of_squares(const float* x, std::int64_t count) override {
    std::vector<double> blocks;
    for (std::int64_t begin = 0; begin < count; begin += square_block_elements) {
      const std::int64_t end =
          begin + square_block_elements < count ? begin + square_block_elements : count;
      blocks.push_back(dot(x + begin, x + begin, end - begin));
    }
    return sum_tree(blocks.data(), static_cast<std::int64_t>(blocks.size()));
  }

  void adamw(float* param, float* m, float* v, const float* grad, std::int64_t count,
             const adamw_scalars& s) override {
    for (std::int64_t i = 0; i < count; ++i) {
      const float g = grad[i] * s.grad_scale;
      m[i] = s.beta1 * m[i] + (1.0f - s.beta1) * g;
      v[i] = s.beta2 * v[i] + (1.0f - s.beta2) * g * g;
      const float step = (m[i] / s.bias1) / (std::sqrt(v[i] / s.bias2) + s.eps);
      param[i] = param[i] - s.lr * (step + s.weight_decay * param[i]);
    }
  }

  float* allocate(std::int64_t count) override {
    invariant(count >= 0, "a tensor has no negative size");
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(float) + 63) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes == 0 ? 64 : bytes);
    if (p == nullptr) throw std::bad_alloc();
    std::memset(p, 0, bytes);
    return static_cast<float*>(p);
  }
  void release(float* p) override { std::free(p); }
  void copy(float* to, const float* from, std::int64_t count) override {
    std::memmove(to, from, sizeof(float) * count);
  }
};

}  // namespace

std::unique_ptr<backend> make_reference_backend() { return std::make_unique<reference_backend>(); }

}  // namespace stagecoach
