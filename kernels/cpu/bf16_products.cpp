#include "kernels/cpu/bf16_products.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/bf16_sizes.hpp"
#include "kernels/cpu/head_pieces.hpp"

namespace stagecoach {
namespace {

using std::int64_t;

// 8 rows of a panel's sums fill the registers.
constexpr int64_t panel = bf16_panel;
constexpr int64_t tile_rows = 128;
constexpr int64_t tile_count_wanted = 16;  // keeps 8 threads busy
constexpr int64_t pack_rows_chunk = 32;
constexpr int64_t query_rows = 64;
// Of the head's tiles: logits of a piece for them stay in a second-level cache. Even, so that each
// pair of rows lies in one group.
constexpr int64_t group_rows = 128;
// Words between panels that are written side by side: at 4,096 bytes apart they would share cache
// sets.
constexpr int64_t panel_gap = 16;
// Of the head's weight gradient at a time: their inputs, packed, stay in a cache. Whole groups.
constexpr int64_t weight_rows = 1024;

int64_t pairs_of(int64_t count) { return divide_up(count, 2); }
int64_t panels_of(int64_t columns) { return divide_up(columns, panel); }

/// Width of the panels of one head's channels: all in one where they fit.
int64_t head_panel(int64_t d) { return d <= 64 ? round_up(d, 16) : panel; }

/// Words before each piece, and after the last, when piece i takes of(piece) words.
template <class Of>
std::vector<int64_t> offsets_of(const std::vector<index_range>& pieces, const Of& of) {
  std::vector<int64_t> at{0};
  for (const index_range& piece : pieces) at.push_back(at.back() + of(piece));
  return at;
}
std::vector<int64_t> head_forward_offsets(const std::vector<index_range>& pieces, int64_t c) {
  return offsets_of(
      pieces, [c](const index_range& v) { return panels_of(v.count()) * panel * pairs_of(c); });
}
std::vector<int64_t> head_backward_offsets(const std::vector<index_range>& pieces, int64_t c) {
  return offsets_of(
      pieces, [c](const index_range& v) { return panels_of(c) * panel * pairs_of(v.count()); });
}

int64_t widest(const std::vector<index_range>& pieces) {
  int64_t columns = 0;
  for (const index_range& v : pieces) columns = std::max(columns, v.count());
  return columns;
}

index_range row_group(int64_t group, int64_t rows) {
  return {group * group_rows, std::min(rows, (group + 1) * group_rows)};
}

/// What forward leaves for backward in place of logits. Exponentials are against the maximum of
/// their row and piece, as pairs in rows, and 0 at the target, whose gradient needs all its digits.
struct head_store {
  std::uint32_t* exponentials;  // tiles: row group, then piece, each [rows, pairs_of(columns)]
  float* factor;            // [piece, row]: the maximum, then what an exponential is multiplied by
  float* target;            // [row]: its logit, then its gradient
  std::int32_t* token;      // [row]: which it is
  std::vector<int64_t> at;  // pairs before each piece
  int64_t floats;

  head_store(float* storage, const std::vector<index_range>& pieces, int64_t rows)
      : at(offsets_of(pieces, [](const index_range& v) { return pairs_of(v.count()); })) {
    const int64_t words = round_up(rows * at.back(), 16);
    const int64_t factors = round_up(static_cast<int64_t>(pieces.size()) * rows, 16);
    exponentials = reinterpret_cast<std::uint32_t*>(storage);
    factor = storage + words;
    target = factor + factors;
    token = reinterpret_cast<std::int32_t*>(target + round_up(rows, 16));
    floats = words + factors + 2 * round_up(rows, 16);
  }
  std::uint32_t* tile(const index_range& rows, int64_t piece) const {
    return exponentials + rows.begin * at.back() + rows.count() * at[piece];
  }
};

}  // namespace

bool agrees_with(const bf16_kernels& a, const bf16_kernels& b) {
  constexpr int64_t rows = 9, columns = 48, pairs = 40;
  // Numbers of all sizes from a fixed rule: usual ones, tiny ones whose products are denormal,
  // zeros.
  std::uint64_t state = 20261126;
  const auto next = [&state] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state >> 33);
  };
  const auto fill = [&](std::vector<std::uint32_t>& words) {
    for (std::uint32_t& word : words) {
      word = 0;
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t kind = next() % 8;
        const std::uint32_t exponent = kind == 0   ? 0
                                       : kind == 1 ? 1 + next() % 60
                                       : kind == 2 ? 60 + next() % 10
                                                   : 120 + next() % 12;
        const std::uint32_t sign_and_mantissa = kind == 0 ? 0 : next() & 0x807F;
        word = word << 16 | sign_and_mantissa | exponent << 7;
      }
    }
  };
  std::vector<std::uint32_t> left(rows * pairs), right(pairs * columns);
  fill(left);
  fill(right);
  std::vector<float> sums[2], floats(2 * panel);
  std::vector<std::uint32_t> packs[2];
  for (int i = 0; i < 2; ++i) {
    const bf16_kernels& table = i == 0 ? a : b;
    sums[i].resize(rows * columns);
    table.product({sums[i].data(), columns, left.data(), pairs, 1, right.data(), columns, rows,
                   columns, pairs, nullptr, false});
    packs[i].resize(panel);
    std::memcpy(floats.data(), right.data(), floats.size() * sizeof(float));
    table.pairs_in_rows(packs[i].data(), panel, floats.data(), 2 * panel, 1, 2 * panel);
  }
  return std::memcmp(sums[0].data(), sums[1].data(), rows * columns * sizeof(float)) == 0 &&
         packs[0] == packs[1];
}

