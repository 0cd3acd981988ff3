#include "worker/replica_reduction.hpp"

#include <doctest/doctest.h>

#include <future>
#include <random>
#include <vector>

using namespace stagecoach;

namespace {

/// Leaves of known values, and what each replica holds of them.
struct scene {
  std::vector<int> cuts;  // leaves of replica r: [cuts[r], cuts[r + 1])
  std::int64_t floats;
  std::vector<std::vector<float>> leaves;

  scene(std::vector<int> leaf_cuts, std::int64_t count)
      : cuts(std::move(leaf_cuts)), floats(count) {
    std::mt19937_64 random(11);
    for (int leaf = 0; leaf < cuts.back(); ++leaf) {
      leaves.emplace_back();
      // Of very different sizes, so that another order of the sum gives other bits.
      for (std::int64_t i = 0; i < count; ++i)
        leaves.back().push_back(static_cast<float>(static_cast<double>(random() % 1000) /
                                                   static_cast<double>(1 + random() % 100'000)));
    }
  }
  int replica_count() const { return static_cast<int>(cuts.size()) - 1; }

  /// By definition: a node is the sum of its left and its right half.
  std::vector<float> sum(std::int64_t first, std::int64_t last) const {
    if (last - first == 1) return leaves[static_cast<std::size_t>(first)];
    const std::int64_t middle = (first + last) / 2;
    auto left = sum(first, middle);
    const auto right = sum(middle, last);
    for (std::size_t i = 0; i < left.size(); ++i) left[i] = left[i] + right[i];
    return left;
  }

  /// What each replica ends with.
  std::vector<std::vector<float>> reduce(const reduction_shape& common, std::int64_t piece) {
    auto links = make_memory_links(replica_count());
    std::vector<std::future<std::vector<float>>> pending;
    for (int r = 0; r < replica_count(); ++r)
      pending.push_back(std::async(std::launch::async, [&, r] {
        auto shape = common;
        shape.replica = r;
        auto device = make_cpu_backend(1);
        replica_reduction reduction(shape, *links[static_cast<std::size_t>(r)], *device, piece);
        std::vector<float> root;
        for (std::uint64_t step = 1; step <= 2; ++step) {
          std::vector<std::vector<float>> blocks;
          for (const tree_node& b : shape.blocks[static_cast<std::size_t>(r)])
            blocks.push_back(sum(b.first(), b.last()));
          std::vector<float*> own;
          for (auto& b : blocks) own.push_back(b.data());
          root.assign(static_cast<std::size_t>(floats), -1.0F);
          CHECK(reduction.run(step, own, root.data()).has_value());
        }
        return root;
      }));
    std::vector<std::vector<float>> roots;
    for (auto& p : pending) roots.push_back(p.get());
    return roots;
  }

  reduction_shape shape() const {
    reduction_shape s;
    s.leaf_count = cuts.back();
    s.needs = [](int, int) { return true; };
    for (int r = 0; r < replica_count(); ++r) {
      s.ranks.push_back(r);
      s.blocks.push_back(
          maximal_blocks(cuts[static_cast<std::size_t>(r)], cuts[static_cast<std::size_t>(r) + 1]));
      s.shares.push_back({{floats * r / replica_count(), floats * (r + 1) / replica_count()}});
    }
    return s;
  }
};

}  // namespace

TEST_CASE("replica reduction: every cut of leaves, shares and pieces gives the bits of the tree") {
  for (const std::vector<int>& cuts :
       {std::vector{0, 4, 8}, {0, 3, 8}, {0, 1, 2, 5, 8}, {0, 3, 4}, {0, 1, 2, 3, 4, 5, 6, 7, 8}}) {
    scene s(cuts, 1003);
    const auto expected = s.sum(0, cuts.back());
    for (const std::int64_t piece : {16, 77, 5000}) {
      CAPTURE(cuts.size());
      CAPTURE(piece);
      for (const auto& root : s.reduce(s.shape(), piece)) CHECK(root == expected);
    }
  }
}

TEST_CASE("replica reduction: shares may lie scattered and differ in size") {
  scene s({0, 4, 8}, 1000);
  auto shape = s.shape();
  shape.shares = {{{0, 10}, {900, 1000}}, {{10, 400}, {400, 900}}};
  for (const auto& root : s.reduce(shape, 64)) CHECK(root == s.sum(0, 8));
}

TEST_CASE("replica reduction: who does not need a share gets nothing of it") {
  scene s({0, 2, 4, 8}, 900);
  auto shape = s.shape();
  shape.needs = [](int from, int to) { return (to - from + 3) % 3 <= 1; };  // the next one alone
  const auto expected = s.sum(0, 8);
  const auto roots = s.reduce(shape, 64);
  for (int r = 0; r < 3; ++r)
    for (std::size_t i = 0; i < 900; ++i) {
      const int owner = static_cast<int>(i) / 300;
      const bool needs = owner == r || (owner + 1) % 3 == r;
      REQUIRE(roots[static_cast<std::size_t>(r)][i] == (needs ? expected[i] : -1.0F));
    }
}

TEST_CASE("replica reduction: inexact, one block each is added by replica") {
  scene s({0, 1, 2, 3}, 500);
  auto shape = s.shape();
  shape.is_exact = false;
  std::vector<float> expected = s.leaves[0];
  for (std::size_t i = 0; i < expected.size(); ++i)
    expected[i] = (expected[i] + s.leaves[1][i]) + s.leaves[2][i];
  for (const auto& root : s.reduce(shape, 100)) CHECK(root == expected);
}

TEST_CASE("replica reduction: a lost link ends it with the link's error") {
  scene s({0, 4, 8}, 1000);
  auto links = make_memory_links(2);
  links[1]->cancel();
  auto device = make_cpu_backend(1);
  auto shape = s.shape();
  replica_reduction reduction(shape, *links[0], *device);
  std::vector<float> own(1000), root(1000);
  CHECK(reduction.run(1, {own.data()}, root.data()).err().code == errc::unreachable);
}
