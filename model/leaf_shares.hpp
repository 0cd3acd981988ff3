// Leaves by speed: which share of a step's leaves each replica takes, and when to change it.
//
// Pure. Whole leaves move and nothing else, so any shares give the same bits (DESIGN 4). Knows no
// worker and no clock: time and step come with each look.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace stagecoach {

/// How many leaves each replica takes so that the slowest is done soonest; each at least one. Ties
/// go to the lower index, so the same arguments give the same shares everywhere.
///   leaf_us: of each replica, all above 0; not more of them than leaves
std::vector<int> share_leaves(std::int64_t leaf_count, const std::vector<double>& leaf_us);

/// As a plan's leaf_cuts.
std::vector<int> cuts_of(const std::vector<int>& leaves);

/// When somebody is slow enough, and for long enough, for leaves or layers to move.
struct balance_rules {
  // Far apart on purpose: between the two nothing changes, so a replica near one border does not
  // send leaves to and fro.
  double slow_above = 1.3;  // of its peers' median time, or its peers of its
  double even_below = 1.1;  // all within this: uneven shares are made even again
  double gain_min = 0.10;   // of the step's predicted compute time; a change costs about a step
  int steps = 20;           // it must have been so for these many steps ...
  std::int64_t ms = 5'000;  // ... and beats: a small model makes 20 steps between two of them
  std::int64_t cool_down_ms = 30'000;  // from the start of a generation on
};

struct replica_pace {
  double leaf_us = 0;  // lately; 0: not known
  int leaves = 0;      // it has now
};

struct leaf_change {
  std::vector<int> leaves;  // by replica
  int replica = 0;          // the one that differs most
  double ratio = 1;         // its time for a leaf to its peers' median
  double gain = 0;          // predicted, of the slowest replica's compute time
};

/// The one of at least two whose time differs most from the median of the others' (of an even count
/// the lower middle). A slow one before a fast one that is as far off: of two they are the same
/// fact.
struct outlier {
  int index = 0;
  double ratio = 1;     // its time to that median
  double distance = 0;  // |log ratio|
};
outlier farthest_from_peers(const std::vector<double>& us);

/// How the paces compare, and since when: what was so for a moment moves nothing.
class pace_view {
 public:
  enum class kind { even_enough, uneven_pace, uneven_shares };
  void restart(std::int64_t now_ms);
  /// True: it has been seen for as long as the rules ask, in a generation that is old enough.
  bool lasts(kind seen, std::int64_t now_ms, std::uint64_t step, const balance_rules& rules);

 private:
  std::int64_t started_ms_ = 0;
  kind seen_ = kind::even_enough;
  std::int64_t since_ms_ = 0;
  std::uint64_t since_step_ = 0;
};

class leaf_watch {
 public:
  explicit leaf_watch(balance_rules rules = {}) : rules_(rules) {}
  /// A generation begins to run.
  void restart(std::int64_t now_ms) { view_.restart(now_ms); }
  /// The newest figures; an answer is a change that pays now.
  std::optional<leaf_change> look(std::int64_t now_ms, std::uint64_t step,
                                  const std::vector<replica_pace>& paces);

 private:
  balance_rules rules_;
  pace_view view_;
};

}  // namespace stagecoach
