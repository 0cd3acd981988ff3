// What the parts of `stagecoach bench` share: medians, a figure's line, the faces of elastic and
// comm.
#pragma once

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "tools/command.hpp"
#include "worker/link.hpp"

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

/// A training step that is timed: B 4, vocabulary 50,304.
struct step_shape {
  const char* name;
  int layers, channels, heads, tokens;
};
inline constexpr step_shape step_shapes[] = {{"d6/384", 6, 384, 6, 256},
                                             {"d12/768", 12, 768, 12, 64}};

/// All calls of one kind in a step of this shape: best of `repetitions`; flops 0 where it is no
/// product.
struct kernel_time {
  std::string name;
  double best_ms = 0, flops = 0;
};
std::vector<kernel_time> time_kernels(const step_shape& shape, precision p, int threads,
                                      int repetitions);

/// The three products of a linear layer, y [m,n] = x [m,k] * w.
std::vector<kernel_time> time_products(std::int64_t m, std::int64_t k, std::int64_t n, precision p,
                                       int threads, int repetitions);

/// Bubbles of 2 and 4 stages under each schedule, a line each; bench_pipeline.cpp.
std::vector<nlohmann::json> bench_pipeline(int rounds);

struct elastic_flags {
  int events = 20;   // of each fault
  int rounds = 5;    // turns of each candidate where a price is measured
  std::string only;  // figures, by comma; empty: all
  std::string peer, peer_script;
};

/// Issue "elastic to the last bit", its table of targets, measured; bench_elastic.cpp.
exit_code bench_elastic(const global_flags& flags, const elastic_flags& own);

struct comm_flags {
  int rounds = 5;
  std::string peer, peer_script;
  std::function<double()> load_now;
  // Set in the process that is the other rank.
  std::string partner;  // HOST:PORT of who started it
  link_choice links = link_choice::automatic;
};

/// Links between processes of this host, each kind beside PyTorch's Gloo; bench_comm.cpp.
exit_code bench_comm(const global_flags& flags, const comm_flags& own,
                     const std::function<void(const std::string&, nlohmann::json)>& figure);

}  // namespace stagecoach
