// Text from weights: greedy or temperature sampling with a counter-based generator. For people, not
// for speed.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model/stage.hpp"

namespace stagecoach {

struct sampling {
  double temperature = 0.8;  // 0: greedy
  int top_k = 40;            // 0: all
  std::uint64_t seed = 1;
  int max_new_tokens = 200;
};

/// Whole model in one stage (units 0..end). prompt non-empty; the context window slides.
/// on_token is called for each new token; return false to stop.
void generate(stage& whole_model, const model_spec& m, backend& device,
              std::vector<std::int32_t> prompt, const sampling& how,
              const std::function<bool(std::int32_t)>& on_token);

}  // namespace stagecoach
