// The coordinator's shell: carries out what its machine says, on a store and a disk that may fail.
#include "coordinator/wire.hpp"
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

void cluster::start_coordinator() {
  if (coordinator_) {
    lose_log(coordinator_);
    coordinator_->is_fenced = true;
  }
  auto c = std::make_shared<coordinator_process>();
  std::vector<store_row> rows(rows_.begin(), rows_.end());
  restored_records restored = restore_records(rows);
  for (const std::string& problem : restored.problems) violate("restore: {}", problem);
  c->machine =
      std::make_unique<cluster_machine>(std::move(restored), std::string(), detection{}, shares_);
  c->incarnation = c->machine->incarnation();
  say("coordinator starts, incarnation {}", c->incarnation);
  coordinator_ = c;
  for (action& a : c->machine->start()) c->todo.push_back(std::move(a));
  every(0, 100 * ms, [this, c] {
    if (!c->is_frozen) tick(c);
    return c->is_alive;
  });
  pump(c);
}

void cluster::crash(const coordinator_ptr& c, const char* why) {
  if (!c->is_alive) return;
  say("coordinator {} crashes: {}", c->incarnation, why);
  ++result_.coordinator_crashes;
  disturb(20 * second);
  c->is_alive = false;
  c->todo.clear();
  c->deferred.clear();
  if (!c->is_fenced) {
    lose_log(c);
    // What was not synced may be lost from some row on; a batch under way is whole or absent.
    const bool reaches_disk = c->is_saving && chance(0.5);
    if (!reaches_disk && chance(0.5)) c->unsynced.resize(draw(0, c->unsynced.size()));
    write_rows(c->unsynced);
    if (reaches_disk) write_rows(c->saving.rows);
  }
  for (auto& [id, x] : connections_) {
    if (x->whom == c) cut(x, delay(ms, 20 * ms), -1);
  }
  if (coordinator_ != c) return;
  coordinator_ = nullptr;
  const bool is_long = chance(rates_.long_absence);
  in(is_long ? delay(5 * second, 40 * second) : delay(100 * ms, 5 * second), [this] {
    if (!coordinator_) start_coordinator();
  });
}

/// It stands still; perhaps a successor takes its store over meanwhile, and it wakes beside that.
void cluster::freeze_coordinator() {
  const coordinator_ptr c = coordinator_;
  const us for_us = delay(200 * ms, 25 * second);
  const us idle = delay(2 * second, 3 * second);  // no pong: a worker gives the channel up
  say("coordinator {} freezes for {} ms", c->incarnation, for_us / ms);
  c->is_frozen = true;
  disturb(for_us + 30 * second);
  if (for_us > idle) {
    in(idle, [this, c] {
      for (auto& [id, x] : connections_) {
        if (x->whom == c && c->is_frozen) cut(x, delay(0, 20 * ms), 0);
      }
    });
  }
  if (chance(0.5)) {
    in(delay(100 * ms, for_us), [this, c] {
      if (coordinator_ == c && c->is_frozen) {
        former_ = c;
        start_coordinator();
      }
    });
  }
  in(for_us, [this, c, for_us] {
    say("coordinator {} thaws", c->incarnation);
    // Its shell looks at the clock before it hears what came meanwhile.
    c->deferred.insert(c->deferred.begin(), [this, c, for_us] {
      if (for_us / ms >= cluster_machine::sleep_ms_min) tell(c, events::woke{for_us / ms});
    });
    thaw(c);
    // It finds out by its first synced write that the store is another's, or a person ends it.
    in(delay(second, 10 * second), [this, c] {
      if (c->is_fenced) crash(c, "it has a successor");
    });
  });
}

/// As the real one: time stands still while a write is waited for.
void cluster::tick(const coordinator_ptr& c) {
  if (!c->is_saving) tell(c, events::tick{now_ / ms, now_ / ms});
}

