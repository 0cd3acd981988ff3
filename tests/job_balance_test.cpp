// Slow and fast workers of one job: leaves between replicas, layers between stages.
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

namespace {

/// A pipeline of two stages with four layers, two each; the second worker becomes slow.
struct pipeline {
  static job_spec spec() {
    job_spec s = two_stages();
    s.model.n_layer = 4;
    s.stop_steps = 10'000;
    return s;
  }
  bench b{spec()};
  std::uint64_t at = 0;
  feed order;

  pipeline() {
    b.start();
    REQUIRE(b.machine.generation()->shape.shape.unit_cuts == std::vector<int>{0, 3, 6});
  }
  std::vector<std::string> units(int from, int to) const {
    return stage_tensor_names(spec().model, from, to);
  }
  /// A second and ten steps pass; each says what a layer takes it, edges take nothing.
  std::vector<action> pass(std::int64_t front_us, std::int64_t back_us) {
    std::vector<action> all = b.tick(1'000);
    at += 10;
    const auto layers = layers_of(spec().model, b.machine.generation()->shape.shape.unit_cuts);
    for (int rank = 0; rank < 2; ++rank) {
      beat x{1, b.generation(), at, static_cast<int>(worker_phase::running)};
      x.layer_us = rank == 0 ? front_us : back_us;
      x.leaf_us = x.layer_us * layers[static_cast<std::size_t>(rank)];
      for (action& a : b.say(b.worker_at(rank), x)) all.push_back(std::move(a));
    }
    return all;
  }
  /// Until a feed is begun for what moves.
  void fall_behind() {
    for (int s = 0; s < 40; ++s) REQUIRE(sent<feed>(pass(5'000, 5'000)).empty());
    for (int s = 0; s < 10; ++s) {
      const auto feeds = sent<feed>(pass(5'000, 15'000));
      if (feeds.empty()) continue;
      CHECK(s >= 5);  // five seconds of it
      REQUIRE(feeds.size() == 2);
      order = feeds[0].second;
      return;
    }
    FAIL("no feed was begun");
  }
  std::vector<action> links_stand() {
    b.say(1, feed_ready{1, b.generation(), order.request});
    return b.say(2, feed_ready{1, b.generation(), order.request});
  }
};

}  // namespace

TEST_CASE("a slow stage's layers move: fed while the run goes on, then a step boundary") {
  pipeline p;
  bench& b = p.b;
  p.fall_behind();
  // By hand: 3 x 5 ms and 1 x 15 ms; two each took 30 ms. So one layer goes, with its 12 tensors.
  CHECK(p.order.transfers.size() == 12);
  for (const auto& t : p.order.transfers) {
    CHECK(t.tensor.starts_with("h.2."));
    CHECK(p.order.participants[static_cast<std::size_t>(t.from_rank)].worker == w(b.worker_at(1)));
  }
  CHECK(b.machine.layer_balance().empty());
  const auto fed_orders = sent<give_order>(p.links_stand());
  REQUIRE(fed_orders.size() == 1);
  CHECK(fed_orders[0].second.kind == static_cast<int>(order_kind::feed));
  const std::uint64_t front = b.worker_at(0), back = b.worker_at(1), before = b.generation();
  const auto said = b.say(front, fed{1, before, p.order.request, p.at + 2});
  const auto holds = sent<give_order>(said);
  REQUIRE(holds.size() == 1);
  CHECK(holds[0].second.kind == static_cast<int>(order_kind::hold));
  CHECK(has_note(said, "layers_moved"));
  CHECK(b.machine.layer_balance().find(
            "w" + std::to_string(back) +
            " took 3.00 x its peers' median time for a layer: layers 2, 2 became 3, 1, 50 % less "
            "time of the slowest stage by that") != std::string::npos);
  const std::uint64_t step = p.at + 3;
  b.say(front, held{1, before, step});
  const auto asked = sent<prepare>(b.say(back, held{1, before, step}));
  REQUIRE(asked.size() == 2);
  CHECK(asked[0].second.wait_step == step);
  CHECK(b.machine.wish(5).most == 0);
  auto grown = p.units(0, 3);
  for (const auto& t : p.order.transfers) grown.push_back(t.tensor);
  const auto at_step = static_cast<std::int64_t>(step);
  b.answer(front, before + 1, at_step, grown);
  const auto commits = sent<commit>(b.answer(back, before + 1, at_step, p.units(3, 6)));
  REQUIRE(commits.size() == 2);
  const commit& c = commits[0].second;
  CHECK(c.source == source_kind::live);
  CHECK(c.step == step);
  CHECK(c.transfers.empty());
  CHECK(c.shape.shape.unit_cuts == std::vector<int>{0, 4, 6});
  CHECK(c.shape.members[0].worker == w(front));
  CHECK(c.leaf_us == std::vector<std::int64_t>{15'000, 15'000});
  CHECK(c.layer_us == std::vector<std::int64_t>{5'000, 15'000});
  CHECK(b.machine.generation()->reason.starts_with("balance: "));
  b.load(front, step);
  b.load(back, step);
  REQUIRE(b.machine.state() == job_state::running);
  SUBCASE("both are as fast again: the layer goes back, but not before the cool-down") {
    for (int s = 0; s < 29; ++s) CHECK(sent<feed>(p.pass(5'000, 5'200)).empty());
    const auto feeds = sent<feed>(p.pass(5'000, 5'200));
    REQUIRE(feeds.size() == 2);
    CHECK(feeds[0].second.transfers.size() == 12);
  }
  SUBCASE("slow still: nothing moves any more") {
    for (int s = 0; s < 100; ++s) CHECK(sent<feed>(p.pass(5'000, 15'000)).empty());
  }
  SUBCASE("a link breaks: the same two go on where they are cut") {
    const std::uint64_t number = b.generation();
    b.say(front, failed{1, number, "unreachable", "the link broke"});
    b.beats({1, 2});
    b.tick(300);
    b.answer(front, number + 1, at_step, p.units(0, 4));
    const auto again = sent<commit>(b.answer(back, number + 1, at_step, p.units(4, 6)));
    REQUIRE(again.size() == 2);
    CHECK(again[0].second.shape.shape.unit_cuts == std::vector<int>{0, 4, 6});
    CHECK(again[0].second.transfers.empty());
  }
}

TEST_CASE("layers whose copies fail stay, and the run is left alone until the next cool-down") {
  pipeline p;
  p.fall_behind();
  p.links_stand();
  const auto said =
      p.b.say(p.b.worker_at(0), fed{1, p.b.generation(), p.order.request, 0, "a link closed"});
  CHECK(sent<stop_feed>(said).size() == 2);
  for (int s = 0; s < 29; ++s) {
    const auto quiet = p.pass(5'000, 15'000);
    CHECK(sent<feed>(quiet).empty());
    CHECK(sent<give_order>(quiet).empty());
  }
  bool is_tried_again = false;
  for (int s = 0; s < 10; ++s)
    is_tried_again = is_tried_again || !sent<feed>(p.pass(5'000, 15'000)).empty();
  CHECK(is_tried_again);
}

TEST_CASE("a drain ends a move of layers") {
  pipeline p;
  p.fall_behind();
  CHECK(sent<stop_feed>(p.b.step(job_events::worker_draining{w(2), true, "test"})).size() == 2);
  CHECK(p.b.machine.layer_balance().empty());
}
