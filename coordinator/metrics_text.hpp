// What is known, as Prometheus text. Names and labels: one prefix, base units, no worker or process
// ids that only grow.
#pragma once

#include <string>

namespace stagecoach {

struct api_state;

std::string metrics_text(const api_state& state);

}  // namespace stagecoach
