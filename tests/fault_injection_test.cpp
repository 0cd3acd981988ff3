// Faults on purpose: what the words mean, and that a flip changes one element, once.
#include "worker/fault_injection.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "kernels/backend.hpp"
#include "tests/training_run.hpp"

using namespace stagecoach;
using namespace stagecoach::testing;

TEST_CASE("the words of --inject") {
  const auto flip = parse_fault("flip@40");
  REQUIRE(flip.has_value());
  CHECK(flip->what == injected_fault::kind::flip);
  CHECK(flip->step == 40);
  CHECK(flip->tensor.empty());
  const auto named = parse_fault("flip@7:h.0.attn.c_attn.weight");
  REQUIRE(named.has_value());
  CHECK(named->tensor == "h.0.attn.c_attn.weight");
  const auto stall = parse_fault("stall@3");
  REQUIRE(stall.has_value());
  CHECK(stall->what == injected_fault::kind::stall);
  for (const char* text : {"", "flip", "flip@", "flip@0", "flip@x", "flip@-1", "flip@3:", "burn@3",
                           "stall@3:wte.weight", "flip@3 "})
    CHECK(!parse_fault(text).has_value());
}

TEST_CASE("a flip changes the middle element of its tensor after its step, once") {
  const job_spec spec = small_job();
  auto device = make_cpu_backend(1);
  stage model(spec.model, spec.batch, 0, 2, 1, *device);
  model.initialise_parameters();
  const tensor_hash before = model.weights_hash(true);
  fault_injection faults({{injected_fault::kind::flip, 5, "h.0.attn.c_attn.weight"}});
  faults.after_apply(4, model);
  CHECK(model.weights_hash(true) == before);
  const float* values = model.parameter("h.0.attn.c_attn.weight");
  const std::vector<float> was(values, values + 64 * 192);
  faults.after_apply(5, model);
  int changed = 0;
  for (std::size_t i = 0; i < was.size(); ++i) changed += values[i] != was[i];
  CHECK(changed == 1);
  // Bit 22 is worth half of the leading one, so the value moves by a quarter to a half.
  const std::size_t middle = 64 * 192 / 2;
  CHECK(std::abs(values[middle] / was[middle] - 1.0F) >= 0.25F);
  CHECK(faults.is_empty());
  const tensor_hash flipped = model.weights_hash(true);
  faults.after_apply(5, model);  // the step is done again after a recovery
  CHECK(model.weights_hash(true) == flipped);
}
