// The bodies of row_kernels.hpp; included once by each row_kernels_<isa>.cpp, which names the
// table.
//
// All in an anonymous namespace and without the standard library: an inline function that both
// files instantiate would be one symbol, and the linker could keep the copy that an older CPU can't
// run. Vectors have 16 lanes whatever the instruction set has, so the bits stay.
#include <cstdint>

#include "kernels/cpu/row_kernels.hpp"
#include "kernels/cpu/transpose_8x8.hpp"
#include "kernels/math.hpp"

namespace stagecoach {
namespace {

using std::int64_t;

constexpr int64_t width = 16;
constexpr int64_t unroll = 4;
constexpr int64_t column_block_rows = 64;
constexpr float layernorm_eps = 1e-5f;

// `vec` is 16 floats. With AVX-512 that is a register; with AVX2 it is a pair of them, by hand: GCC
// 12 keeps a vector wider than the machine's in memory and compares it lane by lane, 4 to 8 times
// slower.
#ifdef __AVX512F__

typedef float vec __attribute__((vector_size(64)));
typedef float loose_vec __attribute__((vector_size(64), aligned(4), may_alias));

STAGECOACH_INLINE vec splat(float x) { return math::splat<vec>(x); }
STAGECOACH_INLINE vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
STAGECOACH_INLINE void store(float* p, vec x) { *reinterpret_cast<loose_vec*>(p) = x; }
template <class F, class... V>
STAGECOACH_INLINE vec by_register(F f, V... x) {
  return f(x...);
}

#else

typedef float half __attribute__((vector_size(32)));
typedef float loose_half __attribute__((vector_size(32), aligned(4), may_alias));
struct vec {
  half low, high;
};

STAGECOACH_INLINE vec splat(float x) { return {math::splat<half>(x), math::splat<half>(x)}; }
STAGECOACH_INLINE vec load(const float* p) {
  return {*reinterpret_cast<const loose_half*>(p), *reinterpret_cast<const loose_half*>(p + 8)};
}
STAGECOACH_INLINE void store(float* p, vec x) {
  *reinterpret_cast<loose_half*>(p) = x.low;
  *reinterpret_cast<loose_half*>(p + 8) = x.high;
}
template <class F, class... V>
STAGECOACH_INLINE vec by_register(F f, V... x) {
  return {f(x.low...), f(x.high...)};
}
STAGECOACH_INLINE vec operator+(vec a, vec b) { return {a.low + b.low, a.high + b.high}; }
STAGECOACH_INLINE vec operator-(vec a, vec b) { return {a.low - b.low, a.high - b.high}; }
STAGECOACH_INLINE vec operator*(vec a, vec b) { return {a.low * b.low, a.high * b.high}; }
STAGECOACH_INLINE vec operator-(vec a, float b) { return {a.low - b, a.high - b}; }
STAGECOACH_INLINE vec operator*(vec a, float b) { return {a.low * b, a.high * b}; }
STAGECOACH_INLINE void operator+=(vec& a, vec b) { a = a + b; }

#endif

/// count < 16 values; the other lanes are `rest`.
STAGECOACH_INLINE vec load_some(const float* p, int64_t count, float rest) {
  vec x = splat(rest);
  __builtin_memcpy(&x, p, static_cast<unsigned long>(count) * sizeof(float));
  return x;
}
STAGECOACH_INLINE void store_some(float* p, vec x, int64_t count) {
  __builtin_memcpy(p, &x, static_cast<unsigned long>(count) * sizeof(float));
}
STAGECOACH_INLINE vec larger(vec a, vec b) {
  return by_register([](auto x, auto y) { return x > y ? x : y; }, a, b);
}
STAGECOACH_INLINE vec exp(vec x) {
  return by_register([](auto part) { return math::exp(part); }, x);
}
STAGECOACH_INLINE vec gelu(vec x) {
  return by_register([](auto part) { return math::gelu(part); }, x);
}
STAGECOACH_INLINE vec gelu_slope(vec x) {
  return by_register([](auto part) { return math::gelu_slope(part); }, x);
}

/// Lanes i and i+8, then i+4, i+2, i+1.
STAGECOACH_INLINE float sum_lanes(vec x) {
  float a[width];
  store(a, x);
  for (int64_t step = width / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) a[i] = a[i] + a[i + step];
  return a[0];
}
STAGECOACH_INLINE float max_lanes(vec x) {
  float a[width];
  store(a, x);
  for (int64_t i = 1; i < width; ++i) a[0] = a[i] > a[0] ? a[i] : a[0];
  return a[0];
}

/// Sum over i of term(vector at i): element i in lane i mod 64, the remainder in the first 16, then
/// trees. term(i, n) gives the 16 terms from i on, 0 in lanes at and beyond n.
template <class Term>
STAGECOACH_INLINE float sum_of(int64_t count, Term term) {
  vec s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + unroll * width <= count; i += unroll * width) {
    s0 += term(i, width);
    s1 += term(i + width, width);
    s2 += term(i + 2 * width, width);
    s3 += term(i + 3 * width, width);
  }
  for (; i + width <= count; i += width) s0 += term(i, width);
  if (i < count) s1 += term(i, count - i);
  return sum_lanes((s0 + s2) + (s1 + s3));
}

STAGECOACH_INLINE vec load_upto(const float* p, int64_t n, float rest) {
  return n == width ? load(p) : load_some(p, n, rest);
}
STAGECOACH_INLINE void store_upto(float* p, vec x, int64_t n) {
  if (n == width)
    store(p, x);
  else
    store_some(p, x, n);
}
/// step(i, n) for each 16 elements, n of them valid.
template <class Step>
STAGECOACH_INLINE void each_vector(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + width <= count; i += width) step(i, width);
  if (i < count) step(i, count - i);
}

