// job_machine, fifth part: slow and fast replicas. Leaves move to where they are done sooner, as a
// change at a step boundary: the same members, the same state, no transfer, the same bits.
//
// When a move pays is model/leaf_shares.hpp's business. A replica's pace is its slowest stage's.
// Stages of a pipeline keep their layers: moving those moves state.
#include <algorithm>

#include "coordinator/job_machine.hpp"

namespace stagecoach {

void job_machine::start_balancing() {
  const auto leaf_us_of = [](const member& m) { return m.pulse ? m.pulse->leaf_us : 0; };
  const plan& p = generation_->shape;
  std::vector<replica_pace> paces(static_cast<std::size_t>(p.shape.replica_count));
  for (std::size_t r = 0; r < paces.size(); ++r)
    paces[r].leaves = p.shape.leaf_cuts[r + 1] - p.shape.leaf_cuts[r];
  bool is_known = is_whole();
  for (const member* m : planned()) {
    double& slowest = paces[static_cast<std::size_t>(p.replica_of(m->rank))].leaf_us;
    slowest = std::max(slowest, static_cast<double>(leaf_us_of(*m)));
    is_known = is_known && leaf_us_of(*m) > 0 && m->is_connected;
  }
  if (!is_known) paces.clear();
  const auto change = watch_.look(now_ms_, reported_step_, paces);
  if (!change) return;

  std::string before, after;
  for (std::size_t r = 0; r < paces.size(); ++r) {
    before += fmt::format("{}{}", r == 0 ? "" : ", ", paces[r].leaves);
    after += fmt::format("{}{}", r == 0 ? "" : ", ", change->leaves[r]);
  }
  std::string who;
  generation_->leaf_us.clear();  // kept with the generation that it makes
  for (const member* m : planned()) {
    generation_->leaf_us.push_back(leaf_us_of(*m));
    const auto replica = static_cast<std::size_t>(p.replica_of(m->rank));
    const bool is_the_one = static_cast<int>(replica) == change->replica &&
                            static_cast<double>(leaf_us_of(*m)) == paces[replica].leaf_us;
    if (is_the_one && who.empty()) who = m->facts.name;
  }
  balance_ = fmt::format(
      "at step {} {} took {:.1f} ms for a leaf, {:.2f} x its peers' median: leaves {} became {}, "
      "{:.0f} % less time to compute a step by that",
      reported_step_, who, paces[static_cast<std::size_t>(change->replica)].leaf_us / 1e3,
      change->ratio, before, after, change->gain * 100);
  note("leaves_moved", balance_,
       {{"worker", who},
        {"ratio", fmt::format("{:.3f}", change->ratio)},
        {"gain", fmt::format("{:.3f}", change->gain)},
        {"from", before},
        {"to", after}});
  start_hold("balance", {order_kind::hold});
}

/// The shares for those who sit in this plan, by the times of the newest one; answers these times
/// by the new ranks. They were measured with that plan's units on each stage: other cuts, or
/// somebody new, begin with even shares and are measured again.
std::vector<std::int64_t> job_machine::weigh_leaves(plan& p) const {
  if (!generation_ || generation_->leaf_us.size() != generation_->shape.members.size() ||
      generation_->shape.shape.unit_cuts != p.shape.unit_cuts)
    return {};
  const auto& former = generation_->shape.members;
  std::vector<double> slowest(static_cast<std::size_t>(p.shape.replica_count), 0);
  std::vector<std::int64_t> by_rank;
  for (std::size_t rank = 0; rank < p.members.size(); ++rank) {
    const auto known = std::find_if(former.begin(), former.end(), [&](const plan_member& m) {
      return m.worker == p.members[rank].worker;
    });
    if (known == former.end()) return {};
    by_rank.push_back(generation_->leaf_us[static_cast<std::size_t>(known - former.begin())]);
    double& us = slowest[static_cast<std::size_t>(p.replica_of(static_cast<int>(rank)))];
    us = std::max(us, static_cast<double>(by_rank.back()));
  }
  p.shape.leaf_cuts = cuts_of(share_leaves(record_.spec.batch.leaf_count, slowest));
  return by_rank;
}

}  // namespace stagecoach
