// Every operation of every backend against the fp64 formulas of tests/kernels_oracle.hpp.
//
// Tolerances are of the largest wanted value: a unit is 2^-24 = 6e-8 per rounding, a sum of K terms
// adds about sqrt(K) of them, and polynomials add 1.5.
#include "kernels/backend.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/fixed_order.hpp"
#include "tests/kernels_oracle.hpp"

using namespace stagecoach;
using oracle::doubles;
using oracle::max_error;
using oracle::normal;
using oracle::random_tokens;
using oracle::tensor;

namespace {

constexpr double sum_tolerance = 2e-6;  // sums of up to 4,096 terms

std::vector<std::unique_ptr<backend>> all_backends() {
  std::vector<std::unique_ptr<backend>> backends;
  backends.push_back(make_reference_backend());
  backends.push_back(make_cpu_backend(1));
  backends.push_back(make_cpu_backend(3));
  return backends;
}

/// Runs a fact on each backend, aligned and not, with a seed that a failure prints.
template <class Fact>
void on_all(Fact fact) {
  unsigned seed = 20261123;
  for (const auto& b : all_backends())
    for (std::int64_t shift : {0, 1, 7}) {
      CAPTURE(b->name());
      CAPTURE(shift);
      CAPTURE(seed);
      std::mt19937 generator(seed++);
      fact(*b, generator, shift);
    }
}

struct matrix_shape {
  std::int64_t m, k, n;
};

}  // namespace

TEST_CASE("linear: forward, input gradient and weight gradient are the matrix products") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    for (const auto& [m, k, n] : {matrix_shape{1, 1, 1},
                                  {7, 48, 33},
                                  {33, 48, 144},
                                  {130, 257, 65},
                                  {300, 64, 192},
                                  {257, 96, 384}}) {
      CAPTURE(m);
      CAPTURE(k);
      CAPTURE(n);
      const tensor x = normal(g, m * k, 1, shift), w = normal(g, k * n, 1, shift);
      const tensor bias = normal(g, n, 1, shift), dy = normal(g, m * n, 1, shift);
      tensor y(m * n, shift), dx(m * k, shift), dw(k * n, shift), dbias(n, shift);
      doubles want = oracle::product(x.wide(), w.wide(), m, k, n);
      b.linear_forward(y, x, w, nullptr, m, k, n);
      CHECK(max_error(y, want) < sum_tolerance);
      for (std::int64_t i = 0; i < m * n; ++i) want[i] += bias[i % n];
      y.poison();
      b.linear_forward(y, x, w, bias, m, k, n);
      CHECK(max_error(y, want) < sum_tolerance);
      b.linear_backward_input(dx, dy, w, m, k, n);
      CHECK(max_error(dx, oracle::product(dy.wide(), w.wide(), m, n, k, false, true)) <
            sum_tolerance);
      b.linear_backward_weight(dw, dbias, x, dy, m, k, n, false);
      CHECK(max_error(dw, oracle::product(x.wide(), dy.wide(), k, m, n, true)) < sum_tolerance);
      CHECK(max_error(dbias, oracle::column_sums(dy.wide(), m, n)) < sum_tolerance);
      tensor without(k * n, shift);
      b.linear_backward_weight(without, nullptr, x, dy, m, k, n, false);
      CHECK(without.same_bits(dw));
    }
  });
}

TEST_CASE("linear: accumulate adds the second gradient to the first") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const std::int64_t m = 70, k = 48, n = 80;
    const tensor x1 = normal(g, m * k, 1, shift), y1 = normal(g, m * n, 1, shift);
    const tensor x2 = normal(g, m * k, 1, shift), y2 = normal(g, m * n, 1, shift);
    tensor dw(k * n, shift), db(n, shift), second(k * n, shift), second_b(n, shift);
    b.linear_backward_weight(second, second_b, x2, y2, m, k, n, false);
    b.linear_backward_weight(dw, db, x1, y1, m, k, n, false);
    doubles want = dw.wide(), want_b = db.wide();
    for (std::int64_t i = 0; i < k * n; ++i) want[i] += second[i];
    for (std::int64_t i = 0; i < n; ++i) want_b[i] += second_b[i];
    b.linear_backward_weight(dw, db, x2, y2, m, k, n, true);
    CHECK(max_error(dw, want) < sum_tolerance);
    CHECK(max_error(db, want_b) < sum_tolerance);
  });
}

