// Silent corruption, as the machine of a job sees it: who is named, who is evicted, where it goes
// on.
#include <doctest/doctest.h>

#include "coordinator/job_machine.hpp"
#include "tests/machine_test_support.hpp"

using namespace stagecoach;
using namespace stagecoach::test;

namespace {

const std::string right = "0000000000000000000000000000000a";
const std::string wrong = "0000000000000000000000000000000b";

/// One stage, `replicas` workers that run from step 0.
struct bench {
  explicit bench(int replicas, int least = 1) : machine(fresh(replicas, least)) {
    tick(0);
    job_events::workers_given e;
    for (int n = 1; n <= replicas; ++n) e.workers.push_back(facts(n));
    step(e);
    for (int n = 1; n <= replicas; ++n) answer(n, 0, -1);
    for (int n = 1; n <= replicas; ++n) load(n, 0);
    REQUIRE(machine.state() == job_state::running);
  }
  static restored_job fresh(int replicas, int least) {
    restored_job r;
    r.record.id = static_cast<job_id>(1);
    r.record.spec = small_spec(least, replicas);
    r.record.spec.parallelism.is_explicit = true;
    r.record.spec.parallelism.stages = 1;
    r.record.spec.parallelism.replicas = replicas;
    return r;
  }
  static worker_facts facts(int n) {
    return {w(static_cast<std::uint64_t>(n)),
            fmt::format("p{}", n),
            fmt::format("w{}", n),
            "h",
            "127.0.0.1",
            4000,
            "c"};
  }
  std::vector<action> step(const job_event& e) {
    auto list = machine.step(e);
    seen.insert(seen.end(), list.begin(), list.end());
    return list;
  }
  std::vector<action> tick(std::int64_t ms) {
    now += ms;
    return step(job_events::tick{now, now});
  }
  std::vector<action> say(int n, to_coordinator m) {
    return step(job_events::worker_said{w(static_cast<std::uint64_t>(n)), std::move(m)});
  }
  /// state_step -1: holds nothing.
  std::vector<action> answer(int n, std::uint64_t loaded_in, std::int64_t state_step) {
    prepared p;
    p.job = 1;
    p.number = machine.record().number;
    if (state_step >= 0) {
      p.has_state = true;
      p.step = static_cast<std::uint64_t>(state_step);
      p.chain = 1000 + p.step;
      p.loaded_in = loaded_in;
      p.tensors = stage_tensor_names(machine.record().spec.model, 0, 4);
    }
    return say(n, p);
  }
  std::uint64_t generation() const { return machine.generation()->shape.generation; }
  std::uint64_t hash() const { return plan_hash(machine.generation()->shape); }
  std::vector<action> load(int n, std::uint64_t at_step) {
    return say(n, ready{1, generation(), hash(), at_step, ""});
  }
  std::vector<action> report(std::uint64_t step_now, const std::string& before = "") {
    progress p{1, generation(), hash(), {}};
    step_report r;
    r.step = step_now;
    r.chain = 1000 + step_now;
    r.weights_hash = before;
    p.steps.push_back(r);
    return say(rank0(), p);
  }
  int rank0() const {
    return static_cast<int>(value(machine.generation()->shape.members.front().worker));
  }
  void save(std::uint64_t at_step, const std::string& weights_hash) {
    part_saved x;
    x.job = 1;
    x.generation = generation();
    x.plan_hash = hash();
    x.step = at_step;
    x.chain = 1000 + at_step;
    x.part.file = fmt::format("g{}-{}", x.generation, at_step);
    x.part.tensors = stage_tensor_names(machine.record().spec.model, 0, 4);
    x.part.weights_hash = weights_hash;
    const auto manifests = all_of<actions::write_manifest>(say(rank0(), x));
    REQUIRE(manifests.size() == 1);
    step(manifest_written{static_cast<job_id>(1), at_step, true, ""});
  }
  std::vector<action> dispute(std::vector<weights_suspect> suspects, bool is_certain,
                              std::uint64_t at_step) {
    failed f;
    f.job = 1;
    f.generation = generation();
    f.code = "corrupt";
    f.message = "weights differ";
    f.suspects = std::move(suspects);
    f.is_certain = is_certain;
    f.step = at_step;
    return say(rank0(), f);
  }
  std::string corruption() const {
    std::string text;
    for (const auto& n : all_of<actions::note>(seen)) {
      if (n.record.kind == "silent_corruption" && n.record.fields.count("workers") != 0)
        text += n.record.fields.at("workers") + ";";
    }
    return text;
  }

