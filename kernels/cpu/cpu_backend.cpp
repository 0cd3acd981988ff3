// The CPU: oneDNN for every matrix product, row kernels for the rest, cut into tasks for our own
// threads. Products with bf16 operands are bf16_products.hpp's.
//
// oneDNN is called with one thread on tiles that shape alone fixes; which thread runs a tile
// changes no bit (DESIGN 4). Its plain sgemm on these tiles was as fast as its matmul primitives
// with packed weights (0.996 of their time, summed over a GPT-2 step of 6 layers of 384 at one
// thread, measured interleaved). It takes strides and keeps no state per shape, so nothing needs to
// know when weights change.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <dnnl.hpp>
#include <vector>

#include "config/result.hpp"
#include "kernels/backend.hpp"
#include "kernels/bf16_sizes.hpp"
#include "kernels/cpu/bf16_products.hpp"
#include "kernels/cpu/head_pieces.hpp"
#include "kernels/cpu/instruction_set.hpp"
#include "kernels/cpu/row_kernels.hpp"
#include "kernels/cpu/scratch_buffer.hpp"
#include "kernels/cpu/thread_pool.hpp"
#include "kernels/fixed_order.hpp"

namespace stagecoach {
namespace {

using std::int64_t;

constexpr int64_t element_chunk =
    16384;  // 64 KiB per operand: three of them stay in a second-level cache
constexpr int64_t row_chunk = 32;
constexpr int64_t column_chunk = 64;  // of column sums: four cache lines of each row
constexpr int64_t query_rows = 64;    // attention tile: less of the upper triangle than 128
constexpr int64_t head_rows = 256;
constexpr int64_t piece_step = 16;         // of the head's pieces: whole vectors
constexpr int64_t product_step = 48;       // columns of oneDNN's inner kernel
constexpr int64_t tile_count_wanted = 16;  // keeps 8 threads busy
constexpr int64_t weight_tile_count =
    8;  // of weight gradients: wider tiles gain more than balance does
// Rows that one product of a weight gradient sums. Measured at 1,024 rows: 7 % faster in pieces of
// 512 for layers, and in pieces of 128 for the head, whose rows lie 200 KB apart.
constexpr int64_t weight_rows = 512;
constexpr int64_t head_weight_rows = 128;
// From here on turning a weight over first pays: oneDNN's own way with transposed weights is 3-15 %
// slower at these tiles.
constexpr int64_t transposing_rows = 512;
constexpr int64_t transposing_chunk = 64;

/// A grid of equal pieces (the last ones may be smaller) over a matrix.
struct tile_grid {
  int64_t rows, columns, tile_rows, tile_columns;
  int64_t row_count() const { return divide_up(rows, tile_rows); }
  int64_t column_count() const { return divide_up(columns, tile_columns); }
  int64_t count() const { return row_count() * column_count(); }
  index_range row_range(int64_t tile) const {
    const int64_t begin = tile / column_count() * tile_rows;
    return {begin, std::min(rows, begin + tile_rows)};
  }
  index_range column_range(int64_t tile) const {
    const int64_t begin = tile % column_count() * tile_columns;
    return {begin, std::min(columns, begin + tile_columns)};
  }
};

/// Tiles of up to tile_rows rows; columns are cut only as far as the threads need it.
tile_grid product_grid(int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_count) {
  const int64_t row_tiles = divide_up(rows, tile_rows);
  const int64_t pieces =
      std::clamp<int64_t>(divide_up(tile_count, row_tiles), 1, std::max<int64_t>(1, columns / 96));
  const int64_t tile_columns = round_up(divide_up(columns, pieces), product_step);
  return {rows, columns, tile_rows, std::min(columns, tile_columns)};
}

enum class operand { plain, transposed };

/// c [m,n] = alpha * a * b, or += ; a is [m,k] and b is [k,n], stored so or transposed, row-major.
void product(operand a_kind, operand b_kind, int64_t m, int64_t n, int64_t k, float alpha,
             const float* a, int64_t lda, const float* b, int64_t ldb, bool accumulate, float* c,
             int64_t ldc) {
  const auto status =
      dnnl::sgemm(a_kind == operand::plain ? 'N' : 'T', b_kind == operand::plain ? 'N' : 'T', m, n,
                  k, alpha, a, lda, b, ldb, accumulate ? 1.0f : 0.0f, c, ldc);
  invariant(status == dnnl::status::success, "oneDNN takes every product of valid sizes");
}

/// c [m,n] = or += a^T * b over `rows` rows of a and b, `step` rows at a time in order.
void weight_product(int64_t m, int64_t n, int64_t rows, int64_t step, const float* a, int64_t lda,
                    const float* b, int64_t ldb, bool accumulate, float* c, int64_t ldc) {
  for (int64_t begin = 0; begin < rows; begin += step)
    product(operand::transposed, operand::plain, m, n, std::min(step, rows - begin), 1,
            a + begin * lda, lda, b + begin * ldb, ldb, accumulate || begin != 0, c, ldc);
}

/// The CPU's own instruction where it does what bf16_kernels.hpp says, else the same in two.
const bf16_kernels& bf16_kernels_of(instruction_set set) {
  if (set == instruction_set::avx2) return bf16_kernels_avx2;
  static const bool is_native = __builtin_cpu_supports("avx512bf16") &&
                                agrees_with(bf16_kernels_avx512_bf16, bf16_kernels_avx512);
  return is_native ? bf16_kernels_avx512_bf16 : bf16_kernels_avx512;
}

class cpu_backend final : public backend {
 public:
  cpu_backend(int threads, instruction_set set)
      : set_(set),
        rows_(set == instruction_set::avx512 ? row_kernels_avx512 : row_kernels_avx2),
        pool_(threads),
        lane_scratch_(threads),
        bf16_(pool_, bf16_kernels_of(set), rows_) {}

