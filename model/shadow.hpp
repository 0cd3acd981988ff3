// State of tensors that belong to another worker's stage: parameters and moments, kept at the same
// step as one's own by applying the same reduced gradients with the same scalars.
//
// AdamW is elementwise, so the same kernel over a tensor gives the bits that its owner gets. Knows
// no link and no step: who brings the gradients sees to it that none is missing.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "model/parameters.hpp"

namespace stagecoach {

class shadow_state {
 public:
  explicit shadow_state(backend& device) : device_(&device) {}

  /// Zeroed places for one more tensor. The pointers stay where they are while a shadow holds it.
  void add(const tensor_info& tensor);
  /// Takes a tensor that another shadow of this backend holds: both have the same memory from then
  /// on, so only one of them may go on. False: the other does not hold it.
  bool share(const tensor_info& tensor, const shadow_state& other);

  const std::vector<tensor_info>& tensors() const { return tensors_; }  // in order of coming
  bool is_held(const std::string& name) const { return places_.count(name) != 0; }
  float* parameter(const std::string& name) { return array(name, 0); }  // null if not held
  float* moment1(const std::string& name) { return array(name, 1); }
  float* moment2(const std::string& name) { return array(name, 2); }

  /// AdamW on one tensor.
  void apply(const tensor_info& tensor, const float* gradient, const adamw_scalars& scalars) {
    apply(tensor, gradient, scalars, 0, tensor.count());
  }
  /// On its elements [begin, begin + count), of which gradient is.
  void apply(const tensor_info& tensor, const float* gradient, const adamw_scalars& scalars,
             std::int64_t begin, std::int64_t count);

  tensor_hash state_hash() const;  // parameters and moments, as stage::state_hash
  std::int64_t allocated_bytes() const;

 private:
  struct place {
    std::shared_ptr<float> memory;  // parameter, moment1, moment2
    std::int64_t stride = 0;
  };
  float* array(const std::string& name, int kind) const;

  backend* device_;
  std::vector<tensor_info> tensors_;
  std::map<std::string, place> places_;  // by tensor name
};

}  // namespace stagecoach