  /// The coordinator dies, with no message of its last breath delivered, and is started again.
  void restart() {
    std::map<std::string, std::string> rows;
    for (const auto& s : all_of<actions::save>(seen)) {
      for (const auto& r : s.rows) {
        if (r.value)
          rows[r.key] = *r.value;
        else
          rows.erase(r.key);
      }
    }
    restored_records all = restore_records({rows.begin(), rows.end()});
    REQUIRE(all.jobs.count(static_cast<job_id>(1)) == 1);
    machine = job_machine(std::move(all.jobs.at(static_cast<job_id>(1))));
    tick(0);
  }
  std::vector<action> reconnect(int n, worker_phase phase, std::uint64_t at_step) {
    hello h;
    h.name = fmt::format("w{}", n);
    h.process = fmt::format("p{}", n);
    h.device_class = "c";
    h.job = 1;
    h.generation = h.promised = generation();
    h.plan_hash = hash();
    h.phase = static_cast<int>(phase);
    h.step = at_step;
    return step(job_events::worker_connected{w(static_cast<std::uint64_t>(n)), h});
  }

  job_machine machine;
  std::vector<action> seen;
  std::int64_t now = 1000;
};

}  // namespace

TEST_CASE("three replicas: the one that is outvoted is evicted, the rest goes on live") {
  bench b(3);
  b.report(20);
  const auto list = b.dispute({{2, wrong}}, true, 20);
  CHECK(b.corruption() == "w2;");
  const auto released = all_of<actions::release>(list);
  REQUIRE(released.size() == 1);
  CHECK(released[0].worker == w(2));
  CHECK(released[0].is_distrusted);
  CHECK(sent<prepare>(list).size() == 2);
  b.answer(1, 1, 20);
  const auto committed = sent<commit>(b.answer(3, 1, 20));
  REQUIRE(!committed.empty());
  CHECK(committed[0].second.source == source_kind::live);
  CHECK(committed[0].second.step == 20);  // no committed step is lost
}

TEST_CASE("two replicas: back to an older checkpoint, and the step done again names the liar") {
  bench b(2);
  b.save(10, "");
  b.save(20, "");
  b.report(20);
  const auto list = b.dispute({{1, right}, {2, wrong}}, false, 20);
  CHECK(b.corruption() == "w1, w2;");
  CHECK(has_note(list, "rolled_back"));
  CHECK(all_of<actions::release>(list).empty());
  REQUIRE(all_of<actions::forget_series>(list).size() == 1);
  CHECK(all_of<actions::forget_series>(list)[0].step == 19);
  // What they hold is not used, and the checkpoint of the disputed step may hold it.
  CHECK(b.machine.checkpoints().count(20) == 0);
  b.answer(1, 1, 20);
  const auto asked = all_of<actions::find_checkpoint>(b.answer(2, 1, 20));
  REQUIRE(asked.size() == 1);
  CHECK(asked[0].step_max == 19);
  CHECK(asked[0].distrusted.bad_saves == std::vector<std::uint64_t>{20 * 64 + 1});
  checkpoint_facts facts;
  facts.step = 10;
  facts.seq = 1;
  facts.chain = 1010;
  b.step(checkpoint_found{static_cast<job_id>(1), asked[0].request, facts, {}});
  b.load(1, 10);
  b.load(2, 10);
  REQUIRE(b.machine.state() == job_state::running);
  CHECK(b.generation() == asked[0].distrusted.fence);
  // Reports and parts of the generation that went wrong are not taken any more.
  part_saved late;
  late.job = 1;
  late.generation = 1;
  late.step = 19;
  late.chain = 1019;
  late.part.tensors = stage_tensor_names(b.machine.record().spec.model, 0, 4);
  CHECK(all_of<actions::write_manifest>(b.say(2, late)).empty());

  CHECK(all_of<actions::release>(b.report(20, "")).empty());
  const auto judged = b.report(21, right);  // the weights after step 20
  CHECK(b.corruption() == "w1, w2;w2;");
  const auto released = all_of<actions::release>(judged);
  REQUIRE(released.size() == 1);
  CHECK(released[0].worker == w(2));
  CHECK(released[0].is_distrusted);
  const auto committed = sent<commit>(b.answer(1, b.generation(), 21));
  REQUIRE(committed.size() == 1);
  CHECK(committed[0].second.source == source_kind::live);
  CHECK(committed[0].second.step == 21);
}