bf16_products::bf16_products(thread_pool& pool, const bf16_kernels& kernels,
                             const row_kernels& rows)
    : pool_(pool), kernels_(kernels), rows_(rows), lanes_(pool.thread_count()) {}

// ---- packing ----------------------------------------------------------------------------------

template <class Fill>
const bf16_products::word* bf16_products::packed(const float* w, pack_kind kind, int64_t words,
                                                 const Fill& fill) {
  pack& p = packs_[{w, kind}];
  if (p.epoch == epoch_ && p.words == words) return words_of(p.memory, words);
  word* to = words_of(p.memory, words);
  fill(to);
  p.words = words;
  p.epoch = epoch_;
  return to;
}

int64_t bf16_products::packed_head_bytes(int64_t channels, int64_t vocab) {
  const std::vector<index_range> pieces = vocabulary_pieces(vocab, panel);
  return 4 * (head_forward_offsets(pieces, channels).back() +
              head_backward_offsets(pieces, channels).back());
}

/// Rows [rows, columns] as pairs of neighbours [rows, pairs_of(columns)].
bf16_products::word* bf16_products::pack_rows(scratch_buffer& to, const float* from, int64_t rows,
                                              int64_t columns) {
  const int64_t pairs = pairs_of(columns);
  word* words = words_of(to, rows * pairs);
  pool_.run(divide_up(rows, pack_rows_chunk), [&](int64_t i, int) {
    const int64_t first = i * pack_rows_chunk;
    kernels_.pairs_in_rows(words + first * pairs, pairs, from + first * columns, columns,
                           std::min(pack_rows_chunk, rows - first), columns);
  });
  return words;
}

void bf16_products::reserve_lanes(int64_t count) {
  for (scratch_buffer& lane : lanes_) lane.of(count);
}

// ---- linear layers ----------------------------------------------------------------------------

/// c [rows, columns] = bias + a * b, on the pool; a [rows, pairs], b in panels [pairs, panel].
void bf16_products::product_of_rows(float* c, int64_t ldc, const word* a, const word* panels,
                                    int64_t rows, int64_t columns, int64_t pairs,
                                    const float* bias) {
  const int64_t row_tiles = divide_up(rows, tile_rows), panel_count = panels_of(columns);
  const int64_t runs = std::clamp<int64_t>(divide_up(tile_count_wanted, row_tiles), 1, panel_count);
  pool_.run(row_tiles * runs, [&](int64_t task, int) {
    const int64_t first = task / runs * tile_rows;
    const index_range run = block_of(panel_count, task % runs, runs);
    for (int64_t j = run.begin; j < run.end; ++j)
      kernels_.product({c + first * ldc + j * panel, ldc, a + first * pairs, pairs, 1,
                        panels + j * panel * pairs, panel, std::min(tile_rows, rows - first),
                        std::min(panel, columns - j * panel), pairs,
                        bias != nullptr ? bias + j * panel : nullptr, false});
  });
}

