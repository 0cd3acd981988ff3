// Who is lost, and who is not: coordinator/job_watch.cpp.
#include <doctest/doctest.h>

#include "tests/job_bench.hpp"

using namespace stagecoach;
using namespace stagecoach::test;

namespace {

job_spec replicas(int count) {
  job_spec s = small_spec(1, count);
  s.parallelism.is_explicit = true;
  s.parallelism.stages = 1;
  s.parallelism.replicas = count;
  return s;
}

/// Three replicas that run: workers 1, 2, 3.
bench three() {
  bench b(replicas(3));
  b.give({1, 2, 3});
  for (const std::uint64_t n : {1, 2, 3}) b.answer(n, 1);
  for (const std::uint64_t n : {1, 2, 3}) b.load(n);
  REQUIRE(b.machine.state() == job_state::running);
  return b;
}

/// Time in which these beat and nobody else is heard.
void pass(bench& b, std::int64_t ms, std::vector<std::uint64_t> beating) {
  for (std::int64_t t = 0; t < ms; t += 100) {
    if (t % 1000 == 0) b.beats(beating);
    b.tick(100);
  }
}

std::vector<std::uint64_t> released(const std::vector<action>& actions) {
  std::vector<std::uint64_t> ids;
  for (const auto& r : all_of<actions::release>(actions)) ids.push_back(value(r.worker));
  return ids;
}

}  // namespace

TEST_CASE("a killed worker: one closed socket, one question, and the next prepare goes out") {
  bench b = three();
  const auto asked = b.step(job_events::worker_disconnected{w(2), "reset"});
  const auto probes = sent<probe>(asked);
  REQUIRE(probes.size() == 1);
  CHECK(value(probes[0].first) == 1);
  CHECK(value(probes[0].second.peer.worker) == 2);
  CHECK(probes[0].second.peer.process == "p2");
  CHECK(probes[0].second.peer.link_port == 4000);
  CHECK(b.machine.state() == job_state::running);
  const auto lost = b.find(2, "gone");
  CHECK(released(lost) == std::vector<std::uint64_t>{2});
  CHECK(sent<prepare>(lost).size() == 2);
  CHECK(has_note(lost, "worker_lost"));
}

TEST_CASE("a closed link asks too, and a member that is not the accuser is asked first") {
  bench b = three();
  const auto probes = sent<probe>(b.say(1, peer_report{1, 1, 2, "lost", "reset"}));
  REQUIRE(probes.size() == 1);
  CHECK(value(probes[0].first) == 3);
  CHECK(released(b.find(2, "gone")) == std::vector<std::uint64_t>{2});
}

TEST_CASE("a stopped worker: a peer's suspicion and a witness's silence evict it, in 1.5 s") {
  bench b = three();
  pass(b, 1000, {1, 2, 3});
  pass(b, 1000, {1, 3});  // 2 stands since its last beat
  const std::int64_t suspected = b.now;
  CHECK(sent<probe>(b.say(1, peer_report{1, 1, 2, "suspected", "silent"})).size() == 1);
  CHECK(sent<probe>(b.say(3, peer_report{1, 1, 2, "suspected", "silent"})).empty());
  b.tick(300);
  const auto lost = b.find(2, "silent");
  CHECK(released(lost) == std::vector<std::uint64_t>{2});
  CHECK(sent<prepare>(lost).size() == 2);
  CHECK(b.now - suspected == 300);
}

TEST_CASE("two members: the accuser is the witness, and late beats are the second sign") {
  bench b(replicas(2));
  b.start();
  b.save_step(0, 1000);
  pass(b, 1000, {1, 2});
  CHECK(sent<probe>(b.say(1, peer_report{1, 1, 2, "suspected", "silent"})).size() == 1);
  SUBCASE("no beat either: lost") {
    b.tick(300);
    CHECK(released(b.find(2, "silent")).empty());  // its beat is 1.3 s old
    CHECK(released(b.tick(100)) == std::vector<std::uint64_t>{2});
  }
  SUBCASE("it beats: the link is at fault, nobody is evicted") {
    b.tick(300);
    b.find(2, "silent");
    b.beats({2});
    b.tick(1000);
    b.find(2, "silent");  // asked again after a second
    auto all = b.tick(100);
    CHECK(has_note(all, "generation_failed"));
    b.beats({1, 2});
    for (action& a : b.tick(300)) all.push_back(std::move(a));
    CHECK(released(all).empty());
    CHECK(sent<prepare>(all).size() == 2);
  }
}