TEST_CASE("a step done again that nobody had before names nobody") {
  bench b(2);
  b.save(10, "");
  b.report(20);
  b.dispute({{1, right}, {2, wrong}}, false, 20);
  b.answer(1, 1, 20);
  const auto asked = all_of<actions::find_checkpoint>(b.answer(2, 1, 20));
  checkpoint_facts facts;
  facts.step = 10;
  facts.chain = 1010;
  b.step(checkpoint_found{static_cast<job_id>(1), asked.at(0).request, facts, {}});
  b.load(1, 10);
  b.load(2, 10);
  b.report(20);
  const auto judged = b.report(21, "0000000000000000000000000000000c");
  CHECK(has_note(judged, "silent_corruption"));
  CHECK(all_of<actions::release>(judged).empty());
  CHECK(b.machine.state() == job_state::running);
}

TEST_CASE(
    "a checkpoint that holds other weights than all voted is not used, whichever comes first") {
  bench b(2);
  b.save(10, right);
  CHECK(!has_note(b.report(11, right), "silent_corruption"));
  CHECK(b.machine.checkpoints().count(10) == 1);
  SUBCASE("the vote after the checkpoint") {
    b.save(20, wrong);
    CHECK(has_note(b.report(21, right), "silent_corruption"));
  }
  SUBCASE("the checkpoint after the vote") {
    b.report(21, right);
    b.save(20, wrong);
  }
  CHECK(b.machine.checkpoints().count(20) == 0);
  CHECK(b.machine.checkpoints().count(10) == 1);
  CHECK(b.machine.record().distrusted.bad_saves == std::vector<std::uint64_t>{20 * 64 + 1});
}

TEST_CASE("after the last step the members' weights are compared before the job is completed") {
  bench b(3);
  b.save(90, "");
  b.report(100);
  b.save(100, right);
  b.say(1, finished{1, 1, 100, right});
  b.say(2, finished{1, 1, 100, right});
  SUBCASE("all agree") {
    b.say(3, finished{1, 1, 100, right});
    CHECK(b.machine.state() == job_state::completed);
  }
  SUBCASE("one holds other weights") {
    const auto list = b.say(3, finished{1, 1, 100, wrong});
    CHECK(b.corruption() == "w3;");
    CHECK(b.machine.state() != job_state::completed);
    REQUIRE(all_of<actions::release>(list).size() == 1);
    CHECK(all_of<actions::release>(list)[0].worker == w(3));
  }
}

TEST_CASE("the one that is wrong after the last step saved it too: saved again from the others") {
  bench b(3);
  b.report(100);
  b.save(100, wrong);
  b.say(1, finished{1, 1, 100, wrong});
  b.say(2, finished{1, 1, 100, right});
  const auto list = b.say(3, finished{1, 1, 100, right});
  CHECK(b.corruption().find("w1;") == 0);
  CHECK(b.machine.checkpoints().count(100) == 0);
  CHECK(b.machine.state() != job_state::completed);
  b.answer(2, 1, 100);
  const auto committed = sent<commit>(b.answer(3, 1, 100));
  REQUIRE(committed.size() == 2);
  CHECK(committed[0].second.source == source_kind::live);
  CHECK(committed[0].second.save_at_start);
}

TEST_CASE("a final checkpoint that holds other weights than its workers is written again") {
  bench b(2);
  b.report(100);
  b.save(100, wrong);
  b.say(1, finished{1, 1, 100, right});
  const auto list = b.say(2, finished{1, 1, 100, right});
  CHECK(has_note(list, "silent_corruption"));
  CHECK(b.machine.state() != job_state::completed);
  CHECK(sent<prepare>(list).size() == 2);
  b.answer(1, 1, 100);
  const auto committed = sent<commit>(b.answer(2, 1, 100));
  REQUIRE(committed.size() == 2);
  CHECK(committed[0].second.save_at_start);
}

