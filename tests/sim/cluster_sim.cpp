// Sets up one history from its seed and runs it to its end.
#include "tests/sim/cluster_sim.hpp"

#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

void cluster::set_up(std::uint64_t seed) {
  uses_wire_ = seed % 4 == 0;
  worker_count_ = static_cast<int>(draw(1, 6));
  // Rates are drawn per seed: some histories are calm, some are storms.
  const auto rate = [this](double max) {
    return chance(0.5) ? 0.0 : max * static_cast<double>(draw(0, 100)) / 100;
  };
  rates_.kill = rate(0.5);
  rates_.freeze = rate(0.15);
  rates_.cut_control = rate(0.3);
  rates_.cut_link = rate(0.2);
  rates_.coordinator_crash = rate(0.1);
  rates_.action_crash = rate(0.01);
  rates_.disk_full = rate(0.1);
  rates_.corrupt = rate(0.05);
  rates_.drain = rate(0.2);
  rates_.pause = rate(0.1);
  rates_.slow = rate(0.05);
  rates_.coordinator_freeze = rate(0.05);
  rates_.disk_slow = rate(0.1);
  rates_.worker_action_crash = rate(0.002);
  rates_.partition = rate(0.1);
  rates_.long_absence = rate(1.0);
  if (chance(0.2)) {  // a deputy's day: workers are lost while the coordinator is away
    rates_.long_absence = 1;
    rates_.coordinator_crash = std::max(rates_.coordinator_crash, 0.08);
    rates_.kill = std::max(rates_.kill, 0.2);
  }
  // Some histories have no faults: jobs compete for workers, and what was taken from one must have
  // been of use to another.
  const bool is_contest = chance(0.2);
  if (is_contest) rates_ = {};
  rates_.priority = rate(0.2);
  rates_.pace = rate(0.1);
  shares_.leaves.ms = static_cast<std::int64_t>(draw(0, 3'000));
  shares_.leaves.cool_down_ms = static_cast<std::int64_t>(draw(1'000, 10'000));
  shares_.runtime_min = static_cast<std::int64_t>(draw(200, 5'000));
  shares_.age_step = static_cast<std::int64_t>(draw(5'000, 60'000));
  faults_until_ = delay(10 * second, 60 * second);
  for (int i = 0; i < worker_count_; ++i) {
    in(delay(0, 3 * second), [this, i] { start_process(fmt::format("w{}", i)); });
  }
  start_coordinator();
  const int jobs = static_cast<int>(is_contest ? draw(2, 5) : draw(1, 3));
  for (int i = 0; i < jobs; ++i) {
    in(delay(0, (is_contest ? 30 : 5) * second), [this, spec = make_spec(i)] {
      // A client tries until it is answered; by name, so a second try is a conflict and not a
      // second job.
      every(0, 300 * ms, [this, spec] {
        for (const auto& [id, known] : specs_) {
          if (known.name == spec.name) return false;
        }
        disturb();
        if (coordinator_) tell(events::submit_job{spec, "", reply_id{1}});
        return true;
      });
    });
  }
  in(500 * ms, [this] { faults(); });
  hangs(seed);
  rivals(seed);
}

job_spec cluster::make_spec(int index) {
  job_spec s;
  s.name = fmt::format("job{}", index);
  s.priority = static_cast<int>(draw(0, 2));
  s.model.n_layer = static_cast<std::int64_t>(draw(1, 3));
  s.model.d_model = 8;
  s.model.n_head = 2;
  s.model.d_ff = 32;
  s.model.vocab_size = 16;
  s.model.context = 8;
  s.model.init = "random";
  s.batch.global_sequences = 8;
  s.batch.micro_sequences = 1;
  s.batch.sequence_tokens = 8;
  s.batch.leaf_count = 8;
  s.stop_steps = static_cast<std::int64_t>(chance(0.3) ? draw(1, 20) : draw(20, 300));
  s.elasticity.workers_min =
      static_cast<int>(draw(1, static_cast<std::uint64_t>(std::max(1, worker_count_ - 1))));
  s.elasticity.workers_max = s.elasticity.workers_min + static_cast<int>(draw(0, 3));
  if (chance(0.3)) {  // takes all it can get, and can give nearly all of it back
    s.elasticity.workers_min = 1;
    s.elasticity.workers_max = worker_count_;
  }
  s.elasticity.on_loss = chance(0.7) ? "replace" : chance(0.5) ? "shrink" : "wait";
  s.elasticity.wait_for_min_ms = static_cast<std::int64_t>(draw(2'000, 30'000));
  s.elasticity.max_failures = 100'000;
  s.elasticity.copies = static_cast<int>(draw(0, 2));
  s.parallelism.shard_optimizer = chance(0.3);
  if (chance(0.5)) {
    s.parallelism.is_explicit = true;
    s.parallelism.stages =
        static_cast<int>(draw(1, static_cast<std::uint64_t>(std::min(3, worker_count_))));
    s.parallelism.replicas = static_cast<int>(
        draw(1, static_cast<std::uint64_t>(std::max(1, worker_count_ / s.parallelism.stages))));
  }
  s.checkpoint.every_steps = chance(0.2) ? 0 : static_cast<std::int64_t>(draw(3, 20));
  s.checkpoint.keep_last = static_cast<int>(draw(1, 3));
  s.checkpoint.store = "folder";
  return s;
}

outcome cluster::run() {
  const us end = faults_until_ + 400 * second;
  while (!queue_.empty() && result_.safety.empty()) {
    entry next = queue_.top();
    queue_.pop();
    if (next.time > end) break;
    now_ = next.time;
    next.what();
    if (!are_faults_on_ && !specs_.empty() && completed_.size() == specs_.size() &&
        now_ > 8 * second) {
      if (result_.deputy_generations == 0) break;
      // Whoever ran on another side of a cut hears of the end, too.
      if (ended_us_ < 0 || !coordinator_ || coordinator_->is_frozen) ended_us_ = now_;
      if (now_ - ended_us_ < 30 * second) continue;
      check_one_run();
      break;
    }
  }
  result_.generations = plans_.size();
  if (result_.safety.empty() && (completed_.size() != specs_.size() || specs_.empty())) {
    for (const auto& [job, spec] : specs_) {
      if (completed_.count(job) != 0) continue;
      result_.liveness += fmt::format(
          "job {} did not end: {}; ", job,
          coordinator_ ? coordinator_->machine->why(static_cast<job_id>(job)) : "no coordinator");
    }
    if (specs_.empty()) result_.liveness = "no job was ever accepted";
  }
  return result_;
}

outcome run_cluster(std::uint64_t seed, bool is_loud) { return cluster(seed, is_loud).run(); }

}  // namespace stagecoach::sim
