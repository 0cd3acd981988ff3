// The two instruction sets' row kernels give the same bits; against the formulas they are tested
// through the backend (kernels_backend_test.cpp).
#include "kernels/cpu/row_kernels.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <random>

#include "tests/kernels_oracle.hpp"

using namespace stagecoach;
using oracle::normal;
using oracle::tensor;

TEST_CASE("row kernels: avx2 and avx512 give the same bits") {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq")) {
    MESSAGE("skipped: this CPU has no AVX-512");
    return;
  }
  const row_kernels &a = row_kernels_avx2, &b = row_kernels_avx512;
  std::mt19937 g(11);
  for (std::int64_t c : {1, 15, 16, 17, 63, 64, 100, 384, 1001}) {
    CAPTURE(c);
    const std::int64_t rows = 70, count = rows * c;
    const tensor x = normal(g, count, 2), dy = normal(g, count), gain = normal(g, c),
                 bias = normal(g, c);
    tensor y1(count), y2(count), s1(rows), s2(rows), t1(rows), t2(rows), u1(c), u2(c), v1(c), v2(c);

    a.layernorm_forward(y1, s1, t1, x, gain, bias, rows, c);
    b.layernorm_forward(y2, s2, t2, x, gain, bias, rows, c);
    CHECK(y1.same_bits(y2));
    CHECK(s1.same_bits(s2));
    CHECK(t1.same_bits(t2));
    a.layernorm_backward_input(y1, dy, dy, x, gain, s1, t1, rows, c);
    b.layernorm_backward_input(y2, dy, dy, x, gain, s1, t1, rows, c);
    CHECK(y1.same_bits(y2));
    a.layernorm_backward_weight(u1, v1, dy, x, s1, t1, c, rows, c, false);
    b.layernorm_backward_weight(u2, v2, dy, x, s1, t1, c, rows, c, false);
    CHECK(u1.same_bits(u2));
    CHECK(v1.same_bits(v2));
    a.column_sums(u1, x, c, rows, c, true);
    b.column_sums(u2, x, c, rows, c, true);
    CHECK(u1.same_bits(u2));
    a.add_bias(y1, c, bias, rows, c);
    b.add_bias(y2, c, bias, rows, c);
    CHECK(y1.same_bits(y2));

    a.gelu_forward(y1, x, count);
    b.gelu_forward(y2, x, count);
    CHECK(y1.same_bits(y2));
    a.gelu_backward(y1, dy, x, count);
    b.gelu_backward(y2, dy, x, count);
    CHECK(y1.same_bits(y2));
    a.add(y1, y1, x, count);
    b.add(y2, y2, x, count);
    CHECK(y1.same_bits(y2));

    a.softmax_stats(s1, t1, x, c, rows, c);
    b.softmax_stats(s2, t2, x, c, rows, c);
    CHECK(s1.same_bits(s2));
    CHECK(t1.same_bits(t2));
    y1.assign(x);
    y2.assign(x);
    a.softmax_gradient(y1, c, s1, t1, rows, c);
    b.softmax_gradient(y2, c, s1, t1, rows, c);
    CHECK(y1.same_bits(y2));

    CHECK(a.sum_of_squares(x, count) == b.sum_of_squares(x, count));
    tensor p1 = normal(g, count), p2(count), m1(count), m2(count), w1(count), w2(count);
    p2.assign(p1);
    for (std::int64_t i = 0; i < count; ++i) {
      m1[i] = m2[i] = x[i];
      w1[i] = w2[i] = x[i] * x[i];
    }
    const adamw_factors f{0.01f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.3f, 0.2f, 0.7f};
    a.adamw(p1, m1, w1, dy, count, f);
    b.adamw(p2, m2, w2, dy, count, f);
    CHECK(p1.same_bits(p2));
    CHECK(m1.same_bits(m2));
    CHECK(w1.same_bits(w2));
  }
  for (std::int64_t tokens : {1, 17, 70, 200}) {
    const std::int64_t rows = tokens < 64 ? tokens : 64, ld = 208, d = 48,
                       first = tokens - rows + 1;
    const tensor scores = normal(g, rows * ld), dout = normal(g, rows * d),
                 out = normal(g, rows * d);
    tensor p1(rows * ld), p2(rows * ld), g1(rows * ld), g2(rows * ld), i1(rows), i2(rows), l1(rows),
        l2(rows);
    p1.assign(scores);
    p2.assign(scores);
    a.causal_softmax(p1, ld, rows, tokens, first, i1, l1);
    b.causal_softmax(p2, ld, rows, tokens, first, i2, l2);
    CHECK(p1.same_bits(p2));
    CHECK(i1.same_bits(i2));
    CHECK(l1.same_bits(l2));
    a.scale_rows(p1, ld, i1, rows, tokens);
    b.scale_rows(p2, ld, i2, rows, tokens);
    CHECK(p1.same_bits(p2));
    p1.assign(scores);
    p2.assign(scores);
    g1.assign(scores);
    g2.assign(scores);
    a.causal_softmax_backward(p1, g1, ld, rows, tokens, first, l1, dout, out, d, d, 0.125f);
    b.causal_softmax_backward(p2, g2, ld, rows, tokens, first, l1, dout, out, d, d, 0.125f);
    CHECK(p1.same_bits(p2));
    CHECK(g1.same_bits(g2));
  }
}

TEST_CASE("row kernels: transpose turns over any size and writes no more") {
  std::mt19937 g(12);
  for (std::int64_t rows : {1, 7, 8, 9, 33, 64})
    for (std::int64_t columns : {1, 8, 15, 48, 65}) {
      const tensor from = normal(g, rows * columns, 1, 3);
      tensor to(columns * rows, 5);
      row_kernels_avx2.transpose(to, rows, from, columns, rows, columns);
      bool is_equal = to.has_intact_guards();
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < columns; ++j)
          is_equal = is_equal && to[j * rows + i] == from[i * columns + j];
      CHECK(is_equal);
    }
}
