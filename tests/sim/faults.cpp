#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

void cluster::kill(const process_ptr& p) {
  if (!p->is_alive) return;
  say("{} is killed", p->name);
  disturb(30 * second);
  close_links(p);
  close_feed(p);
  p->is_alive = false;
  p->has_lost_host = chance(0.1);
  if (p->channel) {
    cut(p->channel, -1,
        p->has_lost_host ? delay(second, 10 * second)
        : chance(0.9)    ? delay(ms, 20 * ms)
                         : delay(second, 10 * second));
  }
  in(delay(100 * ms, 8 * second), [this, name = p->name] { start_process(name); });
}

/// Another coordinator is started while one lives that does not know of it (a stop too short to
/// notice, and somebody impatient), and channels break while both answer. Generators of their own:
/// other histories stay as they were.
void cluster::rivals(std::uint64_t seed) {
  if (seed % 11 != 5) return;
  auto own = std::make_shared<std::mt19937_64>(mix(seed, hash_name("rival")));
  every(second, 250 * ms, [this, own] {
    const std::uint64_t what = (*own)() % 40, which = (*own)(), for_ms = 1'000 + (*own)() % 8'000;
    if (!are_faults_on_) return false;
    const bool are_two = former_ && former_->is_alive && coordinator_;
    if (are_two) {
      std::uint64_t n = which;
      for (auto& [name, p] : processes_) {
        if (p->is_alive && p->channel && (n >>= 1) % 2 == 0) cut(p->channel, ms, ms);
      }
    } else if (what == 0 && coordinator_ && !coordinator_->is_frozen) {
      say("a second coordinator is started");
      disturb(60 * second);
      const coordinator_ptr c = former_ = coordinator_;
      start_coordinator();
      in(static_cast<us>(for_ms) * ms, [this, c] { crash(c, "it has a successor"); });
    }
    return true;
  });
}

void cluster::faults() {
  if (now_ >= faults_until_) {
    say("faults end");
    are_faults_on_ = false;
    for (auto& [name, p] : processes_) {
      tell(events::undrain_worker{name, reply_id{}});
    }
    // Who operates the cluster goes on until everything runs.
    every(second, 5 * second, [this] {
      if (coordinator_) {
        for (const worker_view& w : coordinator_->machine->workers()) {
          if (w.state == "DRAINED" || w.state == "DRAINING")
            tell(events::undrain_worker{w.name, reply_id{}});
        }
        for (const job_view& j : coordinator_->machine->job_views()) {
          if (j.state == "PAUSED" || j.state == "CHECKPOINTING")
            tell(events::resume_job{j.id, reply_id{}});
        }
      }
      return true;
    });
    return;
  }
  constexpr double period = 0.1;
  if (chance(rates_.priority * period)) change_priority();
  if (auto p = pick(); p && chance(rates_.pace * period)) {
    p->step_ms = static_cast<int>(draw(5, 300));
    p->paced_at = now_;
    say("{} takes {} ms for a step alone now", p->name, p->step_ms);
  }
  if (auto p = pick(); p && chance(rates_.kill * period)) kill(p);
  if (auto p = pick(); p && !p->is_frozen && chance(rates_.freeze * period)) {
    const us for_us = delay(200 * ms, 15 * second);
    say("{} freezes for {} ms", p->name, for_us / ms);
    p->is_frozen = true;
    disturb(for_us + 20 * second);
    // Its peers' links notice after a second of silence.
    if (for_us > second && p->trainer.are_links_open) {
      const toy_trainer& t = p->trainer;
      for (int r = 0; r < static_cast<int>(t.shape.members.size()); ++r) {
        const process_ptr other = peer_of(t, r);
        if (r == t.rank || !share_links(p, other)) continue;
        const auto tell_peer = [this, p, other, rank = t.rank, hash = t.hash](const char* what) {
          if (other->trainer.hash == hash && share_links(p, other))
            report_link(other, rank, what, 0);
        };
        in(second, [tell_peer] { tell_peer("suspected"); });
        in(for_us + 10 * ms, [tell_peer] { tell_peer("recovered"); });
      }
    }
    in(for_us, [this, p] {
      say("{} thaws", p->name);
      p->steady_since = now_;
      thaw(p);
    });
  }
  if (auto p = pick(); p && p->channel && chance(rates_.cut_control * period)) {
    disturb(40 * second);
    say("{} loses its control channel", p->name);
    cut(p->channel, delay(ms, chance(0.2) ? 5 * second : 50 * ms),
        delay(ms, chance(0.2) ? 5 * second : 50 * ms));
  }
  if (auto p = pick(); p && p->trainer.are_links_open && chance(rates_.cut_link * period)) {
    const int r = static_cast<int>(draw(0, p->trainer.shape.members.size() - 1));
    const process_ptr other = peer_of(p->trainer, r);
    if (r != p->trainer.rank && share_links(p, other)) {
      disturb(40 * second);
      say("the link between {} and {} breaks", p->name, other->name);
      p->trainer.lost_peers.insert(r);
      other->trainer.lost_peers.insert(p->trainer.rank);
      report_link(p, r, "lost", delay(ms, 20 * ms));
      report_link(other, p->trainer.rank, "lost", delay(ms, 20 * ms));
    }
  }
  if (island_.empty() && chance(rates_.partition * period)) cut_off();
  if (coordinator_ && chance(rates_.coordinator_crash * period)) crash(coordinator_, "killed");
  if (coordinator_ && !coordinator_->is_frozen && chance(rates_.coordinator_freeze * period))
    freeze_coordinator();
  if (chance(rates_.corrupt * period)) {
    for (auto& [job, have] : manifests_) {
      const auto good = std::count_if(have.begin(), have.end(), [&, job = job](const auto& m) {
        return is_good(job, m.second);
      });
      if (good < 2 || !chance(0.5)) continue;  // without any the job rightly pauses
      for (const part_record& part : have.rbegin()->second.facts.parts) {
        parts_[job][part.file].is_corrupt = true;
        say("checkpoint {} of job {} is damaged", have.rbegin()->first, job);
        break;
      }
    }
  }
  if (auto p = pick(); p && chance(rates_.drain * period)) {
    disturb(40 * second);
    say("{} is to be drained", p->name);
    tell(events::drain_worker{p->name, "test", reply_id{}});
    in(delay(second, 10 * second), [this, name = p->name] {
      tell(events::undrain_worker{name, reply_id{}});
    });
  }
  if (!specs_.empty() && chance(rates_.pause * period)) {
    const auto job = static_cast<job_id>(draw(1, specs_.size()));
    disturb(40 * second);
    say("job {} is to pause", value(job));
    tell(events::pause_job{job, reply_id{}});
    in(delay(second, 10 * second), [this, job] { tell(events::resume_job{job, reply_id{}}); });
  }
  in(static_cast<us>(period * second), [this] { faults(); });
}

}  // namespace stagecoach::sim