void cluster::tell(const coordinator_ptr& c, const event& e) {
  if (!c->is_alive) return;
  ++result_.events;
  for (action& a : c->machine->step(e)) {
    if (const auto* s = std::get_if<actions::send>(&a)) {
      if (const auto* k = std::get_if<commit>(&s->message)) check_decided(c, *k);
    }
    c->todo.push_back(std::move(a));
  }
  pump(c);
}

void cluster::write_rows(const std::vector<actions::row>& rows) {
  for (const actions::row& r : rows) {
    if (r.value) {
      rows_[r.key] = *r.value;
    } else {
      rows_.erase(r.key);
    }
    if (r.value) check_row(r.key, *r.value);
  }
}

void cluster::pump(const coordinator_ptr& c) {
  while (!c->todo.empty() && !c->is_saving && c->is_alive) {
    if (are_faults_on_ && chance(rates_.action_crash)) return crash(c, "between two actions");
    action a = std::move(c->todo.front());
    c->todo.pop_front();
    carry_out(c, a);
  }
}

/// The rows of the vote log that were written until then.
void cluster::write_log(const coordinator_ptr& c, us until) {
  if (c->is_fenced) return;
  for (; !c->unsynced_log.empty() && c->unsynced_log.front().time <= until;
       c->unsynced_log.pop_front()) {
    const logged_step& row = c->unsynced_log.front();
    if (truth_of(row.job).chain[row.step] != row.chain)
      violate("step {} of job {} is logged with another chain", row.step, row.job);
    vote_log_[row.job].insert(row.step);
  }
}

/// Of the last second, what comes after some row. Drawn apart: other histories stay as they were.
void cluster::lose_log(const coordinator_ptr& c) {
  write_log(c, now_ - second);
  const std::uint64_t drawn = mix(static_cast<std::uint64_t>(now_), c->incarnation);
  c->unsynced_log.resize(drawn % (c->unsynced_log.size() + 1));
  write_log(c, now_);
}

/// Durable whole or not at all; a full disk is tried again. All that follows waits.
void cluster::start_save(const coordinator_ptr& c) {
  const bool is_full = are_faults_on_ && chance(rates_.disk_full);
  on(c, is_full ? second : write_time(10 * ms), [this, c, is_full] {
    if (is_full) {
      say("the store is full");
      return start_save(c);
    }
    if (c->is_fenced) return crash(c, "its store is another's");
    write_rows(c->unsynced);
    c->unsynced.clear();
    write_log(c, now_);
    write_rows(c->saving.rows);
    c->is_saving = false;
    pump(c);
  });
}

void cluster::carry_out(const coordinator_ptr& c, action& a) {
  const auto later = [this, c](us after, event e) {
    on(c, after, [this, c, e = std::move(e)] { tell(c, e); });
  };
  if (auto* s = std::get_if<actions::save>(&a)) {
    if (!s->is_synced) {
      c->unsynced.insert(c->unsynced.end(), s->rows.begin(), s->rows.end());
      return;
    }
    c->is_saving = true;
    c->saving = *s;
    start_save(c);
  } else if (auto* x = std::get_if<actions::send>(&a)) {
    down(c, x->connection, x->message);
  } else if (auto* k = std::get_if<actions::close>(&a)) {
    const auto found = connections_.find(static_cast<std::uint64_t>(k->connection));
    if (found != connections_.end()) cut(found->second, delay(ms, 10 * ms), delay(0, ms));
  } else if (auto* f = std::get_if<actions::find_checkpoint>(&a)) {
    later(write_time(300 * ms), find_on_disk(*f));
  } else if (auto* m = std::get_if<actions::write_manifest>(&a)) {
    if (are_faults_on_ && chance(rates_.disk_full)) {
      return later(delay(ms, 50 * ms), manifest_written{m->job, m->step, false, "disk full"});
    }
    check_manifest(*m);
    // The write and its answer are apart: the coordinator may die in between.
    in(write_time(30 * ms), [this, c, m = *m, later] {
      if (!c->is_alive && chance(0.5)) return;
      later(delay(ms, 30 * ms), put_manifest(m, c->incarnation));
    });
  } else if (auto* r = std::get_if<actions::retire_checkpoints>(&a)) {
    const checkpoints_retired answer = retire_on_disk(*r);
    if (!answer.steps.empty()) later(delay(ms, 20 * ms), answer);
  } else if (auto* l = std::get_if<actions::series>(&a)) {
    write_log(c, now_ - second);
    for (const step_report& s : l->steps)
      c->unsynced_log.push_back({now_, value(l->job), s.step, s.chain});
  } else if (auto* n = std::get_if<actions::note>(&a)) {
    check_stuck(n->record);
    const event_record& e = n->record;
    c->unsynced.push_back({keys::event(e.job, e.number), to_json_text(e)});
    say("   [{}] {}: {}", value(e.job), e.kind, e.text);
    if (c->is_fenced) return;  // what it thinks is no longer the run's story
    if (e.kind == "divergence") violate("divergence: {}", e.text);
    if (e.kind == "generation_failed") c->ran.erase(value(e.job));
    if (e.kind == "feed_started") ++result_.feeds;
    if (e.kind == "feed_done") ++result_.fed_switches;
    if (e.kind == "worker_lost") ++result_.lost_workers;
    if (e.kind == "deputy_decided") ++result_.adoptions;
    if (e.kind == "generations_merged") ++result_.merges;
    check_preemption(e);
    check_moves(e);
  }
}

