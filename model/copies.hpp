// Neighbour copies: in a single pipeline nobody else holds a stage, so other ranks keep its state
// beside their own (elasticity.copies), always at the same step, by replaying the optimizer.
//
// Pure functions of a plan, so that every member, the coordinator and a deputy know who holds what.
#pragma once

#include <string>
#include <vector>

#include "config/job_spec.hpp"
#include "model/plan.hpp"

namespace stagecoach {

/// By rank: the ranks whose stage it keeps a copy of, in rising order. hosts: by rank. A stage's
/// holders stand on other hosts than its own and each other's where there are such, then with whom
/// keeps the fewest copies, then nearest behind. Empty lists where replicas hold the copies.
std::vector<std::vector<int>> copied_ranks(int copies, const layout& shape,
                                           const std::vector<std::string>& hosts);

/// What a rank keeps of another rank's stage.
struct kept_copy {
  int owner = 0;
  std::vector<int> tensors;  // global tensor indices; without those that it holds already
};
std::vector<kept_copy> copies_kept(const job_spec& spec, const layout& shape,
                                   const std::vector<std::string>& hosts, int rank);

/// By rank. Workers whose links have one address share a host.
std::vector<std::string> hosts_of(const plan& p);

}  // namespace stagecoach
