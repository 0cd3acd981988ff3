// A job machine on a bench, with hands for what workers would say.
#pragma once

#include <doctest/doctest.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "coordinator/job_machine.hpp"
#include "coordinator/wire.hpp"
#include "tests/machine_test_support.hpp"

namespace stagecoach::test {

/// The disk's answer: the newest whole checkpoint is of this step, as bench::save_step made it with
/// chain 1000 + step.
inline checkpoint_found found_at(std::uint64_t step, std::uint64_t request,
                                 std::vector<std::string> skipped = {}) {
  checkpoint_facts facts;
  facts.step = step;
  facts.chain = 1000 + step;
  return {static_cast<job_id>(1), request, facts, std::move(skipped)};
}

/// A job with hands: says what workers would say.
struct bench {
  explicit bench(job_spec spec) : machine(fresh(std::move(spec))) { tick(0); }
  explicit bench(restored_job restored) : machine(std::move(restored)) {}

  static restored_job fresh(job_spec spec) {
    restored_job r;
    r.record.id = static_cast<job_id>(1);
    r.record.spec = std::move(spec);
    return r;
  }
  static worker_facts facts(std::uint64_t n) {
    return {w(n), fmt::format("p{}", n), fmt::format("w{}", n), "h", "127.0.0.1", 4000, "c"};
  }

  std::vector<action> step(const job_event& e) {
    last = machine.step(e);
    for (const auto& [to, q] : sent<probe>(last)) witnesses[value(q.peer.worker)] = value(to);
    return last;
  }
  std::vector<action> tick(std::int64_t ms) {
    now += ms;
    return step(job_events::tick{now, now});
  }
  std::vector<action> give(std::vector<std::uint64_t> ids) {
    job_events::workers_given e;
    for (const auto n : ids) e.workers.push_back(facts(n));
    return step(e);
  }
  /// Where a member's connection and a link to it are closed it is dead: its witness finds it gone.
  std::vector<action> say(std::uint64_t n, to_coordinator m) {
    const auto* report = std::get_if<peer_report>(&m);
    const std::uint64_t dead =
        report && report->what == "lost" && closed.count(report->peer) ? report->peer : 0;
    auto all = step(job_events::worker_said{w(n), std::move(m)});
    if (dead == 0 || witnesses.count(dead) == 0) return all;
    for (action& a : find(dead, "gone")) all.push_back(std::move(a));
    return last = all;
  }
  /// The witness that was asked about a worker says what it found.
  std::vector<action> find(std::uint64_t about, const std::string& verdict) {
    const probed found{1, generation(), about, verdict, verdict == "alive" ? "" : "no answer"};
    return step(job_events::worker_said{w(witnesses.at(about)), found});
  }
  std::vector<action> answer(std::uint64_t n, std::uint64_t number, std::int64_t at_step = -1,
                             std::vector<std::string> tensors = {}) {
    prepared p;
    p.job = 1;
    p.number = number;
    if (at_step >= 0) {
      p.has_state = true;
      p.step = static_cast<std::uint64_t>(at_step);
      p.chain = 1000 + p.step;
      p.tensors = std::move(tensors);
      vote_result v;
      v.step = p.step;
      v.chain = p.chain;
      p.last_vote = v;
    }
    return say(n, p);
  }
  std::uint64_t generation() const { return machine.generation()->shape.generation; }
  std::uint64_t hash() const { return plan_hash(machine.generation()->shape); }
  std::vector<action> load(std::uint64_t n, std::uint64_t at_step = 0) {
    return say(n, ready{1, generation(), hash(), at_step, ""});
  }
  std::vector<std::string> stage(int rank) const {
    const plan& p = machine.generation()->shape;
    const auto s = static_cast<std::size_t>(p.stage_of(rank));
    return stage_tensor_names(machine.record().spec.model, p.shape.unit_cuts[s],
                              p.shape.unit_cuts[s + 1]);
  }
  std::uint64_t worker_at(int rank) const {
    return value(machine.generation()->shape.members[static_cast<std::size_t>(rank)].worker);
  }
  /// Runs on workers 1 and 2 from step 0.
  void start() {
    give({1, 2});
    answer(1, 1);
    answer(2, 1);
    load(1);
    load(2);
    REQUIRE(machine.state() == job_state::running);
  }
  void progress_to(std::uint64_t step_now) {
    progress p{1, generation(), hash(), {}};
    step_report r;
    r.step = step_now;
    r.chain = 1000 + step_now;
    p.steps.push_back(r);
    say(worker_at(0), p);
  }
  void beats(std::vector<std::uint64_t> ids) {
    for (const auto n : ids)
      say(n, beat{1, generation(), 0, static_cast<int>(worker_phase::running)});
  }
  /// Every stage's part of a step, by the replica 0 of each.
  std::vector<action> save_parts(std::uint64_t at_step, std::uint64_t chain) {
    std::vector<action> all;
    const plan& p = machine.generation()->shape;
    for (int rank = 0; rank < p.shape.stage_count; ++rank) {
      part_saved x;
      x.job = 1;
      x.generation = generation();
      x.plan_hash = hash();
      x.step = at_step;
      x.chain = chain;
      x.part_count = p.shape.stage_count;
      x.part.file = fmt::format("g{}-{}-{}", x.generation, at_step, rank);
      x.part.tensors = stage(rank);
      if (rank > 0) std::erase(x.part.tensors, "wte.weight");
      x.part.weights_hash = "00000000000000010000000000000001";
      for (action& a : say(worker_at(rank), x)) all.push_back(std::move(a));
    }
    return all;
  }
  void save_step(std::uint64_t at_step, std::uint64_t chain) {
    const auto manifests = all_of<actions::write_manifest>(save_parts(at_step, chain));
    REQUIRE(manifests.size() == 1);
    step(manifest_written{static_cast<job_id>(1), at_step, true, ""});
  }
  void disconnect(std::uint64_t n) {
    closed.insert(n);
    step(job_events::worker_disconnected{w(n), "closed"});
  }

  job_machine machine;
  std::vector<action> last;
  std::int64_t now = 1000;
  std::set<std::uint64_t> closed;                    // whose connection is
  std::map<std::uint64_t, std::uint64_t> witnesses;  // by the worker they were asked about last
};

}  // namespace stagecoach::test
