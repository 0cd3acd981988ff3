#include "worker/worker_machine.hpp"

#include <doctest/doctest.h>

#include <fmt/format.h>

using namespace stagecoach;

namespace {

prepared answer(std::uint64_t job, std::uint64_t number, std::uint64_t step = 0) {
  prepared p;
  p.job = job;
  p.number = number;
  p.has_state = step > 0;
  p.step = step;
  return p;
}

struct bench {
  bench() : machine(identity()) {}
  static worker_identity identity() {
    worker_identity h;
    h.name = "w";
    h.process = "p";
    return h;
  }
  std::vector<worker_action> step(const worker_event& e) { return last = machine.step(e); }
  std::vector<worker_action> told(to_worker m) {
    return step(worker_events::coordinator_said{std::move(m)});
  }
  std::vector<worker_action> said(to_coordinator m) {
    return step(worker_events::trainer_said{std::move(m)});
  }
  void connect(std::uint64_t incarnation = 1) {
    step(worker_events::connected{0});
    told(welcome{1, incarnation, 1000});
  }
  static commit plan_of(std::uint64_t job, std::uint64_t number) {
    commit c;
    c.shape.job = static_cast<job_id>(job);
    c.shape.generation = number;
    c.shape.shape = {1, 1, "1f1b", {0, 3}, {0, 1}};
    c.shape.members.resize(1);
    return c;
  }
  /// Connected and running generation 1 of job 1.
  void run() {
    connect();
    told(prepare{1, 1});
    said(answer(1, 1));
    told(plan_of(1, 1));
    said(ready{1, 1, plan_hash(plan_of(1, 1).shape), 0, ""});
    told(run_stage{1, 1});
    REQUIRE(machine.phase() == worker_phase::running);
  }
  template <class T>
  std::vector<T> sent() const {
    std::vector<T> found;
    for (const auto& a : last) {
      if (const auto* s = std::get_if<worker_actions::send>(&a)) {
        if (const T* m = std::get_if<T>(&s->message)) found.push_back(*m);
      }
    }
    return found;
  }
  template <class T>
  std::vector<T> trainer_told() const {
    std::vector<T> found;
    for (const auto& a : last) {
      if (const auto* t = std::get_if<worker_actions::tell_trainer>(&a)) {
        if (const T* m = std::get_if<T>(&t->message)) found.push_back(*m);
      }
    }
    return found;
  }
  worker_machine machine;
  std::vector<worker_action> last;
};

}  // namespace

TEST_CASE("a worker greets, is welcomed, and beats once a period") {
  bench b;
  b.step(worker_events::connected{0});
  REQUIRE(b.sent<hello>().size() == 1);
  CHECK(b.sent<hello>()[0].name == "w");
  b.step(worker_events::tick{100, 0});
  CHECK(b.sent<beat>().empty());
  b.told(welcome{7, 1, 1000});
  CHECK(b.machine.id() == 7);
  b.step(worker_events::tick{1000, 0});
  CHECK(b.sent<beat>().empty());
  b.step(worker_events::tick{1100, 0, {}, 0, 700, 200});
  REQUIRE(b.sent<beat>().size() == 1);
  CHECK(b.sent<beat>()[0].leaf_us == 700);
  CHECK(b.sent<beat>()[0].layer_us == 200);
}

TEST_CASE("beats say what the trainer's thread is at, and come closer while it stands") {
  bench b;
  b.run();
  std::int64_t now = 0;
  std::vector<beat> beats;
  const auto pass = [&](std::int64_t ms, std::uint64_t op) {
    for (const std::int64_t end = now + ms; now < end;) {
      now += 100;
      b.step(worker_events::tick{now, 0, {op, trainer_activity::wait, 3}});
      for (const beat& x : b.sent<beat>()) beats.push_back(x);
    }
  };
  for (std::uint64_t op = 1; op <= 20; ++op) pass(100, op);
  CHECK(beats.size() == 2);
  CHECK(beats.back().op == 20);
  CHECK(beats.back().activity == static_cast<int>(trainer_activity::wait));
  CHECK(beats.back().waits_for == 3);
  CHECK(beats.back().stands_ms == 0);
  pass(2000, 20);
  CHECK(beats.back().stands_ms >= 1900);
  CHECK(beats.size() >= 7);
  SUBCASE("it moves again") {
    pass(100, 21);
    beats.clear();
    for (std::uint64_t op = 22; op <= 41; ++op) pass(100, op);
    CHECK(beats.size() == 2);
    CHECK(beats.back().stands_ms < 100);
  }
  SUBCASE("what this process slept through is no standing still") {
    now += 60'000;
    pass(100, 20);
    CHECK(beats.back().stands_ms <= 2300);
  }
}