  std::string name() const override { return std::string("cpu:") + to_string(set_); }

  // ---- packed weights -----------------------------------------------------------------------

  void weights_changed() override { bf16_.weights_changed(); }
  int64_t packed_linear_bytes(int64_t k, int64_t n, precision p) const override {
    return p == precision::bf16 ? bf16_linear_bytes(k, n) : 0;
  }
  int64_t packed_head_bytes(head_shape s, precision p) const override {
    return p == precision::bf16 ? bf16_products::packed_head_bytes(s.channels, s.vocab) : 0;
  }

  // ---- linear -------------------------------------------------------------------------------

  void linear_forward(float* y, const float* x, const float* w, const float* bias, int64_t m,
                      int64_t k, int64_t n, precision p) override {
    if (p == precision::bf16) return bf16_.linear_forward(y, x, w, bias, m, k, n);
    const tile_grid grid = product_grid(m, n, 128, tile_count_wanted);
    pool_.run(grid.count(), [&](int64_t tile, int) {
      const index_range r = grid.row_range(tile), c = grid.column_range(tile);
      float* out = y + r.begin * n + c.begin;
      product(operand::plain, operand::plain, r.count(), c.count(), k, 1, x + r.begin * k, k,
              w + c.begin, n, false, out, n);
      if (bias != nullptr) rows_.add_bias(out, n, bias + c.begin, r.count(), c.count());
    });
  }

  void linear_backward_input(float* dx, const float* dy, const float* w, int64_t m, int64_t k,
                             int64_t n, precision p) override {
    if (p == precision::bf16) return bf16_.linear_backward_input(dx, dy, w, m, k, n);
    const bool is_turned = m >= transposing_rows;
    const tile_grid grid = product_grid(m, k, is_turned ? 128 : 256, tile_count_wanted);
    float* turned = is_turned ? turned_.of(k * n) : nullptr;  // [N, K]
    if (is_turned)
      each_chunk(k, transposing_chunk, [&](int64_t row, int64_t count) {
        rows_.transpose(turned + row, k, w + row * n, n, count, n);
      });
    pool_.run(grid.count(), [&](int64_t tile, int) {
      const index_range r = grid.row_range(tile), c = grid.column_range(tile);
      float* out = dx + r.begin * k + c.begin;
      if (is_turned)
        product(operand::plain, operand::plain, r.count(), c.count(), n, 1, dy + r.begin * n, n,
                turned + c.begin, k, false, out, k);
      else
        product(operand::plain, operand::transposed, r.count(), c.count(), n, 1, dy + r.begin * n,
                n, w + c.begin * n, n, false, out, k);
    });
  }

