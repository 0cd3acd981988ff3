#include "coordinator/job_machine.hpp"

#include <doctest/doctest.h>

#include "coordinator/decision.hpp"
#include "coordinator/wire.hpp"
#include "tests/job_bench.hpp"

using namespace stagecoach;
using namespace stagecoach::test;

TEST_CASE("a first generation is prepared, saved, and only then committed") {
  bench b(two_stages());
  auto asked = b.give({1, 2});
  CHECK(sent<prepare>(asked).size() == 2);
  CHECK(place_of<actions::save>(asked) < place_of<actions::send>(asked));  // the number first
  CHECK(b.machine.state() == job_state::planning);
  CHECK(sent<commit>(b.answer(1, 1)).empty());
  const auto decided = b.answer(2, 1);
  const auto commits = sent<commit>(decided);
  REQUIRE(commits.size() == 2);
  CHECK(commits[0].second.source == source_kind::initial);
  CHECK(commits[0].second.save_at_start);
  const int save = place_of<actions::save>(decided);
  CHECK(save >= 0);
  CHECK(save < place_of<actions::send>(decided));
  CHECK(sent<run_stage>(b.load(1)).empty());
  CHECK(sent<run_stage>(b.load(2)).size() == 2);
  CHECK(b.machine.state() == job_state::running);
}

TEST_CASE("messages of another number, plan or stranger are dropped and counted") {
  bench b(two_stages());
  b.give({1, 2});
  b.answer(1, 1);
  CHECK(b.answer(2, 7).empty());
  b.answer(2, 1);
  CHECK(b.say(1, ready{1, 1, 12345, 0, ""}).empty());
  CHECK(b.say(9, held{1, 1, 0}).empty());
  CHECK(b.machine.view().stale_messages == 3);
  CHECK(b.machine.state() == job_state::planning);
}

TEST_CASE("a frozen member is not told to forget its state, and asked when it is back in time") {
  bench b(two_stages());
  b.start();
  b.progress_to(7);
  for (int i = 0; i < 101; ++i) {
    b.beats({1});
    b.tick(100);
  }
  CHECK(b.machine.state() == job_state::recovering);
  CHECK(sent<stop_stage>(b.last).empty());
  CHECK_FALSE(b.machine.has_worker(w(2)));
  CHECK(b.machine.expects(w(2)));
  const bool is_first = b.worker_at(0) == 1;
  const auto decided = b.answer(1, 2, 7, b.stage(is_first ? 0 : 1));
  CHECK(sent<commit>(decided).empty());  // half the model is in the frozen one
  hello h;
  h.name = "w-2";
  h.process = "p2";
  h.job = 1;
  h.generation = 1;
  h.step = 7;
  const auto back = b.step(job_events::worker_connected{w(2), h});
  CHECK(sent<prepare>(back).size() == 1);
  const auto commits = sent<commit>(b.answer(2, 2, 7, b.stage(is_first ? 1 : 0)));
  REQUIRE(commits.size() == 2);
  CHECK(commits[0].second.source == source_kind::live);
  CHECK(commits[0].second.step == 7);
}

