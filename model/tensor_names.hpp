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

/// ZeRO-1: which replica keeps the moments of each of a stage's tensors (as given by
/// stage_tensor_indices): contiguous runs, the largest as small as it can be. The tied matrix comes
/// first, so replica 0 has it on the first and on the last stage. With fewer tensors than replicas
/// the last ones keep none.
std::vector<int> moment_owners(const model_spec& m, const std::vector<int>& stage_tensors,
                               int replica_count);

/// Global indices of the tensors of units [begin, end) of which a replica keeps moments: all of
/// them, or with a sharded optimizer its own share and those of the `elasticity.copies` replicas
/// before it.
std::vector<int> kept_moments(const job_spec& spec, int unit_begin, int unit_end, int replica,
                              int replica_count);
/// Do the replicas share the moments of a stage among them? One alone has nobody to share with.
inline bool is_sharded(const job_spec& spec, int replica_count) {
  return spec.parallelism.shard_optimizer && replica_count > 1;
}

/// Sum of the parts' tensor hashes (32 hex digits each) is the whole's; empty if a text is not one.
std::string add_tensor_hashes(const std::vector<std::string>& parts);

}  // namespace stagecoach