TEST_CASE("linear: gradients agree with finite differences") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const std::int64_t m = 3, k = 5, n = 4;
    const tensor x = normal(g, m * k, 1, shift), w = normal(g, k * n, 1, shift);
    const tensor dy = normal(g, m * n, 1, shift);
    tensor dx(m * k, shift), dw(k * n, shift), dbias(n, shift);
    b.linear_backward_input(dx, dy, w, m, k, n);
    b.linear_backward_weight(dw, dbias, x, dy, m, k, n, false);
    const auto by_x = [&](const doubles& v) {
      return oracle::dot(dy.wide(), oracle::product(v, w.wide(), m, k, n));
    };
    const auto by_w = [&](const doubles& v) {
      return oracle::dot(dy.wide(), oracle::product(x.wide(), v, m, k, n));
    };
    CHECK(max_error(dx, oracle::numeric_gradient(by_x, x.wide())) < 1e-6);
    CHECK(max_error(dw, oracle::numeric_gradient(by_w, w.wide())) < 1e-6);
  });
}

TEST_CASE("layernorm: forward, statistics and gradients follow the formulas") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    for (const auto& [m, c] :
         {std::pair<std::int64_t, std::int64_t>{1, 1}, {1, 48}, {7, 33}, {200, 384}, {65, 130}}) {
      CAPTURE(m);
      CAPTURE(c);
      // An offset of 3 deviations: a variance from E[x^2] - E[x]^2 would lose digits.
      tensor x = normal(g, m * c, 1, shift);
      for (std::int64_t i = 0; i < m * c; ++i) x[i] += 3;
      const tensor gain = normal(g, c, 1, shift), bias = normal(g, c, 1, shift);
      const tensor dy = normal(g, m * c, 1, shift), residual = normal(g, m * c, 1, shift);
      tensor y(m * c, shift), mean(m, shift), rstd(m, shift), dx(m * c, shift), dgain(c, shift),
          dbias(c, shift);
      doubles want_mean, want_rstd;
      const doubles want =
          oracle::layernorm(x.wide(), gain.wide(), bias.wide(), m, c, &want_mean, &want_rstd);
      b.layernorm_forward(y, mean, rstd, x, gain, bias, m, c);
      CHECK(max_error(y, want) < sum_tolerance);
      CHECK(max_error(mean, want_mean) < sum_tolerance);
      CHECK(max_error(rstd, want_rstd) < sum_tolerance);
      if (c == 1) continue;  // the gradient through a norm of one value is zero up to rounding
      const auto grads = oracle::layernorm_backward(dy.wide(), x.wide(), gain.wide(), m, c);
      b.layernorm_backward_input(dx, nullptr, dy, x, gain, mean, rstd, m, c);
      CHECK(max_error(dx, grads.dx) < sum_tolerance);
      doubles with_residual = grads.dx;
      for (std::int64_t i = 0; i < m * c; ++i) with_residual[i] += residual[i];
      dx.poison();
      b.layernorm_backward_input(dx, residual, dy, x, gain, mean, rstd, m, c);
      CHECK(max_error(dx, with_residual) < sum_tolerance);
      tensor in_place(m * c, shift);
      in_place.assign(residual);
      b.layernorm_backward_input(in_place, in_place, dy, x, gain, mean, rstd, m, c);
      CHECK(in_place.same_bits(dx));
      b.layernorm_backward_weight(dgain, dbias, dy, x, mean, rstd, m, c, false);
      CHECK(max_error(dgain, grads.dgain) < sum_tolerance);
      CHECK(max_error(dbias, grads.dbias) < sum_tolerance);
      doubles twice = dgain.wide();
      for (double& v : twice) v *= 2;
      b.layernorm_backward_weight(dgain, dbias, dy, x, mean, rstd, m, c, true);
      CHECK(max_error(dgain, twice) < 1e-7);
    }
  });
}

