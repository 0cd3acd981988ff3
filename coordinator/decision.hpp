// Which members a new generation has, where each one sits, and whose state it starts from.
//
// Pure functions of what the candidates answered to prepare: the same answers give the same
// decision everywhere. Says nothing of when to decide or whom to ask (coordinator/job_machine.hpp).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "config/ids.hpp"
#include "config/job_spec.hpp"
#include "coordinator/messages.hpp"
#include "model/plan.hpp"

namespace stagecoach {

struct candidate {
  worker_id worker{};
  prepared answer;
  std::string link_host{};  // as in plan_member; copies stand on other hosts where there are some
};

/// by_rank: indices into the candidates.
struct live_choice {
  std::uint64_t step = 0, chain = 0;
  std::vector<int> by_rank;
  std::optional<vote_result> roll_forward;  // set if a member of by_rank stands at step - 1
  std::vector<transfer_record> transfers;
};

/// The newest step, at least step_min, of which shape.worker_count() of the candidates hold every
/// tensor of the model, at that step or one before it with the reduced gradient kept and the vote
/// known. Members sit where they need the least from others; ties by worker id. Transfers bring
/// what each lacks of its stage (with a sharded optimizer: moments of its share only) and of the
/// copies that it keeps (model/copies.hpp). None: no such step.
std::optional<live_choice> choose_live(const job_spec& spec, const layout& shape,
                                       const std::vector<candidate>& candidates,
                                       std::uint64_t step_min);

/// Who will sit where after a voluntary change, and what is to be copied for it while the present
/// generation runs. Indices are into the candidates, also from_rank and to_rank.
struct feed_choice {
  std::vector<int> by_rank;
  std::vector<transfer_record> transfers;
};

/// The same seats and needs as choose_live would find with these candidates; those that leave give
/// and get none. Answers say what each holds now, all at one step and chain. None: too few.
std::optional<feed_choice> choose_feed(const job_spec& spec, const layout& shape,
                                       const std::vector<candidate>& candidates,
                                       const std::vector<bool>& is_leaving);

/// Members for a start from disk: by worker id.
std::vector<int> choose_fresh(const layout& shape, const std::vector<candidate>& candidates);

}  // namespace stagecoach
