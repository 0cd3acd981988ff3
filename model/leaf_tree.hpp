// The full binary tree over leaf indices: which blocks a replica emits and how blocks merge (DESIGN
// 4).
//
// Purely about indices; the arrays are the caller's. Node (level, index) covers leaves
// [index << level, (index+1) << level).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace stagecoach {

struct tree_node {
  int level = 0;
  std::int64_t index = 0;
  std::int64_t first() const { return index << level; }
  std::int64_t last() const { return (index + 1) << level; }
  bool operator==(const tree_node&) const = default;
};

/// Maximal aligned blocks of [begin, end), in leaf order.
std::vector<tree_node> maximal_blocks(std::int64_t begin, std::int64_t end);

/// The additions that turn a set of blocks (in leaf order, covering [0, leaf_count) exactly) into
/// the root. Each entry: position `into` += position `from` (positions in the given list); then
/// `from` is dead. The sequence and each operand order (left + right) depend on leaf_count alone.
struct merge {
  int into = 0;
  int from = 0;
};
std::vector<merge> merge_order(const std::vector<tree_node>& blocks, std::int64_t leaf_count);

/// While leaves of [begin, end) complete in order: after leaf `leaf` is done, how many times the
/// newest block on the stack is merged into the one below it (binary-counter rule, never beyond
/// maximal blocks).
int merges_after_leaf(std::int64_t begin, std::int64_t end, std::int64_t leaf);

/// Sum of values by the full binary tree over index (missing right siblings are passed up
/// unchanged).
double tree_sum(std::vector<double> values);

}  // namespace stagecoach