TEST_CASE("layernorm: gradients agree with finite differences") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const std::int64_t m = 3, c = 6;
    const tensor x = normal(g, m * c, 1, shift), gain = normal(g, c, 1, shift);
    const tensor bias = normal(g, c, 1, shift), dy = normal(g, m * c, 1, shift);
    tensor y(m * c, shift), mean(m, shift), rstd(m, shift), dx(m * c, shift), dgain(c, shift),
        dbias(c, shift);
    b.layernorm_forward(y, mean, rstd, x, gain, bias, m, c);
    b.layernorm_backward_input(dx, nullptr, dy, x, gain, mean, rstd, m, c);
    b.layernorm_backward_weight(dgain, dbias, dy, x, mean, rstd, m, c, false);
    const auto by_x = [&](const doubles& v) {
      return oracle::dot(dy.wide(), oracle::layernorm(v, gain.wide(), bias.wide(), m, c));
    };
    const auto by_gain = [&](const doubles& v) {
      return oracle::dot(dy.wide(), oracle::layernorm(x.wide(), v, bias.wide(), m, c));
    };
    CHECK(max_error(dx, oracle::numeric_gradient(by_x, x.wide())) < 2e-6);
    CHECK(max_error(dgain, oracle::numeric_gradient(by_gain, gain.wide())) < 2e-6);
  });
}

TEST_CASE("gelu: forward and gradient, in place too, and against finite differences") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    for (std::int64_t count : {1, 15, 16, 1000, 40003}) {
      const tensor x = normal(g, count, 3, shift), dy = normal(g, count, 1, shift);
      tensor y(count, shift), dx(count, shift);
      doubles want(count), slope(count);
      for (std::int64_t i = 0; i < count; ++i) {
        want[i] = oracle::gelu(x[i]);
        slope[i] = dy[i] * oracle::gelu_slope(x[i]);
      }
      b.gelu_forward(y, x, count);
      b.gelu_backward(dx, dy, x, count);
      CHECK(max_error(y, want) < 5e-7);
      CHECK(max_error(dx, slope) < 5e-7);
      tensor in_place(count, shift);
      in_place.assign(dy);
      b.gelu_backward(in_place, in_place, x, count);
      CHECK(in_place.same_bits(dx));
    }
    const tensor x = normal(g, 50, 2, shift), dy = normal(g, 50, 1, shift);
    tensor dx(50, shift);
    b.gelu_backward(dx, dy, x, 50);
    const auto f = [&](const doubles& v) {
      double sum = 0;
      for (std::size_t i = 0; i < v.size(); ++i)
        sum += dy[static_cast<std::int64_t>(i)] * oracle::gelu(v[i]);
      return sum;
    };
    CHECK(max_error(dx, oracle::numeric_gradient(f, x.wide())) < 5e-7);
  });
}

TEST_CASE("add is exact, in place too") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const std::int64_t count = 40003;
    const tensor x = normal(g, count, 1, shift), z = normal(g, count, 1, shift);
    tensor y(count, shift), in_place(count, shift);
    in_place.assign(x);
    b.add(y, x, z, count);
    b.add(in_place, in_place, z, count);
    bool equal = true;
    for (std::int64_t i = 0; i < count; ++i) equal = equal && y[i] == x[i] + z[i];
    CHECK(equal);
    CHECK(y.has_intact_guards());
    CHECK(in_place.same_bits(y));
  });
}

