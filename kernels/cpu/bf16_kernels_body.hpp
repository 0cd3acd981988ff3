// The bodies of bf16_kernels.hpp; included once by each bf16_kernels_<isa>.cpp, which names the
// table. In an anonymous namespace and without the standard library, like row_kernels_body.hpp.
#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/bf16_kernels.hpp"
#include "kernels/cpu/transpose_8x8.hpp"
#include "kernels/math.hpp"

namespace stagecoach {
namespace {

using std::int64_t;
using std::uint32_t;

// ---- rounding and packing -------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int64_t lanes = 16;
#else
constexpr int64_t lanes = 8;
#endif
typedef uint32_t words __attribute__((vector_size(lanes * 4)));
typedef std::int32_t signed_words __attribute__((vector_size(lanes * 4)));
typedef uint32_t loose_words __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
typedef std::uint64_t doubles __attribute__((vector_size(lanes * 4)));

STAGECOACH_INLINE words load(const void* p) { return *static_cast<const loose_words*>(p); }
STAGECOACH_INLINE void store(void* p, words x) { *static_cast<loose_words*>(p) = x; }
STAGECOACH_INLINE words load_some(const void* p, int64_t count) {
  words x{};
  __builtin_memcpy(&x, p, static_cast<unsigned long>(count) * 4);
  return x;
}
STAGECOACH_INLINE words load_upto(const float* p, int64_t count) {
  return count >= lanes ? load(p) : count <= 0 ? words{} : load_some(p, count);
}

#ifdef __AVX512BF16__

/// Element i of both, side by side.
STAGECOACH_INLINE words pair_of(words even, words odd) {
  alignas(64) static constexpr std::uint16_t places[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (words)_mm512_permutexvar_epi16(_mm512_load_si512(places), both);
}
/// Pairs of neighbours in a run of 2 * lanes floats, in order.
STAGECOACH_INLINE words pairs_in_run(words first, words second) {
  return (words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

#else

/// The bf16 is the upper half; the lower half is left over.
STAGECOACH_INLINE words round_up_half(words x) {
  const words size = x & 0x7FFFFFFF;
  words r = x + 0x7FFF + ((x >> 16) & 1);
  r = (signed_words)size > 0x7F800000 ? x | 0x00400000 : r;
  return (signed_words)size < 0x00800000 ? x & 0x80000000 : r;
}
STAGECOACH_INLINE words pair_of(words even, words odd) {
  return (round_up_half(even) >> 16) | (round_up_half(odd) & 0xFFFF0000);
}
STAGECOACH_INLINE words pairs_in_run(words first, words second) {
  // In 64-bit lanes a pair is one number: shift its halves together, then take the low words.
  const words a = round_up_half(first), b = round_up_half(second);
  const doubles x = __builtin_bit_cast(doubles, a), y = __builtin_bit_cast(doubles, b);
  const doubles low_x = ((x >> 16) & 0xFFFF) | ((x >> 32) & 0xFFFF0000);
  const doubles low_y = ((y >> 16) & 0xFFFF) | ((y >> 32) & 0xFFFF0000);
  const words p = __builtin_bit_cast(words, low_x), q = __builtin_bit_cast(words, low_y);
#ifdef __AVX512F__
  return __builtin_shufflevector(p, q, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#else
  return __builtin_shufflevector(p, q, 0, 2, 4, 6, 8, 10, 12, 14);
#endif
}

#endif

STAGECOACH_INLINE void row_to_pairs(uint32_t* to, const float* from, int64_t columns) {
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes)
    store(to + j / 2, pairs_in_run(load(from + j), load(from + j + lanes)));
  if (j == columns) return;
  const words rest = pairs_in_run(load_upto(from + j, columns - j),
                                  load_upto(from + j + lanes, columns - j - lanes));
  __builtin_memcpy(to + j / 2, &rest, static_cast<unsigned long>((columns - j + 1) / 2) * 4);
}

void pairs_in_rows(uint32_t* to, int64_t ld_to, const float* from, int64_t ld, int64_t rows,
                   int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) row_to_pairs(to + r * ld_to, from + r * ld, columns);
}

typedef float floats __attribute__((vector_size(lanes * 4)));

STAGECOACH_INLINE words scaled(words x, float factor) { return (words)((floats)x * factor); }

void pairs_of_rows(uint32_t* to, int64_t width, const float* from, int64_t ld, int64_t rows,
                   int64_t columns, const float* factor) {
  for (int64_t r = 0; r < rows; r += 2, to += width) {
    const float *even = from + r * ld, *odd = even + ld;
    const bool has_odd = r + 1 < rows;
    for (int64_t j = 0; j < width; j += lanes) {
      words a = load_upto(even + j, columns - j);
      words b = has_odd ? load_upto(odd + j, columns - j) : words{};
      if (factor != nullptr) {
        a = scaled(a, factor[r]);
        if (has_odd) b = scaled(b, factor[r + 1]);
      }
      store(to + j, pair_of(a, b));
    }
  }
}

STAGECOACH_INLINE words load_upto(const uint32_t* p, int64_t count) {
  return count >= lanes ? load(p) : count <= 0 ? words{} : load_some(p, count);
}

void pairs_across(uint32_t* to, int64_t width, int64_t step, const uint32_t* from, int64_t ld,
                  int64_t rows, int64_t columns) {
  const int64_t pairs = (columns + 1) / 2;  // an odd column's partner is 0 already
  for (int64_t r = 0; r < rows; r += 2, to += width, from += 2 * ld) {
    const bool has_odd = r + 1 < rows;
    uint32_t* out = to;
    for (int64_t first = 0; first < columns; first += width, out += step)
      for (int64_t j = 0; j < width; j += lanes) {
        // `lanes` columns are half a vector of each row.
        words a{}, b{};
        const uint32_t* here = from + (first + j) / 2;
        const int64_t left = pairs - (first + j) / 2, count = left < lanes / 2 ? left : lanes / 2;
        if (count == lanes / 2 && has_odd) {
          a = load_some(here, lanes / 2);
          b = load_some(here + ld, lanes / 2);
        } else if (count > 0) {
          a = load_some(here, count);
          if (has_odd) b = load_some(here + ld, count);
        }
        const words even = (a & 0xFFFF) | (b << 16), odd = (a >> 16) | (b & 0xFFFF0000);
#ifdef __AVX512F__
        store(out + j, (words)__builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20,
                                                      5, 21, 6, 22, 7, 23));
#else
        store(out + j, (words)__builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11));
#endif
      }
  }
}

constexpr int64_t turned_pairs = 64;  // of a row at a time: 8 rows of them are 2 KB

void pairs_in_rows_turned(uint32_t* to, int64_t width, const float* from, int64_t ld, int64_t rows,
                          int64_t columns) {
  uint32_t strip[8 * turned_pairs];
  const int64_t pairs = (columns + 1) / 2;
  for (int64_t first = 0; first < pairs; first += turned_pairs) {
    const int64_t count = pairs - first < turned_pairs ? pairs - first : turned_pairs;
    const int64_t floats =
        columns - 2 * first < 2 * turned_pairs ? columns - 2 * first : 2 * turned_pairs;
    for (int64_t r = 0; r < width; r += 8) {
      for (int64_t i = 0; i < 8; ++i) {
        if (r + i < rows)
          row_to_pairs(strip + i * turned_pairs, from + (r + i) * ld + 2 * first, floats);
        else
          __builtin_memset(strip + i * turned_pairs, 0, turned_pairs * 4);
      }
      uint32_t* out = to + first * width + r;
      int64_t p = 0;
      for (; p + 8 <= count; p += 8) transpose_8x8(out + p * width, width, strip + p, turned_pairs);
      for (; p < count; ++p)
        for (int64_t i = 0; i < 8; ++i) out[p * width + i] = strip[i * turned_pairs + p];
    }
  }
}

// ---- products ---------------------------------------------------------------------------------

#ifdef __AVX512F__
typedef __m512 sums;
STAGECOACH_INLINE sums load_sums(const float* p) { return _mm512_loadu_ps(p); }
STAGECOACH_INLINE void store_sums(float* p, sums x) { _mm512_storeu_ps(p, x); }
#else
typedef __m256 sums;
STAGECOACH_INLINE sums load_sums(const float* p) { return _mm256_loadu_ps(p); }
STAGECOACH_INLINE void store_sums(float* p, sums x) { _mm256_storeu_ps(p, x); }
#endif

#if defined(__AVX512BF16__)

// 24 sums: more than the latency needs, and each pair of b is read for 8 rows (6 of a wide panel).
constexpr int vectors_max = 4;
constexpr int rows_of(int vectors) { return vectors == 4 ? 6 : 8; }
typedef __m512bh operand;
STAGECOACH_INLINE operand load_operand(const uint32_t* p) {
  return (__m512bh)_mm512_loadu_si512(p);
}
STAGECOACH_INLINE operand spread_operand(uint32_t pair) {
  return (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
}
STAGECOACH_INLINE sums add_products(sums s, operand a, operand b) {
  return _mm512_dpbf16_ps(s, a, b);
}
/// The instruction never makes denormal numbers, whatever the thread's mode is.
struct flushing {};

#else

constexpr int vectors_max = 3;
struct operand {
  sums even, odd;
};
STAGECOACH_INLINE operand split(words x) { return {(sums)(x << 16), (sums)(x & 0xFFFF0000)}; }
STAGECOACH_INLINE operand load_operand(const uint32_t* p) { return split(load(p)); }
STAGECOACH_INLINE operand spread_operand(uint32_t pair) { return split(words{} + pair); }
#ifdef __AVX512F__
constexpr int rows_of(int) { return 4; }
STAGECOACH_INLINE sums add_products(sums s, operand a, operand b) {
  return _mm512_fmadd_ps(a.even, b.even, _mm512_fmadd_ps(a.odd, b.odd, s));
}
#else
constexpr int rows_of(int) { return 2; }
STAGECOACH_INLINE sums add_products(sums s, operand a, operand b) {
  return _mm256_fmadd_ps(a.even, b.even, _mm256_fmadd_ps(a.odd, b.odd, s));
}
#endif
/// Denormal operands and results are zero while this lives, as VDPBF16PS has it.
class flushing {
 public:
  flushing() : mode_(_mm_getcsr()) { _mm_setcsr(mode_ | 0x8040); }
  ~flushing() { _mm_setcsr(mode_); }

 private:
  unsigned mode_;
};

#endif

/// c [rows, vectors * lanes]; start_step: floats between the starts of two rows, 0 for one bias.
template <int rows, int vectors>
__attribute__((noinline)) void block(float* c, int64_t ldc, const float* start, int64_t start_step,
                                     const uint32_t* a, int64_t a_row, int64_t a_pair,
                                     const uint32_t* b, int64_t width, int64_t pairs) {
  sums s[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v)
      s[r][v] = start != nullptr ? load_sums(start + r * start_step + v * lanes) : sums{};
  for (int64_t p = 0; p < pairs; ++p, a += a_pair, b += width) {
    operand wide[vectors];
    for (int v = 0; v < vectors; ++v) wide[v] = load_operand(b + v * lanes);
    for (int r = 0; r < rows; ++r) {
      const operand one = spread_operand(a[r * a_row]);
      for (int v = 0; v < vectors; ++v) s[r][v] = add_products(s[r][v], one, wide[v]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) store_sums(c + r * ldc + v * lanes, s[r][v]);
}

/// Rows in blocks of rows_of(vectors), the last ones one by one; columns [first, first + vectors *
/// lanes) of the panel, in which `columns` of the whole are valid.
template <int vectors>
void columns_of_panel(const bf16_product& x, int64_t first) {
  constexpr int64_t size = vectors * lanes;
  constexpr int block_rows = rows_of(vectors);
  const int64_t valid = x.columns - first < size ? x.columns - first : size;
  float bias[size], tile[block_rows * size];
  if (x.bias != nullptr) {
    __builtin_memset(bias, 0, sizeof bias);
    __builtin_memcpy(bias, x.bias + first, static_cast<unsigned long>(valid) * 4);
  }
  for (int64_t row = 0; row < x.rows;) {
    const bool is_whole = x.rows - row >= block_rows;
    const int64_t count = is_whole ? block_rows : 1;
    float* c = x.c + row * x.ldc + first;
    const uint32_t* a = x.a + row * x.a_row;
    const bool is_direct = valid == size && x.row_factor == nullptr;
    const bool starts_at_c = x.accumulate && x.row_factor == nullptr;
    if (!is_direct && starts_at_c) {
      __builtin_memset(tile, 0, sizeof tile);
      for (int64_t r = 0; r < count; ++r)
        __builtin_memcpy(tile + r * size, c + r * x.ldc, static_cast<unsigned long>(valid) * 4);
    }
    float* out = is_direct ? c : tile;
    const int64_t ld = is_direct ? x.ldc : size;
    const float* start = starts_at_c ? out : x.bias != nullptr ? bias : nullptr;
    const int64_t start_step = starts_at_c ? ld : 0;
    {
      // Around the call only: what a table does beside the sums must not depend on the mode.
      [[maybe_unused]] flushing mode;
      if (is_whole)
        block<block_rows, vectors>(out, ld, start, start_step, a, x.a_row, x.a_pair, x.b + first,
                                   x.panel_width, x.pairs);
      else
        block<1, vectors>(out, ld, start, start_step, a, x.a_row, x.a_pair, x.b + first,
                          x.panel_width, x.pairs);
    }
    for (int64_t r = 0; r < count && !is_direct; ++r) {
      if (x.row_factor == nullptr) {
        __builtin_memcpy(c + r * x.ldc, tile + r * size, static_cast<unsigned long>(valid) * 4);
        continue;
      }
      const float factor = x.row_factor[row + r];
      for (int64_t i = 0; i < valid; ++i) {
        const float term = tile[r * size + i] * factor;
        c[r * x.ldc + i] = x.accumulate ? c[r * x.ldc + i] + term : term;
      }
    }
    row += count;
  }
}

void product(const bf16_product& x) {
  int64_t first = 0;
  const auto left = [&] { return (x.panel_width - first) / lanes; };
  if constexpr (vectors_max >= 4)
    for (; left() == 4 && first < x.columns; first += 4 * lanes) columns_of_panel<4>(x, first);
  for (; left() >= 3 && first < x.columns; first += 3 * lanes) columns_of_panel<3>(x, first);
  for (; left() >= 2 && first < x.columns; first += 2 * lanes) columns_of_panel<2>(x, first);
  for (; left() >= 1 && first < x.columns; first += lanes) columns_of_panel<1>(x, first);
}

constexpr bf16_kernels table{pairs_in_rows, pairs_of_rows, pairs_across, pairs_in_rows_turned,
                             product};

}  // namespace
}  // namespace stagecoach
