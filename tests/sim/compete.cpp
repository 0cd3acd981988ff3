// Jobs that compete: priorities that change, and what must hold of taking workers away.
#include <algorithm>

#include "coordinator/wire.hpp"
#include "model/plan.hpp"
#include "model/tensor_names.hpp"
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

void cluster::change_priority() {
  if (specs_.empty()) return;
  const auto job = static_cast<job_id>(draw(1, specs_.size()));
  const int priority = static_cast<int>(draw(0, 4));
  say("job {} gets priority {}", value(job), priority);
  disturb();
  tell(events::set_priority{job, priority, reply_id{}});
}

/// No victim is touched unless the new gang then fits: undisturbed, it starts.
void cluster::check_preemption(const event_record& e) {
  if (e.kind != "preemption") return;
  ++result_.preemptions;
  const std::string id = e.fields.at("job");
  const std::uint64_t job = std::stoull(id.substr(2));
  const bool is_quiet = now_ >= quiet_since_;
  // A last step, a checkpoint, a generation; a step takes up to 150 ms and a message 20 ms.
  in(10 * second, [this, job, is_quiet, before = starts_[job], disturbances = disturbances_] {
    if (!is_quiet || disturbances != disturbances_ || starts_[job] != before) return;
    // A trainer that hung shortly before is found out only now, and is of no use to the new gang.
    const bool is_one_hung = std::any_of(processes_.begin(), processes_.end(),
                                         [this](const auto& p) { return was_hung(p.second); });
    if (is_one_hung) return;
    if (rates_.disk_full > 0 || rates_.disk_slow > 0 || rates_.slow > 0 ||
        completed_.count(job) != 0)
      return;
    violate("workers were taken from others for job {}, and it did not start: {}", job,
            coordinator_ ? coordinator_->machine->why(static_cast<job_id>(job)) : "");
  });
}

/// Leaves and layers don't go to and fro: one move in a cool-down, and that long after a generation
/// began, by the coordinator's time, which a slow disk holds up.
void cluster::check_moves(const event_record& e) {
  const std::uint64_t job = value(e.job);
  if (e.kind == "leaves_moved" || e.kind == "layers_moved") {
    if (e.kind == "leaves_moved") ++result_.leaf_moves;
    const auto started = started_.find(job);
    if (started != started_.end() &&
        e.unix_ms - started->second < shares_.leaves.cool_down_ms - 200) {
      violate("{} of job {}, {} ms after its generation began", e.kind, job,
              e.unix_ms - started->second);
    }
  } else if (e.kind == "generation_started" || e.kind == "generation_adopted") {
    started_[job] = e.unix_ms;
  }
}

/// Layers move because they are done sooner by that, and what they take is there before.
void cluster::check_layer_move(const commit& c, const plan& former) {
  ++result_.layer_moves;
  if (now_ < quiet_since_) return;
  // Moments that replicas share are not fed.
  if (!c.transfers.empty() && !is_sharded(c.spec, c.shape.shape.replica_count)) {
    return violate("generation {} of job {} moves layers, and {} tensors are still to be copied",
                   c.shape.generation, value(c.shape.job), c.transfers.size());
  }
  const auto slowest = [this, &c](const plan& p) {
    double most = 0;
    for (std::size_t rank = 0; rank < p.members.size(); ++rank) {
      const auto r = static_cast<std::size_t>(p.replica_of(static_cast<int>(rank)));
      const int leaves = p.shape.leaf_cuts[r + 1] - p.shape.leaf_cuts[r];
      most = std::max(most, leaves * by_id_.at(p.members[rank].process)->step_ms *
                                stage_share(p, c.spec, static_cast<int>(rank)));
    }
    return most;
  };
  for (const plan_member& m : c.shape.members) {
    // Whose pace changed while the layers were on their way.
    if (now_ - by_id_.at(m.process)->paced_at < 20 * second) return;
  }
  const double before = slowest(former), after = slowest(c.shape);
  if (after > before * (1 - shares_.leaves.gain_min) * 1.001) {
    violate(
        "generation {} of job {} moves layers: its slowest stage took {:.0f} before, {:.0f} now",
        c.shape.generation, value(c.shape.job), before, after);
  }
}

/// A generation has no fewer workers than its job asks for.
void cluster::check_size(const commit& c) {
  const std::uint64_t job = value(c.shape.job);
  ++starts_[job];
  const job_spec& spec = specs_.at(job);
  const parallelism_spec& p = spec.parallelism;
  int least = spec.elasticity.workers_min;
  if (p.is_explicit) least = std::min(least, p.stages * p.replicas);
  const auto smallest = choose_layout(spec, least);
  if (smallest && c.shape.shape.worker_count() < smallest->worker_count()) {
    violate("generation {} of job {} has {} workers; it asks for {} at least", c.shape.generation,
            job, c.shape.shape.worker_count(), least);
  }
  const auto row = from_json_text<generation_record>(
      rows_.at(keys::generation(c.shape.job, c.shape.generation)));
  const bool is_shrink = row && row->reason.starts_with("shrink");
  const bool is_balance = row && row->reason.starts_with("balance");
  // Whoever did not answer makes it another layout. Where replicas share the optimizer's moments
  // they load what they are given of the weights anew.
  const plan& former = newest_plans_[job];
  const bool has_same_stages = former.shape.unit_cuts == c.shape.shape.unit_cuts &&
                               former.members.size() == c.shape.members.size();
  const bool has_moved =
      has_same_stages && !c.transfers.empty() && !spec.parallelism.shard_optimizer;
  if (is_balance && now_ >= quiet_since_ && (c.step < applied_[job] || has_moved)) {
    violate("generation {} of job {} moves leaves, {} tensors and {} steps back",
            c.shape.generation, job, c.transfers.size(), applied_[job] - c.step);
  }
  if (is_balance && former.members.size() == c.shape.members.size() &&
      former.shape.unit_cuts != c.shape.shape.unit_cuts)
    check_layer_move(c, former);
  if (is_shrink && now_ >= quiet_since_ && c.step < applied_[job]) {
    violate("generation {} of job {} gives workers away and starts at step {}; step {} was done",
            c.shape.generation, job, c.step, applied_[job]);
  }
  applied_[job] = c.step;  // a loss may have taken what was done after it
}

}  // namespace stagecoach::sim
