#include "model/parameters.hpp"

#include <fmt/format.h>
#include <xxhash.h>
// The library's own choice of the vector path when the program runs, where it was built with one:
// the same hashes, four times as fast as the SSE2 that this program is compiled for.
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>

#include "config/result.hpp"
#include "model/exact_math.hpp"
#include "model/philox.hpp"
#include "model/plan.hpp"

namespace stagecoach {

namespace {

constexpr std::int64_t hash_chunk_count = 65'536;  // frozen: it is part of every golden hash

bool ends_with(const std::string& text, const char* tail) {
  return std::string_view(text).ends_with(tail);
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

bool parse_hex(std::string_view text, std::uint64_t& out) {
  out = 0;
  for (const char c : text) {
    const int digit = hex_digit(c);
    if (digit < 0) return false;
    out = out << 4 | static_cast<std::uint64_t>(digit);
  }
  return true;
}

}  // namespace

std::int64_t tensor_info::count() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

std::vector<tensor_info> all_tensors(const model_spec& m) {
  std::vector<tensor_info> list;
  const auto add = [&list](std::string name, std::vector<std::int64_t> shape, int unit) {
    list.push_back({std::move(name), std::move(shape), static_cast<int>(list.size()), unit});
  };
  const auto add_pair = [&add](const std::string& name, std::vector<std::int64_t> shape, int unit) {
    const std::int64_t width = shape.back();
    add(name + ".weight", std::move(shape), unit);
    add(name + ".bias", {width}, unit);
  };
  const std::int64_t c = m.d_model;
  add("wte.weight", {m.vocab_size, c}, 0);
  add("wpe.weight", {m.context, c}, 0);
  for (int block = 0; block < m.n_layer; ++block) {
    const std::string prefix = fmt::format("h.{}.", block);
    const int unit = block + 1;
    add_pair(prefix + "ln_1", {c}, unit);
    add_pair(prefix + "attn.c_attn", {c, 3 * c}, unit);
    add_pair(prefix + "attn.c_proj", {c, c}, unit);
    add_pair(prefix + "ln_2", {c}, unit);
    add_pair(prefix + "mlp.c_fc", {c, m.d_ff}, unit);
    add_pair(prefix + "mlp.c_proj", {m.d_ff, c}, unit);
  }
  add_pair("ln_f", {c}, static_cast<int>(m.n_layer) + 1);
  return list;
}

std::vector<tensor_info> stage_tensors(const model_spec& m, int unit_begin, int unit_end) {
  std::vector<tensor_info> held;
  for (tensor_info& tensor : all_tensors(m)) {
    const bool is_tied_for_head = tensor.index == 0 && unit_end == unit_count(m);
    if ((tensor.unit >= unit_begin && tensor.unit < unit_end) || is_tied_for_head) {
      held.push_back(std::move(tensor));
    }
  }
  return held;
}

void initialise(float* to, const tensor_info& tensor, const model_spec& m) {
  const std::int64_t count = tensor.count();
  if (!tensor.decays()) {
    std::fill(to, to + count, ends_with(tensor.name, ".weight") ? 1.0F : 0.0F);
    return;
  }
  // GPT-2: each block adds two projections to the residual stream, whose variance this keeps at
  // one.
  double std = m.init_std;
  if (ends_with(tensor.name, ".c_proj.weight")) {
    std /= std::sqrt(2.0 * static_cast<double>(m.n_layer));
  }
  for (std::int64_t i = 0; i < count; i += 2) {
    const std::uint64_t pair = static_cast<std::uint64_t>(i) / 2;
    const philox_counter random =
        philox({static_cast<std::uint32_t>(pair), static_cast<std::uint32_t>(pair >> 32),
                static_cast<std::uint32_t>(tensor.index),
                static_cast<std::uint32_t>(philox_site::initial_values)},
               m.init_seed);
    // Box and Muller 1958: two independent normals from two uniforms.
    const double radius = std * std::sqrt(-2.0 * exact::log(unit_interval(random[0], random[1])));
    const exact::sine_cosine angle = exact::of_turns(unit_interval(random[2], random[3]));
    to[i] = static_cast<float>(radius * angle.cosine);
    if (i + 1 < count) to[i + 1] = static_cast<float>(radius * angle.sine);
  }
}

tensor_hash& tensor_hash::operator+=(const tensor_hash& other) {
  // Two sums modulo 2^64, without a carry between them: commutative, so the order can't matter.
  low += other.low;
  high += other.high;
  return *this;
}

tensor_hash hash_tensor(const std::string& name, const float* values, std::int64_t count) {
  // The choice is made by the first call, which nobody else may be beside.
  [[maybe_unused]] static const bool is_chosen = [] {
    const std::array<char, 1024> some{};
    return XXH3_128bits_withSeed(some.data(), some.size(), 0).low64 != 0;
  }();
  tensor_hash sum;
  for (std::int64_t offset = 0; offset < count; offset += hash_chunk_count) {
    const std::int64_t chunk = std::min(hash_chunk_count, count - offset);
    // The place of a chunk is its seed; without it, two swapped chunks would hash the same.
    const XXH64_hash_t seed =
        XXH3_64bits_withSeed(name.data(), name.size(), static_cast<XXH64_hash_t>(offset));
    const XXH128_hash_t hash = XXH3_128bits_withSeed(
        values + offset, static_cast<std::size_t>(chunk) * sizeof(float), seed);
    sum += tensor_hash{hash.low64, hash.high64};
  }
  return sum;
}

std::string to_string(const tensor_hash& h) { return fmt::format("{:016x}{:016x}", h.high, h.low); }

bool parse_tensor_hash(const std::string& text, tensor_hash& out) {
  if (text.size() != 32) return false;
  tensor_hash parsed;
  const std::string_view view = text;
  if (!parse_hex(view.substr(0, 16), parsed.high) || !parse_hex(view.substr(16), parsed.low)) {
    return false;
  }
  out = parsed;
  return true;
}

}  // namespace stagecoach
