// Products with bf16 operands: the definition of kernels/cpu/bf16_kernels.hpp bit for bit on each
// instruction set that this CPU has, and the backends' operations against fp64 formulas.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/cpu/bf16_kernels.hpp"
#include "tests/kernels_oracle.hpp"

using namespace stagecoach;
using oracle::doubles;
using oracle::max_error;
using oracle::normal;
using oracle::random_tokens;
using oracle::tensor;

namespace {

// Sums of up to 4,096 terms in fp32, of operands that are exact: as in kernels_backend_test.cpp.
constexpr double sum_tolerance = 3e-6;
// Where rounded values are themselves rounded operands (probabilities, slopes): half a unit of 8
// bits, of each of two operands, and none of the largest value's terms cancel it.
constexpr double operand_tolerance = 2 * 0x1p-8;

struct named_table {
  const char* name;
  const bf16_kernels* table;
};

std::vector<named_table> tables_here() {
  std::vector<named_table> tables{{"avx2", &bf16_kernels_avx2}};
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back({"avx512", &bf16_kernels_avx512});
    if (__builtin_cpu_supports("avx512bf16"))
      tables.push_back({"avx512_bf16", &bf16_kernels_avx512_bf16});
  }
  return tables;
}

/// To 8 significant bits, ties to even, by the definition of rounding and not by bits.
float round_to_bf16(float x) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  const double fraction = std::frexp(static_cast<double>(x), &exponent);  // [0.5, 1)
  if (exponent < -125) return std::copysign(0.0f, x);
  return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8));
}

doubles rounded(const tensor& x) {
  doubles wide = x.wide();
  for (double& value : wide) value = round_to_bf16(static_cast<float>(value));
  return wide;
}