void bf16_products::linear_forward(float* y, const float* x, const float* w, const float* bias,
                                   int64_t m, int64_t k, int64_t n) {
  const int64_t pairs = pairs_of(k), panels = panels_of(n);
  const word* b = packed(w, pack_kind::forward, panels * panel * pairs, [&](word* to) {
    pool_.run(panels, [&](int64_t j, int) {
      kernels_.pairs_of_rows(to + j * panel * pairs, panel, w + j * panel, n, k,
                             std::min(panel, n - j * panel), nullptr);
    });
  });
  product_of_rows(y, n, pack_rows(left_, x, m, k), b, m, n, pairs, bias);
}

void bf16_products::linear_backward_input(float* dx, const float* dy, const float* w, int64_t m,
                                          int64_t k, int64_t n) {
  const int64_t pairs = pairs_of(n), panels = panels_of(k);
  const word* b = packed(w, pack_kind::backward, panels * panel * pairs, [&](word* to) {
    pool_.run(panels, [&](int64_t j, int) {
      kernels_.pairs_in_rows_turned(to + j * panel * pairs, panel, w + j * panel * n, n,
                                    std::min(panel, k - j * panel), n);
    });
  });
  product_of_rows(dx, k, pack_rows(left_, dy, m, n), b, m, k, pairs, nullptr);
}

void bf16_products::linear_backward_weight(float* dw, const float* x, const float* dy, int64_t m,
                                           int64_t k, int64_t n, bool accumulate) {
  const int64_t pairs = pairs_of(m), left = panels_of(k), right = panels_of(n);
  word* a = words_of(left_, left * panel * pairs);
  word* b = words_of(right_, right * panel * pairs);
  pool_.run(left + right, [&](int64_t task, int) {
    const bool is_left = task < left;
    const int64_t j = is_left ? task : task - left, columns = is_left ? k : n;
    kernels_.pairs_of_rows((is_left ? a : b) + j * panel * pairs, panel,
                           (is_left ? x : dy) + j * panel, columns, m,
                           std::min(panel, columns - j * panel), nullptr);
  });
  const int64_t runs = std::clamp<int64_t>(divide_up(tile_count_wanted, left), 1, right);
  pool_.run(left * runs, [&](int64_t task, int) {
    const int64_t i = task / runs;
    const index_range run = block_of(right, task % runs, runs);
    for (int64_t j = run.begin; j < run.end; ++j)
      kernels_.product({dw + i * panel * n + j * panel, n, a + i * panel * pairs, 1, panel,
                        b + j * panel * pairs, panel, std::min(panel, k - i * panel),
                        std::min(panel, n - j * panel), pairs, nullptr, accumulate});
  });
}

// ---- attention --------------------------------------------------------------------------------

namespace {

/// One head of one sequence, packed for its products, in a lane's scratch.
struct attention_lane {
  int64_t d, t, ld, width, panels;  // ld: floats of a row of scores; width, panels: of D channels
  std::uint32_t *keys_turned, *values_turned;              // panels of 48 keys [D / 2, 48]
  std::uint32_t *keys, *values;                            // panels of channels [T / 2, width]
  std::uint32_t *query, *query_pairs, *from, *from_pairs;  // of one tile of rows
  std::uint32_t *row_pairs, *column_pairs;                 // of one tile of scores
  float *scores, *slopes, *scaled, *inverse;
  int64_t count = 0;  // floats

  attention_lane(float* storage, attention_shape s)
      : d(s.channels / s.n_head),
        t(s.tokens),
        ld(round_up(t, panel)),
        width(head_panel(d)),
        panels(divide_up(d, width)) {
    const auto floats = [&](int64_t size) {
      float* at = storage == nullptr ? nullptr : storage + count;
      count += round_up(size, 16);
      return at;
    };
    const auto words = [&](int64_t size) { return reinterpret_cast<std::uint32_t*>(floats(size)); };
    const int64_t tile_pairs = panels * width * query_rows / 2;
    keys_turned = words(ld * pairs_of(d));
    values_turned = words(ld * pairs_of(d));
    keys = words(panels * width * pairs_of(t));
    values = words(panels * width * pairs_of(t));
    query = words(query_rows * pairs_of(d));
    from = words(query_rows * pairs_of(d));
    query_pairs = words(tile_pairs);
    from_pairs = words(tile_pairs);
    row_pairs = words(query_rows * ld / 2);
    column_pairs = words(query_rows * ld / 2);
    scores = floats(query_rows * ld);
    slopes = floats(query_rows * ld);
    scaled = floats(query_rows * d);
    inverse = floats(query_rows);
  }
};

/// x [rows, ld_from] times scale, [rows, d].
void scale_into(float* to, const float* from, int64_t ld_from, int64_t rows, int64_t d,
                float scale) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < d; ++i) to[r * d + i] = from[r * ld_from + i] * scale;
}

}  // namespace