STAGECOACH_INLINE float largest(const float* x, int64_t count) {
  vec m0 = splat(-__builtin_inff()), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + unroll * width <= count; i += unroll * width) {
    m0 = larger(load(x + i), m0);
    m1 = larger(load(x + i + width), m1);
    m2 = larger(load(x + i + 2 * width), m2);
    m3 = larger(load(x + i + 3 * width), m3);
  }
  for (; i + width <= count; i += width) m0 = larger(load(x + i), m0);
  if (i < count) m0 = larger(load_some(x + i, count - i, -__builtin_inff()), m0);
  return max_lanes(larger(larger(m0, m1), larger(m2, m3)));
}

// ---- linear ---------------------------------------------------------------------------------

void add_bias(float* y, int64_t ld, const float* bias, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = y + r * ld;
    each_vector(columns, [&](int64_t i, int64_t n) {
      store_upto(row + i, load_upto(row + i, n, 0) + load_upto(bias + i, n, 0), n);
    });
  }
}

void column_sums(float* out, const float* x, int64_t ld, int64_t m, int64_t columns,
                 bool accumulate) {
  each_vector(columns, [&](int64_t j, int64_t n) {
    vec total{};
    for (int64_t begin = 0; begin < m; begin += column_block_rows) {
      const int64_t end = begin + column_block_rows < m ? begin + column_block_rows : m;
      vec part{};
      for (int64_t r = begin; r < end; ++r) part += load_upto(x + r * ld + j, n, 0);
      total += part;
    }
    if (accumulate) total = load_upto(out + j, n, 0) + total;
    store_upto(out + j, total, n);
  });
}

// ---- layer normalisation --------------------------------------------------------------------

void layernorm_forward(float* y, float* mean, float* rstd, const float* x, const float* gain,
                       const float* bias, int64_t rows, int64_t c) {
  const float size = static_cast<float>(c);
  for (int64_t r = 0; r < rows; ++r, x += c, y += c) {
    const float mu = sum_of(c, [&](int64_t i, int64_t n) { return load_upto(x + i, n, 0); }) / size;
    const float squares = sum_of(c, [&](int64_t i, int64_t n) {
      const vec d = load_upto(x + i, n, mu) - mu;
      return d * d;
    });
    const float inverse = 1.0f / __builtin_sqrtf(squares / size + layernorm_eps);
    each_vector(c, [&](int64_t i, int64_t n) {
      const vec normal = (load_upto(x + i, n, 0) - mu) * inverse;
      store_upto(y + i, normal * load_upto(gain + i, n, 0) + load_upto(bias + i, n, 0), n);
    });
    mean[r] = mu;
    rstd[r] = inverse;
  }
}