float value_of(std::uint32_t half) {
  const std::uint32_t bits = half << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float flushed(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

/// The definition's sum over pairs, one after the other.
float sum_of_pairs(float start, const std::vector<std::uint32_t>& a,
                   const std::vector<std::uint32_t>& b) {
  float s = flushed(start);
  for (std::size_t p = 0; p < a.size(); ++p) {
    s = flushed(std::fma(value_of(a[p] >> 16), value_of(b[p] >> 16), s));
    s = flushed(std::fma(value_of(a[p] & 0xFFFF), value_of(b[p] & 0xFFFF), s));
  }
  return s;
}

/// bf16 numbers whose products are usual, tiny or zero; no denormal ones, which rounding makes
/// zero.
std::uint32_t random_half(std::mt19937& g, bool is_usual) {
  if (!is_usual && g() % 6 == 0) return g() & 0x8000;
  const std::uint32_t exponent = is_usual ? 120 + g() % 12 : 55 + g() % 20;
  return (g() & 0x807F) | exponent << 7;
}

std::vector<std::unique_ptr<backend>> all_backends() {
  std::vector<std::unique_ptr<backend>> backends;
  backends.push_back(make_reference_backend());
  backends.push_back(make_cpu_backend(1));
  backends.push_back(make_cpu_backend(3));
  return backends;
}

template <class Fact>
void on_all(Fact fact) {
  unsigned seed = 20261126;
  for (const auto& b : all_backends())
    for (std::int64_t shift : {0, 7}) {
      CAPTURE(b->name());
      CAPTURE(shift);
      CAPTURE(seed);
      std::mt19937 generator(seed++);
      fact(*b, generator, shift);
    }
}

}  // namespace

TEST_CASE("bf16: rounding is to the nearest, ties to even, and makes no denormal number") {
  std::vector<float> values = {0.0f,
                               -0.0f,
                               1.0f,
                               1.0f + 0x1p-8f,             // a tie, to even: down
                               1.0f + 3 * 0x1p-8f,         // a tie, to even: up
                               1.0f + 0x1p-8f + 0x1p-23f,  // above the tie
                               -1.0f - 0x1p-8f,
                               std::numeric_limits<float>::max(),  // to infinity
                               INFINITY,
                               -INFINITY,
                               0x1p-126f,
                               0x1.fffffep-127f,  // denormal: to zero, though the nearest is normal
                               -0x1p-149f};
  std::mt19937 g(1);
  while (values.size() < 999) {
    const std::uint32_t bits = g();
    float x;
    std::memcpy(&x, &bits, sizeof x);
    if (!std::isnan(x)) values.push_back(x);
  }
  const std::int64_t count = static_cast<std::int64_t>(values.size());
  for (const auto& [name, table] : tables_here()) {
    CAPTURE(std::string(name));
    std::vector<std::uint32_t> pairs((count + 1) / 2, 7);
    table->pairs_in_rows(pairs.data(), count, values.data(), count, 1, count);
    std::vector<float> got;
    for (std::uint32_t pair : pairs) {
      got.push_back(value_of(pair & 0xFFFF));
      got.push_back(value_of(pair >> 16));
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const float want = i == 7 ? INFINITY : round_to_bf16(values[i]);
      CAPTURE(values[i]);
      CHECK(std::memcmp(&got[i], &want, sizeof want) == 0);
    }
    CHECK(got[count] == 0);  // the odd one out is paired with zero
    const float nan = NAN;
    std::uint32_t pair = 0;
    table->pairs_in_rows(&pair, 1, &nan, 1, 1, 1);
    CHECK(std::isnan(value_of(pair & 0xFFFF)));
  }
}

TEST_CASE("bf16: the three packings hold the same pairs, and zeros beside them") {
  std::mt19937 g(2);
  for (const auto& [name, table] : tables_here()) {
    CAPTURE(std::string(name));
    for (const auto& [rows, columns, width] :
         {std::array<std::int64_t, 3>{1, 1, 16}, {7, 35, 48}, {48, 300, 48}, {33, 64, 64}}) {
      CAPTURE(rows);
      CAPTURE(columns);
      const std::int64_t ld = columns + 3, pairs = (columns + 1) / 2;
      const tensor x = normal(g, rows * ld, 1, 1);
      std::vector<std::uint32_t> in_rows(rows * pairs), turned(pairs * width, 7);
      table->pairs_in_rows(in_rows.data(), pairs, x, ld, rows, columns);
      table->pairs_in_rows_turned(turned.data(), width, x, ld, rows, columns);
      bool is_same = true;
      for (std::int64_t p = 0; p < pairs; ++p)
        for (std::int64_t r = 0; r < width; ++r)
          is_same = is_same && turned[p * width + r] == (r < rows ? in_rows[r * pairs + p] : 0);
      CHECK(is_same);
      // The same matrix lying the other way: its rows are now what is summed over.
      tensor other(columns * rows);
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t j = 0; j < columns; ++j) other[j * rows + r] = x[r * ld + j];
      std::vector<std::uint32_t> of_rows(pairs * width, 7);
      table->pairs_of_rows(of_rows.data(), width, other, rows, columns, rows, nullptr);
      CHECK(of_rows == turned);
      // And from pairs in rows to pairs across rows.
      const std::int64_t step = (rows + 1) / 2 * 48 + 5;
      std::vector<std::uint32_t> across(7 * step, 7), want(7 * step, 7);
      for (std::int64_t j = 0; j < columns; j += 48)
        table->pairs_of_rows(want.data() + j / 48 * step, 48, x.data() + j, ld, rows,
                             std::min<std::int64_t>(48, columns - j), nullptr);
      table->pairs_across(across.data(), 48, step, in_rows.data(), pairs, rows, columns);
      CHECK(across == want);
      // A factor comes before rounding.
      tensor doubled(columns * rows);
      std::vector<float> factor(columns);
      for (std::int64_t j = 0; j < columns; ++j) {
        factor[j] = 0.3f * static_cast<float>(j + 1);
        for (std::int64_t r = 0; r < rows; ++r)
          doubled[j * rows + r] = other[j * rows + r] * factor[j];
      }
      std::vector<std::uint32_t> plain(pairs * width), scaled(pairs * width);
      table->pairs_of_rows(plain.data(), width, doubled, rows, columns, rows, nullptr);
      table->pairs_of_rows(scaled.data(), width, other, rows, columns, rows, factor.data());
      CHECK(scaled == plain);
    }
  }
}