TEST_CASE("attention: forward, log-sum-exp and gradients follow the formulas") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    for (const attention_shape s : {attention_shape{1, 1, 1, 16},
                                    {2, 7, 3, 48},
                                    {2, 33, 2, 48},
                                    {1, 150, 2, 64},
                                    {1, 257, 1, 128},
                                    {1, 130, 4, 20}}) {
      CAPTURE(s.tokens);
      CAPTURE(s.channels);
      const std::int64_t rows = s.batch * s.tokens, c = s.channels;
      const tensor qkv = normal(g, rows * 3 * c, 1.5, shift), dout = normal(g, rows * c, 1, shift);
      tensor out(rows * c, shift), lse(s.batch * s.n_head * s.tokens, shift),
          dqkv(rows * 3 * c, shift);
      doubles want_lse;
      const doubles want = oracle::attention(qkv.wide(), s, &want_lse);
      b.attention_forward(out, lse, qkv, s);
      // Scores reach 40 here, and their rounding (40 * 2^-24) is a relative error of the
      // probability.
      CHECK(max_error(out, want) < 1e-5);
      CHECK(max_error(lse, want_lse) < sum_tolerance);
      b.attention_backward(dqkv, dout, qkv, out, lse, s);
      CHECK(max_error(dqkv, oracle::attention_backward(dout.wide(), qkv.wide(), s)) < 1e-5);
    }
  });
}

TEST_CASE("attention: gradients agree with finite differences") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const attention_shape s{1, 5, 2, 6};
    const tensor qkv = normal(g, 5 * 18, 1, shift), dout = normal(g, 5 * 6, 1, shift);
    tensor out(5 * 6, shift), lse(10, shift), dqkv(5 * 18, shift);
    b.attention_forward(out, lse, qkv, s);
    b.attention_backward(dqkv, dout, qkv, out, lse, s);
    const auto f = [&](const doubles& v) {
      return oracle::dot(dout.wide(), oracle::attention(v, s));
    };
    CHECK(max_error(dqkv, oracle::numeric_gradient(f, qkv.wide())) < 5e-6);
  });
}

TEST_CASE("attention: a later token changes no earlier output") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const attention_shape s{1, 140, 2, 32};
    tensor qkv = normal(g, 140 * 96, 1, shift);
    tensor before(140 * 32, shift), after(140 * 32, shift), lse(280, shift);
    b.attention_forward(before, lse, qkv, s);
    for (std::int64_t i = 100 * 96; i < 140 * 96; ++i) qkv[i] += 1;
    b.attention_forward(after, lse, qkv, s);
    CHECK(std::memcmp(before.data(), after.data(), sizeof(float) * 100 * 32) == 0);
  });
}

TEST_CASE("embedding: rows are picked, and gradients are summed per token and position") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const std::int64_t batch = 3, t = 7, c = 49, vocab = 11, context = 9;  // tokens repeat
    const auto tokens = random_tokens(g, batch * t, vocab);
    const tensor wte = normal(g, vocab * c, 1, shift), wpe = normal(g, context * c, 1, shift);
    const tensor dy = normal(g, batch * t * c, 1, shift);
    tensor y(batch * t * c, shift), dwte(vocab * c, shift), dwpe(context * c, shift);
    doubles want(batch * t * c), want_wte(vocab * c), want_wpe(context * c);
    for (std::int64_t i = 0; i < batch * t; ++i)
      for (std::int64_t j = 0; j < c; ++j) {
        want[i * c + j] = double{wte[tokens[i] * c + j]} + wpe[i % t * c + j];
        want_wte[tokens[i] * c + j] += dy[i * c + j];
        want_wpe[i % t * c + j] += dy[i * c + j];
      }
    b.embedding_forward(y, tokens.data(), wte, wpe, batch, t, c);
    CHECK(max_error(y, want) < 1e-7);
    b.embedding_backward(dwte, dwpe, dy, tokens.data(), batch, t, c, vocab, context, false);
    CHECK(max_error(dwte, want_wte) < 1e-6);
    CHECK(max_error(dwpe, want_wpe) < 1e-6);
    for (double& x : want_wte) x *= 2;
    for (double& x : want_wpe) x *= 2;
    b.embedding_backward(dwte, dwpe, dy, tokens.data(), batch, t, c, vocab, context, true);
    CHECK(max_error(dwte, want_wte) < 1e-6);
    CHECK(max_error(dwpe, want_wpe) < 1e-6);
  });
}