TEST_CASE("after prepare(n) nothing of a smaller number is taken or said") {
  bench b;
  b.run();
  b.told(prepare{1, 5});
  CHECK(b.trainer_told<prepare>().size() == 1);
  b.told(prepare{1, 4});
  CHECK(b.last.empty());
  b.told(run_stage{1, 1});
  CHECK(b.last.empty());
  b.told(bench::plan_of(1, 4));
  CHECK(b.last.empty());
  b.said(held{1, 1, 3});
  CHECK(b.last.empty());
  b.said(finished{1, 1, 3});
  CHECK(b.last.empty());
  CHECK(b.machine.stale_messages() == 3);
  b.said(answer(1, 5, 3));
  CHECK(b.sent<prepared>().size() == 1);
  b.told(bench::plan_of(1, 5));
  CHECK(b.machine.phase() == worker_phase::loading);
}

TEST_CASE("a prepare that is asked again is answered again, without the trainer") {
  bench b;
  b.run();
  b.told(prepare{1, 2});
  b.told(prepare{1, 2});
  CHECK(b.last.empty());  // the answer is on its way
  b.said(answer(1, 2, 3));
  b.told(prepare{1, 2});
  CHECK(b.trainer_told<prepare>().empty());
  REQUIRE(b.sent<prepared>().size() == 1);
  CHECK(b.sent<prepared>()[0].step == 3);
}

TEST_CASE("training goes on while the coordinator is away, and all is said on its return") {
  bench b;
  b.run();
  b.step(worker_events::disconnected{"gone"});
  CHECK(b.last.empty());
  part_saved part;
  part.job = 1;
  part.generation = 1;
  part.step = 4;
  b.said(part);
  for (std::uint64_t s = 1; s <= 3; ++s) {
    progress p{1, 1, 0, {}};
    p.steps.resize(1);
    p.steps[0].step = s;
    b.said(p);
    CHECK(b.last.empty());
  }
  b.said(peer_report{1, 1, 9, "lost", "reset"});
  b.said(held{1, 1, 4});
  b.step(worker_events::connected{4});
  REQUIRE(b.sent<hello>().size() == 1);
  const hello h = b.sent<hello>()[0];
  CHECK(h.job == 1);
  CHECK(h.generation == 1);
  CHECK(h.phase == static_cast<int>(worker_phase::held));
  CHECK(h.step == 4);
  CHECK(h.promised == 1);
  b.told(welcome{1, 2, 1000});
  REQUIRE(b.sent<progress>().size() == 1);
  CHECK(b.sent<progress>()[0].steps.size() == 3);
  CHECK(b.sent<part_saved>().size() == 1);
  CHECK(b.sent<peer_report>().size() == 1);
  CHECK(b.sent<held>().size() == 1);
  SUBCASE("a part is said again until it is durable") {
    b.step(worker_events::disconnected{"gone"});
    b.connect(2);
    CHECK(b.sent<part_saved>().size() == 1);
    CHECK(b.sent<progress>().size() == 1);  // that channel may have lost it
    b.told(checkpoint_durable{1, 4});
    b.step(worker_events::disconnected{"gone"});
    b.connect(2);
    CHECK(b.sent<part_saved>().empty());
  }
}

