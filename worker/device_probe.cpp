// The device's arithmetic as a fact: one microbatch through each kind of unit, hashed.
#include "worker/device_probe.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <vector>

#include "kernels/backend.hpp"
#include "model/stage.hpp"

namespace stagecoach {

std::string device_class(int threads, const std::string& isa) {
  auto device = make_cpu_backend(threads, isa);
  model_spec m{"probe", 1, 48, 3, 192, 2100, 32, "random", 7, 0.02};
  batch_spec b{2, 2, 31, 1};
  const int units = 3;
  stage probe(m, b, 0, units, 1, *device);
  probe.initialise_parameters();
  std::vector<std::int32_t> tokens(62), targets(62);
  for (int i = 0; i < 62; ++i) {
    tokens[i] = (i * 97) % 2100;
    targets[i] = (i * 131 + 5) % 2100;
  }
  std::vector<float> gradients(static_cast<std::size_t>(probe.gradient_count()));
  double loss = probe.forward(0, nullptr, tokens.data(), targets.data(), nullptr);
  probe.backward_input(0, nullptr, nullptr, 1.0f / 62);
  probe.backward_weight(0, gradients.data(), false);
  std::uint64_t hash = XXH3_64bits(gradients.data(), gradients.size() * sizeof(float));
  hash ^= XXH3_64bits(&loss, sizeof loss);
  return fmt::format("{}-{:016x}", device->name(), hash);
}

}  // namespace stagecoach