TEST_CASE("nobody has answered yet is not the same as nobody has state") {
  // Found by: stagecoach_sim --seed 122: slow messages, and the job gave its live workers back.
  bench b(two_stages());
  b.start();
  b.progress_to(7);
  b.step(job_events::worker_gone{w(2), "killed"});
  b.tick(2'100);  // the answer of 1 is on its way
  CHECK(b.machine.has_worker(w(1)));
  b.tick(8'000);  // minority_wait
  CHECK(b.machine.state() == job_state::pending);
}

TEST_CASE("a checkpoint that was found damaged is no reason to go below what is held live") {
  // Found by: stagecoach_sim --seed 944.
  job_spec spec = small_spec(1, 1);
  bench b(spec);
  b.give({1});
  b.answer(1, 1);
  b.load(1);
  b.save_step(0, 1000);
  b.progress_to(14);
  b.save_step(12, 1012);
  b.save_step(14, 1014);
  b.step(job_events::worker_gone{w(1), "killed"});
  b.give({2});
  const auto finds = all_of<actions::find_checkpoint>(b.answer(2, b.machine.record().number));
  REQUIRE(finds.size() == 1);
  const auto committed = b.step(found_at(12, finds[0].request, {"step 14 is damaged"}));
  REQUIRE(sent<commit>(committed).size() == 1);
  CHECK(sent<commit>(committed)[0].second.step == 12);
  CHECK(b.machine.checkpoints().rbegin()->first == 12);
}

TEST_CASE("with two replicas a loss goes on live from the newest step, without a checkpoint") {
  job_spec s = small_spec(1, 2);
  s.parallelism.is_explicit = true;
  s.parallelism.stages = 1;
  s.parallelism.replicas = 2;
  bench b(s);
  b.start();
  b.progress_to(20);
  b.disconnect(2);
  b.say(1, peer_report{1, 1, 2, "lost", "reset"});
  const auto decided = b.answer(1, 2, 20, stage_tensor_names(s.model, 0, 4));
  const auto commits = sent<commit>(decided);
  REQUIRE(commits.size() == 1);
  CHECK(commits[0].second.source == source_kind::live);
  CHECK(commits[0].second.step == 20);
  CHECK(all_of<actions::find_checkpoint>(decided).empty());
}

TEST_CASE("a joiner is shown without a place until a plan gives it one") {
  job_spec s = small_spec(1, 3);
  bench b(s);
  b.give({1});
  b.answer(1, 1);
  b.load(1);
  b.give({2});
  const auto members = b.machine.view().members;
  REQUIRE(members.size() == 2);
  CHECK(members[0].stage == 0);
  CHECK(members[0].replica == 0);
  CHECK(members[1].stage == -1);
  CHECK(members[1].state == "joining");
}

TEST_CASE("a stage that nobody holds any more comes from the newest durable checkpoint") {
  bench b(two_stages());
  b.start();
  b.save_step(0, 1000);
  b.progress_to(20);
  b.save_step(15, 1015);
  const auto survivor = b.worker_at(0);
  const auto lost = b.worker_at(1);
  b.disconnect(lost);
  b.say(survivor, peer_report{1, 1, lost, "lost", "reset"});
  b.give({3});
  b.answer(survivor, 2, 20, b.stage(0));
  const auto asked = b.answer(3, 2);
  const auto finds = all_of<actions::find_checkpoint>(asked);
  REQUIRE(finds.size() == 1);
  const auto decided = b.step(found_at(15, finds[0].request, {"step 20 is damaged"}));
  CHECK(has_note(decided, "checkpoint_skipped"));
  const auto commits = sent<commit>(decided);
  REQUIRE(commits.size() == 2);
  CHECK(commits[0].second.source == source_kind::checkpoint);
  CHECK(commits[0].second.step == 15);
  CHECK(commits[0].second.chain == 1015);
}

TEST_CASE("a silent member that may stand at a newer step is waited for, a dead one is not") {
  bench b(two_stages());
  b.start();
  b.save_step(0, 1000);
  b.progress_to(20);
  const auto survivor = b.worker_at(0);
  const auto frozen = b.worker_at(1);
  for (int i = 0; i < 101; ++i) {
    b.beats({survivor});
    b.tick(100);
  }
  REQUIRE(b.machine.state() == job_state::recovering);
  b.give({3});
  b.answer(3, 2);
  const auto asked = b.answer(survivor, 2, 20, b.stage(0));
  const auto finds = all_of<actions::find_checkpoint>(asked);
  REQUIRE(finds.size() == 1);
  checkpoint_facts facts;
  const auto held_back =
      b.step(checkpoint_found{static_cast<job_id>(1), finds[0].request, facts, {}});
  CHECK(sent<commit>(held_back).empty());
  SUBCASE("it is known to be dead") {
    const auto gone = b.step(job_events::worker_gone{w(frozen), "its process ended"});
    CHECK(sent<commit>(gone).size() == 2);
  }
  SUBCASE("ten seconds pass") {
    std::vector<std::pair<worker_id, commit>> commits;
    for (int i = 0; i < 105 && commits.empty(); ++i) {
      b.say(survivor, beat{});
      b.say(3, beat{});
      commits = sent<commit>(b.tick(100));
    }
    CHECK(commits.size() == 2);
  }
}

TEST_CASE("who did not answer the plan before is waited for while that plan has not run") {
  // Found by: stagecoach_sim --seed 29879.
  job_spec s = small_spec(1, 2);
  s.parallelism.is_explicit = true;
  s.parallelism.stages = 1;
  s.parallelism.replicas = 2;
  bench b(s);
  b.start();
  b.save_step(10, 1010);
  b.progress_to(20);
  const auto all = stage_tensor_names(s.model, 0, 4);
  failed link{1, 1, to_string(errc::unreachable), "a link broke", false};
  b.say(1, link);
  b.tick(300);
  b.answer(1, 2, 20, all);
  REQUIRE(sent<commit>(b.tick(2'100)).size() == 1);  // without 2, which holds step 20 as well
  b.step(job_events::worker_gone{w(1), "killed"});
  b.give({3});
  b.answer(3, 3);
  const auto finds = all_of<actions::find_checkpoint>(b.tick(2'100));
  REQUIRE(finds.size() == 1);
  CHECK(sent<commit>(b.step(found_at(10, finds[0].request))).empty());
  const auto commits = sent<commit>(b.answer(2, 3, 20, all));
  REQUIRE_FALSE(commits.empty());
  CHECK(commits[0].second.step == 20);
}

TEST_CASE("a step that was reported is worth a wait until a generation below it runs") {
  // Found by: stagecoach_sim --seed 23661.
  bench b(two_stages());
  b.start();
  b.save_step(21, 1021);
  b.progress_to(25);
  const auto stays = b.worker_at(1), goes = b.worker_at(0);
  b.step(job_events::worker_gone{w(goes), "killed"});
  b.give({3});
  b.answer(3, 2);
  auto finds = all_of<actions::find_checkpoint>(b.answer(stays, 2, 25, b.stage(1)));
  REQUIRE(finds.size() == 1);
  const checkpoint_found found = found_at(21, finds[0].request);
  REQUIRE(sent<commit>(b.step(found)).size() == 2);  // of 25 nobody has the first stage
  CHECK(b.machine.view().step == 21);                // else it would go back when it runs
  b.step(job_events::worker_gone{w(3), "killed"});
  b.give({4, 5});
  b.answer(4, 3);
  b.answer(5, 3);
  finds = all_of<actions::find_checkpoint>(b.tick(2'100));
  REQUIRE(finds.size() == 1);
  const checkpoint_found again = found_at(21, finds[0].request);
  CHECK(sent<commit>(b.step(again)).empty());  // who holds half of 25 is silent
  CHECK(sent<commit>(b.answer(stays, 3, 25, b.stage(1))).size() == 2);
}

TEST_CASE("who lives and is not heard may have gone on, further than what is saved") {
  // Found by: stagecoach_sim --seed 22160: on the other side of a cut, with a deputy.
  const job_spec s = small_spec(1, 1);
  bench b(s);
  b.give({1});
  b.answer(1, 1);
  b.load(1);
  b.progress_to(20);
  b.save_step(20, 1020);
  b.disconnect(1);
  b.tick(3'000);
  REQUIRE_FALSE(b.machine.has_worker(w(1)));
  b.give({2});
  const auto look = [&b] {
    const auto finds = all_of<actions::find_checkpoint>(b.answer(2, 2));
    REQUIRE(finds.size() == 1);
    return b.step(found_at(20, finds[0].request));
  };
  SUBCASE("a witness reaches it, and it comes back") {
    b.find(1, "alive");
    CHECK(sent<commit>(look()).empty());
    hello h;
    h.name = "w1";
    h.process = "p1";
    h.job = h.generation = 1;
    h.plan_hash = b.hash();
    h.phase = static_cast<int>(worker_phase::running);
    h.step = 30;
    b.step(job_events::worker_connected{w(1), h});
    const auto commits = sent<commit>(b.answer(1, 2, 30, stage_tensor_names(s.model, 0, 4)));
    REQUIRE(commits.size() == 1);
    CHECK(commits[0].second.step == 30);
  }
  SUBCASE("a witness reaches it, and it does not come") {
    b.find(1, "alive");
    CHECK(sent<commit>(look()).empty());
    b.say(2, beat{});
    CHECK(sent<commit>(b.tick(6'000)).empty());
    b.say(2, beat{});
    CHECK(sent<commit>(b.tick(5'000)).size() == 1);
  }
  SUBCASE("nobody reaches it: what was reported is what is saved") {
    b.find(1, "silent");
    CHECK(sent<commit>(look()).size() == 1);
  }
}

TEST_CASE("who greets again and again and never answers does not hold up the decision for ever") {
  job_spec s = small_spec(1, 2);
  s.parallelism.is_explicit = true;
  s.parallelism.stages = 1;
  s.parallelism.replicas = 2;
  bench b(s);
  b.start();
  b.progress_to(20);
  b.say(1, failed{1, 1, to_string(errc::unreachable), "a link broke", false});
  b.tick(300);
  b.answer(1, 2, 20, stage_tensor_names(s.model, 0, 4));
  hello h;
  h.name = "w2";
  h.process = "p2";
  h.job = h.generation = 1;
  h.plan_hash = b.hash();
  h.step = 20;
  std::size_t commits = 0;
  for (int i = 0; i < 8 && commits == 0; ++i) {
    b.say(1, beat{});
    b.step(job_events::worker_connected{w(2), h});
    commits += sent<commit>(b.tick(1'900)).size();
  }
  CHECK(commits == 1);
}

TEST_CASE("a checkpoint exists when all parts are in a manifest that is durable") {
  bench b(two_stages());
  b.start();
  const auto manifests = all_of<actions::write_manifest>(b.save_parts(5, 1005));
  REQUIRE(manifests.size() == 1);
  CHECK(manifests[0].parts.size() == 2);
  CHECK(manifests[0].weights_hash == "00000000000000020000000000000002");
  CHECK(b.machine.checkpoints().empty());
  SUBCASE("durable") {
    const auto done = b.step(manifest_written{static_cast<job_id>(1), 5, true, ""});
    CHECK(b.machine.checkpoints().count(5) == 1);
    CHECK(place_of<actions::save>(done) < place_of<actions::send>(done));
    CHECK(sent<checkpoint_durable>(done).size() == 2);
    CHECK(all_of<actions::retire_checkpoints>(done).size() == 1);
  }
  SUBCASE("the disk is full: training goes on, the manifest is written again") {
    CHECK(has_note(b.step(manifest_written{static_cast<job_id>(1), 5, false, "disk full"}),
                   "save_failed"));
    CHECK(b.machine.state() == job_state::running);
    b.beats({1, 2});
    b.tick(2500);
    b.beats({1, 2});
    CHECK(all_of<actions::write_manifest>(b.tick(2600)).size() == 1);
  }
}

TEST_CASE("a newer save becomes whole though many before it wait for a slow disk") {
  bench b(two_stages());
  b.start();
  for (std::uint64_t step = 1; step <= 20; ++step)
    CHECK(all_of<actions::write_manifest>(b.save_parts(step, 1000 + step)).size() == 1);
}

TEST_CASE("a part of an older generation counts for its step") {
  bench b(two_stages());
  b.start();
  const auto first = b.worker_at(0), second = b.worker_at(1);
  const auto stage0 = b.stage(0);
  auto stage1 = b.stage(1);
  std::erase(stage1, "wte.weight");
  part_saved x;
  x.job = 1;
  x.generation = 1;
  x.plan_hash = b.hash();
  x.step = 5;
  x.chain = 1005;
  x.part_count = 2;
  x.part.file = "a";
  x.part.tensors = stage0;
  CHECK(all_of<actions::write_manifest>(b.say(first, x)).empty());
  b.disconnect(second);
  b.say(first, peer_report{1, 1, second, "lost", "reset"});
  REQUIRE(b.machine.state() == job_state::recovering);
  x.part.file = "b";
  x.part.tensors = stage1;
  CHECK(all_of<actions::write_manifest>(b.say(second, x)).size() == 1);  // a stranger now
}

TEST_CASE("a step that is reported again with another chain is a divergence") {
  bench b(two_stages());
  b.start();
  b.progress_to(7);
  b.progress_to(7);
  CHECK_FALSE(has_note(b.last, "divergence"));
  progress p{1, 1, b.hash(), {}};
  step_report r;
  r.step = 7;
  r.chain = 1;
  p.steps.push_back(r);
  CHECK(has_note(b.say(b.worker_at(0), p), "divergence"));
}

TEST_CASE("a step that its generation reports again is logged once and is no step done again") {
  bench b(two_stages());
  b.start();
  const auto reported = [&b](std::vector<std::uint64_t> steps) {
    progress p{1, b.machine.view().generation, b.hash(), {}};
    for (const std::uint64_t step : steps) {
      step_report r;
      r.step = step;
      r.chain = 1000 + step;
      p.steps.push_back(r);
    }
    std::vector<std::uint64_t> logged;
    for (const auto& s : all_of<actions::series>(b.say(b.worker_at(0), p))) {
      for (const step_report& r : s.steps) logged.push_back(r.step);
    }
    return logged;
  };
  using steps = std::vector<std::uint64_t>;
  CHECK(reported({1, 2, 3}) == steps{1, 2, 3});
  CHECK(reported({2, 3, 4, 5}) == steps{4, 5});  // the channel broke: 4 was lost with it
  CHECK(reported({7}) == steps{7});
  CHECK(reported({5, 6, 7}) == steps{6});  // a hole is filled late
  CHECK(b.machine.view().redone_steps == 0);
  CHECK(b.machine.view().step == 7);
  CHECK_FALSE(has_note(b.last, "divergence"));
}

TEST_CASE("what a worker did for a job that has given it back is still logged") {
  bench b(two_stages());
  b.start();
  b.progress_to(7);
  progress late{1, 1, b.hash(), {}};
  for (const std::uint64_t step : {7, 8}) {
    step_report r;
    r.step = step;
    r.chain = 1000 + step;
    late.steps.push_back(r);
  }
  const std::uint64_t first = b.worker_at(0);
  b.step(job_events::pause{});
  b.say(1, held{1, 1, 8});
  b.say(2, held{1, 1, 8});
  b.save_step(8, 1008);
  REQUIRE(b.machine.state() == job_state::paused);
  const auto logged = all_of<actions::series>(b.say(first, late));
  REQUIRE(logged.size() == 1);
  REQUIRE(logged[0].steps.size() == 1);
  CHECK(logged[0].steps[0].step == 8);
  CHECK(b.machine.state() == job_state::paused);
}

TEST_CASE("steps that a dead rank 0 had not reported are told again by a survivor") {
  job_spec s = small_spec(1, 2);
  s.parallelism.is_explicit = true;
  s.parallelism.stages = 1;
  s.parallelism.replicas = 2;
  bench b(s);
  b.start();
  for (std::uint64_t step = 1; step <= 20; ++step) b.progress_to(step);
  const auto dead = b.worker_at(0), survivor = b.worker_at(1);
  b.disconnect(dead);
  b.say(survivor, peer_report{1, 1, dead, "lost", "reset"});
  const auto commits = sent<commit>(b.answer(survivor, 2, 22, stage_tensor_names(s.model, 0, 4)));
  REQUIRE(commits.size() == 1);
  CHECK(commits[0].second.retell_rank == 0);
  CHECK(commits[0].second.retell_after == 20);
  b.load(survivor, 22);

  progress again{1, 2, b.hash(), {}};
  for (std::uint64_t step : {20, 21, 22}) {
    step_report r;
    r.step = step;
    r.chain = 1000 + step;
    again.steps.push_back(r);
  }
  const auto told = all_of<actions::series>(b.say(survivor, again));
  REQUIRE(told.size() == 1);
  CHECK(told[0].steps.size() == 2);  // 20 was known
  CHECK_FALSE(has_note(b.last, "recovered"));
  CHECK(b.machine.view().redone_steps == 0);
  CHECK(all_of<actions::series>(b.say(survivor, again)).empty());
  b.progress_to(23);
  CHECK(has_note(b.last, "recovered"));
}

TEST_CASE("pause: save and hold ride together, the job pauses when the checkpoint is durable") {
  bench b(two_stages());
  b.start();
  b.progress_to(7);
  const auto ordered = b.step(job_events::pause{static_cast<reply_id>(1)});
  const auto orders = sent<give_order>(ordered);
  REQUIRE(orders.size() == 1);
  CHECK(value(orders[0].first) == b.worker_at(0));
  CHECK(orders[0].second.kind == static_cast<int>(order_kind::hold));
  CHECK(orders[0].second.with == order_bit(order_kind::save));
  b.say(1, held{1, 1, 8});
  b.say(2, held{1, 1, 8});
  CHECK(b.machine.state() == job_state::checkpointing);
  b.save_step(8, 1008);
  CHECK(b.machine.state() == job_state::paused);
  CHECK(sent<stop_stage>(b.last).size() == 2);
  b.step(job_events::resume{});
  CHECK(b.machine.state() == job_state::pending);
  CHECK(b.machine.wish(2).least == 2);
}

TEST_CASE("who holds and loses its channel holds only if it says so again") {
  // Found by: stagecoach_sim --seed 5535: a deputy had let it go while the coordinator slept.
  bench b(two_stages());
  b.start();
  b.progress_to(7);
  b.step(job_events::pause{});
  b.say(1, held{1, 1, 8});
  b.say(2, held{1, 1, 8});
  b.disconnect(2);
  b.save_step(8, 1008);
  CHECK(b.machine.state() == job_state::checkpointing);
  hello back;
  back.process = "p2";
  back.job = 1;
  back.generation = back.promised = 1;
  back.plan_hash = b.hash();
  back.step = 8;
  back.phase = static_cast<int>(worker_phase::held);
  b.step(job_events::worker_connected{w(2), back});
  b.say(2, held{1, 1, 8});
  CHECK(b.machine.state() == job_state::paused);
}

TEST_CASE("a manifest of the coordinator never has the number of a deputy's") {
  // Found by: stagecoach_sim --seed 23918: the second was taken for the first, of an older start.
  const auto number = [](bool is_deputys) {
    restored_job r = bench::fresh(two_stages());
    r.is_deputys = is_deputys;
    bench b(r);
    b.tick(0);
    b.start();
    return all_of<actions::write_manifest>(b.save_parts(5, 1005)).at(0).seq;
  };
  CHECK(number(false) != number(true));
}

TEST_CASE("a hold that nobody remembers after a restart is let go") {
  bench b(two_stages());
  b.start();
  restored_job r;
  r.record = b.machine.record();
  r.generation = b.machine.generation();
  bench c(two_stages());
  c.machine = job_machine(r);
  c.tick(0);
  CHECK(c.machine.expects(w(1)));
  hello h;
  h.job = 1;
  h.generation = 1;
  h.plan_hash = b.hash();
  h.phase = static_cast<int>(worker_phase::held);
  h.step = 9;
  c.step(job_events::worker_connected{w(1), h});
  const auto adopted = c.step(job_events::worker_connected{w(2), h});
  CHECK(sent<resume_stage>(adopted).size() == 2);
  CHECK(sent<prepare>(adopted).empty());
  CHECK(c.machine.state() == job_state::running);
}

TEST_CASE(
    "a member that missed the end of a hold is let go when it comes back, though another is "
    "ordered") {
  // Found by: stagecoach_sim --seed 5610.
  bench b(two_stages());
  b.start();
  b.progress_to(7);
  b.step(job_events::pause{});
  b.say(1, held{1, 1, 8});
  b.step(job_events::resume{});  // the pause is withdrawn
  CHECK(sent<resume_stage>(b.say(2, held{1, 1, 8})).size() == 2);
  b.step(job_events::pause{});
  hello h;
  h.job = 1;
  h.generation = 1;
  h.plan_hash = b.hash();
  h.phase = static_cast<int>(worker_phase::held);
  h.step = 8;
  b.disconnect(2);
  CHECK(sent<resume_stage>(b.step(job_events::worker_connected{w(2), h})).size() == 1);
  CHECK(sent<resume_stage>(b.say(2, held{1, 1, 8})).size() == 1);
  CHECK(b.say(1, held{1, 1, 9}).empty());  // the new hold, which the other is still to reach
}

TEST_CASE("after a restart a running generation is adopted without a word") {
  bench b(two_stages());
  b.start();
  restored_job r;
  r.record = b.machine.record();
  r.generation = b.machine.generation();
  bench c(two_stages());
  c.machine = job_machine(r);
  c.tick(0);
  hello h;
  h.job = 1;
  h.generation = 1;
  h.plan_hash = b.hash();
  h.phase = static_cast<int>(worker_phase::running);
  h.step = 9;
  c.step(job_events::worker_connected{w(1), h});
  SUBCASE("all came back") {
    const auto adopted = c.step(job_events::worker_connected{w(2), h});
    CHECK(all_of<actions::send>(adopted).empty());
    CHECK(c.machine.state() == job_state::running);
  }
  SUBCASE("one was ready and missed the order to run") {
    h.phase = static_cast<int>(worker_phase::ready);
    const auto adopted = c.step(job_events::worker_connected{w(2), h});
    CHECK(sent<run_stage>(adopted).size() == 1);
  }
  SUBCASE("one never comes: after ten seconds the next number") {
    std::vector<std::pair<worker_id, prepare>> asked;
    for (int i = 0; i < 102 && asked.empty(); ++i) {
      c.say(1, beat{1, 1, 9, static_cast<int>(worker_phase::running)});
      asked = sent<prepare>(c.tick(100));
    }
    REQUIRE(asked.size() == 1);
    CHECK(asked[0].second.number == 2);
  }
  SUBCASE("one answered a prepare whose number was never saved") {
    h.promised = 6;
    h.phase = static_cast<int>(worker_phase::prepared);
    const auto asked = sent<prepare>(c.step(job_events::worker_connected{w(2), h}));
    REQUIRE(asked.size() == 2);
    CHECK(asked[0].second.number == 7);
  }
}

TEST_CASE("a failure that is fatal fails the job with its words") {
  bench b(two_stages());
  b.give({1, 2});
  b.answer(1, 1);
  b.answer(2, 1);
  const auto ended = b.say(2, failed{1, 1, "bad_spec", "init: /nowhere is not there", true});
  CHECK(b.machine.state() == job_state::failed);
  CHECK(b.machine.record().reason == "init: /nowhere is not there");
  CHECK(all_of<actions::release>(ended).size() == 2);
}

TEST_CASE("a worker that lacks the data is refused for the job, by name") {
  bench b(two_stages());
  b.give({1, 2});
  b.answer(1, 1);
  b.answer(2, 1);
  const auto refused = b.say(2, failed{1, 1, "not_found", "no /data/text on h2", false});
  CHECK(has_note(refused, "worker_refused"));
  std::string why;
  CHECK_FALSE(b.machine.accepts(bench::facts(2), &why));
  CHECK(why == "failed at this job: no /data/text on h2");
}

TEST_CASE("more failures in an hour than the budget fail the job") {
  job_spec s = two_stages();
  s.elasticity.max_failures = 1;
  bench b(s);
  b.start();
  b.say(1, failed{1, 1, "unreachable", "link", false});
  CHECK(b.machine.state() == job_state::recovering);
  b.tick(300);
  b.answer(1, 2, 0, b.stage(0));
  b.answer(2, 2, 0, b.stage(1));
  REQUIRE(b.machine.generation()->shape.generation == 2);
  b.say(1, failed{1, 2, "unreachable", "link", false});
  CHECK(b.machine.state() == job_state::failed);
}

TEST_CASE("a job is completed when its last step is durable and all have finished") {
  job_spec s = two_stages();
  s.stop_steps = 10;
  bench b(s);
  b.start();
  b.progress_to(10);
  b.say(1, finished{1, 1, 10});
  b.say(2, finished{1, 1, 10});
  CHECK(b.machine.state() == job_state::checkpointing);
  b.save_step(10, 1010);
  CHECK(b.machine.state() == job_state::completed);
  const int save = place_of<actions::save>(b.last);
  CHECK(save < place_of<actions::send>(b.last));
  CHECK(sent<stop_stage>(b.last).size() == 2);
}

TEST_CASE("without any usable checkpoint a job that had one pauses and says where it looked") {
  bench b(two_stages());
  b.start();
  b.save_step(0, 1000);
  const auto survivor = b.worker_at(0), lost = b.worker_at(1);
  b.disconnect(lost);
  b.say(survivor, peer_report{1, 1, lost, "lost", "reset"});
  b.give({3});
  b.answer(survivor, 2, 5, b.stage(0));
  const auto finds = all_of<actions::find_checkpoint>(b.answer(3, 2));
  REQUIRE(finds.size() == 1);
  b.step(checkpoint_found{
      static_cast<job_id>(1), finds[0].request, std::nullopt, {"part a: corrupt"}});
  CHECK(b.machine.state() == job_state::paused);
  CHECK(b.machine.record().reason.find("no usable checkpoint in folder") == 0);
}

TEST_CASE("a checkpoint that becomes durable while an older one is verified is looked for again") {
  // Found by: stagecoach_sim --seed 1391.
  bench b(two_stages());
  b.start();
  b.save_step(0, 1000);
  const auto survivor = b.worker_at(0), lost = b.worker_at(1);
  b.disconnect(lost);
  b.say(survivor, peer_report{1, 1, lost, "lost", "reset"});
  b.give({3});
  b.answer(survivor, 2, 7, b.stage(0));
  const auto finds = all_of<actions::find_checkpoint>(b.answer(3, 2));
  REQUIRE(finds.size() == 1);
  b.save_parts(5, 1005);
  b.step(manifest_written{static_cast<job_id>(1), 5, true, ""});
  const auto again =
      b.step(checkpoint_found{static_cast<job_id>(1), finds[0].request, checkpoint_facts{}, {}});
  CHECK(sent<commit>(again).empty());
  CHECK(all_of<actions::find_checkpoint>(again).size() == 1);
}

// ---- decision ----
namespace {

candidate holder(std::uint64_t id, std::uint64_t at_step, std::vector<std::string> tensors,
                 bool has_pending = false) {
  candidate c;
  c.worker = w(id);
  c.answer.has_state = true;
  c.answer.step = at_step;
  c.answer.chain = 1000 + at_step;
  c.answer.tensors = std::move(tensors);
  vote_result v;
  v.step = at_step;
  v.chain = c.answer.chain;
  c.answer.last_vote = v;
  c.answer.has_pending = has_pending;
  return c;
}

}  // namespace

TEST_CASE("the losses that a job survives are those of its least copied stage") {
  bench b(two_stages());
  job_spec copied = two_stages();
  copied.elasticity.copies = 1;
  bench c(copied);
  for (bench* x : {&b, &c}) {
    x->give({1, 2});
    x->answer(1, 1);
    x->answer(2, 1);
    x->load(1);
    x->load(2);
  }
  CHECK(b.machine.view().losses_survived == 0);
  CHECK(c.machine.view().losses_survived == 1);
  c.step(job_events::worker_disconnected{w(2), "closed"});
  CHECK(c.machine.view().losses_survived == 0);
  CHECK(b.machine.view().weakest.rfind("stage 0 (embed..h.", 0) == 0);
}

TEST_CASE("a damaged checkpoint is no reason to give up an older live state") {
  bench b(small_spec(1, 1));
  b.give({1});
  b.answer(1, 1);
  b.load(1);
  b.step(job_events::tick{b.now += 10, b.now});
  checkpoint_record damaged;
  damaged.job = static_cast<job_id>(1);
  damaged.step = 50;
  job_machine again({b.machine.record(), b.machine.generation(), {{50, damaged}}, 9});
  const auto all = stage_tensor_names(small_spec(1, 1).model, 0, 4);
  (void)again.step(job_events::tick{1, 1});
  hello h;
  h.process = "p1";
  h.job = 1;
  h.generation = h.promised = 1;
  h.plan_hash = b.hash();
  h.phase = static_cast<int>(worker_phase::prepared);  // it lost its generation on the way
  (void)again.step(job_events::worker_connected{w(1), h});
  prepared p;
  p.job = 1;
  p.number = 2;
  p.has_state = true;
  p.step = 7;
  p.tensors = all;
  const auto asked = all_of<actions::find_checkpoint>(again.step(job_events::worker_said{w(1), p}));
  REQUIRE(asked.size() == 1);
  checkpoint_found found{static_cast<job_id>(1), asked[0].request, std::nullopt, {}};
  const auto commits = sent<commit>(again.step(found));
  REQUIRE(commits.size() == 1);
  CHECK(commits[0].second.source == source_kind::live);
  CHECK(commits[0].second.step == 7);
}

TEST_CASE("decision: the newest step of which every tensor has a holder, or can roll forward") {
  const job_spec s = two_stages();
  const layout shape{2, 1, "1f1b", {0, 2, 4}, {0, 8}};
  const auto front = stage_tensor_names(s.model, 0, 2), back = stage_tensor_names(s.model, 2, 4);
  SUBCASE("all at one step") {
    const auto c = choose_live(s, shape, {holder(1, 9, back), holder(2, 9, front)}, 0);
    REQUIRE(c);
    CHECK(c->step == 9);
    CHECK(c->by_rank == std::vector<int>{1, 0});  // each sits where its tensors are
    CHECK(c->transfers.empty());
    CHECK_FALSE(c->roll_forward);
  }
  SUBCASE("one is a step behind and kept the gradient") {
    const auto c = choose_live(s, shape, {holder(1, 10, front), holder(2, 9, back, true)}, 0);
    REQUIRE(c);
    CHECK(c->step == 10);
    REQUIRE(c->roll_forward);
    CHECK(c->roll_forward->step == 10);
  }
  SUBCASE("one is a step behind and did not") {
    CHECK_FALSE(choose_live(s, shape, {holder(1, 10, front), holder(2, 9, back)}, 0));
  }
  SUBCASE("a joiner gets what it lacks, and only that") {
    const auto whole = stage_tensor_names(s.model, 0, 4);
    candidate joiner;
    joiner.worker = w(1);
    const auto c = choose_live(s, shape, {joiner, holder(2, 9, whole)}, 0);
    REQUIRE(c);
    CHECK(c->transfers.size() == (c->by_rank[0] == 0 ? front.size() : back.size()));
    for (const auto& t : c->transfers) CHECK(c->by_rank[static_cast<std::size_t>(t.to_rank)] == 0);
  }
  SUBCASE(
      "a lost stage is found at its neighbour, and the spare gets it with its copy of another") {
    job_spec copied = s;
    copied.elasticity.copies = 1;
    const auto whole = stage_tensor_names(s.model, 0, 4);
    candidate spare;
    spare.worker = w(3);
    const auto c = choose_live(copied, shape, {holder(1, 9, whole), spare}, 0);
    REQUIRE(c);
    CHECK(c->step == 9);
    CHECK(c->transfers.size() == whole.size());  // its stage, and the copy of the other, each once
    CHECK(c->by_rank.size() == 2);
  }
  SUBCASE("a pipeline's neighbours bring its copies, wherever they are missing") {
    job_spec copied = s;
    copied.elasticity.copies = 1;
    const auto c = choose_live(copied, shape, {holder(1, 9, front), holder(2, 9, back)}, 0);
    REQUIRE(c);
    CHECK(c->by_rank == std::vector<int>{0, 1});
    // wte is held at both ends; all else goes to the other.
    CHECK(c->transfers.size() == front.size() - 1 + back.size() - 1);
  }
  SUBCASE("a sharded optimizer: each replica needs its own share, and parameters of the rest") {
    job_spec sharded = s;
    sharded.parallelism.shard_optimizer = true;
    const layout pair{1, 2, "1f1b", {0, 4}, {0, 4, 8}};
    const auto all = all_tensor_sizes(s.model);
    const auto names_of = [&](int replica) {
      std::vector<std::string> names;
      for (const int t : kept_moments(sharded, 0, 4, replica, 2))
        names.push_back(all[static_cast<std::size_t>(t)].name);
      return names;
    };
    const auto first = names_of(0), second = names_of(1);
    CHECK(first.size() + second.size() == all.size());
    // Worker 1 held the second share and worker 2 the first: each sits where its moments are.
    const auto c = choose_live(sharded, pair, {holder(1, 9, second), holder(2, 9, first)}, 0);
    REQUIRE(c);
    CHECK(c->by_rank == std::vector<int>{1, 0});
    CHECK(c->transfers.size() == all.size());
    for (const auto& t : c->transfers) CHECK(t.is_parameter_only);
    // A share that nobody holds is lost, though the other replica has its parameters.
    candidate spare;
    spare.worker = w(3);
    CHECK_FALSE(choose_live(sharded, pair, {holder(1, 9, second), spare}, 0));
    // With a copy at the neighbour both shares survive, and the spare gets its own and its copy.
    sharded.elasticity.copies = 1;
    const auto whole = stage_tensor_names(s.model, 0, 4);
    const auto d = choose_live(sharded, pair, {holder(1, 9, whole), spare}, 0);
    REQUIRE(d);
    CHECK(d->transfers.size() == whole.size());
    for (const auto& t : d->transfers) CHECK_FALSE(t.is_parameter_only);
  }
  SUBCASE("older than what is durable is of no use") {
    CHECK_FALSE(choose_live(s, shape, {holder(1, 9, back), holder(2, 9, front)}, 10));
  }
  SUBCASE("the embedding matrix that the head lost is copied from the embedding") {
    const auto c = choose_live(
        s, shape, {holder(1, 9, front), holder(2, 9, {back.begin() + 1, back.end()})}, 0);
    REQUIRE(c);
    REQUIRE(c->transfers.size() == 1);
    CHECK(c->transfers[0] == transfer_record{"wte.weight", 0, 1, false});
  }
}