void bf16_products::attention_forward(float* out, float* lse, const float* qkv, attention_shape s) {
  const int64_t t = s.tokens, c = s.channels, d = c / s.n_head, tiles = divide_up(t, query_rows);
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  reserve_lanes(attention_lane(nullptr, s).count);
  pool_.run(s.batch * s.n_head, [&](int64_t bh, int number) {
    const attention_lane lane(lanes_[number].of(0), s);
    const int64_t b = bh / s.n_head, h = bh % s.n_head;
    const float* k = qkv + b * t * 3 * c + c + h * d;
    for (int64_t j = 0; j < t; j += panel)
      kernels_.pairs_in_rows_turned(lane.keys_turned + j * pairs_of(d), panel, k + j * 3 * c, 3 * c,
                                    std::min(panel, t - j), d);
    for (int64_t i = 0; i < lane.panels; ++i)
      kernels_.pairs_of_rows(lane.values + i * lane.width * pairs_of(t), lane.width,
                             k + c + i * lane.width, 3 * c, t,
                             std::min(lane.width, d - i * lane.width), nullptr);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * query_rows, rows = std::min(query_rows, t - first);
      const int64_t keys = first + rows;
      float* to = out + (b * t + first) * c + h * d;
      scale_into(lane.scaled, qkv + (b * t + first) * 3 * c + h * d, 3 * c, rows, d, scale);
      kernels_.pairs_in_rows(lane.query, pairs_of(d), lane.scaled, d, rows, d);
      for (int64_t j = 0; j < keys; j += panel)
        kernels_.product({lane.scores + j, lane.ld, lane.query, pairs_of(d), 1,
                          lane.keys_turned + j * pairs_of(d), panel, rows,
                          std::min(panel, lane.ld - j), pairs_of(d), nullptr, false});
      rows_.causal_softmax(lane.scores, lane.ld, rows, keys, first + 1, lane.inverse,
                           lse + bh * t + first);
      kernels_.pairs_in_rows(lane.row_pairs, lane.ld / 2, lane.scores, lane.ld, rows, keys);
      for (int64_t i = 0; i < lane.panels; ++i)
        kernels_.product({to + i * lane.width, c, lane.row_pairs, lane.ld / 2, 1,
                          lane.values + i * lane.width * pairs_of(t), lane.width, rows,
                          std::min(lane.width, d - i * lane.width), pairs_of(keys), nullptr,
                          false});
      rows_.scale_rows(to, c, lane.inverse, rows, d);
    }
  });
}

