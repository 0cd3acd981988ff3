// Slow and fast replicas of one job.
#include <doctest/doctest.h>

#include "tests/job_bench.hpp"

using namespace stagecoach;
using namespace stagecoach::test;

namespace {

job_spec two_replicas() {
  job_spec s = small_spec(2, 2);
  s.parallelism.is_explicit = true;
  s.parallelism.stages = 1;
  s.parallelism.replicas = 2;
  return s;
}

/// A second passes, and both beat with what a leaf took them.
std::vector<action> pass(bench& b, std::uint64_t at_step, std::int64_t first_us,
                         std::int64_t second_us) {
  std::vector<action> all = b.tick(1'000);
  for (const std::uint64_t n : {1, 2}) {
    beat x{1, b.generation(), at_step, static_cast<int>(worker_phase::running)};
    x.leaf_us = n == 1 ? first_us : second_us;
    for (action& a : b.say(n, x)) all.push_back(std::move(a));
  }
  return all;
}

}  // namespace

TEST_CASE("a slow replica's leaves move at a step boundary, with no state and no step done again") {
  bench b(two_replicas());
  b.start();
  REQUIRE(b.machine.generation()->shape.shape.leaf_cuts == std::vector<int>{0, 4, 8});
  std::uint64_t at = 0;
  for (int s = 0; s < 40; ++s) CHECK(sent<give_order>(pass(b, ++at, 5'000, 5'000)).empty());
  std::vector<std::pair<worker_id, give_order>> orders;
  std::vector<action> said;
  while (orders.empty() && at < 400) {
    said = pass(b, at += 10, 5'000, 12'000);
    orders = sent<give_order>(said);
  }
  CHECK(at == 100);  // seen at 50, five seconds at ten steps each
  REQUIRE(orders.size() == 1);
  CHECK(orders[0].second.kind == static_cast<int>(order_kind::hold));
  CHECK(has_note(said, "leaves_moved"));
  CHECK(b.machine.balance().find("at step 90 w2 took 12.0 ms for a leaf, 2.40 x its peers' median: "
                                 "leaves 4, 4 became 6, 2") == 0);
  const std::uint64_t before = b.generation();
  b.say(1, held{1, before, 91});
  CHECK(sent<prepare>(b.say(2, held{1, before, 91})).size() == 2);
  CHECK(b.machine.wish(5).most == 0);  // it asks for nobody meanwhile
  b.answer(1, before + 1, 91, b.stage(0));
  const auto commits = sent<commit>(b.answer(2, before + 1, 91, b.stage(0)));
  REQUIRE(commits.size() == 2);
  const commit& c = commits[0].second;
  CHECK(c.source == source_kind::live);
  CHECK(c.step == 91);
  CHECK(c.transfers.empty());
  // By hand: 6 x 5 ms and 2 x 12 ms; 5 and 3 would be 36 ms.
  CHECK(c.shape.shape.leaf_cuts == std::vector<int>{0, 6, 8});
  CHECK(c.shape.members[1].worker == w(2));
  b.load(1, 91);
  b.load(2, 91);
  CHECK(b.machine.state() == job_state::running);
  SUBCASE("both are as fast again: even shares, but not before the cool-down") {
    for (int s = 0; s < 29; ++s) CHECK(sent<give_order>(pass(b, at += 10, 5'000, 5'200)).empty());
    CHECK(sent<give_order>(pass(b, at += 10, 5'000, 5'200)).size() == 1);
    CHECK(b.machine.balance().find("leaves 6, 2 became 4, 4") != std::string::npos);
  }
  SUBCASE("somewhat slow still: nothing moves") {
    for (int s = 0; s < 100; ++s) CHECK(sent<give_order>(pass(b, at += 10, 5'000, 6'000)).empty());
  }
}

TEST_CASE("leaves stay where a time is not known") {
  bench b(two_replicas());
  b.start();
  for (std::uint64_t at = 1; at < 80; ++at)
    CHECK(sent<give_order>(pass(b, at * 10, 5'000, 0)).empty());
}