void layernorm_backward_input(float* dx, const float* residual, const float* dy, const float* x,
                              const float* gain, const float* mean, const float* rstd, int64_t rows,
                              int64_t c) {
  const float size = static_cast<float>(c);
  for (int64_t r = 0; r < rows; ++r, dx += c, dy += c, x += c) {
    const float mu = mean[r], inverse = rstd[r];
    const auto g = [&](int64_t i, int64_t n) {
      return load_upto(dy + i, n, 0) * load_upto(gain + i, n, 0);
    };
    const auto normal = [&](int64_t i, int64_t n) {
      return (load_upto(x + i, n, mu) - mu) * inverse;
    };
    const float a = sum_of(c, g) / size;
    const float b = sum_of(c, [&](int64_t i, int64_t n) { return g(i, n) * normal(i, n); }) / size;
    each_vector(c, [&](int64_t i, int64_t n) {
      vec through = (g(i, n) - a - normal(i, n) * b) * inverse;
      if (residual != nullptr) through = load_upto(residual + i, n, 0) + through;
      store_upto(dx + i, through, n);
    });
    if (residual != nullptr) residual += c;
  }
}

void layernorm_backward_weight(float* dgain, float* dbias, const float* dy, const float* x,
                               const float* mean, const float* rstd, int64_t ld, int64_t m,
                               int64_t columns, bool accumulate) {
  each_vector(columns, [&](int64_t j, int64_t n) {
    vec gains{}, biases{};
    for (int64_t begin = 0; begin < m; begin += column_block_rows) {
      const int64_t end = begin + column_block_rows < m ? begin + column_block_rows : m;
      vec gain{}, bias{};
      for (int64_t r = begin; r < end; ++r) {
        const vec d = load_upto(dy + r * ld + j, n, 0);
        gain += d * ((load_upto(x + r * ld + j, n, 0) - mean[r]) * rstd[r]);
        bias += d;
      }
      gains += gain;
      biases += bias;
    }
    if (accumulate) {
      gains = load_upto(dgain + j, n, 0) + gains;
      biases = load_upto(dbias + j, n, 0) + biases;
    }
    store_upto(dgain + j, gains, n);
    store_upto(dbias + j, biases, n);
  });
}

// ---- transposing ------------------------------------------------------------------------------

void transpose(float* to, int64_t ld_to, const float* from, int64_t ld_from, int64_t rows,
               int64_t columns) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t r = 0; r < whole_rows; r += 8)
    for (int64_t j = 0; j < whole_columns; j += 8)
      transpose_8x8(to + j * ld_to + r, ld_to, from + r * ld_from + j, ld_from);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = r < whole_rows ? whole_columns : 0; j < columns; ++j)
      to[j * ld_to + r] = from[r * ld_from + j];
}

// ---- elements -------------------------------------------------------------------------------

void gelu_forward(float* y, const float* x, int64_t count) {
  each_vector(count,
              [&](int64_t i, int64_t n) { store_upto(y + i, gelu(load_upto(x + i, n, 0)), n); });
}

void gelu_backward(float* dx, const float* dy, const float* x, int64_t count) {
  each_vector(count, [&](int64_t i, int64_t n) {
    store_upto(dx + i, load_upto(dy + i, n, 0) * gelu_slope(load_upto(x + i, n, 0)), n);
  });
}

void add(float* y, const float* a, const float* b, int64_t count) {
  each_vector(count, [&](int64_t i, int64_t n) {
    store_upto(y + i, load_upto(a + i, n, 0) + load_upto(b + i, n, 0), n);
  });
}

void add_scaled(float* y, const float* x, float factor, int64_t count) {
  each_vector(count, [&](int64_t i, int64_t n) {
    store_upto(y + i, load_upto(y + i, n, 0) + load_upto(x + i, n, 0) * factor, n);
  });
}

double sum_of_squares(const float* x, int64_t count) {
  typedef double doubles __attribute__((vector_size(32)));
  typedef float four __attribute__((vector_size(16)));
  typedef float loose_four __attribute__((vector_size(16), aligned(4), may_alias));
  constexpr int64_t lanes = 4, sums = 8;
  const auto square = [](four part) {
    const doubles w = __builtin_convertvector(part, doubles);
    return w * w;
  };
  doubles s[sums] = {};
  int64_t i = 0;
  for (; i + sums * lanes <= count; i += sums * lanes)
    for (int64_t j = 0; j < sums; ++j)
      s[j] += square(*reinterpret_cast<const loose_four*>(x + i + j * lanes));
  for (; i < count; i += lanes) {
    const int64_t n = count - i < lanes ? count - i : lanes;
    four part{};
    __builtin_memcpy(&part, x + i, static_cast<unsigned long>(n) * sizeof(float));
    s[0] += square(part);
  }
  for (int64_t step = sums / 2; step > 0; step /= 2)
    for (int64_t j = 0; j < step; ++j) s[j] += s[j + step];
  return (s[0][0] + s[0][2]) + (s[0][1] + s[0][3]);
}

