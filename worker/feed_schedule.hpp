// What a feed brings when: a pure function of its order, so that giver and taker need no word about
// it.
//
// A round follows each applied step, from the step on in whose vote the order rode. A piece is a
// run of one tensor's elements: its state is given once, in its round, and from then on the reduced
// gradient of its elements in every round, so it keeps up (AdamW is elementwise).
#pragma once

#include <cstdint>
#include <vector>

#include "config/result.hpp"
#include "coordinator/messages.hpp"

namespace stagecoach {

struct feed_piece {
  int from = 0, to = 0;  // participants
  int tensor = 0;        // global index
  std::int64_t begin = 0, count = 0;
  std::uint64_t round = 0;  // in which its state is given
};

/// In the order in which a frame holds them. Fails: bad_input (an unknown tensor or participant, a
/// tensor fed twice).
result<std::vector<feed_piece>> feed_pieces(const feed& order);

/// Floats of the frame from one participant to another in a round: gradients, then state.
std::int64_t feed_frame_floats(const std::vector<feed_piece>& pieces, int from, int to,
                               std::uint64_t round, bool has_gradients);

}  // namespace stagecoach