/// A cluster of so many workers, w1 on connection 1 and so on, that is given one job.
cluster_machine cluster_of(std::uint64_t workers, const job_spec& spec) {
  cluster_machine cluster(restored_records{}, "folder");
  (void)cluster.start();
  (void)cluster.step(events::tick{1000, 1000});
  (void)cluster.step(events::submit_job{spec, "", {}});
  for (std::uint64_t n = 1; n <= workers; ++n) {
    hello h;
    h.name = fmt::format("w{}", n);
    h.process = fmt::format("p{}", n);
    h.device = "cpu";
    h.device_class = "c";
    (void)cluster.step(events::worker_attached{static_cast<connection_id>(n), h});
  }
  return cluster;
}

TEST_CASE("a distrusted worker is drained with the reason, durably, until it is undrained") {
  job_spec spec = small_spec(3, 3);
  spec.parallelism.is_explicit = true;
  spec.parallelism.stages = 1;
  spec.parallelism.replicas = 3;
  cluster_machine cluster = cluster_of(3, spec);
  const auto say = [&cluster](std::uint64_t n, to_coordinator m) {
    return cluster.step(events::worker_said{static_cast<connection_id>(n), std::move(m)});
  };
  for (std::uint64_t n = 1; n <= 3; ++n) {
    prepared p;
    p.job = 1;
    p.number = 1;
    (void)say(n, p);
  }
  const plan& shape = cluster.jobs().at(static_cast<job_id>(1)).generation()->shape;
  for (std::uint64_t n = 1; n <= 3; ++n) (void)say(n, ready{1, 1, plan_hash(shape), 0, ""});
  failed f;
  f.job = 1;
  f.generation = 1;
  f.code = "corrupt";
  f.suspects = {{2, wrong}};
  f.is_certain = true;
  f.step = 20;
  const auto list = say(1, f);
  CHECK(has_note(list, "worker_distrusted"));
  CHECK(cluster.workers().at(1).state == "DRAINED");
  CHECK(cluster.workers().at(1).reason.find("silent corruption of job small") == 0);
  bool is_durable = false;
  for (const auto& s : all_of<actions::save>(list)) {
    for (const auto& r : s.rows)
      is_durable = is_durable || (r.key == keys::worker(w(2)) && r.value && s.is_synced &&
                                  r.value->find("silent corruption") != std::string::npos);
  }
  CHECK(is_durable);
  (void)cluster.step(events::undrain_worker{"w2", {}});
  CHECK(cluster.workers().at(1).state == "IDLE");
}

