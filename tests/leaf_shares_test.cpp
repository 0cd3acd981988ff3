#include "model/leaf_shares.hpp"

#include <doctest/doctest.h>

#include <algorithm>

using namespace stagecoach;

namespace {

double slowest(const std::vector<int>& leaves, const std::vector<double>& us) {
  double most = 0;
  for (std::size_t r = 0; r < us.size(); ++r) most = std::max(most, leaves[r] * us[r]);
  return most;
}

/// Smallest makespan of all ways to deal out the leaves, by trying each.
double best(std::int64_t left, const std::vector<double>& us, std::size_t r, double so_far) {
  const auto after = static_cast<std::int64_t>(us.size() - r - 1);
  if (after == 0) return std::max(so_far, static_cast<double>(left) * us[r]);
  double found = 1e300;
  for (std::int64_t n = 1; n <= left - after; ++n)
    found = std::min(found,
                     best(left - n, us, r + 1, std::max(so_far, static_cast<double>(n) * us[r])));
  return found;
}

std::vector<replica_pace> paces(const std::vector<double>& us, const std::vector<int>& leaves) {
  std::vector<replica_pace> list;
  for (std::size_t r = 0; r < us.size(); ++r) list.push_back({us[r], leaves[r]});
  return list;
}

}  // namespace

TEST_CASE("leaves go to whoever is done first, each replica has one") {
  CHECK(share_leaves(8, {1, 1}) == std::vector<int>{4, 4});
  CHECK(share_leaves(8, {3, 1}) == std::vector<int>{2, 6});
  CHECK(share_leaves(8, {100, 1, 1}) == std::vector<int>{1, 4, 3});
  CHECK(share_leaves(3, {5, 9, 1}) == std::vector<int>{1, 1, 1});
  CHECK(share_leaves(8, {7}) == std::vector<int>{8});
  CHECK(cuts_of({2, 6}) == std::vector<int>{0, 2, 8});
}

TEST_CASE("no other shares end sooner") {
  std::uint32_t x = 12345;
  const auto draw = [&x](int from, int to) {
    x = x * 1664525u + 1013904223u;
    return from + static_cast<int>((x >> 8) % static_cast<std::uint32_t>(to - from + 1));
  };
  for (int i = 0; i < 300; ++i) {
    std::vector<double> us;
    for (int r = draw(1, 4); r > 0; --r) us.push_back(draw(1, 50));
    const int leaves = 1 << draw(2, 4);
    const std::vector<int> shares = share_leaves(leaves, us);
    int sum = 0;
    for (const int n : shares) {
      CHECK(n >= 1);
      sum += n;
    }
    CHECK(sum == leaves);
    CHECK(slowest(shares, us) == best(leaves, us, 0, 0));
  }
}

TEST_CASE("a slow replica gets fewer leaves after 20 steps, five seconds and the cool-down") {
  leaf_watch w;
  w.restart(0);
  const auto even = paces({100, 100, 100, 100}, {4, 4, 4, 4});
  const auto slow = paces({100, 100, 200, 100}, {4, 4, 4, 4});
  for (int s = 0; s < 40; ++s) CHECK_FALSE(w.look(s * 1'000, static_cast<std::uint64_t>(s), even));
  CHECK_FALSE(w.look(40'000, 40, slow));
  CHECK_FALSE(w.look(41'000, 60, slow));  // 20 steps, but one second
  CHECK_FALSE(w.look(46'000, 59, slow));
  const auto change = w.look(46'000, 60, slow);
  REQUIRE(change);
  CHECK(change->replica == 2);
  CHECK(change->ratio == doctest::Approx(2));
  CHECK(change->leaves == std::vector<int>{5, 5, 2, 4});  // 500 at most instead of 800
  CHECK(change->gain == doctest::Approx(1 - 500.0 / 800));
  SUBCASE("in a young generation nothing moves") {
    w.restart(46'000);
    CHECK_FALSE(w.look(47'000, 80, slow));
    CHECK_FALSE(w.look(75'000, 800, slow));
    CHECK(w.look(76'000, 820, slow));
  }
  SUBCASE("a moment in line starts the count anew") {
    CHECK_FALSE(w.look(47'000, 61, even));
    CHECK_FALSE(w.look(48'000, 90, slow));
    CHECK_FALSE(w.look(52'000, 120, slow));
  }
}

TEST_CASE("between slow and even nothing changes, in either direction") {
  leaf_watch w({1.3, 1.1, 0.10, 2, 0, 0});
  const auto at = [&w](double us, int leaves) {
    std::optional<leaf_change> change;
    for (std::uint64_t s = 1; s <= 10; ++s)
      change = w.look(static_cast<std::int64_t>(s), s, paces({us, 100}, {leaves, 16 - leaves}));
    return change;
  };
  CHECK_FALSE(at(125, 8));
  CHECK(at(140, 8)->leaves == std::vector<int>{7, 9});
  CHECK_FALSE(at(125, 6));
  CHECK_FALSE(at(112, 6));
  CHECK(at(105, 6)->leaves == std::vector<int>{8, 8});
  CHECK(at(60, 8)->leaves == std::vector<int>{10, 6});  // a fast one gets more
}

TEST_CASE("a change that gains less than a tenth is not made") {
  leaf_watch w({1.3, 1.1, 0.10, 2, 0, 0});
  for (std::uint64_t s = 1; s <= 10; ++s)
    CHECK_FALSE(w.look(static_cast<std::int64_t>(s), s, paces({140, 100}, {1, 1})));
  for (std::uint64_t s = 1; s <= 10; ++s)  // 7 * 140 = 980 to 9 * 100: as good as it gets
    CHECK_FALSE(w.look(static_cast<std::int64_t>(s), s, paces({140, 100}, {7, 9})));
}

TEST_CASE("unknown times and single replicas are left alone") {
  leaf_watch w({1.3, 1.1, 0.10, 0, 0, 0});
  CHECK_FALSE(w.look(1, 1, paces({0, 100}, {4, 4})));
  CHECK_FALSE(w.look(2, 2, paces({100}, {8})));
  CHECK_FALSE(w.look(3, 3, {}));
}
