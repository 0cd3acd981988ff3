#include "config/leaves.hpp"

#include <doctest/doctest.h>

#include <initializer_list>

using namespace stagecoach;

TEST_CASE("leaf balance is the mean share over the busiest share") {
  CHECK(leaf_balance(8, 7) == doctest::Approx(4.0 / 7));  // DESIGN 4: 57 %
  for (int n : {1, 2, 4, 8}) CHECK(leaf_balance(8, n) == 1.0);
  CHECK(leaf_balance(8, 3) == doctest::Approx(8.0 / 9));
  CHECK(leaf_balance(8, 16) == doctest::Approx(0.5));
}

TEST_CASE("leaves: auto is the smallest balanced power of two that divides the microbatches") {
  CHECK(resolve_leaf_count(16, 1, 1) == 1);
  CHECK(resolve_leaf_count(8, 1, 2) == 2);
  CHECK(resolve_leaf_count(12, 1, 2) == 2);
  // At 3 replicas 4, 8 and 16 leaves give 0.667, 0.889 and 0.889; 32 give 32/33.
  CHECK(resolve_leaf_count(64, 1, 4) == 32);
  CHECK(resolve_leaf_count(64, 3, 3) == 32);
  CHECK(resolve_leaf_count(64, 4, 4) == 4);
}

TEST_CASE("leaves: auto takes the largest power of two where none is balanced") {
  CHECK(resolve_leaf_count(16, 1, 4) == 16);
  CHECK(resolve_leaf_count(12, 1, 8) == 4);
  CHECK(resolve_leaf_count(7, 1, 8) == 1);
}

TEST_CASE("leaves: auto keeps its promise over a range of jobs") {
  for (int microbatches = 1; microbatches <= 256; ++microbatches)
    for (int most = 1; most <= 12; ++most) {
      const std::int64_t leaves = resolve_leaf_count(microbatches, 1, most);
      CHECK(microbatches % leaves == 0);
      CHECK((leaves & (leaves - 1)) == 0);
      bool is_last = microbatches % (2 * leaves) != 0;
      bool balanced = leaves >= most;
      for (int n = 1; n <= most; ++n) balanced = balanced && leaf_balance(leaves, n) >= 0.9 - 1e-12;
      CHECK((balanced || is_last));
    }
}

TEST_CASE("leaves: auto is balanced at every worker count, given enough microbatches") {
  for (int most = 1; most <= 16; ++most)
    for (int least = 1; least <= most; ++least) {
      CAPTURE(least);
      CAPTURE(most);
      CHECK(are_leaves_balanced(128, least, most));
      const std::int64_t leaves = resolve_leaf_count(128, least, most);
      for (int n = least; n <= most; ++n) CHECK(leaf_balance(leaves, n) >= 0.9 - 1e-12);
    }
  // By hand: 64 leaves at 1..8 replicas are 0.914 or more (7: 64/70), 32 are 0.889 at 6 (32/36).
  CHECK(resolve_leaf_count(1 << 20, 1, 8) == 64);
  CHECK(are_leaves_balanced(64, 1, 8));
  CHECK_FALSE(are_leaves_balanced(32, 1, 8));
  // 64 leaves are 0.985 at 13 (64/65) and 0.853 at 15 (64/75); 128 are 0.948 there.
  CHECK(resolve_leaf_count(1 << 20, 1, 16) == 128);
  CHECK_FALSE(are_leaves_balanced(64, 1, 16));
  CHECK_FALSE(are_leaves_balanced(96, 1, 8));  // of 96 only 32 is a power of two
}

TEST_CASE("leaves: numbers from a broken file do not trap") {
  CHECK(resolve_leaf_count(0, 0, 0) == 1);
  CHECK(resolve_leaf_count(-4, 5, 1) == 1);
  CHECK(resolve_leaf_count(std::int64_t{1} << 62, 1, 4096) >= 4096);
  CHECK(leaf_balance(0, 0) == 1.0);
}
