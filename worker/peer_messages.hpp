// What workers of one job say to each other while the coordinator is away: plain structs and their
// text.
//
// Whoever would stand in asks the members of the newest generation that it knows (canvass), again
// and again while it stands: that is its sign of life, and each answer is the member's. Orders and
// reports are the coordinator's own messages, carried between a deputy and a member. Sizes are
// bounded as on the control channel.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>

#include "config/result.hpp"
#include "coordinator/messages.hpp"

namespace stagecoach {

struct canvass {
  plan_member from;  // with its address: a member of an older generation may not know it
  std::uint64_t job = 0, generation = 0, plan_hash = 0;
  bool is_standing = false;  // it decides already
};

enum class refusal : int {
  none = 0,         // agrees
  has_coordinator,  // its own control channel stands
  other_identity,   // it has no part in this job, or a newer generation
  lower_rank,       // it comes before the one that asks
  follows_another,
};

struct canvassed {
  process_id from;
  std::uint64_t job = 0;
  int why = 0;                 // refusal
  hello greeting;              // what it is doing, as the coordinator would be told
  beat pulse;                  // and how it stands
  checkpoint_durable durable;  // newest that it was told of; step 0, seq 0: none
};

struct deputy_order {  // from a deputy to a member
  process_id from;
  to_worker message;
};
struct deputy_report {  // from a member to the deputy that it follows
  process_id from;
  to_coordinator message;
};

using peer_message = std::variant<canvass, canvassed, deputy_order, deputy_report>;

std::string encode(const peer_message& message);
/// Fails: too_large, bad_input.
result<peer_message> decode_peer_message(std::string_view text);

#define STAGECOACH_FIELDS(type, ...)                  \
  template <class V, class M>                         \
  requires std::same_as<std::remove_const_t<M>, type> \
  void visit_fields(V&& v, M& m) { __VA_ARGS__; }

STAGECOACH_FIELDS(canvass, v("from", m.from), v("job", m.job), v("generation", m.generation),
                  v("plan_hash", m.plan_hash), v("standing", m.is_standing))
STAGECOACH_FIELDS(canvassed, v("from", m.from), v("job", m.job), v("why", m.why),
                  v("greeting", m.greeting), v("pulse", m.pulse), v("durable", m.durable))

#undef STAGECOACH_FIELDS

}  // namespace stagecoach
