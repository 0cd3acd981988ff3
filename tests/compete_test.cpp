// Jobs that compete for workers: the coordinator's machine with hands that play the workers.
#include <doctest/doctest.h>

#include "tests/machine_test_support.hpp"

using namespace stagecoach;
using namespace stagecoach::test;

namespace {

/// Workers answer at once: a prepare with nothing held, a commit with ready, orders when told to.
struct bench {
  bench() : machine(restored_records{}, "/checkpoints", detection{}, {10'000, 100'000, {}}) {
    (void)machine.start();
    tick(0);
  }
  void carry_out(std::vector<action> out) {
    for (action& a : out) {
      if (auto* s = std::get_if<actions::send>(&a)) inbox.push_back({s->worker, s->message});
      if (auto* n = std::get_if<actions::note>(&a)) notes.push_back(n->record);
      if (auto* m = std::get_if<actions::write_manifest>(&a)) manifests.push_back(*m);
      if (auto* f = std::get_if<actions::find_checkpoint>(&a)) lookups.push_back(*f);
    }
  }
  void step(const event& e) { carry_out(machine.step(e)); }
  void say(worker_id w, to_coordinator m) {
    step(events::worker_said{static_cast<connection_id>(value(w)), std::move(m)});
  }
  /// Time passes; everybody is heard.
  void tick(std::int64_t ms) {
    for (std::int64_t left = ms;; left -= 500) {
      now += std::clamp<std::int64_t>(left, 0, 500);
      for (std::uint64_t w = 1; w <= attached; ++w) say(test::w(w), beat{});
      step(events::tick{now, now});
      if (left <= 500) break;
    }
    answer();
  }
  void attach(int count) {
    for (int i = 0; i < count; ++i) {
      hello h;
      h.name = fmt::format("w{}", ++attached);
      h.process = "p" + h.name;
      h.host = "h";
      h.device = "cpu";
      h.device_class = "c";
      step(events::worker_attached{static_cast<connection_id>(attached), h});
    }
    answer();
  }
  void answer() {
    while (!inbox.empty()) {
      auto [w, message] = std::move(inbox.front());
      inbox.erase(inbox.begin());
      if (auto* p = std::get_if<prepare>(&message)) {
        prepared a;
        a.job = p->job;
        a.number = p->number;
        if (held.count(w) != 0 && held.at(w).job == p->job) {
          a.has_state = true;
          a.step = held.at(w).step;
          a.chain = a.step;
          a.tensors = held.at(w).tensors;
          vote_result v;
          v.step = v.chain = a.step;
          a.last_vote = v;
        }
        say(w, a);
      } else if (auto* c = std::get_if<commit>(&message)) {
        state s{value(c->shape.job), c->step, {}};
        for (std::size_t rank = 0; rank < c->shape.members.size(); ++rank) {
          if (c->shape.members[rank].worker != w) continue;
          const auto stage = static_cast<std::size_t>(c->shape.stage_of(static_cast<int>(rank)));
          s.tensors = stage_tensor_names(c->spec.model, c->shape.shape.unit_cuts[stage],
                                         c->shape.shape.unit_cuts[stage + 1]);
        }
        held[w] = s;
        say(w, ready{value(c->shape.job), c->shape.generation, plan_hash(c->shape), c->step, ""});
      } else if (auto* o = std::get_if<give_order>(&message)) {
        orders.push_back(*o);
      } else if (std::holds_alternative<stop_stage>(message)) {
        held.erase(w);
      }
    }
  }
  job_id submit(const std::string& name, int priority, int least, int most) {
    job_spec s = small_spec(least, most);
    s.name = name;
    s.priority = priority;
    step(events::submit_job{s, "", reply_id{1}});
    step(events::tick{now, now});
    answer();
    return *machine.find_job(name);
  }
  /// All members hold after `at`, with a checkpoint of it if one was ordered.
  void hold(job_id job, std::uint64_t at) {
    const plan p = machine.jobs().at(job).generation()->shape;
    bool is_save = false;
    for (const give_order& o : orders)
      is_save = is_save || (o.with & order_bit(order_kind::save)) != 0;
    orders.clear();
    for (const plan_member& m : p.members) held[m.worker].step = at;
    for (int rank = 0; is_save && rank < p.shape.stage_count; ++rank) {
      part_saved x;
      x.job = value(job);
      x.generation = p.generation;
      x.plan_hash = plan_hash(p);
      x.step = x.chain = at;
      x.part_count = p.shape.stage_count;
      x.part.file = fmt::format("{}-{}", at, rank);
      x.part.tensors = held[p.members[static_cast<std::size_t>(rank)].worker].tensors;
      if (rank > 0) std::erase(x.part.tensors, "wte.weight");
      x.part.weights_hash = "00000000000000010000000000000001";
      say(p.members[static_cast<std::size_t>(rank)].worker, x);
    }
    for (const auto& m : std::exchange(manifests, {}))
      step(manifest_written{job, m.step, true, ""});
    for (const plan_member& m : p.members) say(m.worker, held_at(job, p, at));
    answer();
    step(events::tick{now, now});
    answer();
  }
  static stagecoach::held held_at(job_id job, const plan& p, std::uint64_t at) {
    return {value(job), p.generation, at};
  }
  std::string state_of(job_id id) const { return machine.job(id)->state; }
  int workers_of(job_id id) const { return machine.job(id)->workers; }
  int count(const std::string& kind) const {
    return static_cast<int>(
        std::count_if(notes.begin(), notes.end(), [&](const auto& n) { return n.kind == kind; }));
  }

