// A voluntary change: what it needs is copied while the generation runs, then it is made at a step.
#include <doctest/doctest.h>

#include "coordinator/decision.hpp"
#include "tests/job_bench.hpp"

using namespace stagecoach;
using namespace stagecoach::test;

namespace {

/// One worker that runs at step 10, and one that has joined; the feed that is begun for it.
struct growing {
  bench b{small_spec(1, 2)};
  feed order;

  growing() {
    b.give({1});
    b.answer(1, 1);
    b.load(1);
    b.progress_to(10);
    b.give({2});
    const auto feeds = sent<feed>(wait(700));
    REQUIRE(feeds.size() == 2);  // who gives and who gets
    order = feeds[0].second;
  }
  std::vector<action> wait(std::int64_t ms) {
    b.beats({1, 2});
    return b.tick(ms);
  }
  std::vector<action> links_stand() {
    b.say(1, feed_ready{1, 1, order.request});
    return b.say(2, feed_ready{1, 1, order.request});
  }
  std::vector<action> is_fed(std::uint64_t step) {
    return b.say(2, fed{1, 1, order.request, step});
  }
};

}  // namespace

TEST_CASE("a joiner is fed all that its seat needs while the run goes on") {
  growing g;
  // One of the two stages that a plan of two workers has.
  const layout next = *choose_layout(g.order.spec, 2);
  const std::size_t front = stage_tensor_names(g.order.spec.model, 0, next.unit_cuts[1]).size();
  const std::size_t back =
      stage_tensor_names(g.order.spec.model, next.unit_cuts[1], next.unit_cuts.back()).size();
  CHECK((g.order.transfers.size() == front || g.order.transfers.size() == back));
  for (const auto& t : g.order.transfers) {
    CHECK(g.order.participants[static_cast<std::size_t>(t.from_rank)].worker == w(1));
    CHECK(g.order.participants[static_cast<std::size_t>(t.to_rank)].worker == w(2));
  }
  CHECK(g.b.machine.state() == job_state::running);
  CHECK(std::string(g.b.machine.phase_name()) == "running");

  const auto orders = sent<give_order>(g.links_stand());
  REQUIRE(orders.size() == 1);
  CHECK(orders[0].first == w(1));
  CHECK(orders[0].second.kind == static_cast<int>(order_kind::feed));
  CHECK(orders[0].second.order == g.order.request);

  // Only then does the run stop, after a step and without a save.
  const auto holds = sent<give_order>(g.is_fed(14));
  REQUIRE(holds.size() == 1);
  CHECK(holds[0].second.kind == static_cast<int>(order_kind::hold));
  const auto asked = sent<prepare>(g.b.say(1, held{1, 1, 15}));
  REQUIRE(asked.size() == 2);
  for (const auto& [to, p] : asked) CHECK(p.wait_step == 15);

  const auto all = stage_tensor_names(g.order.spec.model, 0, 4);
  g.b.answer(1, 2, 15, all);
  const auto commits = sent<commit>(g.b.answer(2, 2, 15, all));
  REQUIRE(commits.size() == 2);
  CHECK(commits[0].second.source == source_kind::live);
  CHECK(commits[0].second.step == 15);
  CHECK(commits[0].second.transfers.empty());
}

TEST_CASE("late parts made a later step durable than the one that is held: it goes on from there") {
  // Found by: stagecoach_sim --seed 13037.
  growing g;
  g.links_stand();
  REQUIRE(sent<give_order>(g.is_fed(14)).size() == 1);
  g.b.save_step(40, 1040);
  REQUIRE(sent<prepare>(g.b.say(1, held{1, 1, 15})).size() == 2);
  const auto all = stage_tensor_names(g.order.spec.model, 0, 4);
  g.b.answer(1, 2, 15, all);
  const auto decided = g.b.answer(2, 2, 15, all);
  CHECK(sent<commit>(decided).empty());
  CHECK(all_of<actions::find_checkpoint>(decided).size() == 1);
}