void bf16_products::attention_backward(float* dqkv, const float* dout, const float* qkv,
                                       const float* out, const float* lse, attention_shape s) {
  const int64_t t = s.tokens, c = s.channels, d = c / s.n_head, tiles = divide_up(t, query_rows);
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  reserve_lanes(attention_lane(nullptr, s).count);
  pool_.run(s.batch * s.n_head, [&](int64_t bh, int number) {
    const attention_lane lane(lanes_[number].of(0), s);
    const int64_t b = bh / s.n_head, h = bh % s.n_head;
    const float* k = qkv + b * t * 3 * c + c + h * d;
    float* dk = dqkv + b * t * 3 * c + c + h * d;
    for (int64_t j = 0; j < t; j += panel) {
      const int64_t count = std::min(panel, t - j);
      kernels_.pairs_in_rows_turned(lane.keys_turned + j * pairs_of(d), panel, k + j * 3 * c, 3 * c,
                                    count, d);
      kernels_.pairs_in_rows_turned(lane.values_turned + j * pairs_of(d), panel, k + c + j * 3 * c,
                                    3 * c, count, d);
    }
    const auto channels = [&](int64_t i) { return std::min(lane.width, d - i * lane.width); };
    for (int64_t i = 0; i < lane.panels; ++i)
      kernels_.pairs_of_rows(lane.keys + i * lane.width * pairs_of(t), lane.width,
                             k + i * lane.width, 3 * c, t, channels(i), nullptr);
    // The last tile sees every key, so it writes all of dk and dv; the others add.
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
      const bool is_first = tile == tiles - 1;
      const int64_t first = tile * query_rows, rows = std::min(query_rows, t - first);
      const int64_t keys = first + rows, tile_pairs = pairs_of(rows);
      const float* q = qkv + (b * t + first) * 3 * c + h * d;
      const float* from = dout + (b * t + first) * c + h * d;
      scale_into(lane.scaled, q, 3 * c, rows, d, scale);
      kernels_.pairs_in_rows(lane.query, pairs_of(d), lane.scaled, d, rows, d);
      kernels_.pairs_in_rows(lane.from, pairs_of(d), from, c, rows, d);
      for (int64_t i = 0; i < lane.panels; ++i) {
        kernels_.pairs_of_rows(lane.query_pairs + i * lane.width * tile_pairs, lane.width,
                               q + i * lane.width, 3 * c, rows, channels(i), nullptr);
        kernels_.pairs_of_rows(lane.from_pairs + i * lane.width * tile_pairs, lane.width,
                               from + i * lane.width, c, rows, channels(i), nullptr);
      }
      for (int64_t j = 0; j < keys; j += panel) {
        kernels_.product({lane.scores + j, lane.ld, lane.query, pairs_of(d), 1,
                          lane.keys_turned + j * pairs_of(d), panel, rows, panel, pairs_of(d),
                          nullptr, false});
        kernels_.product({lane.slopes + j, lane.ld, lane.from, pairs_of(d), 1,
                          lane.values_turned + j * pairs_of(d), panel, rows, panel, pairs_of(d),
                          nullptr, false});
      }
      rows_.causal_softmax_backward(lane.scores, lane.slopes, lane.ld, rows, keys, first + 1,
                                    lse + bh * t + first, from, out + (b * t + first) * c + h * d,
                                    c, d, scale);
      kernels_.pairs_in_rows(lane.row_pairs, lane.ld / 2, lane.slopes, lane.ld, rows, keys);
      for (int64_t i = 0; i < lane.panels; ++i)
        kernels_.product({dqkv + (b * t + first) * 3 * c + h * d + i * lane.width, 3 * c,
                          lane.row_pairs, lane.ld / 2, 1, lane.keys + i * lane.width * pairs_of(t),
                          lane.width, rows, channels(i), pairs_of(keys), nullptr, false});
      const auto add_to_keys = [&](float* to, const float* weights, const word* pairs) {
        for (int64_t j = 0; j < keys; j += panel) {
          const int64_t count = std::min(panel, keys - j);
          kernels_.pairs_of_rows(lane.column_pairs, panel, weights + j, lane.ld, rows, count,
                                 nullptr);
          for (int64_t i = 0; i < lane.panels; ++i)
            kernels_.product({to + j * 3 * c + i * lane.width, 3 * c, lane.column_pairs, 1, panel,
                              pairs + i * lane.width * tile_pairs, lane.width, count, channels(i),
                              tile_pairs, nullptr, !is_first});
        }
      };
      add_to_keys(dk, lane.slopes, lane.query_pairs);
      add_to_keys(dk + c, lane.scores, lane.from_pairs);
    }
  });
}

// ---- head -------------------------------------------------------------------------------------

const bf16_products::word* bf16_products::packed_head_forward(const float* wte, head_shape s) {
  const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, panel);
  const std::vector<int64_t> at = head_forward_offsets(pieces, s.channels);
  return packed(wte, pack_kind::head_forward, at.back(), [&](word* to) {
    pool_.run(static_cast<int64_t>(pieces.size()), [&](int64_t piece, int) {
      const index_range v = pieces[piece];
      for (int64_t j = 0; j < v.count(); j += panel)
        kernels_.pairs_in_rows_turned(to + at[piece] + j * pairs_of(s.channels), panel,
                                      wte + (v.begin + j) * s.channels, s.channels,
                                      std::min(panel, v.count() - j), s.channels);
    });
  });
}

const bf16_products::word* bf16_products::packed_head_backward(const float* wte, head_shape s) {
  const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, panel);
  const std::vector<int64_t> at = head_backward_offsets(pieces, s.channels);
  return packed(wte, pack_kind::head_backward, at.back(), [&](word* to) {
    pool_.run(static_cast<int64_t>(pieces.size()), [&](int64_t piece, int) {
      const index_range v = pieces[piece];
      for (int64_t j = 0; j < s.channels; j += panel)
        kernels_.pairs_of_rows(to + at[piece] + j * pairs_of(v.count()), panel,
                               wte + v.begin * s.channels + j, s.channels, v.count(),
                               std::min(panel, s.channels - j), nullptr);
    });
  });
}

