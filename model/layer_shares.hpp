// Layers by speed: where a pipeline is cut so that its slowest stage is done soonest, and when a
// cut is to move.
//
// Pure. Whole layers move, and a boundary is rounded alike whether it is cut or not, so any cuts
// give the same bits (DESIGN 4). Knows no worker and no clock: time and step come with each look.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "config/job_spec.hpp"
#include "model/leaf_shares.hpp"
#include "model/plan.hpp"

namespace stagecoach {

/// Who sits at a rank: one leaf on its stage, as measured lately and without waits.
struct seat_pace {
  std::int64_t leaf_us = 0;        // 0: not known
  std::int64_t layer_us = 0;       // one of its layers; 0: it has none, or does not say
  std::uint64_t memory_bytes = 0;  // of its host; 0: not known
};

/// The same apart: how fast each one is, and how much there is to do in each unit.
struct pace_table {
  std::vector<double> layer_us;             // by rank
  std::vector<std::uint64_t> memory_bytes;  // by rank
  /// By unit, in layers. What a stage takes beyond its layers is the embedding's or the head's;
  /// where no stage tells them apart their flops do (unit_cost).
  std::vector<double> weights;
};

/// seats: by rank of the layout in which they were measured. None: a time is not known.
std::optional<pace_table> read_paces(const job_spec& spec, const layout& shape,
                                     const std::vector<seat_pace>& seats);

/// What one leaf will take the worker at a rank under these cuts.
double predicted_leaf_us(const pace_table& paces, const layout& shape, int rank);

/// unit_cuts for the shape's seats such that the slowest stage of all replicas, with the leaves
/// that each one has, is done as soon as can be (to one in a hundred); of these the nearest to the
/// shape's own. Embedding and head stay in the first and last stage, and nobody is given more than
/// its memory holds. None: no cuts fit. The same arguments give the same cuts everywhere.
std::optional<std::vector<int>> choose_cuts(const job_spec& spec, const layout& shape,
                                            const pace_table& paces);

struct layer_change {
  std::vector<int> unit_cuts;
  int rank = 0;      // the one that differs most
  double ratio = 1;  // its time for a layer to its peers' median
  double gain = 0;   // predicted, of the slowest stage's compute time
};

/// As leaf_watch, for the stages of a pipeline. Leaves move first, since that moves no state: what
/// counts as gain here is what they can't bring.
class layer_watch {
 public:
  explicit layer_watch(balance_rules rules = {}) : rules_(rules) {}
  void restart(std::int64_t now_ms) {
    view_.restart(now_ms);
    next_look_ms_ = now_ms;
  }
  /// seats: by rank; an answer is a change that pays now. A job whose file says how many layers
  /// each stage has keeps them.
  std::optional<layer_change> look(std::int64_t now_ms, std::uint64_t step, const job_spec& spec,
                                   const layout& shape, const std::vector<seat_pace>& seats);

 private:
  balance_rules rules_;
  pace_view view_;
  std::int64_t next_look_ms_ = 0;
};

/// How many layers each stage has.
std::vector<int> layers_of(const model_spec& model, const std::vector<int>& unit_cuts);

}  // namespace stagecoach