TEST_CASE("a patrol walks from checkpoint to checkpoint, and what it finds sends the job back") {
  job_spec spec = small_spec(1, 1);
  spec.elasticity.patrol = true;
  restored_job restored;
  restored.record.id = static_cast<job_id>(1);
  restored.record.spec = spec;
  restored.record.state = job_state::running;
  restored.record.step = 35;
  for (const std::uint64_t step : {0, 10, 20, 30}) {
    checkpoint_record& c = restored.checkpoints[step];
    c.step = step;
    c.seq = step + 1;
    c.chain = 1000 + step;
  }
  generation_record g;
  g.shape.job = static_cast<job_id>(1);
  g.shape.generation = 1;
  g.shape.shape.unit_cuts = {0, 4};
  g.shape.shape.leaf_cuts = {0, 8};
  g.shape.members.push_back({w(1), "p1", "w1", "127.0.0.1", 4000});
  restored.generation = g;
  restored.generations[1] = g;
  job_machine machine(std::move(restored));
  (void)machine.step(job_events::tick{1000, 1000});
  hello h;
  h.job = 1;
  h.generation = 1;
  h.plan_hash = plan_hash(g.shape);
  h.phase = static_cast<int>(worker_phase::running);
  h.step = 35;
  h.name = "w1";
  (void)machine.step(job_events::worker_connected{w(1), h});
  REQUIRE(machine.state() == job_state::running);

  REQUIRE(machine.next_audit());
  CHECK(machine.next_audit()->from == 0);
  CHECK(machine.next_audit()->to == 10);
  audited same;
  same.is_identical = true;
  (void)machine.step(job_events::window_audited{"idle", 0, 10, same});
  CHECK(machine.record().audited_step == 10);
  REQUIRE(machine.next_audit());
  CHECK(machine.next_audit()->from == 10);
  // An answer to a window that is not asked for any more is not listened to.
  audited bad;
  bad.what = "weights";
  bad.step = 17;
  bad.tensors = {"wpe.weight"};
  CHECK(machine.step(job_events::window_audited{"idle", 0, 10, bad}).empty());

  const auto list = machine.step(job_events::window_audited{"idle", 10, 20, bad});
  std::map<std::string, std::string> fields;
  for (const auto& n : all_of<actions::note>(list)) {
    if (n.record.kind == "silent_corruption") fields = n.record.fields;
  }
  CHECK(fields["workers"] == "w1");
  CHECK(fields["step"] == "17");
  CHECK(fields["tensors"] == "wpe.weight");
  CHECK(machine.checkpoints().size() == 2);  // steps 0 and 10
  CHECK(machine.record().distrusted.bad_saves == std::vector<std::uint64_t>{21, 31});
  const auto released = all_of<actions::release>(list);
  REQUIRE(released.size() == 1);
  CHECK(released[0].is_distrusted);
  // Its place is free: the next worker starts from the checkpoint that was found right.
  CHECK(machine.state() == job_state::pending);
  (void)machine.step(job_events::workers_given{{bench::facts(2)}});
  prepared p;
  p.job = 1;
  p.number = machine.record().number;
  const auto asked =
      all_of<actions::find_checkpoint>(machine.step(job_events::worker_said{w(2), p}));
  REQUIRE(asked.size() == 1);
  CHECK(asked[0].step_max == 10);
}

TEST_CASE("a free worker is asked to compute a window again, and a job's need for it comes first") {
  job_spec spec = small_spec(1, 1);
  spec.elasticity.patrol = true;
  cluster_machine cluster = cluster_of(2, spec);
  const auto say = [&cluster](std::uint64_t n, to_coordinator m) {
    return cluster.step(events::worker_said{static_cast<connection_id>(n), std::move(m)});
  };
  prepared p;
  p.job = 1;
  p.number = 1;
  (void)say(1, p);
  const plan& shape = cluster.jobs().at(static_cast<job_id>(1)).generation()->shape;
  (void)say(1, ready{1, 1, plan_hash(shape), 0, ""});
  part_saved x;
  x.job = 1;
  x.generation = 1;
  x.plan_hash = plan_hash(shape);
  x.step = 10;
  x.chain = 1010;
  x.part.tensors = stage_tensor_names(spec.model, 0, 4);
  (void)say(1, x);
  (void)cluster.step(manifest_written{static_cast<job_id>(1), 10, true, ""});
  progress reported{1, 1, plan_hash(shape), {}};
  step_report r;
  r.step = 12;
  reported.steps.push_back(r);
  (void)say(1, reported);

  const auto gathers = all_of<actions::gather_audit>(cluster.step(events::tick{1100, 1100}));
  REQUIRE(gathers.size() == 1);
  CHECK(gathers[0].worker == w(2));
  CHECK(gathers[0].from == 0);
  CHECK(gathers[0].to == 10);
  CHECK(all_of<actions::gather_audit>(cluster.step(events::tick{1200, 1200})).empty());
  events::audit_gathered gathered{w(2), {}, ""};
  gathered.message.job = 1;
  gathered.message.audit = gathers[0].audit;
  const auto orders = sent<audit>(cluster.step(gathered));
  REQUIRE(orders.size() == 1);
  CHECK(orders[0].first == w(2));

  SUBCASE("its word goes to the job") {
    audited same;
    same.job = 1;
    same.audit = gathers[0].audit;
    same.is_identical = true;
    CHECK(has_note(say(2, same), "window_audited"));
    CHECK(cluster.jobs().at(static_cast<job_id>(1)).record().audited_step == 10);
    CHECK(!has_note(say(2, same), "window_audited"));  // said twice, counted once
  }
  SUBCASE("a job takes it") {
    job_spec other = small_spec(1, 1);
    other.name = "other";
    const auto list = cluster.step(events::submit_job{other, "", {}});
    CHECK(sent<prepare>(list).size() == 1);
    const auto stops = sent<stop_audit>(list);
    REQUIRE(stops.size() == 1);
    CHECK(stops[0].first == w(2));
  }
  SUBCASE(
      "its channel is replaced before the old one closes: the order may be lost, another goes "
      "out") {
    hello again;
    again.name = "w2";
    again.process = "p2";
    again.device = "cpu";
    again.device_class = "c";
    const auto list = cluster.step(events::worker_attached{static_cast<connection_id>(9), again});
    const auto anew = all_of<actions::gather_audit>(list);
    REQUIRE(anew.size() == 1);
    CHECK(anew[0].audit != gathers[0].audit);
    audited old;
    old.job = 1;
    old.audit = gathers[0].audit;
    old.is_identical = true;
    CHECK(!has_note(say(9, old), "window_audited"));
  }
  SUBCASE("the job ends: what could not be done then is tried again later") {
    (void)cluster.step(events::cancel_job{static_cast<job_id>(1), true, {}});
    REQUIRE(cluster.jobs().at(static_cast<job_id>(1)).state() == job_state::cancelled);
    audited not_done;
    not_done.job = 1;
    not_done.audit = gathers[0].audit;
    not_done.is_done = false;
    not_done.text = "no such file";
    CHECK(all_of<actions::gather_audit>(say(2, not_done)).empty());
    std::size_t count = 0;
    for (std::int64_t now = 1300; now < 40'000; now += 100) {
      (void)say(2, beat{});
      count += all_of<actions::gather_audit>(cluster.step(events::tick{now, now})).size();
    }
    CHECK(count == 1);
  }
}

