#include "model/data_order.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <vector>

using namespace stagecoach;

TEST_CASE("the order is a permutation for every count") {
  std::vector<std::uint64_t> counts;
  for (std::uint64_t n = 1; n <= 70; ++n) counts.push_back(n);
  for (const std::uint64_t n : {255, 256, 257, 1000, 4096, 4097, 65'535, 65'537})
    counts.push_back(n);
  for (const std::uint64_t count : counts) {
    for (const std::uint64_t seed : {1ull, 0xfedcba9876543210ull}) {
      std::vector<bool> seen(count, false);
      for (std::uint64_t i = 0; i < count; ++i) {
        const std::uint64_t to = permute(i, count, seed, 3);
        REQUIRE(to < count);
        REQUIRE_FALSE(seen[to]);
        seen[to] = true;
      }
    }
  }
}

TEST_CASE("seeds and epochs give other orders") {
  int same_seed = 0, same_epoch = 0, same_high_epoch = 0;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    const std::uint64_t base = permute(i, 1000, 1, 0);
    same_seed += base == permute(i, 1000, 2, 0);
    same_epoch += base == permute(i, 1000, 1, 1);
    same_high_epoch += base == permute(i, 1000, 1, std::uint64_t{1} << 32);
  }
  // One in a thousand agrees by chance: expectation 1 each.
  CHECK(same_seed < 12);
  CHECK(same_epoch < 12);
  CHECK(same_high_epoch < 12);
}

TEST_CASE("each index is as likely as any other at each position") {
  constexpr int trials = 20'000;
  for (const std::uint64_t position : {0ull, 7ull}) {
    std::array<int, 10> hits{};
    for (int seed = 0; seed < trials; ++seed) {
      ++hits[permute(position, 10, static_cast<std::uint64_t>(seed), 0)];
    }
    for (const int h : hits) CHECK(std::abs(h - 2000) < 5 * 42.5);  // sqrt(20000 * .1 * .9) = 42.4
  }
}

TEST_CASE("counts beyond 32 bits stay in range") {
  const std::uint64_t count = (std::uint64_t{1} << 62) + 12345;
  for (std::uint64_t i = 0; i < 100; ++i) CHECK(permute(count - 1 - i, count, 9, 0) < count);
}

TEST_CASE("the order never changes") {
  // Values from a separate Python program of the same definition; another order would end every job
  // in other weights.
  const auto first = [](std::uint64_t count, std::uint64_t seed, std::uint64_t epoch) {
    std::vector<std::uint64_t> list;
    for (std::uint64_t i = 0; i < 8; ++i) list.push_back(permute(i, count, seed, epoch));
    return list;
  };
  using list = std::vector<std::uint64_t>;
  CHECK(first(8, 1234, 0) == list{0, 7, 6, 3, 2, 1, 4, 5});
  CHECK(first(1000, 1234, 0) == list{111, 353, 88, 90, 94, 319, 614, 293});
  CHECK(first(1000, 1234, 1) == list{112, 286, 630, 882, 666, 401, 33, 801});
  CHECK(first(1'000'000'007, 1, 5) == list{990512211, 541864936, 252649462, 205700697, 923100475,
                                           948898467, 134817116, 637213647});
}

TEST_CASE("samples are windows of T+1 tokens with stride T") {
  CHECK(sample_count(0, 8) == 0);
  CHECK(sample_count(8, 8) == 0);  // no token to predict for the last one
  CHECK(sample_count(9, 8) == 1);
  CHECK(sample_count(16, 8) == 1);
  CHECK(sample_count(17, 8) == 2);
}

TEST_CASE("an epoch sees each sample once, inside the tokens; the next begins anew") {
  const std::int64_t tokens = 8 * 25 + 3, count = sample_count(tokens, 8);
  REQUIRE(count == 25);
  for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<bool> seen(25, false);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t begin = sample_begin(epoch * count + i, tokens, 8, 42);
      REQUIRE(begin % 8 == 0);
      REQUIRE(begin + 9 <= tokens);
      REQUIRE_FALSE(seen[static_cast<std::size_t>(begin / 8)]);
      seen[static_cast<std::size_t>(begin / 8)] = true;
    }
  }
}

TEST_CASE("validation order is plain and wraps") {
  CHECK(validation_begin(0, 8 * 3 + 1, 8) == 0);
  CHECK(validation_begin(2, 8 * 3 + 1, 8) == 16);
  CHECK(validation_begin(3, 8 * 3 + 1, 8) == 0);
}