// ---- the checkpoint folder, which deputies share ----
/// The newest by (incarnation, seq), as the real store orders them.
checkpoint_found cluster::find_on_disk(const actions::find_checkpoint& f) {
  checkpoint_found answer{f.job, f.request, std::nullopt, {}};
  std::pair<std::uint64_t, std::uint64_t> newest;
  for (const auto& [step, m] : manifests_[value(f.job)]) {
    if (step > f.step_max) continue;
    if (!is_good(value(f.job), m)) {
      answer.notes.push_back(fmt::format("step {} is damaged", step));
    } else if (std::pair order(m.incarnation, m.facts.seq); !answer.newest || order > newest) {
      answer.newest = m.facts;
      newest = order;
    }
  }
  return answer;
}

/// A name (seq, step) is used once, for one content.
manifest_written cluster::put_manifest(const actions::write_manifest& m,
                                       std::uint64_t incarnation) {
  const auto files = [](const std::vector<part_record>& parts) {
    std::set<std::string> names;
    for (const part_record& p : parts) names.insert(p.file);
    return names;
  };
  say("manifest of step {} of job {}, number {}, incarnation {}", m.step, value(m.job), m.seq,
      incarnation);
  written_[value(m.job)].insert(m.step);
  auto& have = manifests_[value(m.job)];
  const auto there = have.find(m.step);
  if (there != have.end() && there->second.facts.seq == m.seq) {
    const bool is_same = files(there->second.facts.parts) == files(m.parts);
    return {m.job, m.step, is_same, is_same ? "" : "another manifest has the name"};
  }
  ++result_.saves;
  have[m.step] = {{m.step, m.seq, m.chain, m.loss, m.weights_hash, m.parts, m.generation},
                  incarnation};
  return {m.job, m.step, true, ""};
}

checkpoints_retired cluster::retire_on_disk(const actions::retire_checkpoints& r) {
  auto& have = manifests_[value(r.job)];
  checkpoints_retired answer{r.job, {}};
  // As the real one: the newest that verifies stays, however old.
  std::uint64_t newest_good = 0;
  for (const auto& [step, m] : have) {
    if (is_good(value(r.job), m)) newest_good = step;
  }
  int too_many = static_cast<int>(have.size()) - r.keep_last;
  for (auto m = have.begin(); m != have.end() && too_many > 0; --too_many) {
    if (m->first == newest_good) break;
    answer.steps.push_back(m->first);
    m = have.erase(m);
  }
  return answer;
}

}  // namespace stagecoach::sim
