#include "model/tensor_names.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
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

std::vector<int> moment_owners(const model_spec& m, const std::vector<int>& stage_tensors,
                               int replica_count) {
  const std::vector<tensor_size> all = all_tensor_sizes(m);
  std::vector<std::int64_t> sizes;
  for (const int i : stage_tensors) sizes.push_back(all[static_cast<std::size_t>(i)].count);
  const auto fill = [&sizes](std::int64_t most) {
    std::vector<int> owners;
    std::int64_t taken = 0;
    int owner = 0;
    for (const std::int64_t size : sizes) {
      if (taken > 0 && taken + size > most) {
        ++owner;
        taken = 0;
      }
      taken += size;
      owners.push_back(owner);
    }
    return owners;
  };
  if (sizes.empty()) return {};
  std::int64_t low = *std::max_element(sizes.begin(), sizes.end());
  std::int64_t high = std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
  while (low < high) {  // the smallest bound that fits into the replicas
    const std::int64_t middle = low + (high - low) / 2;
    if (fill(middle).back() < replica_count) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return fill(low);
}

std::vector<int> kept_moments(const job_spec& spec, int unit_begin, int unit_end, int replica,
                              int replica_count) {
  std::vector<int> tensors = stage_tensor_indices(spec.model, unit_begin, unit_end);
  if (!is_sharded(spec, replica_count)) return tensors;
  const std::vector<int> owners = moment_owners(spec.model, tensors, replica_count);
  std::vector<int> kept;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    // How many places this replica stands behind the owner in the ring.
    const int behind = (replica - owners[i] + replica_count) % replica_count;
    if (behind <= spec.elasticity.copies) kept.push_back(tensors[i]);
  }
  return kept;
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
