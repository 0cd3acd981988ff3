// Names and sizes of a model's tensors, without any kernel: what the coordinator needs to know of
// weights.
//
// The same list, in the same order, as all_tensors() of model/parameters.hpp; a test there holds
// them equal.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "config/job_spec.hpp"

namespace stagecoach {

struct tensor_size {
  std::string name;
  std::int64_t count = 0;  // elements
  int unit = 0;            // first unit that owns it
};

/// By global tensor index: wte, wpe, each block's twelve, ln_f.
std::vector<tensor_size> all_tensor_sizes(const model_spec& m);

/// Indices of the tensors that a stage of units [begin, end) holds; the head unit holds wte too.
std::vector<int> stage_tensor_indices(const model_spec& m, int unit_begin, int unit_end);
std::vector<std::string> stage_tensor_names(const model_spec& m, int unit_begin, int unit_end);

/// Sum of the parts' tensor hashes (32 hex digits each) is the whole's; empty if a text is not one.
std::string add_tensor_hashes(const std::vector<std::string>& parts);

}  // namespace stagecoach
