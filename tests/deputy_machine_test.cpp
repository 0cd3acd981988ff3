#include "worker/deputy_machine.hpp"

#include <doctest/doctest.h>

#include <fmt/format.h>

#include <algorithm>

#include "coordinator/wire.hpp"
#include "tests/machine_test_support.hpp"
#include "worker/worker_machine.hpp"

using namespace stagecoach;
using namespace stagecoach::test;

namespace {

plan_member member_of(std::uint64_t n) {
  return {w(n), fmt::format("p{}", n), fmt::format("w{}", n), "127.0.0.1", 4000};
}

/// Replicas, so that any of them holds the whole state.
commit plan_of(std::uint64_t generation, std::uint64_t count) {
  commit c;
  c.spec = small_spec(1, static_cast<int>(count));
  c.shape.job = static_cast<job_id>(1);
  c.shape.generation = generation;
  c.shape.shape = *choose_layout(c.spec, static_cast<int>(count));
  for (std::uint64_t n = 1; n <= count; ++n) c.shape.members.push_back(member_of(n));
  c.checkpoint_folder = "folder";
  return c;
}

hello greeting_of(std::uint64_t n, const commit& c, worker_phase phase = worker_phase::running) {
  hello h;
  h.name = fmt::format("w{}", n);
  h.process = fmt::format("p{}", n);
  h.link_host = "127.0.0.1";
  h.link_port = 4000;
  h.device_class = "c";
  h.job = 1;
  h.generation = h.promised = c.shape.generation;
  h.plan_hash = plan_hash(c.shape);
  h.phase = static_cast<int>(phase);
  h.step = 20;
  return h;
}

/// The deputy of worker `own` in generation 1 with `count` members; the coordinator is away.
struct bench {
  bench(std::uint64_t own, std::uint64_t count)
      : machine(fmt::format("p{}", own)), newest(plan_of(1, count)) {
    facts.newest = &newest;
    facts.greeting = greeting_of(own, newest);
    facts.away_ms = 0;
  }
  std::vector<deputy_action> step(const deputy_event& e) { return last = machine.step(e, facts); }
  std::vector<deputy_action> wait(std::int64_t ms) {
    std::vector<deputy_action> all;
    for (std::int64_t t = 0; t < ms; t += 100) {
      facts.now_ms += 100;
      facts.away_ms += 100;
      facts.free_ms += 100;
      for (auto& a : machine.step(deputy_events::tick{}, facts)) all.push_back(std::move(a));
    }
    return last = all;
  }
  std::vector<deputy_action> answers(std::uint64_t n, refusal why = refusal::none) {
    canvassed x;
    x.from = fmt::format("p{}", n);
    x.job = 1;
    x.why = static_cast<int>(why);
    x.greeting = greeting_of(n, newest);
    return step(deputy_events::answered{x});
  }
  std::vector<deputy_action> gone(std::uint64_t n) {
    return step(deputy_events::unreachable{fmt::format("p{}", n), true, "refused"});
  }
  std::size_t canvasses() const {
    std::size_t count = 0;
    for (const auto& a : last) {
      const auto* s = std::get_if<deputy_actions::send>(&a);
      if (s != nullptr && std::holds_alternative<canvass>(s->message)) ++count;
    }
    return count;
  }
  /// Orders to others and to itself, with the process that gets them.
  template <class T>
  std::vector<std::pair<process_id, T>> ordered() const {
    std::vector<std::pair<process_id, T>> found;
    for (const auto& a : last) {
      if (const auto* own = std::get_if<deputy_actions::order_self>(&a)) {
        if (const T* m = std::get_if<T>(&own->message)) found.emplace_back("self", *m);
      } else if (const auto* s = std::get_if<deputy_actions::send>(&a)) {
        const auto* order = std::get_if<deputy_order>(&s->message);
        if (order == nullptr) continue;
        if (const T* m = std::get_if<T>(&order->message)) found.emplace_back(s->to.process, *m);
      }
    }
    return found;
  }
  bool asks_for_tie_break() const {
    return std::any_of(last.begin(), last.end(), [](const auto& a) {
      return std::holds_alternative<deputy_actions::make_tie_break>(a);
    });
  }
  prepared holds(std::uint64_t number, std::uint64_t step) const {
    prepared p;
    p.job = 1;
    p.number = number;
    p.has_state = true;
    p.step = step;
    p.chain = 1000 + step;
    for (const auto& t : all_tensor_sizes(newest.spec.model)) p.tensors.push_back(t.name);
    return p;
  }

