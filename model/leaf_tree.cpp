#include "model/leaf_tree.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>

#include "config/result.hpp"

namespace stagecoach {

namespace {

// `right` stands directly right of `left` under one parent.
bool are_siblings(const tree_node& left, const tree_node& right) {
  return left.level == right.level && left.index % 2 == 0 && right.index == left.index + 1;
}

}  // namespace

std::vector<tree_node> maximal_blocks(std::int64_t begin, std::int64_t end) {
  invariant(0 <= begin && begin <= end, "a range of leaves runs upward from 0");
  std::vector<tree_node> blocks;
  while (begin < end) {
    int level = std::bit_width(static_cast<std::uint64_t>(end - begin)) - 1;
    if (begin != 0) level = std::min(level, std::countr_zero(static_cast<std::uint64_t>(begin)));
    blocks.push_back({level, begin >> level});
    begin += std::int64_t{1} << level;
  }
  return blocks;
}

std::vector<merge> merge_order(const std::vector<tree_node>& blocks, std::int64_t leaf_count) {
  invariant(leaf_count > 0 && std::has_single_bit(static_cast<std::uint64_t>(leaf_count)),
            "the leaf count is a power of two");
  struct held {
    tree_node node;
    int position;
  };
  std::vector<held> stack;
  std::vector<merge> order;
  std::int64_t covered = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    invariant(blocks[i].first() == covered,
              "blocks cover the leaves in order, without gap or overlap");
    covered = blocks[i].last();
    stack.push_back({blocks[i], static_cast<int>(i)});
    while (stack.size() > 1 && are_siblings(stack[stack.size() - 2].node, stack.back().node)) {
      const held right = stack.back();
      stack.pop_back();
      held& left = stack.back();
      order.push_back({left.position, right.position});
      left.node = {left.node.level + 1, left.node.index / 2};
    }
  }
  invariant(covered == leaf_count && stack.size() == 1, "blocks merge into the root");
  return order;
}

int merges_after_leaf(std::int64_t begin, std::int64_t end, std::int64_t leaf) {
  invariant(begin <= leaf && leaf < end, "a replica completes its own leaves only");
  int merges = 0;
  tree_node node{0, leaf};
  // A left sibling inside the range is whole by now, since leaves complete in order. What is built
  // this way lies in [begin, leaf], so it never exceeds a maximal block.
  while (node.index % 2 == 1) {
    const tree_node parent{node.level + 1, node.index / 2};
    if (parent.first() < begin) break;
    node = parent;
    ++merges;
  }
  return merges;
}

double tree_sum(std::vector<double> values) {
  if (values.empty()) return 0.0;
  std::size_t count = values.size();
  while (count > 1) {
    for (std::size_t i = 0; i + 1 < count; i += 2) values[i / 2] = values[i] + values[i + 1];
    if (count % 2 == 1) values[count / 2] = values[count - 1];
    count = (count + 1) / 2;
  }
  return values[0];
}

}  // namespace stagecoach