TEST_CASE("bf16: a product is the definition's sums, on every instruction set, tiny numbers too") {
  std::mt19937 g(3);
  for (const bool is_usual : {true, false})
    for (const auto& [rows, columns, pairs, width] : {std::array<std::int64_t, 4>{1, 1, 1, 16},
                                                      {5, 16, 7, 16},
                                                      {8, 48, 33, 48},
                                                      {19, 47, 20, 48},
                                                      {13, 64, 40, 64},
                                                      {7, 33, 9, 64},
                                                      {9, 31, 12, 32}}) {
      CAPTURE(rows);
      CAPTURE(columns);
      std::vector<std::uint32_t> a(rows * pairs), b(pairs * width);
      for (auto* words : {&a, &b})
        for (std::uint32_t& word : *words)
          word = random_half(g, is_usual) << 16 | random_half(g, is_usual);
      const tensor before = normal(g, rows * columns, is_usual ? 1 : 0x1p-125);
      const tensor bias = normal(g, columns);
      tensor from_zero(rows * columns);
      for (int start = 0; start < 3; ++start) {
        tensor want(rows * columns);
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t j = 0; j < columns; ++j) {
            std::vector<std::uint32_t> column(pairs);
            for (std::int64_t p = 0; p < pairs; ++p) column[p] = b[p * width + j];
            const float from = start == 0 ? 0.0f : start == 1 ? bias[j] : before[r * columns + j];
            want[r * columns + j] =
                sum_of_pairs(from, {a.begin() + r * pairs, a.begin() + (r + 1) * pairs}, column);
          }
        if (start == 0) from_zero.assign(want);
        std::vector<std::uint32_t> a_turned(rows * pairs);
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t p = 0; p < pairs; ++p) a_turned[p * rows + r] = a[r * pairs + p];
        for (const auto& [name, table] : tables_here()) {
          CAPTURE(std::string(name));
          for (const bool is_turned : {false, true}) {
            tensor got(rows * columns, 1);
            got.assign(before);
            table->product({got, columns, is_turned ? a_turned.data() : a.data(),
                            is_turned ? 1 : pairs, is_turned ? rows : 1, b.data(), width, rows,
                            columns, pairs, start == 1 ? bias.data() : nullptr, start == 2});
            CHECK(got.same_bits(want));
            CHECK(got.has_intact_guards());
            if (start == 1) continue;
            // A factor per row is for the whole sum; c is added after it.
            std::vector<float> factor(rows);
            for (std::int64_t r = 0; r < rows; ++r) factor[r] = 0.1f * static_cast<float>(r - 2);
            tensor times(rows * columns, 1);
            times.assign(before);
            table->product({times, columns, is_turned ? a_turned.data() : a.data(),
                            is_turned ? 1 : pairs, is_turned ? rows : 1, b.data(), width, rows,
                            columns, pairs, nullptr, start == 2, factor.data()});
            bool is_right = true;
            for (std::int64_t r = 0; r < rows; ++r)
              for (std::int64_t j = 0; j < columns; ++j) {
                const float term = from_zero[r * columns + j] * factor[r];
                const float wanted = start == 2 ? before[r * columns + j] + term : term;
                is_right = is_right && times[r * columns + j] == wanted;
              }
            CHECK(is_right);
          }
        }
      }
    }
}

TEST_CASE("bf16: a table that computes otherwise is noticed") {
  CHECK(agrees_with(bf16_kernels_avx2, bf16_kernels_avx2));
  for (const auto& [name, table] : tables_here()) CHECK(agrees_with(*table, bf16_kernels_avx2));
  bf16_kernels other = bf16_kernels_avx2;
  // The even member first: the order that VDPBF16PS does not have.
  other.product = [](const bf16_product& p) {
    for (std::int64_t r = 0; r < p.rows; ++r)
      for (std::int64_t j = 0; j < p.columns; ++j) {
        float s = 0;
        for (std::int64_t i = 0; i < p.pairs; ++i) {
          const std::uint32_t a = p.a[r * p.a_row + i * p.a_pair], b = p.b[i * p.panel_width + j];
          s = flushed(std::fma(value_of(a & 0xFFFF), value_of(b & 0xFFFF), s));
          s = flushed(std::fma(value_of(a >> 16), value_of(b >> 16), s));
        }
        p.c[r * p.ldc + j] = s;
      }
  };
  CHECK_FALSE(agrees_with(other, bf16_kernels_avx2));
}