TEST_CASE("a cut link between two that reach a third: the generation ends, nobody is evicted") {
  bench b = three();
  b.beats({1, 2, 3});
  b.say(1, peer_report{1, 1, 2, "suspected", "silent"});
  b.say(2, peer_report{1, 1, 1, "suspected", "silent"});
  CHECK(b.witnesses.at(1) == 3);
  CHECK(b.witnesses.at(2) == 3);
  b.find(1, "alive");
  b.find(2, "alive");
  CHECK(b.machine.state() == job_state::running);  // it may send again in a moment
  b.tick(200);
  SUBCASE("it stays silent") {
    auto all = b.tick(100);
    CHECK(has_note(all, "generation_failed"));
    for (action& a : b.tick(200)) all.push_back(std::move(a));
    CHECK(sent<prepare>(all).size() == 3);
    CHECK(released(all).empty());
  }
  SUBCASE("it recovers") {
    b.say(1, peer_report{1, 1, 2, "recovered", ""});
    b.say(2, peer_report{1, 1, 1, "recovered", ""});
    pass(b, 5000, {1, 2, 3});
    CHECK(b.machine.state() == job_state::running);
  }
}

TEST_CASE("a link that closed between two living workers ends the generation at once") {
  bench b = three();
  b.say(1, peer_report{1, 1, 2, "lost", "reset"});
  const auto failed = b.find(2, "alive");
  CHECK(has_note(failed, "generation_failed"));
  CHECK(released(failed).empty());
}

TEST_CASE("one that is cut off from all others is lost, though it accuses them") {
  bench b = three();
  b.beats({1, 2, 3});
  b.say(2, peer_report{1, 1, 1, "suspected", "silent"});
  b.say(2, peer_report{1, 1, 3, "suspected", "silent"});
  b.say(1, peer_report{1, 1, 2, "suspected", "silent"});
  b.say(3, peer_report{1, 1, 2, "suspected", "silent"});
  CHECK(b.witnesses.at(1) == 3);
  CHECK(b.witnesses.at(3) == 1);
  b.find(1, "alive");
  b.find(3, "alive");
  b.tick(300);
  // 1 says it, and 3's link is silent as well: two signs, while its beats still come.
  CHECK(released(b.find(2, "silent")) == std::vector<std::uint64_t>{2});
}

TEST_CASE("a lost control socket does not evict while its process answers") {
  bench b(two_stages());
  b.start();
  b.disconnect(2);
  for (int i = 0; i < 60; ++i) {
    if (b.machine.state() == job_state::running) b.find(2, "alive");
    pass(b, 1000, {1});
  }
  CHECK(b.machine.state() == job_state::running);
  SUBCASE("then it dies: the link closes, and the next answer is another") {
    b.find(2, "alive");  // an answer from just before is no answer to the new question
    b.step(job_events::worker_said{w(1), peer_report{1, 1, 2, "lost", "reset"}});
    CHECK(b.machine.state() == job_state::running);
    CHECK(released(b.find(2, "gone")) == std::vector<std::uint64_t>{2});
  }
  SUBCASE("five minutes on it is given up: orders and saves wait for it") {
    for (int i = 0; i < 241; ++i) {
      if (b.machine.state() == job_state::running) b.find(2, "alive");
      pass(b, 1000, {1});
    }
    CHECK(b.machine.state() == job_state::recovering);
  }
}

TEST_CASE("missed beats alone make somebody ask; a process that answers stays") {
  bench b = three();
  pass(b, 2400, {1, 3});
  CHECK(b.witnesses.count(2) == 0);
  pass(b, 200, {1, 3});
  REQUIRE(b.witnesses.at(2) == 1);
  SUBCASE("alive") {
    b.find(2, "alive");
    pass(b, 900, {1, 3});
    CHECK(b.machine.state() == job_state::running);
  }
  SUBCASE("silent: no beat and no answer are two signs") {
    CHECK(released(b.find(2, "silent")) == std::vector<std::uint64_t>{2});
  }
}

