#include "coordinator/cluster_machine.hpp"

#include <doctest/doctest.h>

#include "tests/machine_test_support.hpp"

using namespace stagecoach;
using namespace stagecoach::test;

namespace {

connection_id at(std::uint64_t n) { return static_cast<connection_id>(n); }

struct bench {
  bench() {
    (void)machine.start();
    tick(0);
  }
  std::vector<action> step(const event& e) { return last = machine.step(e); }
  std::vector<action> tick(std::int64_t ms) {
    now += ms;
    return step(events::tick{now, now});
  }
  static hello greeting(const std::string& name, const std::string& process = "p") {
    hello h;
    h.name = name;
    h.process = process + name;
    h.host = "h";
    h.device = "cpu";
    h.device_class = "c";
    return h;
  }
  std::vector<action> attach(std::uint64_t connection, const std::string& name) {
    return step(events::worker_attached{at(connection), greeting(name)});
  }
  job_id submit(job_spec spec) {
    const auto out = step(events::submit_job{std::move(spec), "text", static_cast<reply_id>(1)});
    const auto replies = all_of<actions::reply>(out);
    REQUIRE(replies.size() == 1);
    REQUIRE(replies[0].outcome);
    return replies[0].outcome->job;
  }
  /// The worker on connection 1 answers its first prepare and has loaded.
  void begin_alone(job_id job) {
    prepared answer;
    answer.job = value(job);
    answer.number = 1;
    step(events::worker_said{at(1), answer});
    const std::uint64_t hash = plan_hash(machine.jobs().at(job).generation()->shape);
    step(events::worker_said{at(1), ready{value(job), 1, hash, 0, ""}});
  }
  std::string state(job_id id) const { return machine.job(id)->state; }

  cluster_machine machine{restored_records{}, "/state/checkpoints"};
  std::vector<action> last;
  std::int64_t now = 1000;
};

}  // namespace

TEST_CASE("a worker is registered durably before it is welcomed, and keeps its id") {
  bench b;
  const auto first = b.attach(1, "a");
  const auto welcomes = sent<welcome>(first);
  REQUIRE(welcomes.size() == 1);
  CHECK(welcomes[0].second.worker == 1);
  CHECK(welcomes[0].second.incarnation == 1);
  CHECK(place_of<actions::save>(first) < place_of<actions::send>(first));
  b.step(events::worker_detached{at(1), "closed"});
  CHECK(sent<welcome>(b.attach(2, "a"))[0].second.worker == 1);
  SUBCASE("a new process of that name is another worker") {
    b.step(events::worker_detached{at(2), "closed"});
    const auto other = b.step(events::worker_attached{at(3), bench::greeting("a", "q")});
    CHECK(sent<welcome>(other)[0].second.worker == 2);
    CHECK(b.machine.workers().size() == 1);
  }
  SUBCASE("a living worker's name is not given away") {
    const auto other = b.step(events::worker_attached{at(3), bench::greeting("a", "q")});
    REQUIRE(sent<refused>(other).size() == 1);
    CHECK(sent<refused>(other)[0].second.is_final);
    CHECK(all_of<actions::close>(other).size() == 1);
  }
}

TEST_CASE("another protocol version is refused with both versions") {
  bench b;
  hello h = bench::greeting("a");
  h.protocol = 99;
  const auto out = b.step(events::worker_attached{at(1), h});
  REQUIRE(sent<refused>(out).size() == 1);
  CHECK(sent<refused>(out)[0].second.reason.find("speaks protocol 99, this coordinator 1") !=
        std::string::npos);
  CHECK(b.machine.workers().empty());
}

TEST_CASE("a job starts with all of its minimum or not at all") {
  bench b;
  const job_id job = b.submit(small_spec(2, 3));
  CHECK(b.machine.job(job)->stop_steps == 100);
  CHECK(sent<prepare>(b.attach(1, "a")).empty());
  CHECK(b.machine.why(job).find("needs   2 workers to start; 1 are attached, 1 of them are free") !=
        std::string::npos);
  CHECK(sent<prepare>(b.attach(2, "b")).size() == 2);
  CHECK(b.state(job) == "PLANNING");
}

TEST_CASE("a folder for checkpoints is resolved at submit") {
  bench b;
  job_spec s = small_spec();
  s.checkpoint.store.clear();
  const job_id job = b.submit(s);
  CHECK(b.machine.jobs().at(job).record().spec.checkpoint.store == "/state/checkpoints/j-000001");
}

TEST_CASE("the queue goes by priority, then age; who does not fit is passed over") {
  bench b;
  job_spec first = small_spec(1, 1), urgent = small_spec(1, 1), large = small_spec(3, 3);
  first.name = "first";
  urgent.name = "urgent";
  urgent.priority = 5;
  large.name = "large";
  large.priority = 9;
  const job_id a = b.submit(first), c = b.submit(urgent), d = b.submit(large);
  b.attach(1, "a");
  CHECK(b.state(c) == "PLANNING");
  CHECK(b.state(a) == "PENDING");
  CHECK(b.state(d) == "PENDING");
  b.attach(2, "b");
  CHECK(b.state(a) == "PLANNING");
}

TEST_CASE(
    "workers without the labels, of another class or drained are not placed, and why says so") {
  bench b;
  job_spec s = small_spec(1, 1);
  s.labels["zone"] = "x";
  const job_id job = b.submit(s);
  b.attach(1, "a");
  CHECK(b.state(job) == "PENDING");
  CHECK(b.machine.why(job).find("not a: it has no label zone=x") != std::string::npos);
  hello h = bench::greeting("b");
  h.labels["zone"] = "x";
  b.step(events::drain_worker{"b", "fan", static_cast<reply_id>(2)});
  REQUIRE(all_of<actions::reply>(b.last).size() == 1);
  CHECK(all_of<actions::reply>(b.last)[0].outcome.err().code == errc::not_found);
  b.step(events::worker_attached{at(2), h});
  CHECK(b.state(job) == "PLANNING");
}

