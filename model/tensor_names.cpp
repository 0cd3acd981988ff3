#include "model/tensor_names.hpp"

#include <fmt/format.h>

#include <string_view>

namespace stagecoach {

std::vector<tensor_size> all_tensor_sizes(const model_spec& m) {
  std::vector<tensor_size> list;
  const auto add_pair = [&list](const std::string& name, std::int64_t rows, std::int64_t width,
                                int unit) {
    list.push_back({name + ".weight", rows * width, unit});
    list.push_back({name + ".bias", width, unit});
  };
  const std::int64_t c = m.d_model;
  list.push_back({"wte.weight", m.vocab_size * c, 0});
  list.push_back({"wpe.weight", m.context * c, 0});
  for (int block = 0; block < m.n_layer; ++block) {
    const std::string prefix = fmt::format("h.{}.", block);
    const int unit = block + 1;
    add_pair(prefix + "ln_1", 1, c, unit);
    add_pair(prefix + "attn.c_attn", c, 3 * c, unit);
    add_pair(prefix + "attn.c_proj", c, c, unit);
    add_pair(prefix + "ln_2", 1, c, unit);
    add_pair(prefix + "mlp.c_fc", c, m.d_ff, unit);
    add_pair(prefix + "mlp.c_proj", m.d_ff, c, unit);
  }
  add_pair("ln_f", 1, c, static_cast<int>(m.n_layer) + 1);
  return list;
}

std::vector<int> stage_tensor_indices(const model_spec& m, int unit_begin, int unit_end) {
  const std::vector<tensor_size> all = all_tensor_sizes(m);
  const int head = static_cast<int>(m.n_layer) + 1;
  std::vector<int> held;
  for (int i = 0; i < static_cast<int>(all.size()); ++i) {
    const int unit = all[static_cast<std::size_t>(i)].unit;
    // The head multiplies by the transposed embedding matrix, so its stage holds a copy.
    const bool is_tied_for_head = i == 0 && unit_end == head + 1 && unit_begin <= head;
    if ((unit >= unit_begin && unit < unit_end) || is_tied_for_head) held.push_back(i);
  }
  return held;
}

std::vector<std::string> stage_tensor_names(const model_spec& m, int unit_begin, int unit_end) {
  const std::vector<tensor_size> all = all_tensor_sizes(m);
  std::vector<std::string> names;
  for (const int i : stage_tensor_indices(m, unit_begin, unit_end)) {
    names.push_back(all[static_cast<std::size_t>(i)].name);
  }
  return names;
}

std::string add_tensor_hashes(const std::vector<std::string>& parts) {
  // Two sums modulo 2^64 without a carry between them, high half first in the text.
  std::uint64_t sums[2] = {0, 0};
  for (const std::string& part : parts) {
    if (part.size() != 32) return {};
    std::uint64_t halves[2] = {0, 0};
    for (std::size_t i = 0; i < 32; ++i) {
      const char c = part[i];
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
      if (digit < 0) return {};
      halves[i / 16] = halves[i / 16] << 4 | static_cast<std::uint64_t>(digit);
    }
    sums[0] += halves[0];
    sums[1] += halves[1];
  }
  return fmt::format("{:016x}{:016x}", sums[0], sums[1]);
}

}  // namespace stagecoach