TEST_CASE("head: loss, logits and gradients follow the formulas") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    for (const head_shape s :
         {head_shape{1, 16, 2}, {7, 48, 257}, {33, 48, 2047}, {70, 33, 2049}, {130, 48, 5000}}) {
      CAPTURE(s.rows);
      CAPTURE(s.vocab);
      const tensor x = normal(g, s.rows * s.channels, 1, shift),
                   wte = normal(g, s.vocab * s.channels, 0.3, shift);
      const auto targets = random_tokens(g, s.rows, s.vocab);
      tensor logits(s.rows * s.vocab, shift), plain(s.rows * s.vocab, shift),
          stats(2 * s.rows, shift);
      tensor dx(s.rows * s.channels, shift), dwte(s.vocab * s.channels, shift);
      const doubles want_logits =
          oracle::product(x.wide(), wte.wide(), s.rows, s.channels, s.vocab, false, true);
      doubles gradient;
      const double want_loss =
          oracle::cross_entropy(want_logits, targets, s.rows, s.vocab, &gradient);
      const float scale = 1.0f / 77;
      for (std::int64_t i = 0; i < s.rows; ++i) gradient[i * s.vocab + targets[i]] -= 1;
      for (double& v : gradient) v *= scale;

      b.head_logits(plain, x, wte, s);
      CHECK(max_error(plain, want_logits) < sum_tolerance);
      const double loss = b.head_forward(logits, stats, x, wte, targets.data(), s);
      CHECK(std::abs(loss - want_loss) < 1e-6 * std::abs(want_loss));
      b.head_backward_input(dx, logits, stats, wte, targets.data(), scale, s);
      CHECK(max_error(logits, gradient) <
            5e-6);  // rounding of logits near 10 becomes relative error
      CHECK(max_error(dx, oracle::product(gradient, wte.wide(), s.rows, s.vocab, s.channels)) <
            5e-6);
      b.head_backward_weight(dwte, logits, x, s, false);
      const doubles want = oracle::product(gradient, x.wide(), s.vocab, s.rows, s.channels, true);
      CHECK(max_error(dwte, want) < 5e-6);
      doubles twice = dwte.wide();
      for (double& v : twice) v *= 2;
      b.head_backward_weight(dwte, logits, x, s, true);
      CHECK(max_error(dwte, twice) < 1e-6);
      CHECK(stats.has_intact_guards());
    }
  });
}

TEST_CASE(
    "head: the input gradient agrees with finite differences, and extreme logits stay finite") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const head_shape s{2, 4, 9};
    const tensor x = normal(g, 8, 1, shift), wte = normal(g, 36, 1, shift);
    const auto targets = random_tokens(g, 2, 9);
    tensor logits(18, shift), stats(4, shift), dx(8, shift);
    b.head_forward(logits, stats, x, wte, targets.data(), s);
    b.head_backward_input(dx, logits, stats, wte, targets.data(), 1, s);
    const auto f = [&](const doubles& v) {
      return oracle::cross_entropy(oracle::product(v, wte.wide(), 2, 4, 9, false, true), targets, 2,
                                   9);
    };
    CHECK(max_error(dx, oracle::numeric_gradient(f, x.wide())) < 1e-6);

    const tensor large = normal(g, 8, 1e4, shift);
    const double loss = b.head_forward(logits, stats, large, wte, targets.data(), s);
    b.head_backward_input(dx, logits, stats, wte, targets.data(), 1, s);
    CHECK(std::isfinite(loss));
    for (std::int64_t i = 0; i < 8; ++i) CHECK(std::isfinite(dx[i]));
  });
}

