// Published model shapes under their names, and small ones of our own for tests and first runs.
//
// Shapes only: no weights, no tokenizer. Sources and doubts stand beside each row in presets.cpp.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "config/job_spec.hpp"

namespace stagecoach {

struct preset {
  std::string name;
  model_spec model;   // model.preset == name
  std::string about;  // one line for a list: what it is and how sure the shape is
};

/// All presets, family by family.
const std::vector<preset>& presets();

/// nullptr if there is none of that name. The pointer is good for the life of the process.
const preset* find_preset(std::string_view name);

/// All names, for suggestions and completion.
const std::vector<std::string>& preset_names();

}  // namespace stagecoach