TEST_CASE("what a patrol finds while the job is paused leaves it paused") {
  restored_job restored = bench::fresh(1, 1);
  restored.record.spec.elasticity.patrol = true;
  restored.record.state = job_state::paused;
  restored.record.step = 20;
  for (const std::uint64_t step : {0, 10, 20}) {
    checkpoint_record& c = restored.checkpoints[step];
    c.step = step;
    c.seq = step + 1;
  }
  generation_record g;
  g.shape.generation = 1;
  g.shape.shape.unit_cuts = {0, 4};
  g.shape.shape.leaf_cuts = {0, 8};
  g.shape.members.push_back({w(1), "p1", "w1", "127.0.0.1", 4000});
  restored.generation = g;
  restored.generations[1] = g;
  job_machine machine(std::move(restored));
  (void)machine.step(job_events::tick{1000, 1000});
  REQUIRE(machine.next_audit());
  CHECK(machine.next_audit()->computed_by == std::set<worker_id>{w(1)});
  audited bad;
  bad.what = "weights";
  bad.step = 7;
  const auto list = machine.step(job_events::window_audited{"idle", 0, 10, bad});
  const auto released = all_of<actions::release>(list);
  REQUIRE(released.size() == 1);
  CHECK(released[0].worker == w(1));
  CHECK(released[0].is_distrusted);
  CHECK(machine.state() == job_state::paused);
  CHECK(machine.checkpoints().size() == 1);
}