  void linear_backward_weight(float* dw, float* dbias, const float* x, const float* dy, int64_t m,
                              int64_t k, int64_t n, bool accumulate, precision p) override {
    if (p == precision::bf16) {
      bf16_.linear_backward_weight(dw, x, dy, m, k, n, accumulate);
      if (dbias != nullptr)
        each_chunk(n, column_chunk, [&](int64_t j, int64_t count) {
          rows_.column_sums(dbias + j, dy + j, n, m, count, accumulate);
        });
      return;
    }
    const tile_grid grid = product_grid(k, n, 192, weight_tile_count);
    const int64_t bias_tasks = dbias != nullptr ? divide_up(n, column_chunk) : 0;
    pool_.run(grid.count() + bias_tasks, [&](int64_t task, int) {
      if (task >= grid.count()) {
        const int64_t begin = (task - grid.count()) * column_chunk;
        rows_.column_sums(dbias + begin, dy + begin, n, m, std::min(column_chunk, n - begin),
                          accumulate);
        return;
      }
      const index_range r = grid.row_range(task), c = grid.column_range(task);
      weight_product(r.count(), c.count(), m, weight_rows, x + r.begin, k, dy + c.begin, n,
                     accumulate, dw + r.begin * n + c.begin, n);
    });
  }

  // ---- layer normalisation, elements --------------------------------------------------------

  void layernorm_forward(float* y, float* mean, float* rstd, const float* x, const float* gain,
                         const float* bias, int64_t m, int64_t c) override {
    each_chunk(m, row_chunk, [&](int64_t r, int64_t count) {
      rows_.layernorm_forward(y + r * c, mean + r, rstd + r, x + r * c, gain, bias, count, c);
    });
  }

  void layernorm_backward_input(float* dx, const float* residual, const float* dy, const float* x,
                                const float* gain, const float* mean, const float* rstd, int64_t m,
                                int64_t c) override {
    each_chunk(m, row_chunk, [&](int64_t r, int64_t count) {
      rows_.layernorm_backward_input(dx + r * c, residual != nullptr ? residual + r * c : nullptr,
                                     dy + r * c, x + r * c, gain, mean + r, rstd + r, count, c);
    });
  }

  void layernorm_backward_weight(float* dgain, float* dbias, const float* dy, const float* x,
                                 const float* mean, const float* rstd, int64_t m, int64_t c,
                                 bool accumulate) override {
    each_chunk(c, column_chunk, [&](int64_t j, int64_t count) {
      rows_.layernorm_backward_weight(dgain + j, dbias + j, dy + j, x + j, mean, rstd, c, m, count,
                                      accumulate);
    });
  }

  void gelu_forward(float* y, const float* x, int64_t count) override {
    each_chunk(count, element_chunk,
               [&](int64_t i, int64_t n) { rows_.gelu_forward(y + i, x + i, n); });
  }
  void gelu_backward(float* dx, const float* dy, const float* x, int64_t count) override {
    each_chunk(count, element_chunk,
               [&](int64_t i, int64_t n) { rows_.gelu_backward(dx + i, dy + i, x + i, n); });
  }
  void add(float* y, const float* a, const float* b, int64_t count) override {
    each_chunk(count, element_chunk,
               [&](int64_t i, int64_t n) { rows_.add(y + i, a + i, b + i, n); });
  }

  // ---- attention ----------------------------------------------------------------------------

  void attention_forward(float* out, float* lse, const float* qkv, attention_shape s,
                         precision p) override {
    if (p == precision::bf16) return bf16_.attention_forward(out, lse, qkv, s);
    const int64_t t = s.tokens, c = s.channels, d = c / s.n_head;
    const int64_t ld = round_up(t, 16), tiles = divide_up(t, query_rows);
    const float scale = 1 / std::sqrt(static_cast<float>(d));
    reserve_lanes(query_rows * (ld + 1));
    pool_.run(s.batch * s.n_head * tiles, [&](int64_t task, int lane) {
      // Long tiles first, so that no thread is left alone with one at the end.
      const int64_t tile = tiles - 1 - task / (s.batch * s.n_head),
                    bh = task % (s.batch * s.n_head);
      const int64_t b = bh / s.n_head, h = bh % s.n_head;
      const int64_t first = tile * query_rows, rows = std::min(query_rows, t - first),
                    keys = first + rows;
      const float* q = qkv + (b * t + first) * 3 * c + h * d;
      const float* k = qkv + b * t * 3 * c + c + h * d;
      float* to = out + (b * t + first) * c + h * d;
      float* scores = lane_scratch_[lane].of(0);
      float* inverse = scores + query_rows * ld;
      product(operand::plain, operand::transposed, rows, keys, d, scale, q, 3 * c, k, 3 * c, false,
              scores, ld);
      rows_.causal_softmax(scores, ld, rows, keys, first + 1, inverse, lse + bh * t + first);
      product(operand::plain, operand::plain, rows, d, keys, 1, scores, ld, k + c, 3 * c, false, to,
              c);
      rows_.scale_rows(to, c, inverse, rows, d);
    });
  }

