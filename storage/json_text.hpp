// JSON text from outside, parsed within bounds: depth, count of values, no duplicate keys.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

#include "config/limits.hpp"
#include "config/result.hpp"

namespace stagecoach {

struct json_bounds {
  int depth_max = limits::json_depth_max;
  std::size_t value_count_max = 4'000'000;  // 16 B each in memory; a 64 MiB manifest has 1 M
};

/// `what` names the text in errors. Fails: bad_input (with the byte position), too_large.
result<nlohmann::json> parse_json(std::string_view text, std::string_view what,
                                  json_bounds bounds = {});

}  // namespace stagecoach