TEST_CASE("a restart of the coordinator forgets no open case: the step done again names the liar") {
  bench b(2);
  b.save(10, "");
  b.save(20, "");
  b.report(20);
  b.dispute({{1, right}, {2, wrong}}, false, 20);
  b.restart();
  SUBCASE("both stand, as they stood when their vote failed") {
    b.reconnect(1, worker_phase::prepared, 20);
    CHECK(sent<prepare>(b.reconnect(2, worker_phase::prepared, 20)).size() == 2);
  }
  SUBCASE("they run: a generation that is not trusted is not adopted") {
    b.reconnect(1, worker_phase::running, 20);
    const auto asked = sent<prepare>(b.reconnect(2, worker_phase::running, 20));
    REQUIRE(asked.size() == 2);
    CHECK(asked[0].second.number >= asked[0].second.distrusted.fence);
    CHECK(asked[0].second.distrusted.suspects.size() == 2);
  }
  SUBCASE("what its members say of the vote again opens no second case") {
    b.reconnect(1, worker_phase::prepared, 20);
    const auto list = b.dispute({{1, right}, {2, wrong}}, false, 20);
    CHECK(!has_note(list, "silent_corruption"));
    b.reconnect(2, worker_phase::prepared, 20);
  }
  b.answer(1, 1, 20);
  const auto asked = all_of<actions::find_checkpoint>(b.answer(2, 1, 20));
  REQUIRE(asked.size() == 1);
  CHECK(asked[0].distrusted.fence > 1);
  CHECK(asked[0].distrusted.step == 19);
  CHECK(asked[0].distrusted.bad_saves == std::vector<std::uint64_t>{20 * 64 + 1});
  checkpoint_facts facts;
  facts.step = 10;
  facts.seq = 1;
  facts.chain = 1010;
  const auto committed =
      sent<commit>(b.step(checkpoint_found{static_cast<job_id>(1), asked[0].request, facts, {}}));
  REQUIRE(committed.size() == 2);
  CHECK(committed[0].second.distrusted.fence == asked[0].distrusted.fence);
  b.load(1, 10);
  b.load(2, 10);
  b.restart();  // once more, in the generation that does the steps again
  b.reconnect(1, worker_phase::running, 18);
  b.reconnect(2, worker_phase::running, 18);
  REQUIRE(b.machine.state() == job_state::running);
  const auto judged = b.report(21, right);
  const auto released = all_of<actions::release>(judged);
  REQUIRE(released.size() == 1);
  CHECK(released[0].worker == w(2));
  CHECK(released[0].is_distrusted);
  CHECK(released[0].reason.find("silent corruption") == 0);
  b.restart();
  CHECK(b.machine.record().distrusted.suspects.empty());
}

TEST_CASE("after a restart an evicted worker is no member, and what it holds is nobody's state") {
  bench b(3);
  b.report(20);
  b.dispute({{2, wrong}}, true, 20);
  b.restart();
  CHECK(!b.machine.expects(w(2)));
  CHECK(b.machine.expects(w(1)));
  b.reconnect(1, worker_phase::prepared, 20);
  const auto asked = sent<prepare>(b.reconnect(3, worker_phase::prepared, 20));
  REQUIRE(asked.size() == 2);  // nobody waits for it
  CHECK(asked[0].second.distrusted.workers == std::vector<std::uint64_t>{2});
}

TEST_CASE("a deputy that had not heard of the rollback: its plan and its state are not taken") {
  bench b(2);
  b.save(10, "");
  b.report(20);
  b.dispute({{1, right}, {2, wrong}}, false, 20);
  b.restart();
  plan_report r;
  r.job = 1;
  r.shape = b.machine.generation()->shape;
  r.shape.generation = 2;
  r.step = 20;
  r.chain = 1020;
  r.decided_by = "w1";
  hello h;
  h.name = "w1";
  h.process = "p1";
  h.device_class = "c";
  h.job = 1;
  h.generation = h.promised = 2;
  h.plan_hash = plan_hash(r.shape);
  h.phase = static_cast<int>(worker_phase::running);
  h.step = 25;
  b.step(job_events::worker_connected{w(1), h});
  SUBCASE("of before the fence") {
    const auto list = b.say(1, r);
    CHECK(!has_note(list, "deputy_decided"));
    const auto asked = sent<prepare>(list);
    REQUIRE(asked.size() == 1);
    CHECK(asked[0].second.number >= b.machine.record().distrusted.fence);
    b.answer(1, 2, 25);
    // It was not waited for either: step 25 is no step of this run.
    CHECK(b.machine.view().step < 25);
  }
  SUBCASE("of one that had, and found another liar") {
    r.shape.generation = b.machine.record().distrusted.fence + 1;
    r.distrusted = b.machine.record().distrusted;
    r.distrusted.workers = {2};
    h.generation = h.promised = r.shape.generation;
    h.plan_hash = plan_hash(r.shape);
    b.step(job_events::worker_connected{w(1), h});
    const auto list = b.say(1, r);
    CHECK(has_note(list, "deputy_decided"));
    const auto released = all_of<actions::release>(list);
    REQUIRE(released.size() == 1);
    CHECK(released[0].worker == w(2));
    CHECK(released[0].is_distrusted);
  }
}
