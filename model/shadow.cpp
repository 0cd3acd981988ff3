#include "model/shadow.hpp"

#include "config/result.hpp"

namespace stagecoach {

void shadow_state::add(const tensor_info& tensor) {
  // Whole cache lines, as in a stage: arrays never share one.
  const std::int64_t stride = (tensor.count() + 15) / 16 * 16;
  float* memory = device_->allocate(3 * stride);
  const auto release = [device = device_](float* p) { device->release(p); };
  places_[tensor.name] = {std::shared_ptr<float>(memory, release), stride};
  tensors_.push_back(tensor);
}

bool shadow_state::share(const tensor_info& tensor, const shadow_state& other) {
  const auto found = other.places_.find(tensor.name);
  if (found == other.places_.end()) return false;
  places_[tensor.name] = found->second;
  tensors_.push_back(tensor);
  return true;
}

float* shadow_state::array(const std::string& name, int kind) const {
  const auto found = places_.find(name);
  if (found == places_.end()) return nullptr;
  return found->second.memory.get() + kind * found->second.stride;
}

void shadow_state::apply(const tensor_info& tensor, const float* gradient,
                         const adamw_scalars& scalars, std::int64_t begin, std::int64_t count) {
  invariant(is_held(tensor.name), "a gradient is applied to a tensor that is held");
  adamw_scalars own = scalars;
  if (!tensor.decays()) own.weight_decay = 0;
  device_->adamw(parameter(tensor.name) + begin, moment1(tensor.name) + begin,
                 moment2(tensor.name) + begin, gradient, count, own);
}

tensor_hash shadow_state::state_hash() const {
  tensor_hash sum;
  for (const tensor_info& t : tensors_) {
    sum += hash_tensor(t.name, array(t.name, 0), t.count());
    sum += hash_tensor(t.name + "@moment1", array(t.name, 1), t.count());
    sum += hash_tensor(t.name + "@moment2", array(t.name, 2), t.count());
  }
  return sum;
}

std::int64_t shadow_state::allocated_bytes() const {
  std::int64_t floats = 0;
  for (const auto& [name, held] : places_) floats += 3 * held.stride;
  return 4 * floats;
}

}  // namespace stagecoach