TEST_CASE("where no member can be asked a worker without a job is") {
  bench b(small_spec(1, 1));
  b.give({1});
  b.answer(1, 1);
  b.load(1);
  const auto sought =
      all_of<actions::seek_witness>(b.step(job_events::worker_disconnected{w(1), "reset"}));
  REQUIRE(sought.size() == 1);
  CHECK(value(sought[0].question.peer.worker) == 1);
  SUBCASE("gone: at once, not after its grace") {
    const auto lost = b.say(9, probed{1, 1, 1, "gone", "refused"});
    CHECK(released(lost) == std::vector<std::uint64_t>{1});
  }
  SUBCASE("alive: the control socket alone is lost") {
    b.say(9, probed{1, 1, 1, "alive", ""});
    for (int i = 0; i < 4; ++i) {
      pass(b, 1000, {});
      b.say(9, probed{1, 1, 1, "alive", ""});
    }
    CHECK(b.machine.state() == job_state::running);
  }
  SUBCASE("nobody answers: its grace") {
    pass(b, 2900, {});
    CHECK(b.machine.state() == job_state::running);
    pass(b, 200, {});
    CHECK(b.machine.state() == job_state::recovering);
  }
}

TEST_CASE("the cluster lets a free worker be the witness") {
  cluster_machine c(restored_records{});
  (void)c.start();
  (void)c.step(events::tick{0, 0});
  for (const std::uint64_t n : {1, 2}) {
    hello h;
    h.name = fmt::format("w{}", n);
    h.process = fmt::format("p{}", n);
    h.device = "cpu";
    h.link_host = "h";
    h.link_port = 4000;
    (void)c.step(events::worker_attached{static_cast<connection_id>(n), h});
  }
  const auto asked = sent<prepare>(c.step(events::submit_job{small_spec(1, 1), "", reply_id{}}));
  REQUIRE(asked.size() == 1);
  const std::uint64_t member = value(asked[0].first), spare = 3 - member;
  const auto connection = [](std::uint64_t n) { return static_cast<connection_id>(n); };
  const auto probes = sent<probe>(c.step(events::worker_detached{connection(member), "reset"}));
  REQUIRE(probes.size() == 1);
  CHECK(value(probes[0].first) == spare);
  const auto lost =
      c.step(events::worker_said{connection(spare), probed{1, 1, member, "gone", "refused"}});
  CHECK(has_note(lost, "worker_lost"));
}

TEST_CASE("a witness that does not answer is replaced, and its late word is dropped") {
  bench b = three();
  b.disconnect(2);
  CHECK(b.witnesses.at(2) == 1);
  pass(b, 700, {1, 3});
  CHECK(b.witnesses.at(2) == 1);
  pass(b, 200, {1, 3});
  CHECK(b.witnesses.at(2) == 3);
  b.say(1, probed{1, 1, 2, "gone", "late"});
  CHECK(b.machine.state() == job_state::running);
  CHECK(b.machine.view().stale_messages == 1);
  b.say(3, probed{1, 1, 2, "whatever", ""});
  CHECK(b.machine.state() == job_state::running);
  b.find(2, "gone");
  CHECK(b.machine.state() == job_state::recovering);
}