TEST_CASE("head: a NaN or infinite input makes the loss not finite") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    for (float bad : {NAN, INFINITY}) {
      const head_shape s{70, 16, 2049};
      tensor x = normal(g, s.rows * s.channels, 1, shift);
      const tensor wte = normal(g, s.vocab * s.channels, 1, shift);
      x[69 * 16 + 3] = bad;
      const auto targets = random_tokens(g, s.rows, s.vocab);
      tensor logits(s.rows * s.vocab, shift), stats(2 * s.rows, shift);
      CHECK_FALSE(std::isfinite(b.head_forward(logits, stats, x, wte, targets.data(), s)));
    }
  });
}

TEST_CASE("sum of squares: fp64, by blocks and the full binary tree") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    CHECK(b.sum_of_squares(nullptr, 0) == 0);
    for (std::int64_t count : {1, 4095, 4096, 4097, 100003}) {
      tensor x = normal(g, count, 1, shift);
      double want = 0;
      for (double v : x.wide()) want += v * v;
      CHECK(std::abs(b.sum_of_squares(x, count) - want) < 1e-12 * want);
      x[count / 2] = INFINITY;
      CHECK_FALSE(std::isfinite(b.sum_of_squares(x, count)));
      x[count / 2] = NAN;
      CHECK(std::isnan(b.sum_of_squares(x, count)));
    }
    // An aligned run of 2^k blocks is a subtree: sums of its halves merge to the same bits.
    const tensor x = normal(g, 8 * 4096, 1, shift);
    const double whole = b.sum_of_squares(x, 8 * 4096);
    CHECK(whole == b.sum_of_squares(x, 4 * 4096) + b.sum_of_squares(x.data() + 4 * 4096, 4 * 4096));
  });
}

TEST_CASE("adamw: three steps follow the formula") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const std::int64_t count = 40003;
    tensor p = normal(g, count, 1, shift), m(count, shift), v(count, shift);
    doubles wide = p.wide(), wm(count), wv(count);
    for (std::int64_t i = 0; i < count; ++i) m[i] = v[i] = 0;
    for (int step = 1; step <= 3; ++step) {
      const tensor grad = normal(g, count, 0.1, shift);
      adamw_scalars s;
      s.lr = 0.01f;
      s.beta1 = 0.9f;
      s.beta2 = 0.95f;
      s.eps = 1e-8f;
      s.weight_decay = 0.1f;
      s.bias1 = static_cast<float>(1 - std::pow(0.9, step));
      s.bias2 = static_cast<float>(1 - std::pow(0.95, step));
      s.grad_scale = 0.7f;
      b.adamw(p, m, v, grad, count, s);
      for (std::int64_t i = 0; i < count; ++i) {
        const double x = double{grad[i]} * s.grad_scale;
        wm[i] = s.beta1 * wm[i] + (1.0 - s.beta1) * x;
        wv[i] = s.beta2 * wv[i] + (1.0 - s.beta2) * x * x;
        wide[i] -= s.lr * (wm[i] / s.bias1 / (std::sqrt(wv[i] / s.bias2) + s.eps) +
                           s.weight_decay * wide[i]);
      }
    }
    CHECK(max_error(p, wide) < 1e-6);
    CHECK(max_error(m, wm) < 1e-6);
    CHECK(max_error(v, wv) < 1e-6);
  });
}

TEST_CASE("memory is zeroed and starts at a multiple of 64 bytes") {
  for (const auto& b : all_backends()) {
    float* p = b->allocate(1001);
    CHECK(reinterpret_cast<std::uintptr_t>(p) % 64 == 0);
    bool zero = true;
    for (int i = 0; i < 1001; ++i) zero = zero && p[i] == 0;
    CHECK(zero);
    const std::vector<float> from(1001, 2.5f);
    b->copy(p, from.data(), 1001);
    CHECK(p[1000] == 2.5f);
    b->release(p);
  }
}

TEST_CASE("the tree merges neighbours first, and a lone last one moves up") {
  std::vector<std::string> names{"a", "b", "c", "d", "e"};
  const auto merge = [](const std::string& x, const std::string& y) { return "(" + x + y + ")"; };
  CHECK(merge_tree(names.data(), 5, merge) == "(((ab)(cd))e)");
}