  void attention_backward(float* dqkv, const float* dout, const float* qkv, const float* out,
                          const float* lse, attention_shape s, precision kind) override {
    if (kind == precision::bf16) return bf16_.attention_backward(dqkv, dout, qkv, out, lse, s);
    const int64_t t = s.tokens, c = s.channels, d = c / s.n_head;
    const int64_t ld = round_up(t, 16), tiles = divide_up(t, query_rows);
    const float scale = 1 / std::sqrt(static_cast<float>(d));
    reserve_lanes(2 * query_rows * ld);
    pool_.run(s.batch * s.n_head, [&](int64_t bh, int lane) {
      const int64_t b = bh / s.n_head, h = bh % s.n_head;
      const float* k = qkv + b * t * 3 * c + c + h * d;
      float* dk = dqkv + b * t * 3 * c + c + h * d;
      float* p = lane_scratch_[lane].of(0);
      float* dp = p + query_rows * ld;
      // The last tile sees every key, so it writes all of dk and dv; the others add.
      for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        const bool is_first = tile == tiles - 1;
        const int64_t first = tile * query_rows, rows = std::min(query_rows, t - first);
        const int64_t keys = first + rows;
        const float* q = qkv + (b * t + first) * 3 * c + h * d;
        const float* from = dout + (b * t + first) * c + h * d;
        product(operand::plain, operand::transposed, rows, keys, d, scale, q, 3 * c, k, 3 * c,
                false, p, ld);
        product(operand::plain, operand::transposed, rows, keys, d, 1, from, c, k + c, 3 * c, false,
                dp, ld);
        rows_.causal_softmax_backward(p, dp, ld, rows, keys, first + 1, lse + bh * t + first, from,
                                      out + (b * t + first) * c + h * d, c, d, scale);
        product(operand::plain, operand::plain, rows, d, keys, 1, dp, ld, k, 3 * c, false,
                dqkv + (b * t + first) * 3 * c + h * d, 3 * c);
        product(operand::transposed, operand::plain, keys, d, rows, 1, dp, ld, q, 3 * c, !is_first,
                dk, 3 * c);
        product(operand::transposed, operand::plain, keys, d, rows, 1, p, ld, from, c, !is_first,
                dk + c, 3 * c);
      }
    });
  }

  // ---- embedding ----------------------------------------------------------------------------

  void embedding_forward(float* y, const std::int32_t* tokens, const float* wte, const float* wpe,
                         int64_t batch, int64_t t, int64_t c) override {
    each_chunk(batch * t, row_chunk, [&](int64_t begin, int64_t count) {
      for (int64_t row = begin; row < begin + count; ++row)
        rows_.add(y + row * c, wte + tokens[row] * c, wpe + row % t * c, c);
    });
  }

  void embedding_backward(float* dwte, float* dwpe, const float* dy, const std::int32_t* tokens,
                          int64_t batch, int64_t t, int64_t c, int64_t vocab, int64_t context_rows,
                          bool accumulate) override {
    if (!accumulate) {
      zero(dwte, vocab * c);
      zero(dwpe, context_rows * c);
    }
    // By columns: every element is then summed in row order by one task.
    each_chunk(c, column_chunk, [&](int64_t j, int64_t count) {
      for (int64_t row = 0; row < batch * t; ++row) {
        const float* from = dy + row * c + j;
        float *wide = dwte + tokens[row] * c + j, *place = dwpe + row % t * c + j;
        rows_.add(wide, wide, from, count);
        rows_.add(place, place, from, count);
      }
    });
  }

  // ---- head ---------------------------------------------------------------------------------

