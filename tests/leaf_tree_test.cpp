#include "model/leaf_tree.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>

using namespace stagecoach;

namespace {

// The definition itself: the two halves, left + right.
std::string expression(std::int64_t begin, std::int64_t end) {
  if (end - begin == 1) return std::to_string(begin);
  const std::int64_t middle = (begin + end) / 2;
  return fmt::format("({}+{})", expression(begin, middle), expression(middle, end));
}

float tree_of(const std::vector<float>& leaves, std::int64_t begin, std::int64_t end) {
  if (end - begin == 1) return leaves[static_cast<std::size_t>(begin)];
  const std::int64_t middle = (begin + end) / 2;
  return tree_of(leaves, begin, middle) + tree_of(leaves, middle, end);
}

// Random cuts of [0, leaf_count) into 1 to leaf_count non-empty ranges.
std::vector<std::int64_t> random_cuts(std::mt19937& random, std::int64_t leaf_count) {
  std::vector<std::int64_t> inner;
  for (std::int64_t i = 1; i < leaf_count; ++i) inner.push_back(i);
  for (std::size_t i = inner.size(); i > 1; --i) std::swap(inner[i - 1], inner[random() % i]);
  inner.resize(random() % static_cast<std::size_t>(leaf_count));
  inner.push_back(0);
  inner.push_back(leaf_count);
  std::sort(inner.begin(), inner.end());
  return inner;
}

// What the replicas and the range owner do together, for any values that can be added.
template <class V, class Add>
V sum_by_replicas(const std::vector<V>& leaves, const std::vector<std::int64_t>& cuts, Add add) {
  std::vector<tree_node> nodes;
  std::vector<V> blocks;
  for (std::size_t r = 0; r + 1 < cuts.size(); ++r) {
    std::vector<V> stack;
    for (std::int64_t leaf = cuts[r]; leaf < cuts[r + 1]; ++leaf) {
      stack.push_back(leaves[static_cast<std::size_t>(leaf)]);
      for (int merges = merges_after_leaf(cuts[r], cuts[r + 1], leaf); merges > 0; --merges) {
        const V right = stack.back();
        stack.pop_back();
        REQUIRE(!stack.empty());
        stack.back() = add(stack.back(), right);
      }
    }
    const std::vector<tree_node> maximal = maximal_blocks(cuts[r], cuts[r + 1]);
    REQUIRE(maximal.size() == stack.size());
    nodes.insert(nodes.end(), maximal.begin(), maximal.end());
    blocks.insert(blocks.end(), stack.begin(), stack.end());
  }
  for (const merge& m : merge_order(nodes, cuts.back())) {
    const auto into = static_cast<std::size_t>(m.into);
    blocks[into] = add(blocks[into], blocks[static_cast<std::size_t>(m.from)]);
  }
  return blocks[0];
}

}  // namespace

TEST_CASE("maximal blocks of ranges worked out by hand") {
  const auto blocks = [](std::int64_t begin, std::int64_t end) {
    std::string text;
    for (const tree_node& n : maximal_blocks(begin, end))
      text += std::to_string(n.first()) + "-" + std::to_string(n.last()) + " ";
    return text;
  };
  CHECK(blocks(0, 8) == "0-8 ");
  CHECK(blocks(1, 7) == "1-2 2-4 4-6 6-7 ");
  CHECK(blocks(0, 7) == "0-4 4-6 6-7 ");
  CHECK(blocks(4, 8) == "4-8 ");
  CHECK(blocks(3, 3) == "");
  CHECK(blocks(1, 15) == "1-2 2-4 4-8 8-12 12-14 14-15 ");
}

TEST_CASE("maximal blocks cover their range in order and none could be larger") {
  for (std::int64_t begin = 0; begin <= 33; ++begin)
    for (std::int64_t end = begin; end <= 70; ++end) {
      std::int64_t next = begin;
      for (const tree_node& n : maximal_blocks(begin, end)) {
        CHECK(n.first() == next);
        next = n.last();
        const tree_node parent{n.level + 1, n.index / 2};
        CHECK((parent.first() < begin || parent.last() > end));
      }
      CHECK(next == end);
    }
}

TEST_CASE("leaves in order leave exactly the maximal blocks, and never a larger one") {
  for (std::int64_t begin = 0; begin < 32; ++begin)
    for (std::int64_t end = begin + 1; end <= 32; ++end) {
      std::vector<tree_node> stack;
      for (std::int64_t leaf = begin; leaf < end; ++leaf) {
        stack.push_back({0, leaf});
        for (int merges = merges_after_leaf(begin, end, leaf); merges > 0; --merges) {
          const tree_node right = stack.back();
          stack.pop_back();
          REQUIRE(!stack.empty());
          CHECK(stack.back().level == right.level);
          CHECK(stack.back().last() == right.first());
          stack.back() = {right.level + 1, right.index / 2};
          CHECK(stack.back().first() >= begin);
          CHECK(stack.back().last() <= end);
        }
      }
      CHECK(stack == maximal_blocks(begin, end));
    }
}

TEST_CASE("any partition adds up in the order of the root") {
  std::mt19937 random(20240611);
  for (std::int64_t leaf_count : {1, 2, 4, 8, 16, 32})
    for (int trial = 0; trial < 50; ++trial) {
      std::vector<std::string> leaves;
      for (std::int64_t i = 0; i < leaf_count; ++i) leaves.push_back(std::to_string(i));
      const std::vector<std::int64_t> cuts = random_cuts(random, leaf_count);
      CHECK(sum_by_replicas(leaves, cuts, [](const std::string& left, const std::string& right) {
              return fmt::format("({}+{})", left, right);
            }) == expression(0, leaf_count));
    }
}

TEST_CASE("300 random partitions of float sums have the bits of the root") {
  std::mt19937 random(7);
  int folded_differs = 0;
  for (int trial = 0; trial < 300; ++trial) {
    const std::int64_t leaf_count = std::int64_t{1} << (random() % 8);
    std::vector<float> leaves;
    for (std::int64_t i = 0; i < leaf_count; ++i)
      leaves.push_back((static_cast<float>(random()) / 4294967296.0f - 0.5f) *
                       static_cast<float>(1 << (random() % 12)));
    const float expected = tree_of(leaves, 0, leaf_count);
    const float got = sum_by_replicas(leaves, random_cuts(random, leaf_count),
                                      [](float left, float right) { return left + right; });
    CHECK_MESSAGE(std::memcmp(&expected, &got, sizeof got) == 0, "trial ", trial);
    float folded = 0;
    for (float leaf : leaves) folded += leaf;
    folded_differs += folded != expected;
  }
  CHECK(folded_differs > 50);  // else the values are too tame to prove anything
}

TEST_CASE("a tree sum of any count follows the tree with absent right siblings") {
  CHECK(tree_sum({}) == 0.0);
  CHECK(tree_sum({3.5}) == 3.5);
  // 1e16 + 1 is 1e16 in double, so each grouping shows.
  CHECK(tree_sum({1e16, 1.0, 1.0}) == (1e16 + 1.0) + 1.0);
  CHECK(tree_sum({1.0, 1.0, 1e16}) == (1.0 + 1.0) + 1e16);
  CHECK(tree_sum({1e16, 1.0, 1.0, 1.0, 1.0}) == ((1e16 + 1.0) + (1.0 + 1.0)) + 1.0);
  CHECK(tree_sum({1e16, 1.0, 1.0, 1.0, 1.0, 1.0, -1e16}) ==
        ((1e16 + 1.0) + (1.0 + 1.0)) + ((1.0 + 1.0) + -1e16));
}