int64_t bf16_products::head_floats(head_shape s) {
  static float nowhere[1];
  return head_store(nowhere, vocabulary_pieces(s.vocab, panel), s.rows).floats;
}

void bf16_products::head_forward(float* logits, float* stats, float* losses, const float* x,
                                 const float* wte, const std::int32_t* targets, head_shape s) {
  const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, panel);
  const std::vector<int64_t> at = head_forward_offsets(pieces, s.channels);
  const head_store store(logits, pieces, s.rows);
  const int64_t piece_count = static_cast<int64_t>(pieces.size());
  const int64_t groups = divide_up(s.rows, group_rows), pairs = pairs_of(s.channels);
  const word* b = packed_head_forward(wte, s);
  const word* a = pack_rows(left_, x, s.rows, s.channels);
  float* sum = head_.of(piece_count * s.rows);  // [piece, row]
  std::copy_n(targets, s.rows, store.token);
  reserve_lanes(group_rows * widest(pieces));
  pool_.run(piece_count * groups, [&](int64_t task, int lane) {
    const int64_t piece = task / groups;
    const index_range v = pieces[piece], r = row_group(task % groups, s.rows);
    float* tile = lanes_[lane].of(0);
    for (int64_t j = 0; j < v.count(); j += panel)
      kernels_.product({tile + j, v.count(), a + r.begin * pairs, pairs, 1,
                        b + at[piece] + j * pairs, panel, r.count(), std::min(panel, v.count() - j),
                        pairs, nullptr, false});
    const auto target_of = [&](int64_t row) -> float* {
      const std::int32_t target = targets[row];
      if (target < v.begin || target >= v.end) return nullptr;
      return tile + (row - r.begin) * v.count() + target - v.begin;
    };
    for (int64_t row = r.begin; row < r.end; ++row)
      if (const float* logit = target_of(row)) store.target[row] = *logit;
    rows_.softmax_exponentials(store.factor + piece * s.rows + r.begin,
                               sum + piece * s.rows + r.begin, tile, v.count(), r.count(),
                               v.count());
    for (int64_t row = r.begin; row < r.end; ++row)
      if (float* exponential = target_of(row)) *exponential = 0;
    kernels_.pairs_in_rows(store.tile(r, piece), pairs_of(v.count()), tile, v.count(), r.count(),
                           v.count());
  });
  merge_pieces(stats, losses, {store.factor, sum}, piece_count, head_block_count(s.vocab), s.rows,
               [&](int64_t row) { return store.target[row]; });
}

void bf16_products::head_backward_input(float* dx, float* logits, const float* stats,
                                        const float* wte, const std::int32_t* targets, float scale,
                                        head_shape s) {
  const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, panel);
  const std::vector<int64_t> at = head_backward_offsets(pieces, s.channels);
  const head_store store(logits, pieces, s.rows);
  const int64_t blocks = head_block_count(s.vocab), groups = divide_up(s.rows, group_rows);
  const int64_t per_block = static_cast<int64_t>(pieces.size()) / blocks;
  const int64_t size = s.rows * s.channels;
  const word* b = packed_head_backward(wte, s);
  float* partial = blocks > 1 ? head_.of(blocks * size) : dx;  // [block, M, C]
  const float *max = stats, *sum = stats + s.rows;
  pool_.run(groups * blocks, [&](int64_t task, int) {
    const int64_t block = task % blocks;
    const index_range r = row_group(task / blocks, s.rows);
    float* to = partial + block * size;
    for (int64_t i = 0; i < per_block; ++i) {
      const int64_t piece = block * per_block + i, pairs = pairs_of(pieces[piece].count());
      float* factor = store.factor + piece * s.rows;
      for (int64_t row = r.begin; row < r.end; ++row)
        factor[row] = math::exp(factor[row] - max[row]) * (scale / sum[row]);
      const word* tile = store.tile(r, piece);
      for (int64_t j = 0; j < s.channels; j += panel) {
        // The next tile follows this one; rows that lie apart are no stream that hardware sees.
        const index_range ahead = block_of(r.count() * pairs, j / panel, panels_of(s.channels));
        if (i + 1 < per_block)
          for (int64_t k = ahead.begin; k < ahead.end; k += 16)
            __builtin_prefetch(tile + r.count() * pairs + k, 0, 2);
        kernels_.product({to + r.begin * s.channels + j, s.channels, tile, pairs, 1,
                          b + at[piece] + j * pairs, panel, r.count(),
                          std::min(panel, s.channels - j), pairs, nullptr, i != 0,
                          factor + r.begin});
      }
    }
    const index_range v = block_of(s.vocab, block, blocks);
    for (int64_t row = r.begin; row < r.end; ++row) {
      if (targets[row] < v.begin || targets[row] >= v.end) continue;
      store.target[row] = (math::exp(store.target[row] - max[row]) / sum[row] - 1.0f) * scale;
      rows_.add_scaled(to + row * s.channels, wte + targets[row] * s.channels, store.target[row],
                       s.channels);
    }
  });
  if (blocks == 1) return;
  constexpr int64_t chunk = 16384;
  pool_.run(divide_up(size, chunk), [&](int64_t i, int) {
    merge_partials(dx, partial, blocks, size, i * chunk, std::min(chunk, size - i * chunk),
                   rows_.add);
  });
}