TEST_CASE("a feed that fails costs nothing: again, and after three times by holding and copying") {
  growing g;
  for (int i = 1; i <= 3; ++i) {
    const auto said = g.b.say(2, fed{1, 1, g.order.request, 0, "a link closed"});
    CHECK(sent<stop_feed>(said).size() == 2);
    CHECK(g.b.machine.state() == job_state::running);
    if (i == 3) break;
    CHECK(sent<feed>(g.wait(1000)).empty());
    g.wait(900);
    const auto again = sent<feed>(g.wait(800));
    REQUIRE(again.size() == 2);
    CHECK(again[0].second.request > g.order.request);
    g.order = again[0].second;
  }
  g.wait(1000);
  const auto holds = sent<give_order>(g.wait(1000));
  REQUIRE(holds.size() == 1);
  CHECK(holds[0].second.kind == static_cast<int>(order_kind::hold));
}

TEST_CASE("a joiner that is lost, or lacks the data, ends its feed and not the run") {
  growing g;
  SUBCASE("lost") {
    const auto said = g.b.step(job_events::worker_gone{w(2), "killed"});
    CHECK_FALSE(g.b.machine.has_worker(w(2)));
    CHECK(g.b.machine.state() == job_state::running);
    CHECK(sent<stop_feed>(said).size() == 1);
  }
  SUBCASE("its own problem") {
    const auto said = g.b.say(2, fed{1, 1, g.order.request, 0, "no such file", true});
    CHECK(has_note(said, "worker_refused"));
    CHECK_FALSE(g.b.machine.has_worker(w(2)));
    CHECK_FALSE(g.b.machine.accepts(bench::facts(2)));
    CHECK(g.b.machine.state() == job_state::running);
  }
}

TEST_CASE("a member that is lost while a joiner is fed: what was fed whole counts as held") {
  growing g;
  g.links_stand();
  g.is_fed(14);
  g.b.step(job_events::worker_gone{w(1), "killed"});
  const auto all = stage_tensor_names(g.order.spec.model, 0, 4);
  const auto commits = sent<commit>(g.b.answer(2, 2, 14, all));
  REQUIRE(commits.size() == 1);
  CHECK(commits[0].second.step == 14);
  CHECK(commits[0].second.source == source_kind::live);
}

TEST_CASE(
    "a drained worker's stage is fed to the spare; it leaves when that runs, nothing is saved") {
  job_spec s = two_stages();
  bench b(s);
  b.start();
  b.progress_to(10);
  b.step(job_events::worker_draining{w(b.worker_at(0)), true, "test"});
  b.give({3});
  const std::uint64_t leaver = b.worker_at(0), stayer = b.worker_at(1);
  b.beats({1, 2, 3});
  b.tick(300);
  const auto feeds = sent<feed>(b.tick(300));
  REQUIRE(feeds.size() == 2);  // the stayer keeps its stage
  const feed order = feeds[0].second;
  CHECK(order.transfers.size() == b.stage(0).size());
  b.say(leaver, feed_ready{1, 1, order.request});
  b.say(3, feed_ready{1, 1, order.request});
  const auto front = b.stage(0), back = b.stage(1);
  const auto holds = sent<give_order>(b.say(3, fed{1, 1, order.request, 12}));
  REQUIRE(holds.size() == 1);
  CHECK(holds[0].second.kind == static_cast<int>(order_kind::hold));
  b.say(leaver, held{1, 1, 13});
  const auto asked = sent<prepare>(b.say(stayer, held{1, 1, 13}));
  CHECK(asked.size() == 3);  // the leaver too: its last gradient may be on its way
  b.answer(leaver, 2, 13, front);
  b.answer(stayer, 2, 13, back);
  const auto said = b.answer(3, 2, 13, front);
  const auto commits = sent<commit>(said);
  REQUIRE(commits.size() == 2);
  CHECK(commits[0].second.transfers.empty());
  CHECK(commits[0].second.step == 13);
  // Until then it may be the last that has the state.
  CHECK(sent<stop_stage>(said).empty());
  CHECK(b.machine.has_worker(w(leaver)));
  b.load(stayer, 13);
  const auto running = b.load(3, 13);
  CHECK(sent<run_stage>(running).size() == 2);
  CHECK(sent<stop_stage>(running).size() == 1);
  CHECK_FALSE(b.machine.has_worker(w(leaver)));
}

TEST_CASE("a pause while a joiner is fed is made at once") {
  growing g;
  const auto orders = sent<give_order>(g.b.step(job_events::pause{}));
  REQUIRE(orders.size() == 1);
  CHECK(orders[0].second.kind != static_cast<int>(order_kind::feed));
  CHECK(std::string(g.b.machine.phase_name()) == "holding");
}