  int64_t head_floats(head_shape s, precision p) const override {
    return p == precision::bf16 ? bf16_products::head_floats(s) : s.rows * s.vocab;
  }
  double head_forward(float* logits, float* stats, const float* x, const float* wte,
                      const std::int32_t* targets, head_shape s, precision p) override {
    sums_.resize(divide_up(s.rows, loss_block_rows));
    if (p == precision::bf16) {
      float* losses = head_scratch_.of(s.rows);
      bf16_.head_forward(logits, stats, losses, x, wte, targets, s);
      return sum_losses(losses, s.rows, sums_.data());
    }
    const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, piece_step);
    const int64_t piece_count = static_cast<int64_t>(pieces.size());
    // With many pieces each takes all rows, and turning its weights over pays; with few, rows are
    // cut too.
    const int64_t group_rows = piece_count >= tile_count_wanted ? 4 * head_rows : head_rows;
    const int64_t groups = divide_up(s.rows, group_rows);
    const bool is_turned = piece_count >= tile_count_wanted && s.rows >= transposing_rows;
    if (is_turned) reserve_lanes(2 * head_columns * s.channels);
    float* max = head_scratch_.of(2 * piece_count * s.rows + s.rows);  // [piece, row], then sums
    float* sum = max + piece_count * s.rows;
    float* losses = sum + piece_count * s.rows;
    pool_.run(piece_count * groups, [&](int64_t task, int lane) {
      const int64_t piece = task / groups, group = task % groups * group_rows;
      const index_range v = pieces[piece];
      const float* weights = wte + v.begin * s.channels;
      float* turned = is_turned ? lane_scratch_[lane].of(0) : nullptr;  // [C, piece]
      if (is_turned) rows_.transpose(turned, v.count(), weights, s.channels, v.count(), s.channels);
      for (int64_t first = group; first < std::min(s.rows, group + group_rows);
           first += head_rows) {
        const int64_t rows = std::min(head_rows, s.rows - first);
        float* tile = logits + first * s.vocab + v.begin;
        if (is_turned)
          product(operand::plain, operand::plain, rows, v.count(), s.channels, 1,
                  x + first * s.channels, s.channels, turned, v.count(), false, tile, s.vocab);
        else
          product(operand::plain, operand::transposed, rows, v.count(), s.channels, 1,
                  x + first * s.channels, s.channels, weights, s.channels, false, tile, s.vocab);
        rows_.softmax_stats(max + piece * s.rows + first, sum + piece * s.rows + first, tile,
                            s.vocab, rows, v.count());
      }
    });
    merge_pieces(stats, losses, {max, sum}, piece_count, head_block_count(s.vocab), s.rows,
                 [&](int64_t row) { return logits[row * s.vocab + targets[row]]; });
    return sum_losses(losses, s.rows, sums_.data());
  }

