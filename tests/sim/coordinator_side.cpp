// The coordinator's shell: carries out what its machine says, on a store and a disk that may fail.
#include "coordinator/wire.hpp"
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

void cluster::start_coordinator() {
  const std::uint64_t mine = ++incarnation_;
  std::vector<store_row> rows(rows_.begin(), rows_.end());
  restored_records restored = restore_records(rows);
  for (const std::string& problem : restored.problems) violate("restore: {}", problem);
  coordinator_ =
      std::make_unique<cluster_machine>(std::move(restored), std::string(), detection{}, shares_);
  say("coordinator starts, incarnation {}", coordinator_->incarnation());
  for (action& a : coordinator_->start()) todo_.push_back(std::move(a));
  every(0, 100 * ms, [this, mine] {
    if (incarnation_ != mine || !coordinator_) return false;
    tell(events::tick{now_ / ms, now_ / ms});
    return true;
  });
  pump();
}

void cluster::crash_coordinator(const char* why) {
  say("coordinator crashes: {}", why);
  ++result_.coordinator_crashes;
  disturb(20 * second);
  ++incarnation_;
  coordinator_.reset();
  todo_.clear();
  if (is_saving_ && chance(0.5)) do_save(saving_);  // it may have reached the disk
  is_saving_ = false;
  for (auto& [id, c] : connections_) cut(c, delay(ms, 20 * ms), -1);
  in(delay(100 * ms, 5 * second), [this] { start_coordinator(); });
}

void cluster::tell(const event& e) {
  if (!coordinator_) return;
  ++result_.events;
  for (action& a : coordinator_->step(e)) todo_.push_back(std::move(a));
  pump();
}

void cluster::do_save(const actions::save& s) {
  for (const actions::row& r : s.rows) {
    if (r.value) {
      rows_[r.key] = *r.value;
    } else {
      rows_.erase(r.key);
    }
    if (r.key.ends_with("/record") && r.value) {
      const auto record = from_json_text<job_record>(*r.value);
      if (!record) {
        violate("row {} does not read: {}", r.key, record.err().message);
        continue;
      }
      check_record(*record);
    }
  }
}

void cluster::pump() {
  while (!todo_.empty() && !is_saving_ && coordinator_) {
    if (are_faults_on_ && chance(rates_.action_crash))
      return crash_coordinator("between two actions");
    action a = std::move(todo_.front());
    todo_.pop_front();
    carry_out(a);
  }
}

void cluster::carry_out(action& a) {
  const std::uint64_t mine = incarnation_;
  const auto later = [this, mine](us after, event e) {
    in(after, [this, mine, e = std::move(e)] {
      if (incarnation_ == mine) tell(e);
    });
  };
  if (auto* s = std::get_if<actions::save>(&a)) {
    if (!s->is_synced) return do_save(*s);
    is_saving_ = true;
    saving_ = *s;
    in(delay(200, 10 * ms), [this, mine] {
      if (incarnation_ != mine) return;
      is_saving_ = false;
      do_save(saving_);
      pump();
    });
  } else if (auto* x = std::get_if<actions::send>(&a)) {
    if (const auto* c = std::get_if<commit>(&x->message)) check_commit(*c);
    down(x->connection, x->message);
  } else if (auto* c = std::get_if<actions::close>(&a)) {
    const auto found = connections_.find(static_cast<std::uint64_t>(c->connection));
    if (found != connections_.end()) cut(found->second, delay(ms, 10 * ms), delay(0, ms));
  } else if (auto* f = std::get_if<actions::find_checkpoint>(&a)) {
    checkpoint_found answer{f->job, f->request, std::nullopt, {}};
    for (const auto& [step, m] : manifests_[value(f->job)]) {
      if (step > f->step_max) continue;
      if (is_good(value(f->job), m)) {
        answer.newest = m.facts;
      } else {
        answer.notes.push_back(fmt::format("step {} is damaged", step));
      }
    }
    later(delay(ms, 300 * ms), answer);
  } else if (auto* m = std::get_if<actions::write_manifest>(&a)) {
    if (are_faults_on_ && chance(rates_.disk_full)) {
      return later(delay(ms, 50 * ms), manifest_written{m->job, m->step, false, "disk full"});
    }
    check_manifest(*m);
    // The write and its answer are apart: the coordinator may die in between.
    in(delay(ms, 30 * ms), [this, mine, m = *m, later] {
      if (incarnation_ != mine && chance(0.5)) return;
      ++result_.saves;
      manifests_[value(m.job)][m.step] = {
          {m.step, m.seq, m.chain, m.loss, m.weights_hash, m.parts}};
      later(delay(ms, 30 * ms), manifest_written{m.job, m.step, true, ""});
    });
  } else if (auto* r = std::get_if<actions::retire_checkpoints>(&a)) {
    auto& have = manifests_[value(r->job)];
    checkpoints_retired answer{r->job, {}};
    // As the real one: the newest that verifies stays, however old.
    std::uint64_t newest_good = 0;
    for (const auto& [step, m] : have) {
      if (is_good(value(r->job), m)) newest_good = step;
    }
    int too_many = static_cast<int>(have.size()) - r->keep_last;
    for (auto m = have.begin(); m != have.end() && too_many > 0; --too_many) {
      if (m->first == newest_good) break;
      answer.steps.push_back(m->first);
      m = have.erase(m);
    }
    if (!answer.steps.empty()) later(delay(ms, 20 * ms), answer);
  } else if (auto* n = std::get_if<actions::note>(&a)) {
    check_stuck(n->record);
    const event_record& e = n->record;
    rows_[keys::event(e.job, e.number)] = to_json_text(e);
    say("   [{}] {}: {}", value(e.job), e.kind, e.text);
    if (e.kind == "divergence") violate("divergence: {}", e.text);
    if (e.kind == "worker_lost") ++result_.lost_workers;
    check_preemption(e);
  }
}

}  // namespace stagecoach::sim