TEST_CASE("what was reported last before a channel broke is said again on the next") {
  bench b;
  b.run();
  std::int64_t now_ms = 0;
  const auto rest = [&](std::int64_t for_ms) {
    for (const std::int64_t until_ms = now_ms + for_ms; now_ms < until_ms;)
      b.step(worker_events::tick{now_ms += 100});
  };
  const auto does = [&](std::uint64_t step) {
    progress p{1, 1, 0, {}};
    p.steps.resize(1);
    p.steps[0].step = step;
    b.said(p);
  };
  const auto steps_sent = [&] {
    std::vector<std::uint64_t> steps;
    for (const progress& p : b.sent<progress>()) {
      for (const step_report& s : p.steps) steps.push_back(s.step);
    }
    return steps;
  };
  using steps = std::vector<std::uint64_t>;
  does(1);
  rest(10'000);
  does(2);
  rest(6'000);
  does(3);
  CHECK(steps_sent() == steps{3});
  b.step(worker_events::disconnected{"gone"});
  does(4);
  b.connect(2);
  CHECK(steps_sent() == steps{2, 3, 4});  // 1 was said 16 s before the channel broke
  SUBCASE("and again if that one breaks as well") {
    does(5);
    b.step(worker_events::disconnected{"gone"});
    b.connect(2);
    CHECK(steps_sent() == steps{2, 3, 4, 5});
  }
  SUBCASE("not if it stood for a while") {
    rest(16'000);
    b.step(worker_events::disconnected{"gone"});
    b.connect(2);
    CHECK(steps_sent().empty());
  }
  SUBCASE("a stop of this process is no time that went by") {
    now_ms += 60'000;
    rest(100);
    b.step(worker_events::disconnected{"gone"});
    b.connect(2);
    CHECK(steps_sent() == steps{2, 3, 4});
  }
  SUBCASE("bounded") {
    for (std::uint64_t step = 5; step < 5 + 2 * worker_machine::retold_steps_max; ++step)
      does(step);
    b.step(worker_events::disconnected{"gone"});
    b.connect(2);
    CHECK(steps_sent().size() == worker_machine::retold_steps_max);
    CHECK(steps_sent().back() == 4 + 2 * worker_machine::retold_steps_max);
    CHECK(b.machine.dropped_reports() == 0);
  }
}

TEST_CASE("the queue of steps is bounded: the oldest go and are counted") {
  bench b;
  b.run();
  b.step(worker_events::disconnected{"gone"});
  progress p{1, 1, 0, {}};
  p.steps.resize(1000);
  for (int i = 0; i < 150; ++i) b.said(p);
  CHECK(b.machine.dropped_reports() == 50'000);
}

TEST_CASE("an older incarnation of the coordinator is left") {
  bench b;
  b.connect(3);
  b.step(worker_events::disconnected{"gone"});
  b.step(worker_events::connected{0});
  b.told(welcome{1, 2, 1000});
  REQUIRE(b.last.size() == 1);
  CHECK(std::holds_alternative<worker_actions::reconnect>(b.last[0]));
  CHECK_FALSE(b.machine.is_welcome());
}

TEST_CASE("a final refusal ends the process, another is tried again") {
  bench b;
  b.step(worker_events::connected{0});
  b.told(refused{"later", false});
  CHECK(b.last.empty());
  b.told(refused{"the name is taken", true});
  REQUIRE(b.last.size() == 1);
  CHECK(std::get<worker_actions::give_up>(b.last[0]).why == "the name is taken");
}

TEST_CASE("a prepare of another job drops the former one first") {
  bench b;
  b.run();
  b.told(prepare{2, 1});
  REQUIRE(b.last.size() == 2);
  CHECK(b.trainer_told<stop_stage>().size() == 1);
  CHECK(b.trainer_told<prepare>().size() == 1);
  CHECK(b.machine.job() == 2);
  CHECK(b.machine.generation() == 0);
}

TEST_CASE("stop_stage of another job is ignored") {
  bench b;
  b.run();
  b.told(stop_stage{9, "?"});
  CHECK(b.machine.phase() == worker_phase::running);
  b.told(stop_stage{1, "done"});
  CHECK(b.trainer_told<stop_stage>().size() == 1);
  CHECK(b.machine.phase() == worker_phase::idle);
}

TEST_CASE("resume goes on from a hold, once") {
  bench b;
  b.run();
  b.said(held{1, 1, 5});
  CHECK(b.machine.phase() == worker_phase::held);
  b.told(resume_stage{1, 1});
  CHECK(b.trainer_told<resume_stage>().size() == 1);
  b.told(resume_stage{1, 1});
  CHECK(b.last.empty());
}

TEST_CASE("a worker greets with what is not trusted, and its deputy builds on no such checkpoint") {
  bench b;
  b.run();
  b.told(checkpoint_durable{1, 20, 1281, 1020});
  part_saved part;
  part.job = 1;
  part.generation = 1;
  part.step = 20;
  b.said(part);
  prepare rollback{1, 1002};
  rollback.distrusted.fence = 1002;
  rollback.distrusted.step = 10;
  b.told(rollback);
  b.step(worker_events::disconnected{});
  b.step(worker_events::connected{20});
  const auto greetings = b.sent<hello>();
  REQUIRE(greetings.size() == 1);
  CHECK(greetings[0].distrusted == rollback.distrusted);
  b.told(welcome{1, 2, 1000});
  CHECK(b.sent<part_saved>().empty());
  b.told(stop_stage{1, "done"});
  b.step(worker_events::connected{0});
  CHECK(b.sent<hello>().at(0).distrusted.fence == 0);
}