TEST_CASE("bf16: linear layers are products of rounded operands") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    for (const auto& [m, k, n] : {std::array<std::int64_t, 3>{1, 1, 1},
                                  {7, 48, 33},
                                  {33, 49, 144},
                                  {130, 257, 65},
                                  {301, 64, 192},
                                  {257, 96, 384}}) {
      CAPTURE(m);
      CAPTURE(k);
      CAPTURE(n);
      const tensor x = normal(g, m * k, 1, shift), w = normal(g, k * n, 1, shift);
      const tensor bias = normal(g, n, 1, shift), dy = normal(g, m * n, 1, shift);
      tensor y(m * n, shift), dx(m * k, shift), dw(k * n, shift), dbias(n, shift);
      doubles want = oracle::product(rounded(x), rounded(w), m, k, n);
      b.weights_changed();
      b.linear_forward(y, x, w, nullptr, m, k, n, precision::bf16);
      CHECK(max_error(y, want) < sum_tolerance);
      for (std::int64_t i = 0; i < m * n; ++i) want[i] += bias[i % n];
      y.poison();
      b.linear_forward(y, x, w, bias, m, k, n, precision::bf16);
      CHECK(max_error(y, want) < sum_tolerance);
      b.linear_backward_input(dx, dy, w, m, k, n, precision::bf16);
      CHECK(max_error(dx, oracle::product(rounded(dy), rounded(w), m, n, k, false, true)) <
            sum_tolerance);
      b.linear_backward_weight(dw, dbias, x, dy, m, k, n, false, precision::bf16);
      const doubles weight = oracle::product(rounded(x), rounded(dy), k, m, n, true);
      CHECK(max_error(dw, weight) < sum_tolerance);
      CHECK(max_error(dbias, oracle::column_sums(dy.wide(), m, n)) < sum_tolerance);
      doubles twice = weight;
      for (double& v : twice) v *= 2;
      b.linear_backward_weight(dw, nullptr, x, dy, m, k, n, true, precision::bf16);
      CHECK(max_error(dw, twice) < sum_tolerance);
    }
  });
}

TEST_CASE("bf16: attention follows the formulas within the rounding of its operands") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    for (const attention_shape s : {attention_shape{1, 1, 1, 16},
                                    {2, 7, 3, 48},
                                    {2, 33, 2, 48},
                                    {1, 150, 2, 128},
                                    {1, 257, 1, 128},
                                    {1, 130, 4, 20}}) {
      CAPTURE(s.tokens);
      CAPTURE(s.channels);
      const std::int64_t rows = s.batch * s.tokens, c = s.channels;
      // Scores near 1: the rounding of a score is an error of its probability.
      const tensor qkv = normal(g, rows * 3 * c, 0.7, shift), dout = normal(g, rows * c, 1, shift);
      tensor out(rows * c, shift), lse(s.batch * s.n_head * s.tokens, shift),
          dqkv(rows * 3 * c, shift);
      doubles want_lse;
      const doubles want = oracle::attention(qkv.wide(), s, &want_lse);
      b.attention_forward(out, lse, qkv, s, precision::bf16);
      CHECK(max_error(out, want) < operand_tolerance);
      CHECK(max_error(lse, want_lse) < operand_tolerance);
      b.attention_backward(dqkv, dout, qkv, out, lse, s, precision::bf16);
      CHECK(max_error(dqkv, oracle::attention_backward(dout.wide(), qkv.wide(), s)) <
            2 * operand_tolerance);
    }
  });
}

TEST_CASE("bf16: attention: a later token changes no earlier output, even one that is not finite") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    const attention_shape s{1, 141, 2, 32};
    tensor qkv = normal(g, 141 * 96, 1, shift);
    tensor before(141 * 32, shift), after(141 * 32, shift), lse(282, shift);
    b.attention_forward(before, lse, qkv, s, precision::bf16);
    for (std::int64_t i = 128 * 96; i < 141 * 96; ++i) qkv[i] += 1;
    qkv[140 * 96 + 70] = INFINITY;
    b.attention_forward(after, lse, qkv, s, precision::bf16);
    CHECK(std::memcmp(before.data(), after.data(), sizeof(float) * 128 * 32) == 0);
  });
}