void adamw(float* __restrict param, float* __restrict m, float* __restrict v,
           const float* __restrict grad, int64_t count, adamw_factors f) {
  const float rest1 = 1.0f - f.beta1, rest2 = 1.0f - f.beta2;
  for (int64_t i = 0; i < count; ++i) {
    const float g = grad[i] * f.grad_scale;
    const float first = f.beta1 * m[i] + rest1 * g;
    const float second = f.beta2 * v[i] + rest2 * g * g;
    const float step = (first / f.bias1) / (__builtin_sqrtf(second / f.bias2) + f.eps);
    m[i] = first;
    v[i] = second;
    param[i] = param[i] - f.lr * (step + f.weight_decay * param[i]);
  }
}

// ---- softmax --------------------------------------------------------------------------------

STAGECOACH_INLINE void zero(float* p, int64_t count) {
  each_vector(count, [&](int64_t i, int64_t n) { store_upto(p + i, vec{}, n); });
}

void causal_softmax(float* scores, int64_t ld, int64_t rows, int64_t columns, int64_t first_valid,
                    float* inverse, float* lse) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * ld;
    const int64_t valid = first_valid + r;
    const float max = largest(row, valid);
    const float sum = sum_of(valid, [&](int64_t i, int64_t n) {
      const vec e = exp(load_upto(row + i, n, -__builtin_inff()) - max);
      store_upto(row + i, e, n);
      return e;
    });
    zero(row + valid, columns - valid);
    inverse[r] = 1.0f / sum;
    lse[r] = max + math::log(sum);
  }
}

void scale_rows(float* x, int64_t ld, const float* factor, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    each_vector(columns, [&](int64_t i, int64_t n) {
      store_upto(x + r * ld + i, load_upto(x + r * ld + i, n, 0) * factor[r], n);
    });
}

void causal_softmax_backward(float* scores, float* dp, int64_t ld, int64_t rows, int64_t columns,
                             int64_t first_valid, const float* lse, const float* dout,
                             const float* out, int64_t ld_out, int64_t d, float scale) {
  for (int64_t r = 0; r < rows; ++r) {
    const float *a = dout + r * ld_out, *b = out + r * ld_out;
    const float delta = sum_of(
        d, [&](int64_t i, int64_t n) { return load_upto(a + i, n, 0) * load_upto(b + i, n, 0); });
    float *p = scores + r * ld, *g = dp + r * ld;
    const int64_t valid = first_valid + r;
    const float norm = lse[r];
    each_vector(valid, [&](int64_t i, int64_t n) {
      const vec e = exp(load_upto(p + i, n, -__builtin_inff()) - norm);
      store_upto(g + i, e * (load_upto(g + i, n, 0) - delta) * scale, n);
      store_upto(p + i, e, n);
    });
    zero(p + valid, columns - valid);
    zero(g + valid, columns - valid);
  }
}

void softmax_stats(float* max, float* sum, const float* logits, int64_t ld, int64_t rows,
                   int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = logits + r * ld;
    const float top = largest(row, columns);
    max[r] = top;
    sum[r] = sum_of(columns, [&](int64_t i, int64_t n) {
      return exp(load_upto(row + i, n, -__builtin_inff()) - top);
    });
  }
}

void softmax_exponentials(float* max, float* sum, float* logits, int64_t ld, int64_t rows,
                          int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = logits + r * ld;
    const float top = largest(row, columns);
    max[r] = top;
    sum[r] = sum_of(columns, [&](int64_t i, int64_t n) {
      const vec e = exp(load_upto(row + i, n, -__builtin_inff()) - top);
      store_upto(row + i, e, n);
      return e;
    });
  }
}

void softmax_gradient(float* logits, int64_t ld, const float* max, const float* factor,
                      int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = logits + r * ld;
    each_vector(columns, [&](int64_t i, int64_t n) {
      store_upto(row + i, exp(load_upto(row + i, n, 0) - max[r]) * factor[r], n);
    });
  }
}

constexpr row_kernels table{add_bias,
                            column_sums,
                            layernorm_forward,
                            layernorm_backward_input,
                            layernorm_backward_weight,
                            gelu_forward,
                            gelu_backward,
                            add,
                            add_scaled,
                            causal_softmax,
                            scale_rows,
                            causal_softmax_backward,
                            softmax_stats,
                            softmax_exponentials,
                            softmax_gradient,
                            transpose,
                            sum_of_squares,
                            adamw};

}  // namespace
}  // namespace stagecoach
