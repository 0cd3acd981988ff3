// What the parts of `stagecoach bench` share: medians, a figure's line, the elastic part's face.
#pragma once

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tools/command.hpp"

namespace stagecoach {

// NaN stands for "not measured" (an interrupted round); sorting it would be undefined.
inline std::vector<double> measured_sorted(std::vector<double> v) {
  std::erase_if(v, [](double x) { return std::isnan(x); });
  std::sort(v.begin(), v.end());
  return v;
}
inline double median(const std::vector<double>& values) {
  const auto v = measured_sorted(values);
  if (v.empty()) return std::nan("");
  return v.size() % 2 == 1 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}
inline double quantile(const std::vector<double>& values, double q) {
  const auto v = measured_sorted(values);
  if (v.empty()) return std::nan("");
  return v[std::min(v.size() - 1, static_cast<std::size_t>(q * static_cast<double>(v.size())))];
}

struct elastic_flags {
  int events = 20;   // of each fault
  int rounds = 5;    // turns of each candidate where a price is measured
  std::string only;  // figures, by comma; empty: all
  std::string peer, peer_script;
};

/// Issue "elastic to the last bit", its table of targets, measured; bench_elastic.cpp.
exit_code bench_elastic(const global_flags& flags, const elastic_flags& own);

}  // namespace stagecoach
