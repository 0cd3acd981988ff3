// stagecoach_sim: whole histories of a cluster, each from its seed.
#include <fmt/format.h>

#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <string>
#include <string_view>

#include "tests/sim/cluster_sim.hpp"

namespace {

constexpr const char* help =
    "usage: stagecoach_sim [--seed N] [--count K] [--trace] [--go-on]\n"
    "Runs the production machines of coordinator and workers through K histories, seeds N .. "
    "N+K-1:\n"
    "a simulated clock, network, store and disk, with losses, cuts, crashes and freezes.\n"
    "  --seed N    the first seed (default 1); the same seed is the same history\n"
    "  --count K   how many (default: 1 if a seed is given, else 300)\n"
    "  --trace     print every event, message and action; the failing check and the seed come "
    "last\n"
    "  --go-on     do not stop at the first history that fails\n"
    "Exits 0 if every history was safe and live, 1 if not, 2 on bad usage. docs/simulation.md\n";

std::uint64_t running_seed = 0;  // for the handler alone

/// An invariant of a machine stops the process; the seed must still be in the failure.
extern "C" void name_the_seed(int) {
  fmt::print("seed {}: safety: an invariant of a machine is broken\n", running_seed);
  std::fflush(stdout);
}

/// False: not a whole number.
bool read_number(std::string_view text, std::uint64_t& number) {
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), number);
  return code == std::errc{} && end == text.data() + text.size();
}

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t seed = 1, count = 0;
  bool has_seed = false, is_traced = false, goes_on = false;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--trace") {
      is_traced = true;
    } else if (flag == "--go-on") {
      goes_on = true;
    } else if (flag == "--help") {
      fmt::print("{}", help);
      return 0;
    } else if ((flag == "--seed" || flag == "--count") && i + 1 < argc &&
               read_number(argv[i + 1], flag == "--seed" ? seed : count)) {
      ++i;
      has_seed = has_seed || flag == "--seed";
    } else {
      fmt::print(stderr, "stagecoach_sim: {} is not understood\n{}", flag, help);
      return 2;
    }
  }
  if (count == 0) count = has_seed ? 1 : 300;

  std::signal(SIGABRT, name_the_seed);
  const auto began = std::chrono::steady_clock::now();
  stagecoach::sim::outcome sum;
  std::uint64_t bad = 0, done = 0;
  for (std::uint64_t s = seed; s - seed < count; ++s) {
    running_seed = s;
    const auto x = stagecoach::sim::run_cluster(s, is_traced);
    ++done;
    sum.events += x.events;
    sum.steps += x.steps;
    sum.lost_workers += x.lost_workers;
    sum.coordinator_crashes += x.coordinator_crashes;
    sum.generations += x.generations;
    sum.rollbacks += x.rollbacks;
    sum.live_recoveries += x.live_recoveries;
    sum.roll_forwards += x.roll_forwards;
    sum.saves += x.saves;
    sum.hangs += x.hangs;
    sum.covered_losses += x.covered_losses;
    sum.preemptions += x.preemptions;
    sum.feeds += x.feeds;
    sum.fed_switches += x.fed_switches;
    sum.deputies += x.deputies;
    sum.deputy_generations += x.deputy_generations;
    sum.adoptions += x.adoptions;
    sum.merges += x.merges;
    sum.leaf_moves += x.leaf_moves;
    sum.layer_moves += x.layer_moves;
    if (x.safety.empty() && x.liveness.empty()) continue;
    ++bad;
    if (!x.safety.empty()) fmt::print("seed {}: safety: {}\n", s, x.safety);
    if (!x.liveness.empty()) fmt::print("seed {}: liveness: {}\n", s, x.liveness);
    if (!goes_on) break;
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  fmt::print(
      "{} seeds from {}: {} events, {} steps, {} generations, {} lost workers, {} coordinator "
      "crashes, {} live loads, {} roll-forwards, {} loads from checkpoints, {} losses with copies, "
      "{} feeds, {} done, {} saves, {} hangs, {} preemptions, {} moves of leaves, {} of layers, {} "
      "deputies, {} "
      "generations of theirs, {} adopted, {} merged; {} bad; "
      "{:.1f} s\n",
      done, seed, sum.events, sum.steps, sum.generations, sum.lost_workers, sum.coordinator_crashes,
      sum.live_recoveries, sum.roll_forwards, sum.rollbacks, sum.covered_losses, sum.feeds,
      sum.fed_switches, sum.saves, sum.hangs, sum.preemptions, sum.leaf_moves, sum.layer_moves,
      sum.deputies, sum.deputy_generations, sum.adoptions, sum.merges, bad, took.count());
  return bad == 0 ? 0 : 1;
}