TEST_CASE("workers of one job share a device class") {
  bench b;
  const job_id job = b.submit(small_spec(2, 2));
  b.attach(1, "a");
  hello h = bench::greeting("b");
  h.device_class = "other";
  b.step(events::worker_attached{at(2), h});
  CHECK(b.state(job) == "PENDING");
  b.attach(3, "c");
  CHECK(b.state(job) == "PLANNING");
}

TEST_CASE("a name that a job uses is a conflict until that job has ended") {
  bench b;
  const job_id job = b.submit(small_spec());
  const auto again = b.step(events::submit_job{small_spec(), "", static_cast<reply_id>(2)});
  CHECK(all_of<actions::reply>(again)[0].outcome.err().code == errc::conflict);
  b.step(events::cancel_job{job, false, static_cast<reply_id>(3)});
  CHECK(b.state(job) == "CANCELLED");
  CHECK(b.submit(small_spec()) != job);
  CHECK(b.machine.find_job("small") == static_cast<job_id>(2));
  CHECK(b.machine.find_job("j-000001") == job);
  CHECK_FALSE(b.machine.find_job("j-9x"));
}

TEST_CASE("a worker that runs a job that is unknown is told to stop") {
  bench b;
  hello h = bench::greeting("a");
  h.job = 77;
  h.generation = 3;
  h.phase = static_cast<int>(worker_phase::running);
  const auto out = b.step(events::worker_attached{at(1), h});
  REQUIRE(sent<stop_stage>(out).size() == 1);
  CHECK(sent<stop_stage>(out)[0].second.job == 77);
}

TEST_CASE("a worker that froze and thaws on the same channel is asked by its job again") {
  // Found by: stagecoach_sim --seed 91: it was told to forget the last copy of ten steps.
  bench b;
  b.attach(1, "a");
  const job_id job = b.submit(small_spec(1, 1));
  b.begin_alone(job);
  for (int i = 0; i < 101; ++i) b.tick(100);
  CHECK(b.state(job) == "RECOVERING");
  const auto back = b.step(
      events::worker_said{at(1), beat{value(job), 1, 5, static_cast<int>(worker_phase::running)}});
  CHECK(sent<stop_stage>(back).empty());
  CHECK(sent<prepare>(back).size() == 1);
}

TEST_CASE("what the coordinator slept through is not the workers' silence") {
  bench b;
  const job_id job = b.submit(small_spec(1, 1));
  b.attach(1, "a");
  prepared answer;
  answer.job = value(job);
  answer.number = 1;
  b.step(events::worker_said{at(1), answer});
  const auto hash = b.machine.job(job)->plan_hash;
  b.step(events::worker_said{at(1), ready{value(job), 1, hash, 0, ""}});
  REQUIRE(b.state(job) == "RUNNING");
  b.tick(60'000);
  CHECK(b.state(job) == "RUNNING");
  for (int i = 0; i < 100; ++i) b.tick(100);
  CHECK(b.state(job) != "RUNNING");
}

TEST_CASE("a coordinator that slept writes first, then lets everybody greet anew") {
  bench b;
  const job_id job = b.submit(small_spec(1, 1));
  b.attach(1, "a");
  SUBCASE("for a moment: nobody has given it up yet") {
    const auto out = b.step(events::woke{1'000});
    CHECK(all_of<actions::save>(out).size() == 1);
    CHECK(all_of<actions::close>(out).empty());
  }
  SUBCASE("for longer than a worker waits") {
    const auto out = b.step(events::woke{9'000});
    CHECK(place_of<actions::save>(out) == 0);
    const auto closed = all_of<actions::close>(out);
    REQUIRE(closed.size() == 1);
    CHECK(closed[0].connection == at(1));
    CHECK(b.machine.job(job)->members[0].state == "disconnected");
  }
}

TEST_CASE(
    "one that was given up and says something is not given to another job while it is sought") {
  // Found by: stagecoach_sim --seed 28468: its part came before its beat, and it dropped its state.
  bench b;
  b.attach(1, "a");
  const job_id job = b.submit(small_spec(1, 1));
  b.begin_alone(job);
  for (int i = 0; i < 101; ++i) b.tick(100);
  REQUIRE(b.state(job) == "RECOVERING");
  job_spec other = small_spec(1, 1);
  other.name = "other";
  const job_id second = b.submit(other);
  part_saved part;
  part.job = value(job);
  part.problem = "disk full";
  for (const auto& [to, x] : sent<prepare>(b.step(events::worker_said{at(1), part})))
    CHECK(x.job != value(second));
  CHECK(b.state(second) == "PENDING");
}

TEST_CASE("a message of a connection that never greeted is dropped and counted") {
  bench b;
  CHECK(b.step(events::worker_said{at(5), beat{}}).empty());
  CHECK(b.machine.dropped_messages() == 1);
}

TEST_CASE("a cluster comes back from its rows with a higher incarnation") {
  bench b;
  const job_id job = b.submit(small_spec(2, 2));
  restored_records rows;
  rows.meta = {1, 2, 2};
  rows.jobs[job].record = b.machine.jobs().at(job).record();
  cluster_machine again(rows);
  const auto begun = again.start();
  CHECK(again.incarnation() == 2);
  CHECK(all_of<actions::save>(begun).size() == 1);
  CHECK(again.job(job)->state == "PENDING");
}