TEST_CASE("bf16: head: loss, logits and gradients follow the formulas of rounded operands") {
  on_all([](backend& b, std::mt19937& g, std::int64_t shift) {
    for (const head_shape s : {head_shape{1, 16, 2},
                               {7, 48, 257},
                               {33, 49, 2047},
                               {70, 33, 2049},
                               {130, 48, 5000},
                               {300, 16, 6500}}) {
      CAPTURE(s.rows);
      CAPTURE(s.vocab);
      const tensor x = normal(g, s.rows * s.channels, 1, shift),
                   wte = normal(g, s.vocab * s.channels, 0.3, shift);
      const auto targets = random_tokens(g, s.rows, s.vocab);
      tensor logits(b.head_floats(s, precision::bf16), shift), plain(s.rows * s.vocab, shift),
          stats(2 * s.rows, shift);
      tensor dx(s.rows * s.channels, shift), dwte(s.vocab * s.channels, shift);
      const doubles want_logits =
          oracle::product(rounded(x), rounded(wte), s.rows, s.channels, s.vocab, false, true);
      b.weights_changed();
      b.head_logits(plain, x, wte, s, precision::bf16);
      CHECK(max_error(plain, want_logits) < sum_tolerance);
      doubles gradient;
      const double want_loss =
          oracle::cross_entropy(want_logits, targets, s.rows, s.vocab, &gradient);
      const double loss = b.head_forward(logits, stats, x, wte, targets.data(), s, precision::bf16);
      CHECK(loss == doctest::Approx(want_loss).epsilon(1e-6));
      const float scale = 0.37f;
      for (std::int64_t i = 0; i < s.rows; ++i) gradient[i * s.vocab + targets[i]] -= 1;
      for (double& v : gradient) v *= scale;
      b.head_backward_input(dx, logits, stats, wte, targets.data(), scale, s, precision::bf16);
      const doubles want_dx = oracle::product(gradient, rounded(wte), s.rows, s.vocab, s.channels);
      CHECK(max_error(dx, want_dx) < operand_tolerance);
      b.head_backward_weight(dwte, logits, x, s, false, precision::bf16);
      const doubles want = oracle::product(gradient, rounded(x), s.vocab, s.rows, s.channels, true);
      CHECK(max_error(dwte, want) < operand_tolerance);
      doubles twice = dwte.wide();
      for (double& v : twice) v *= 2;
      b.head_backward_weight(dwte, logits, x, s, true, precision::bf16);
      CHECK(max_error(dwte, twice) < sum_tolerance);
      CHECK(b.head_floats(s, precision::fp32) == s.rows * s.vocab);
      CHECK(logits.has_intact_guards());
      CHECK(stats.has_intact_guards());
    }
  });
}

TEST_CASE("bf16: threads change no bit, and neither does capping the instruction set") {
  const auto one = make_cpu_backend(1), three = make_cpu_backend(3);
  std::mt19937 g(4);
  const std::int64_t m = 300, k = 130, n = 200;
  const tensor x = normal(g, m * k), w = normal(g, k * n), dy = normal(g, m * n);
  for (const auto& [a, b] : {std::pair{one.get(), three.get()}}) {
    tensor y1(m * n), y2(m * n), d1(m * k), d2(m * k), w1(k * n), w2(k * n);
    a->linear_forward(y1, x, w, nullptr, m, k, n, precision::bf16);
    b->linear_forward(y2, x, w, nullptr, m, k, n, precision::bf16);
    CHECK(y1.same_bits(y2));
    a->linear_backward_input(d1, dy, w, m, k, n, precision::bf16);
    b->linear_backward_input(d2, dy, w, m, k, n, precision::bf16);
    CHECK(d1.same_bits(d2));
    a->linear_backward_weight(w1, nullptr, x, dy, m, k, n, false, precision::bf16);
    b->linear_backward_weight(w2, nullptr, x, dy, m, k, n, false, precision::bf16);
    CHECK(w1.same_bits(w2));
  }
  // A row's result does not depend on how many rows there are.
  tensor first(10 * n), all(m * n);
  one->linear_forward(first, x, w, nullptr, 10, k, n, precision::bf16);
  one->linear_forward(all, x, w, nullptr, m, k, n, precision::bf16);
  CHECK(std::memcmp(first.data(), all.data(), sizeof(float) * 10 * n) == 0);
}

TEST_CASE("bf16: changed weights are packed again once that is said") {
  const auto b = make_cpu_backend(1);
  std::mt19937 g(5);
  const std::int64_t m = 8, k = 32, n = 48;
  const tensor x = normal(g, m * k);
  tensor w = normal(g, k * n), y(m * n), again(m * n);
  b->linear_forward(y, x, w, nullptr, m, k, n, precision::bf16);
  for (std::int64_t i = 0; i < k * n; ++i) w[i] *= 2;  // exact in bf16
  b->weights_changed();
  b->linear_forward(again, x, w, nullptr, m, k, n, precision::bf16);
  for (std::int64_t i = 0; i < m * n; ++i) y[i] *= 2;
  CHECK(again.same_bits(y));
  CHECK(b->packed_linear_bytes(k, n, precision::fp32) == 0);
  CHECK(b->packed_linear_bytes(k, n, precision::bf16) == 4 * (48 * 16 + 48 * 24));
}