void bf16_products::head_backward_weight(float* dwte, const float* logits, const float* x,
                                         head_shape s, bool accumulate) {
  const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, panel);
  const head_store store(const_cast<float*>(logits), pieces, s.rows);
  const int64_t c = s.channels, pairs_max = pairs_of(std::min(s.rows, weight_rows));
  const int64_t right = panels_of(c) * panel * pairs_max;
  reserve_lanes(right + panels_of(widest(pieces)) * (panel * pairs_max + panel_gap));
  pool_.run(static_cast<int64_t>(pieces.size()), [&](int64_t piece, int lane) {
    const index_range v = pieces[piece];
    word* b = words_of(lanes_[lane], 0);
    word* a = b + right;
    for (int64_t first = 0; first < s.rows; first += weight_rows) {
      const int64_t end = std::min(s.rows, first + weight_rows), pairs = pairs_of(end - first);
      const int64_t step = panel * pairs + panel_gap;
      for (int64_t j = 0; j < c; j += panel)
        kernels_.pairs_of_rows(b + j * pairs, panel, x + first * c + j, c, end - first,
                               std::min(panel, c - j), store.factor + piece * s.rows + first);
      for (int64_t group = first / group_rows; group * group_rows < end; ++group) {
        const index_range r = row_group(group, s.rows);
        const word* tile = store.tile(r, piece);
        kernels_.pairs_across(a + (r.begin - first) / 2 * panel, panel, step, tile,
                              pairs_of(v.count()), r.count(), v.count());
      }
      for (int64_t i = 0; i < v.count(); i += panel)
        for (int64_t j = 0; j < c; j += panel)
          kernels_.product({dwte + (v.begin + i) * c + j, c, a + i / panel * step, 1, panel,
                            b + j * pairs, panel, std::min(panel, v.count() - i),
                            std::min(panel, c - j), pairs, nullptr, accumulate || first != 0});
    }
    for (int64_t row = 0; row < s.rows; ++row)
      if (store.token[row] >= v.begin && store.token[row] < v.end)
        rows_.add_scaled(dwte + store.token[row] * c, x + row * c, store.target[row], c);
  });
}

void bf16_products::head_logits(float* logits, const float* x, const float* wte, head_shape s) {
  const std::vector<index_range> pieces = vocabulary_pieces(s.vocab, panel);
  const std::vector<int64_t> at = head_forward_offsets(pieces, s.channels);
  const int64_t groups = divide_up(s.rows, group_rows), pairs = pairs_of(s.channels);
  const word* b = packed_head_forward(wte, s);
  const word* a = pack_rows(left_, x, s.rows, s.channels);
  pool_.run(static_cast<int64_t>(pieces.size()) * groups, [&](int64_t task, int) {
    const index_range v = pieces[task / groups], r = row_group(task % groups, s.rows);
    for (int64_t j = 0; j < v.count(); j += panel)
      kernels_.product({logits + r.begin * s.vocab + v.begin + j, s.vocab, a + r.begin * pairs,
                        pairs, 1, b + at[task / groups] + j * pairs, panel, r.count(),
                        std::min(panel, v.count() - j), pairs, nullptr, false});
  });
}

}  // namespace stagecoach
