#include "model/copies.hpp"

#include <algorithm>
#include <set>
#include <tuple>

#include "model/tensor_names.hpp"

namespace stagecoach {

std::vector<std::vector<int>> copied_ranks(int copies, const layout& shape,
                                           const std::vector<std::string>& hosts) {
  const int ranks = shape.worker_count();
  std::vector<std::vector<int>> kept(static_cast<std::size_t>(ranks));
  if (shape.replica_count != 1) return kept;
  invariant(hosts.size() == kept.size(), "every rank has a host");
  const auto host = [&hosts](int rank) { return hosts[static_cast<std::size_t>(rank)]; };
  for (int owner = 0; owner < ranks; ++owner) {
    std::set<std::string> hosts_used{host(owner)};
    std::set<int> holders{owner};
    for (int i = 0; i < std::min(copies, ranks - 1); ++i) {
      std::tuple<bool, std::size_t, int, int> best{true, kept.size() + 1, 0, -1};
      for (int rank = 0; rank < ranks; ++rank) {
        if (holders.count(rank) != 0) continue;
        best = std::min(
            best, {hosts_used.count(host(rank)) != 0, kept[static_cast<std::size_t>(rank)].size(),
                   (rank - owner + ranks) % ranks, rank});
      }
      const int holder = std::get<3>(best);
      holders.insert(holder);
      hosts_used.insert(host(holder));
      kept[static_cast<std::size_t>(holder)].push_back(owner);
    }
  }
  return kept;
}

std::vector<kept_copy> copies_kept(const job_spec& spec, const layout& shape,
                                   const std::vector<std::string>& hosts, int rank) {
  const auto tensors_of = [&](int owner) {
    const auto stage = static_cast<std::size_t>(owner % shape.stage_count);
    return stage_tensor_indices(spec.model, shape.unit_cuts[stage], shape.unit_cuts[stage + 1]);
  };
  const std::vector<std::vector<int>> kept = copied_ranks(spec.elasticity.copies, shape, hosts);
  std::vector<kept_copy> list;
  std::set<int> held;
  for (const int tensor : tensors_of(rank)) held.insert(tensor);
  for (const int owner : kept[static_cast<std::size_t>(rank)]) {
    kept_copy copy{owner, {}};
    for (const int tensor : tensors_of(owner)) {
      if (held.insert(tensor).second) copy.tensors.push_back(tensor);
    }
    if (!copy.tensors.empty()) list.push_back(std::move(copy));
  }
  return list;
}

std::vector<std::string> hosts_of(const plan& p) {
  std::vector<std::string> hosts;
  for (const plan_member& m : p.members) hosts.push_back(m.link_host);
  return hosts;
}

}  // namespace stagecoach