  void head_backward_input(float* dx, float* logits, const float* stats, const float* wte,
                           const std::int32_t* targets, float scale, head_shape s,
                           precision p) override {
    if (p == precision::bf16)
      return bf16_.head_backward_input(dx, logits, stats, wte, targets, scale, s);
    const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, piece_step);
    const int64_t blocks = head_block_count(s.vocab);
    const int64_t per_block = static_cast<int64_t>(pieces.size()) / blocks;
    const tile_grid grid{s.rows, blocks, 128, 1};
    const int64_t size = s.rows * s.channels;
    float* factor = head_scratch_.of(s.rows + (blocks > 1 ? blocks * size : 0));
    float* partial = blocks > 1 ? factor + s.rows : dx;  // [block, M, C]
    for (int64_t row = 0; row < s.rows; ++row) factor[row] = scale / stats[s.rows + row];
    pool_.run(grid.count(), [&](int64_t task, int) {
      const index_range r = grid.row_range(task);
      const int64_t block = grid.column_range(task).begin;
      for (int64_t i = 0; i < per_block; ++i) {
        const index_range v = pieces[block * per_block + i];
        float* tile = logits + r.begin * s.vocab + v.begin;
        rows_.softmax_gradient(tile, s.vocab, stats + r.begin, factor + r.begin, r.count(),
                               v.count());
        for (int64_t row = r.begin; row < r.end; ++row)
          if (targets[row] >= v.begin && targets[row] < v.end)
            logits[row * s.vocab + targets[row]] -= scale;
        product(operand::plain, operand::plain, r.count(), s.channels, v.count(), 1, tile, s.vocab,
                wte + v.begin * s.channels, s.channels, i != 0,
                partial + block * size + r.begin * s.channels, s.channels);
      }
    });
    if (blocks == 1) return;
    each_chunk(size, element_chunk, [&](int64_t begin, int64_t count) {
      merge_partials(dx, partial, blocks, size, begin, count, rows_.add);
    });
  }

  void head_backward_weight(float* dwte, const float* logits, const float* x, head_shape s,
                            bool accumulate, precision p) override {
    if (p == precision::bf16) return bf16_.head_backward_weight(dwte, logits, x, s, accumulate);
    const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, piece_step);
    pool_.run(static_cast<int64_t>(pieces.size()), [&](int64_t piece, int) {
      const index_range v = pieces[piece];
      weight_product(v.count(), s.channels, s.rows, head_weight_rows, logits + v.begin, s.vocab, x,
                     s.channels, accumulate, dwte + v.begin * s.channels, s.channels);
    });
  }

  void head_logits(float* logits, const float* x, const float* wte, head_shape s,
                   precision p) override {
    if (p == precision::bf16) return bf16_.head_logits(logits, x, wte, s);
    const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, piece_step);
    const int64_t row_tiles = divide_up(s.rows, head_rows);
    pool_.run(static_cast<int64_t>(pieces.size()) * row_tiles, [&](int64_t task, int) {
      const index_range v = pieces[task / row_tiles];
      const int64_t first = task % row_tiles * head_rows;
      product(operand::plain, operand::transposed, std::min(head_rows, s.rows - first), v.count(),
              s.channels, 1, x + first * s.channels, s.channels, wte + v.begin * s.channels,
              s.channels, false, logits + first * s.vocab + v.begin, s.vocab);
    });
  }

  // ---- reductions, optimizer, memory --------------------------------------------------------

  double sum_of_squares(const float* x, int64_t count) override {
    const int64_t block_count = divide_up(count, square_block_elements);
    sums_.resize(block_count);
    const int64_t per_task = 16;
    each_chunk(block_count, per_task, [&](int64_t first, int64_t blocks) {
      for (int64_t b = first; b < first + blocks; ++b) {
        const int64_t begin = b * square_block_elements;
        sums_[b] = rows_.sum_of_squares(x + begin, std::min(square_block_elements, count - begin));
      }
    });
    return sum_tree(sums_.data(), block_count);
  }

  void adamw(float* param, float* m, float* v, const float* grad, int64_t count,
             const adamw_scalars& s) override {
    const adamw_factors f{s.lr,           s.beta1, s.beta2, s.eps,
                          s.weight_decay, s.bias1, s.bias2, s.grad_scale};
    each_chunk(count, element_chunk,
               [&](int64_t i, int64_t n) { rows_.adamw(param + i, m + i, v + i, grad + i, n, f); });
  }

  float* allocate(int64_t count) override {
    invariant(count >= 0, "a tensor has no negative size");
    float* p = allocate_floats(count);
    std::memset(p, 0, static_cast<std::size_t>(count) * sizeof(float));
    return p;
  }
  void release(float* p) override {
    bf16_.forget_weights();  // the next owner of these addresses may hold other weights there
    std::free(p);
  }
  void copy(float* to, const float* from, int64_t count) override {
    std::memmove(to, from, static_cast<std::size_t>(count) * sizeof(float));
  }

 private:
  template <class Body>
  void each_chunk(int64_t count, int64_t chunk, const Body& body) {
    pool_.run(divide_up(count, chunk),
              [&](int64_t i, int) { body(i * chunk, std::min(chunk, count - i * chunk)); });
  }

  void zero(float* p, int64_t count) {
    each_chunk(count, 16 * element_chunk, [&](int64_t i, int64_t n) {
      std::memset(p + i, 0, static_cast<std::size_t>(n) * sizeof(float));
    });
  }

  /// Every lane's scratch holds at least count floats; of(0) then returns it.
  void reserve_lanes(int64_t count) {
    for (scratch_buffer& scratch : lane_scratch_) scratch.of(count);
  }

  instruction_set set_;
  const row_kernels& rows_;
  thread_pool pool_;
  std::vector<scratch_buffer> lane_scratch_;
  scratch_buffer head_scratch_, turned_;
  std::vector<double> sums_;
  bf16_products bf16_;
};

}  // namespace

std::unique_ptr<backend> make_cpu_backend(int threads, const std::string& isa) {
  return std::make_unique<cpu_backend>(threads, settle_instruction_set(isa));
}

}  // namespace stagecoach