TEST_CASE("what the coordinator slept through evicts nobody") {
  cluster_machine c(restored_records{});
  (void)c.start();
  (void)c.step(events::tick{0, 0});
  (void)c.step(events::submit_job{replicas(2), "", reply_id{}});
  std::int64_t now = 0;
  const auto say = [&](std::uint64_t n, to_coordinator m) {
    return c.step(events::worker_said{static_cast<connection_id>(n), std::move(m)});
  };
  for (const std::uint64_t n : {1, 2}) {
    hello h;
    h.name = fmt::format("w{}", n);
    h.process = fmt::format("p{}", n);
    h.device = "cpu";
    h.link_host = "h";
    h.link_port = 4000;
    (void)c.step(events::worker_attached{static_cast<connection_id>(n), h});
  }
  (void)c.step(events::tick{now += 100, 0});
  for (const std::uint64_t n : {1, 2}) {
    prepared p;
    p.job = p.number = 1;
    (void)say(n, p);
  }
  const auto& job = c.jobs().begin()->second;
  REQUIRE_MESSAGE(job.generation(), c.why(job.id()));
  const std::uint64_t hash = plan_hash(job.generation()->shape);
  for (const std::uint64_t n : {1, 2}) (void)say(n, ready{1, 1, hash, 0, ""});
  REQUIRE(job.state() == job_state::running);
  for (int i = 0; i < 20; ++i) {
    (void)c.step(events::tick{now += 60'000, 0});  // it slept for a minute; then the mail is read
    for (const std::uint64_t n : {1, 2}) (void)say(n, beat{1, 1, 0, 4});
  }
  CHECK(job.state() == job_state::running);
  CHECK(job.generation()->shape.generation == 1);
}

TEST_CASE("after a restart, who is known dead is not waited for") {
  restored_job r;
  {
    bench first(replicas(3));
    first.give({1, 2, 3});
    for (const std::uint64_t n : {1, 2, 3}) first.answer(n, 1);
    r.record = first.machine.record();
    r.generation = first.machine.generation();
  }
  bench b(r);
  b.step(job_events::tick{b.now, b.now});
  CHECK(b.machine.state() == job_state::running);
  const auto back = [&](std::uint64_t n) {
    hello h;
    h.job = 1;
    h.generation = 1;
    h.plan_hash = b.hash();
    h.phase = static_cast<int>(worker_phase::running);
    h.process = fmt::format("p{}", n);
    return b.step(job_events::worker_connected{w(n), h});
  };
  back(1);
  REQUIRE(b.witnesses.at(2) == 1);
  REQUIRE(b.witnesses.at(3) == 1);
  b.find(2, "gone");
  b.find(3, "alive");
  pass(b, 500, {1});
  CHECK(b.machine.phase_name() == std::string("adopting"));
  back(3);
  CHECK(b.machine.phase_name() == std::string("preparing"));
}

TEST_CASE("a single worker whose connection closed is lost after its grace, and still waited for") {
  job_spec s = small_spec(1, 1);
  bench b(s);
  b.give({1});
  b.answer(1, 1);
  b.load(1);
  b.disconnect(1);
  b.tick(2900);
  CHECK(b.machine.state() == job_state::running);
  const auto lost = b.tick(200);
  CHECK(all_of<actions::release>(lost).size() == 1);
  CHECK(b.machine.state() == job_state::recovering);
  CHECK(b.machine.expects(static_cast<worker_id>(1)));  // it may be alive and hold the newest step
  b.tick(9'900);
  CHECK(b.machine.state() == job_state::recovering);
  b.tick(200);
  CHECK(b.machine.state() == job_state::pending);
}

TEST_CASE("where witnesses do not answer, a frozen member is lost after three seconds, or ten") {
  bench b(two_stages());
  b.start();
  SUBCASE("suspected") {
    b.say(1, peer_report{1, 1, 2, "suspected", "silent"});
    for (int i = 0; i < 29; ++i) {
      b.beats({1});
      b.tick(100);
    }
    CHECK(b.machine.state() == job_state::running);
    b.beats({1});
    b.tick(150);
    CHECK(b.machine.state() == job_state::recovering);
  }
  SUBCASE("recovered in time") {
    b.say(1, peer_report{1, 1, 2, "suspected", "silent"});
    b.say(1, peer_report{1, 1, 2, "recovered", ""});
    for (int i = 0; i < 40; ++i) {
      b.beats({1});
      b.tick(100);
    }
    CHECK(b.machine.state() == job_state::running);
  }
  SUBCASE("by silence alone") {
    for (int i = 0; i < 99; ++i) {
      b.beats({1});
      b.tick(100);
    }
    CHECK(b.machine.state() == job_state::running);
    b.beats({1});
    b.tick(150);
    CHECK(b.machine.state() == job_state::recovering);
  }
}

namespace {

/// A beat of a member whose trainer has been at this for so long.
void beat_at(bench& b, std::uint64_t n, trainer_activity what, std::int64_t stands_ms,
             std::uint64_t waits_for = 0) {
  beat x{1, b.generation(), 0, static_cast<int>(worker_phase::running)};
  x.activity = static_cast<int>(what);
  x.stands_ms = stands_ms;
  x.waits_for = waits_for;
  b.say(n, x);
}

/// Steps of this length were reported.
void report_steps(bench& b, std::int64_t step_ms) {
  progress p{1, b.generation(), b.hash(), {}};
  for (std::uint64_t step = 1; step <= 5; ++step) {
    step_report r;
    r.step = step;
    r.chain = step;
    r.step_us = step == 3 ? 60'000'000 : 1000 * step_ms;  // one outlier
    p.steps.push_back(r);
  }
  b.say(b.worker_at(0), p);
}

constexpr auto compute = trainer_activity::compute, wait = trainer_activity::wait;

}  // namespace

TEST_CASE("a trainer that stands in one instruction is stuck at its bound, and given up") {
  bench b = three();
  SUBCASE("2 s where steps are short") {
    report_steps(b, 50);
    beat_at(b, 1, wait, 1900, 3);
    beat_at(b, 3, compute, 1950);
    beat_at(b, 2, wait, 1900, 1);
    CHECK(b.machine.state() == job_state::running);
    beat_at(b, 1, wait, 2100, 3);
    beat_at(b, 2, wait, 2100, 1);
    CHECK(b.machine.state() == job_state::running);  // they wait for 3, who moved by its last word
    beat_at(b, 3, compute, 2000);
    CHECK(released(b.last) == std::vector<std::uint64_t>{3});
    CHECK(sent<prepare>(b.last).size() == 2);
    REQUIRE(sent<stop_stage>(b.last).size() == 1);
    CHECK(value(sent<stop_stage>(b.last)[0].first) == 3);
    CHECK(all_of<actions::release>(b.last)[0].is_lost);
  }
  SUBCASE("five median steps where they are long") {
    report_steps(b, 1000);
    beat_at(b, 3, compute, 4900);
    CHECK(b.machine.state() == job_state::running);
    beat_at(b, 3, compute, 5000);
    CHECK(b.machine.state() == job_state::recovering);
  }
  SUBCASE("a minute before the first step is known") {
    beat_at(b, 3, compute, 59'000);
    CHECK(b.machine.state() == job_state::running);
    beat_at(b, 3, compute, 60'000);
    CHECK(b.machine.state() == job_state::recovering);
  }
}

TEST_CASE("declared phases have no clock") {
  bench b = three();
  report_steps(b, 50);
  for (const auto what :
       {trainer_activity::load, trainer_activity::save, trainer_activity::evaluate}) {
    beat_at(b, 3, what, 100'000);
    beat_at(b, 1, wait, 100'000, 3);
    beat_at(b, 2, wait, 100'000, 1);
    CHECK(b.machine.state() == job_state::running);
  }
}

TEST_CASE("who waits is never the culprit: a circle ends the generation and evicts nobody") {
  bench b = three();
  report_steps(b, 50);
  beat_at(b, 1, wait, 3000, 2);
  beat_at(b, 2, wait, 3000, 3);
  CHECK(b.machine.state() == job_state::running);  // of 3 nothing is known yet
  beat_at(b, 3, wait, 3000, 1);
  CHECK(has_note(b.last, "generation_failed"));
  CHECK(released(b.last).empty());
}

TEST_CASE("a wait for one that does nothing ends the generation") {
  bench b = three();
  report_steps(b, 50);
  beat_at(b, 1, trainer_activity::idle, 1000);
  beat_at(b, 2, wait, 3000, 1);
  CHECK(b.machine.state() == job_state::running);
  beat_at(b, 1, trainer_activity::idle, 3000);
  CHECK(has_note(b.last, "generation_failed"));
  CHECK(released(b.last).empty());
}

TEST_CASE("a new generation starts with clocks of its own") {
  bench b = three();
  report_steps(b, 50);
  beat_at(b, 3, compute, 1900);
  b.disconnect(2);
  b.find(2, "gone");
  const auto tensors = stage_tensor_names(replicas(3).model, 0, 4);
  for (const std::uint64_t n : {1, 3}) b.answer(n, 2, 5, tensors);
  b.tick(100);
  for (const std::uint64_t n : {1, 3}) b.load(n, 5);
  REQUIRE(b.machine.state() == job_state::running);
  beat_at(b, 3, compute, 10'000);  // the first step of this generation is not known
  CHECK(b.machine.state() == job_state::running);
}

TEST_CASE("a worker whose trainer does not come back is not given to a job again") {
  cluster_machine c(restored_records{});
  (void)c.start();
  (void)c.step(events::tick{0, 0});
  hello h;
  h.name = "w1";
  h.process = "p1";
  h.device = "cpu";
  (void)c.step(events::worker_attached{static_cast<connection_id>(1), h});
  beat b;
  b.activity = static_cast<int>(compute);
  b.stands_ms = 2500;
  (void)c.step(events::worker_said{static_cast<connection_id>(1), b});
  (void)c.step(events::submit_job{replicas(1), "", reply_id{}});
  CHECK(sent<prepare>(c.step(events::tick{100, 0})).empty());
  CHECK(c.workers()[0].state == "LOST");
  b.activity = static_cast<int>(trainer_activity::idle);
  (void)c.step(events::worker_said{static_cast<connection_id>(1), b});
  CHECK(sent<prepare>(c.step(events::tick{200, 0})).size() == 1);
}