  deputy_machine machine;
  commit newest;
  deputy_facts facts;
  std::vector<deputy_action> last;
};

}  // namespace

TEST_CASE("nobody is canvassed while the coordinator's channel stands, or within its lease") {
  bench b(1, 3);
  b.wait(1'400);
  CHECK(b.canvasses() == 0);
  b.wait(100);
  CHECK(b.canvasses() == 2);
  bench other(1, 3);
  other.facts.away_ms = -1'000'000;
  other.wait(3'000);
  CHECK(other.canvasses() == 0);
}

TEST_CASE(
    "the lowest rank is first: a higher one waits a little, and longer for each that may live") {
  bench b(3, 3);
  b.wait(1'500);
  CHECK(b.canvasses() == 0);
  b.facts.free_ms = 0;
  b.wait(400);
  CHECK(b.canvasses() == 0);
  b.wait(200);
  CHECK(b.canvasses() > 0);
}

TEST_CASE("a majority of the generation's members is a mandate, less is none") {
  bench b(1, 4);
  b.wait(1'500);
  b.answers(2);
  CHECK_FALSE(b.machine.is_standing());
  b.answers(3);
  CHECK(b.machine.is_standing());
}

TEST_CASE("whoever is known dead needs no vote") {
  bench b(1, 4);
  b.wait(1'500);
  b.gone(2);
  b.gone(3);
  CHECK_FALSE(b.machine.is_standing());
  b.gone(4);
  CHECK(b.machine.is_standing());
}

TEST_CASE("where the others are silent and no majority answers, the tie-break file decides") {
  bench b(1, 2);
  b.wait(3'400);
  CHECK_FALSE(b.asks_for_tie_break());
  b.wait(200);
  CHECK(b.asks_for_tie_break());
  CHECK_FALSE(b.machine.is_standing());
  SUBCASE("it is ours") {
    b.step(deputy_events::tie_break_made{1, true});
    CHECK(b.machine.is_standing());
  }
  SUBCASE("another made it") {
    b.step(deputy_events::tie_break_made{1, false});
    b.wait(5'000);
    CHECK_FALSE(b.machine.is_standing());
    CHECK_FALSE(b.asks_for_tie_break());
  }
}

TEST_CASE("a member whose coordinator's channel stands keeps a deputy from standing, or ends it") {
  bench b(1, 3);
  b.wait(1'500);
  SUBCASE("before") {
    b.answers(2, refusal::has_coordinator);
    b.answers(3);
    CHECK_FALSE(b.machine.is_standing());
  }
  SUBCASE("after") {
    b.answers(2);
    REQUIRE(b.machine.is_standing());
    b.answers(3, refusal::has_coordinator);
    CHECK_FALSE(b.machine.is_standing());
  }
}

TEST_CASE("with nobody lost the deputy adopts the generation and orders nothing") {
  bench b(1, 3);
  b.wait(1'500);
  b.answers(2);
  b.answers(3);
  CHECK(b.machine.is_standing());
  b.wait(300);
  CHECK(b.ordered<prepare>().empty());
}

TEST_CASE("a member known dead: the survivors go on in a generation that names its deputy") {
  bench b(1, 3);
  b.wait(1'500);
  b.answers(2);
  b.answers(3);
  b.wait(300);
  b.gone(3);
  const auto asked = b.ordered<prepare>();
  REQUIRE(asked.size() == 2);
  CHECK(asked[0].first == "self");
  CHECK(asked[1].first == "p2");
  CHECK(asked[0].second.number == 2);
  CHECK(asked[0].second.decider == "p1");
  b.step(deputy_events::reported{"p1", b.holds(2, 21)});
  b.step(deputy_events::reported{"p2", b.holds(2, 21)});
  const auto commits = b.ordered<commit>();
  REQUIRE(commits.size() == 2);
  CHECK(commits[0].second.decided_by == "w1");
  CHECK(commits[0].second.reason.find("w3") != std::string::npos);
  CHECK(commits[0].second.step == 21);
  CHECK(commits[0].second.source == source_kind::live);
  CHECK(commits[0].second.checkpoint_folder == "folder");
  CHECK(b.ordered<stop_stage>().empty());
}

TEST_CASE("a deputy in the middle of a rollback goes back too, whoever heard of it") {
  bench b(1, 2);
  distrust spoilt;
  spoilt.fence = 1002;
  spoilt.step = 10;
  spoilt.bad_saves = {1281};
  b.facts.durable = checkpoint_durable{1, 20, 1281, 1020};
  const auto answers = [&b, &spoilt] {
    canvassed x;
    x.from = "p2";
    x.job = 1;
    x.greeting = greeting_of(2, b.newest, worker_phase::prepared);
    x.greeting.promised = 1002;
    x.greeting.distrusted = spoilt;
    x.durable = checkpoint_durable{1, 20, 1281, 1020};
    return b.step(deputy_events::answered{x});
  };
  SUBCASE("it itself") {
    b.facts.greeting.distrusted = spoilt;
    b.facts.greeting.promised = 1002;
    b.facts.greeting.phase = static_cast<int>(worker_phase::prepared);
  }
  SUBCASE("a member only, before it stands") {}
  b.wait(1'500);
  answers();
  std::vector<deputy_action> all = b.last;
  std::vector<std::pair<process_id, prepare>> asked = b.ordered<prepare>();
  for (int i = 0; i < 60 && asked.empty(); ++i) {
    b.wait(100);
    asked = b.ordered<prepare>();
    if (asked.empty()) answers();
  }
  REQUIRE(!asked.empty());
  const std::uint64_t number = asked.back().second.number;
  CHECK(number > 1002);
  CHECK(asked.back().second.distrusted == spoilt);
  auto own = b.holds(number, 20), other = b.holds(number, 20);
  own.loaded_in = other.loaded_in = 1;
  b.step(deputy_events::reported{"p1", own});
  CHECK(b.ordered<commit>().empty());
  b.step(deputy_events::reported{"p2", other});
  CHECK(b.ordered<commit>().empty());
  bool has_looked = false;
  for (const auto& a : b.last) {
    const auto* s = std::get_if<deputy_actions::store>(&a);
    const auto* f = s == nullptr ? nullptr : std::get_if<actions::find_checkpoint>(&s->what);
    if (f == nullptr) continue;
    has_looked = true;
    CHECK(f->distrusted == spoilt);
  }
  CHECK(has_looked);
}

TEST_CASE("a deputy's generation shares the leaves out by the times that its plan came with") {
  bench b(1, 3);
  b.newest.spec.batch.global_sequences = 32;  // two go on as replicas, not as stages
  b.newest.leaf_us = {100, 200, 100};
  b.wait(1'500);
  b.answers(2);
  b.gone(3);
  b.step(deputy_events::reported{"p1", b.holds(2, 21)});
  b.step(deputy_events::reported{"p2", b.holds(2, 21)});
  const auto commits = b.ordered<commit>();
  REQUIRE(commits.size() == 2);
  CHECK(commits[0].second.shape.shape.leaf_cuts == std::vector<int>{0, 6, 8});
  CHECK(commits[0].second.leaf_us == std::vector<std::int64_t>{100, 200});
}

TEST_CASE("a deputy's generation is cut by the times that its plan came with") {
  bench b(1, 3);
  job_spec& spec = b.newest.spec;
  spec.model.n_layer = 6;
  b.newest.shape.shape = *choose_layout(spec, 3);
  REQUIRE(b.newest.shape.shape.unit_cuts == std::vector<int>{0, 3, 5, 8});
  b.newest.leaf_us = {200, 600, 200};
  b.newest.layer_us = {100, 300, 100};
  b.facts.greeting = greeting_of(1, b.newest);
  b.wait(1'500);
  b.answers(2);
  b.gone(3);
  b.step(deputy_events::reported{"p1", b.holds(2, 21)});
  b.step(deputy_events::reported{"p2", b.holds(2, 21)});
  const auto commits = b.ordered<commit>();
  REQUIRE(commits.size() == 2);
  const commit& c = commits[0].second;
  REQUIRE(c.shape.members[0].worker == w(1));
  // By hand: 5 x 100 and 1 x 300; 4 and 2 would be 600, even ones 900.
  CHECK(c.shape.shape.unit_cuts == std::vector<int>{0, 6, 8});
  CHECK(c.leaf_us == std::vector<std::int64_t>{500, 300});
  CHECK(c.layer_us == std::vector<std::int64_t>{100, 300});
}

TEST_CASE("a deputy moves no leaves of itself") {
  bench b(1, 2);
  b.wait(1'500);
  for (int s = 0; s < 100; ++s) {
    b.facts.pulse = beat{1, 1, static_cast<std::uint64_t>(20 + s), 5};
    b.facts.pulse.leaf_us = 100;
    canvassed x;
    x.from = "p2";
    x.job = 1;
    x.greeting = greeting_of(2, b.newest);
    x.pulse = b.facts.pulse;
    x.pulse.leaf_us = 900;
    b.step(deputy_events::answered{x});
    b.wait(1'000);
    CHECK(b.ordered<give_order>().empty());
  }
  CHECK(b.machine.is_standing());
}

TEST_CASE("no PREPARE without a mandate at that moment") {
  bench b(1, 3);
  b.wait(1'500);
  b.answers(2);
  b.answers(3);
  REQUIRE(b.machine.is_standing());
  b.wait(8'000);  // both fall silent
  CHECK(b.ordered<prepare>().empty());
  CHECK(b.asks_for_tie_break());
}

TEST_CASE("after the last step and its manifest the deputy is silent; nobody is told to stop") {
  bench b(1, 1);
  b.wait(1'600);
  REQUIRE(b.machine.is_standing());
  part_saved part;
  part.job = 1;
  part.generation = 1;
  part.plan_hash = plan_hash(b.newest.shape);
  part.step = 100;
  part.part.file = "f";
  part.part.folder = "folder";
  part.part.weights_hash = std::string(32, '0');
  for (const auto& t : all_tensor_sizes(b.newest.spec.model)) part.part.tensors.push_back(t.name);
  b.step(deputy_events::reported{"p1", finished{1, 1, 100}});
  b.step(deputy_events::reported{"p1", part});
  const auto* store = std::get_if<deputy_actions::store>(&b.last.front());
  REQUIRE(store != nullptr);
  CHECK(store->place.folder == "folder");
  b.step(manifest_written{static_cast<job_id>(1), 100, true, ""});
  CHECK(b.ordered<checkpoint_durable>().size() == 1);
  CHECK(b.ordered<stop_stage>().empty());
  CHECK_FALSE(b.machine.is_standing());
}

// ---- the member's side ----
namespace {

/// Worker 2 of three, in generation 1 of job 1; the coordinator went away.
struct follower {
  follower() : machine(greeting_of(2, plan_of(1, 3))) {
    step(worker_events::connected{0});
    told(welcome{2, 1, 1000});
    told(prepare{1, 1});
    said(answer(1));
    told(newest);
    said(ready{1, 1, plan_hash(newest.shape), 0, ""});
    told(run_stage{1, 1});
    REQUIRE(machine.phase() == worker_phase::running);
  }
  static prepared answer(std::uint64_t number) {
    prepared p;
    p.job = 1;
    p.number = number;
    return p;
  }
  std::vector<worker_action> step(const worker_event& e) { return last = machine.step(e); }
  std::vector<worker_action> told(to_worker m) {
    return step(worker_events::coordinator_said{std::move(m)});
  }
  std::vector<worker_action> said(to_coordinator m) {
    return step(worker_events::trainer_said{std::move(m)});
  }
  std::vector<worker_action> ordered(std::uint64_t by, to_worker m) {
    const process_id from = fmt::format("p{}", by);
    return step(worker_events::peer_said{from, deputy_order{from, std::move(m)}});
  }
  refusal canvassed_by(std::uint64_t n, bool is_standing = false, std::uint64_t generation = 1) {
    canvass x;
    x.from = member_of(n);
    x.job = 1;
    x.generation = generation;
    x.plan_hash = plan_hash(newest.shape);
    x.is_standing = is_standing;
    step(worker_events::peer_said{x.from.process, x});
    for (const auto& a : last) {
      const auto* s = std::get_if<worker_actions::send_peer>(&a);
      if (s == nullptr || s->to.process != x.from.process) continue;
      if (const auto* c = std::get_if<canvassed>(&s->message)) return static_cast<refusal>(c->why);
    }
    FAIL("no answer");
    return refusal::none;
  }
  template <class T>
  int to_deputy() const {
    int count = 0;
    for (const auto& a : last) {
      const auto* s = std::get_if<worker_actions::send_peer>(&a);
      const auto* r = s == nullptr ? nullptr : std::get_if<deputy_report>(&s->message);
      if (r != nullptr && std::holds_alternative<T>(r->message)) ++count;
    }
    return count;
  }
  template <class T>
  std::vector<T> to_coordinator_sent() const {
    std::vector<T> found;
    for (const auto& a : last) {
      const auto* s = std::get_if<worker_actions::send>(&a);
      const T* m = s == nullptr ? nullptr : std::get_if<T>(&s->message);
      if (m != nullptr) found.push_back(*m);
    }
    return found;
  }
  void lose_coordinator() { step(worker_events::disconnected{"killed"}); }

  commit newest = plan_of(1, 3);
  worker_machine machine;
  std::vector<worker_action> last;
};

}  // namespace

TEST_CASE("a member agrees to a lower rank of its generation once its coordinator is away") {
  follower f;
  CHECK(f.canvassed_by(1) == refusal::has_coordinator);
  f.lose_coordinator();
  CHECK(f.canvassed_by(3) == refusal::lower_rank);
  CHECK(f.canvassed_by(1, false, 0) == refusal::other_identity);
  CHECK(f.canvassed_by(1) == refusal::none);
  CHECK(f.canvassed_by(3, true) == refusal::none);  // it stands, and rank 0 does not yet
  CHECK(f.canvassed_by(1) == refusal::follows_another);
}

TEST_CASE("a follower reports to its deputy, and keeps for the coordinator what that must get") {
  follower f;
  f.lose_coordinator();
  f.canvassed_by(1, true);
  step_report r;
  r.step = 21;
  f.said(progress{1, 1, plan_hash(f.newest.shape), {r}});
  CHECK(f.to_deputy<progress>() == 1);
  f.ordered(1, prepare{1, 2, "p1"});
  f.said(follower::answer(2));
  CHECK(f.to_deputy<prepared>() == 1);
  commit next = plan_of(2, 2);
  next.decided_by = "w1";
  next.reason = "worker_lost w3";
  f.ordered(1, next);
  CHECK(f.machine.generation() == 2);
  f.step(worker_events::connected{21});
  CHECK(f.to_coordinator_sent<hello>().at(0).promised_to == "p1");
  f.told(welcome{2, 2, 1000});
  const auto reports = f.to_coordinator_sent<plan_report>();
  REQUIRE(reports.size() == 1);
  CHECK(reports[0].decided_by == "w1");
  CHECK(reports[0].reason == "worker_lost w3");
  CHECK(reports[0].shape == next.shape);
  CHECK(f.to_coordinator_sent<progress>().size() == 1);
  f.ordered(1, run_stage{1, 2});  // the coordinator decides now
  CHECK(f.machine.phase() == worker_phase::loading);
}

TEST_CASE("a deputy that hears the coordinator again first says what it decided") {
  commit alone = plan_of(1, 1);
  worker_machine machine(greeting_of(1, alone));
  const auto told = [&machine](to_worker m) {
    return machine.step(worker_events::coordinator_said{std::move(m)});
  };
  (void)machine.step(worker_events::connected{0});
  (void)told(welcome{1, 1, 1000});
  (void)told(prepare{1, 1});
  (void)machine.step(worker_events::trainer_said{follower::answer(1)});
  alone.decided_by = "w1";
  (void)told(alone);
  (void)machine.step(worker_events::disconnected{"killed"});
  for (int t = 100; t < 4'000; t += 100) (void)machine.step(worker_events::tick{t, 0});
  REQUIRE(machine.is_deputy());
  (void)machine.step(worker_events::connected{0});
  const auto said = told(welcome{1, 2, 1000});
  CHECK_FALSE(machine.is_deputy());
  std::vector<std::string> words;
  for (const auto& a : said) {
    if (const auto* s = std::get_if<worker_actions::send>(&a))
      words.push_back(type_name(s->message));
  }
  REQUIRE(words.size() >= 2);
  CHECK(words[0] == "plan_report");
}

TEST_CASE("who promised a number to one decider answers no other with it") {
  follower f;
  f.lose_coordinator();
  f.canvassed_by(1, true);
  f.ordered(1, prepare{1, 2, "p1"});
  f.said(follower::answer(2));
  f.step(worker_events::connected{0});
  f.told(welcome{2, 2, 1000});
  const auto stale = f.machine.stale_messages();
  f.told(prepare{1, 2});
  CHECK(f.to_coordinator_sent<prepared>().empty());
  f.told(plan_of(2, 2));
  CHECK(f.machine.generation() == 1);
  CHECK(f.machine.stale_messages() == stale + 2);
  f.told(prepare{1, 3});
  f.said(follower::answer(3));
  CHECK(f.to_coordinator_sent<prepared>().size() == 1);
}

TEST_CASE("orders of whom this worker does not follow are dropped") {
  follower f;
  f.ordered(1, prepare{1, 2, "p1"});
  CHECK(f.machine.phase() == worker_phase::running);
  f.lose_coordinator();
  f.canvassed_by(1, true);
  f.ordered(3, prepare{1, 2, "p3"});
  CHECK(f.machine.phase() == worker_phase::running);
  f.ordered(1, welcome{9, 9, 1000});
  CHECK(f.machine.id() == 2);
}

TEST_CASE("parts in a deputy's manifest are said again with its number; two saves wait at most") {
  follower f;
  f.lose_coordinator();
  f.canvassed_by(1, true);
  const auto save = [&f](std::uint64_t step) {
    part_saved p;
    p.job = 1;
    p.generation = 1;
    p.step = step;
    f.said(p);
  };
  save(10);
  save(20);
  f.ordered(1, checkpoint_durable{1, 20, 1281, 7});
  save(30);
  f.step(worker_events::connected{0});
  f.told(welcome{2, 2, 1000});
  auto parts = f.to_coordinator_sent<part_saved>();
  REQUIRE(parts.size() == 2);
  CHECK(parts[0].step == 20);
  CHECK(parts[0].seq == 1281);
  CHECK(parts[1].seq == 0);
  f.lose_coordinator();
  save(40);
  save(50);
  f.step(worker_events::connected{0});
  f.told(welcome{2, 2, 1000});
  parts = f.to_coordinator_sent<part_saved>();
  REQUIRE(parts.size() == 2);
  CHECK(parts[0].step == 40);
}

TEST_CASE("messages between workers read back; bad ones are refused") {
  canvass x;
  x.from = member_of(4);
  x.job = 3;
  x.is_standing = true;
  const auto back = decode_peer_message(encode(peer_message(x)));
  REQUIRE(back);
  CHECK(std::get<canvass>(*back).from == x.from);
  CHECK(std::get<canvass>(*back).is_standing);
  const auto order = decode_peer_message(encode(peer_message(deputy_order{"p", prepare{1, 2}})));
  REQUIRE(order);
  CHECK(std::get<prepare>(std::get<deputy_order>(*order).message).number == 2);
  const auto report = decode_peer_message(encode(peer_message(deputy_report{"p", held{1, 2, 3}})));
  REQUIRE(report);
  CHECK(std::get<held>(std::get<deputy_report>(*report).message).step == 3);
  for (const char* bad : {"", "{}", "[]", R"({"type":"order","from":"p","message":"{}"})",
                          R"({"type":"canvassed","why":77})", R"({"type":"canvass","job":-1})",
                          R"({"type":"report","from":7,"message":5})", R"({"type":"nothing"})"}) {
    CHECK_FALSE(decode_peer_message(bad));
  }
}
