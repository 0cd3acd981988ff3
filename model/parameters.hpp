// Parameters by global name: which tensors a unit owns, their shapes, order, initial values and
// hashes.
//
// Names are those of Hugging Face's GPT2LMHeadModel without the "transformer." prefix; linear
// weights are [in, out] as in its Conv1D. The global tensor index is the position in all_tensors();
// sums over tensors (gradient norm) walk it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "config/job_spec.hpp"

namespace stagecoach {

struct tensor_info {
  std::string name;  // "h.3.attn.c_attn.weight"
  std::vector<std::int64_t> shape;
  int index = 0;  // global, over the whole model; wte is 0
  int unit = 0;   // first unit that owns it (wte: the embedding)
  std::int64_t count() const;
  bool decays() const { return shape.size() >= 2; }  // weight decay: matrices only, as nanoGPT does
};

/// wte, wpe, then per block ln_1.{weight,bias}, attn.c_attn.{weight,bias},
/// attn.c_proj.{weight,bias}, ln_2.*, mlp.c_fc.*, mlp.c_proj.*, then ln_f.{weight,bias}.
std::vector<tensor_info> all_tensors(const model_spec& m);

/// Tensors that a stage of units [begin, end) holds, by index. The head unit holds ln_f and wte
/// too.
std::vector<tensor_info> stage_tensors(const model_spec& m, int unit_begin, int unit_end);

/// Initial values of one tensor, a pure function of (seed, tensor index, element): Philox4x32-10
/// normals by a polynomial Box-Muller of our own (no libm). std as GPT-2: init_std for matrices,
/// init_std / sqrt(2 * n_layer) for *.c_proj.weight; biases 0; norm weights 1.
void initialise(float* to, const tensor_info& tensor, const model_spec& m);

/// Order-free hash of a set of tensors: fixed chunks of 65,536 elements, each hashed with its
/// (name, offset) and added up. Adding the parts of any partition of the tensors gives the whole.
struct tensor_hash {
  std::uint64_t low = 0, high = 0;
  tensor_hash& operator+=(const tensor_hash& other);
  bool operator==(const tensor_hash&) const = default;
};
tensor_hash hash_tensor(const std::string& name, const float* values, std::int64_t count);
std::string to_string(const tensor_hash& h);  // 32 hex digits
bool parse_tensor_hash(const std::string& text, tensor_hash& out);

}  // namespace stagecoach
