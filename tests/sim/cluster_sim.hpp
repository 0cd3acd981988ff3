// A whole cluster in one thread: the production machines under a seeded clock, network, store and
// disk.
//
// Toy trainers hold a hash per tensor in place of weights, so the oracle can say after every apply
// whether these are the bits of an undisturbed run. Its truth is its own; it never asks a machine
// (STYLE 2).
#pragma once

#include <cstdint>
#include <string>

namespace stagecoach::sim {

struct outcome {
  std::string safety;    // what was violated first; empty: nothing
  std::string liveness;  // who did not finish in time, and why; empty: all ended
  std::uint64_t events = 0, steps = 0, lost_workers = 0, coordinator_crashes = 0, generations = 0,
                rollbacks = 0, live_recoveries = 0, roll_forwards = 0, saves = 0;
  std::uint64_t hangs = 0;                    // trainers that stood still for a while
  std::uint64_t preemptions = 0;              // workers taken from one job for another
  std::uint64_t feeds = 0, fed_switches = 0;  // begun; and whole
  std::uint64_t covered_losses = 0;           // commits after a loss that copies must have covered
  std::uint64_t deputies = 0, deputy_generations = 0, adoptions = 0, merges = 0;
  std::uint64_t leaf_moves = 0;   // between replicas, since some were slower
  std::uint64_t layer_moves = 0;  // between stages
};

/// Same seed, same history. is_loud prints every event to stdout.
outcome run_cluster(std::uint64_t seed, bool is_loud);

}  // namespace stagecoach::sim