  struct state {
    std::uint64_t job = 0, step = 0;
    std::vector<std::string> tensors;
  };
  cluster_machine machine;
  std::vector<std::pair<worker_id, to_worker>> inbox;
  std::vector<event_record> notes;
  std::vector<actions::write_manifest> manifests;
  std::vector<actions::find_checkpoint> lookups;
  std::vector<give_order> orders;
  std::map<worker_id, state> held;
  std::uint64_t attached = 0;
  std::int64_t now = 1000;
};

}  // namespace

TEST_CASE("a higher job first shrinks an elastic one, at a step boundary and without a save") {
  bench b;
  b.attach(4);
  const job_id low = b.submit("low", 0, 1, 4);
  REQUIRE(b.state_of(low) == "RUNNING");
  REQUIRE(b.workers_of(low) == 4);
  const auto generation = b.machine.job(low)->generation;
  const job_id high = b.submit("high", 5, 2, 2);
  CHECK(b.count("preemption") == 0);  // low runs too short
  CHECK(b.machine.why(high).find("until low may give workers") != std::string::npos);
  b.tick(10'000);
  CHECK(b.count("preemption") == 1);
  CHECK(b.count("shrink_ordered") == 1);
  CHECK(b.state_of(high) == "PENDING");
  REQUIRE(b.orders.size() == 1);  // replicas hold everything: nothing is saved
  CHECK(b.orders[0].kind == static_cast<int>(order_kind::hold));
  b.hold(low, 7);
  CHECK(b.machine.job(low)->generation == generation + 1);
  CHECK(b.machine.jobs().at(low).generation()->step == 7);
  CHECK(b.workers_of(low) == 2);
  CHECK(b.state_of(high) == "RUNNING");
  SUBCASE("it grows again when the other has ended") {
    b.step(events::cancel_job{high, true, reply_id{1}});
    b.tick(1'000);
    b.hold(low, 9);
    CHECK(b.workers_of(low) == 4);
  }
}

TEST_CASE("then whole jobs go, with a checkpoint, and come back by themselves in their old place") {
  bench b;
  b.attach(3);
  const job_id low = b.submit("low", 0, 2, 3);
  b.tick(11'000);
  const job_id high = b.submit("high", 5, 3, 3);
  CHECK(b.count("preemption_ordered") == 1);
  CHECK(b.count("shrink_ordered") == 0);
  REQUIRE(b.orders.size() == 1);
  CHECK(b.orders[0].with == order_bit(order_kind::save));
  b.hold(low, 8);
  CHECK(b.state_of(low) == "PENDING");
  CHECK(b.machine.job(low)->reason.find("preempted by high (priority 5)") == 0);
  CHECK(b.state_of(high) == "RUNNING");
  const job_id later = b.submit("later", 0, 2, 2);
  CHECK(b.machine.job(low)->queue == 1);
  CHECK(b.machine.job(later)->queue == 2);
  b.step(events::cancel_job{high, true, reply_id{1}});
  b.tick(100);
  REQUIRE(b.lookups.size() == 1);
  CHECK(b.lookups[0].job == low);
  CHECK(b.state_of(later) == "PENDING");
}

TEST_CASE("no victim is touched unless the new gang then fits") {
  bench b;
  b.attach(3);
  const job_id low = b.submit("low", 0, 1, 2), equal = b.submit("equal", 5, 1, 1);
  b.tick(11'000);
  const job_id high = b.submit("high", 5, 3, 3);
  b.tick(20'000);
  CHECK(b.count("preemption") == 0);  // two of low and none of equal make two
  CHECK(b.state_of(low) == "RUNNING");
  CHECK(b.state_of(equal) == "RUNNING");
  CHECK(b.machine.why(high).find("until jobs that are not below it end") != std::string::npos);
  SUBCASE("its priority is raised: now it fits") {
    b.step(events::set_priority{high, 6, reply_id{1}});
    b.tick(100);
    CHECK(b.count("preemption_ordered") == 2);
  }
  SUBCASE("free workers and victims are counted together") {
    b.attach(1);
    b.tick(100);
    CHECK(b.count("preemption_ordered") + b.count("shrink_ordered") == 1);
  }
}

TEST_CASE("victims are the lowest, then the youngest, and no more of them than needed") {
  bench b;
  b.attach(4);
  const job_id a = b.submit("a", 1, 1, 1), c = b.submit("c", 0, 1, 1), d = b.submit("d", 0, 1, 1),
               e = b.submit("e", 2, 1, 1);
  b.tick(11'000);
  b.submit("high", 5, 1, 1);
  CHECK(b.count("preemption_ordered") == 1);
  CHECK_FALSE(b.machine.jobs().at(d).yielding().empty());
  for (const job_id spared : {a, c, e}) CHECK(b.machine.jobs().at(spared).yielding().empty());
}

TEST_CASE("a waiting gang is not starved by later small jobs") {
  bench b;
  b.attach(2);
  const job_id first = b.submit("first", 0, 1, 1);
  const job_id big = b.submit("big", 0, 2, 2);
  SUBCASE("equal ones do not start on the worker that is kept for it") {
    const job_id small = b.submit("small", 0, 1, 1);
    CHECK(b.state_of(small) == "PENDING");
    b.step(events::cancel_job{first, true, reply_id{1}});
    b.tick(100);
    CHECK(b.state_of(big) == "RUNNING");
  }
  SUBCASE("a lower one does, and gives it back") {
    const job_id small = b.submit("small", -1, 1, 1);
    CHECK(b.state_of(small) == "RUNNING");
    b.tick(11'000);
    b.step(events::cancel_job{first, true, reply_id{1}});
    b.tick(100);
    CHECK_FALSE(b.machine.jobs().at(small).yielding().empty());
  }
  SUBCASE("where the gang needs more workers than there are, nothing is kept") {
    b.step(events::cancel_job{big, true, reply_id{1}});
    b.submit("huge", 0, 3, 3);
    CHECK(b.state_of(b.submit("small", 0, 1, 1)) == "RUNNING");
  }
}

TEST_CASE("waiting moves a job up, and lets it shrink but not suspend") {
  bench b;
  b.attach(2);
  const job_id elastic = b.submit("elastic", 0, 1, 2);
  b.tick(11'000);
  const job_id other = b.submit("other", 0, 1, 1);
  b.tick(80'000);
  CHECK(b.count("preemption") == 0);  // equal takes nothing
  b.tick(30'000);                     // age_step is 100 s here
  CHECK(b.count("shrink_ordered") == 1);
  b.hold(elastic, 5);
  CHECK(b.state_of(other) == "RUNNING");
  const job_id third = b.submit("third", 0, 1, 1);
  b.tick(250'000);
  CHECK(b.count("preemption_ordered") == 0);
  CHECK(b.machine.why(third).find("priority 0 + 2 for its waiting") != std::string::npos);
}

TEST_CASE("who waited went away: the victim keeps its workers") {
  bench b;
  b.attach(2);
  const job_id low = b.submit("low", 0, 1, 2);
  b.tick(11'000);
  const job_id high = b.submit("high", 5, 1, 1);
  REQUIRE_FALSE(b.machine.jobs().at(low).yielding().empty());
  b.step(events::cancel_job{high, true, reply_id{1}});
  b.tick(100);
  CHECK(b.count("yield_withdrawn") == 1);
  b.hold(low, 4);
  CHECK(b.workers_of(low) == 2);
  CHECK(b.state_of(low) == "RUNNING");
}

TEST_CASE("a changed priority survives a restart of the coordinator") {
  bench b;
  const job_id job = b.submit("one", 3, 1, 1);
  b.step(events::set_priority{job, 9, reply_id{1}});
  restored_records rows;
  rows.jobs[job].record = b.machine.jobs().at(job).record();
  CHECK(cluster_machine(rows).job(job)->priority == 9);
  CHECK(rows.jobs[job].record.spec.priority == 3);  // part of what the job is
}

TEST_CASE("what was taken for a job is not another's that runs and takes more") {
  // Found by: stagecoach_sim --seed 38291.
  bench b;
  b.attach(2);
  const job_id low = b.submit("low", 0, 2, 2);
  b.attach(1);
  const job_id high = b.submit("high", 5, 1, 3);
  REQUIRE(b.state_of(high) == "RUNNING");
  b.tick(11'000);
  const job_id middle = b.submit("middle", 1, 2, 2);
  REQUIRE(b.count("preemption_ordered") == 1);
  // It is between two generations, and would use two more workers.
  b.say(w(3), failed{value(high), 1, to_string(errc::unreachable), "a link broke", false});
  b.hold(low, 8);
  CHECK(b.workers_of(high) == 1);
  CHECK(b.state_of(middle) == "RUNNING");
}

TEST_CASE("what was taken for a job is not kept for a gang that its waiting lets rise past") {
  // Found by: stagecoach_sim --seed 38360.
  bench b;
  b.attach(4);
  const job_id low = b.submit("low", 2, 1, 4);
  b.tick(11'000);
  const job_id gang = b.submit("gang", 1, 4, 4);
  b.tick(199'000);
  const job_id small = b.submit("small", 3, 1, 1);
  REQUIRE(b.count("shrink_ordered") == 1);
  b.tick(3'000);
  REQUIRE(b.machine.job(gang)->queue == 1);
  CHECK(b.count("yield_withdrawn") == 0);
  b.hold(low, 7);
  CHECK(b.state_of(small) == "RUNNING");
}

TEST_CASE("a job whose workers a higher one waits to take is no lower one's victim") {
  // Found by: stagecoach_sim --seed 6404.
  bench b;
  b.attach(4);
  const job_id elastic = b.submit("elastic", 0, 1, 3);
  b.submit("other", 0, 1, 1);
  b.tick(11'000);
  b.submit("small", 1, 1, 1);
  REQUIRE(b.count("shrink_ordered") == 1);
  b.submit("high", 2, 4, 4);
  b.hold(elastic, 7);
  b.tick(1'000);
  const auto took_for = [&b](const char* name) {
    return std::count_if(b.notes.begin(), b.notes.end(), [name](const event_record& n) {
      return n.kind == "preemption" && n.fields.at("name") == name;
    });
  };
  CHECK(took_for("high") == 1);
  CHECK(took_for("small") == 1);
}
