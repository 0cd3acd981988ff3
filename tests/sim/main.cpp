// test_sim --seed N --count K --loud: histories N .. N+K-1; exits 1 at the first that violates
// something.
#include <fmt/format.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "tests/sim/cluster_sim.hpp"

int main(int argc, char** argv) {
  std::uint64_t seed = 1, count = 300;
  bool is_loud = false, goes_on = false;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (flag == "--count" && i + 1 < argc) {
      count = std::strtoull(argv[++i], nullptr, 10);
    } else if (flag == "--loud") {
      is_loud = true;
    } else if (flag == "--go-on") {
      goes_on = true;
    } else {
      fmt::print(stderr, "usage: test_sim [--seed N] [--count K] [--loud] [--go-on]\n");
      return 2;
    }
  }
  stagecoach::sim::outcome sum;
  int bad = 0;
  for (std::uint64_t s = seed; s < seed + count; ++s) {
    const auto x = stagecoach::sim::run_cluster(s, is_loud);
    sum.events += x.events;
    sum.steps += x.steps;
    sum.lost_workers += x.lost_workers;
    sum.coordinator_crashes += x.coordinator_crashes;
    sum.generations += x.generations;
    sum.rollbacks += x.rollbacks;
    sum.live_recoveries += x.live_recoveries;
    sum.roll_forwards += x.roll_forwards;
    sum.saves += x.saves;
    if (x.safety.empty() && x.liveness.empty()) continue;
    ++bad;
    if (!x.safety.empty()) fmt::print("seed {}: safety: {}\n", s, x.safety);
    if (!x.liveness.empty()) fmt::print("seed {}: liveness: {}\n", s, x.liveness);
    if (!goes_on) break;
  }
  fmt::print(
      "{} seeds from {}: {} events, {} steps, {} generations, {} lost workers, {} coordinator "
      "crashes, "
      "{} live loads, {} roll-forwards, {} loads from checkpoints, {} saves; {} bad\n",
      count, seed, sum.events, sum.steps, sum.generations, sum.lost_workers,
      sum.coordinator_crashes, sum.live_recoveries, sum.roll_forwards, sum.rollbacks, sum.saves,
      bad);
  return bad == 0 ? 0 : 1;
}
