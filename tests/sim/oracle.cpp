// What must hold whatever happens; from the simulation's own truth, never from a machine.
#include "coordinator/wire.hpp"
#include "model/copies.hpp"
#include "model/tensor_names.hpp"
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

const truth& cluster::truth_of(std::uint64_t job) {
  truth& t = truths_[job];
  if (!t.at.empty()) return t;
  const job_spec& spec = specs_.at(job);
  values v;
  for (const tensor_size& x : all_tensor_sizes(spec.model)) v[x.name] = hash_name(x.name);
  std::uint64_t chain = 0;
  for (std::int64_t s = 0; s <= spec.stop_steps; ++s) {
    if (s > 0) {
      for (auto& [name, x] : v) x = mix(x, static_cast<std::uint64_t>(s));
      chain = mix(chain, static_cast<std::uint64_t>(s));
    }
    t.at.push_back(v);
    t.chain.push_back(chain);
  }
  return t;
}

void cluster::check_row(const std::string& key, const std::string& text) {
  if (key.starts_with("job/") && key.ends_with("/record")) {
    const auto record = from_json_text<job_record>(text);
    if (!record) return violate("row {} does not read: {}", key, record.err().message);
    check_record(*record);
  } else if (key.starts_with("ckpt/")) {
    const auto record = from_json_text<checkpoint_record>(text);
    if (!record) return violate("row {} does not read: {}", key, record.err().message);
    const std::uint64_t job = value(record->job);
    if (written_[job].count(record->step) == 0)
      violate("checkpoint {} of job {} is indexed before its manifest is durable", record->step,
              job);
    durable_[job].insert(record->step);
  } else if (key.starts_with("job/")) {
    const auto record = from_json_text<generation_record>(text);
    if (!record) return violate("row {} does not read: {}", key, record.err().message);
    stored_plans_[value(record->shape.job)] = record->shape;
    say("generation {} of job {} is stored", record->shape.generation, value(record->shape.job));
  }
}

/// Where those who remain of the former plan held a copy of every stage, no step that one of them
/// stands at is given up.
void cluster::check_nothing_lost(const commit& c) {
  const std::uint64_t job = value(c.shape.job);
  const auto former = newest_plans_.find(job);
  if (former == newest_plans_.end() || ran_.count({job, former->second.generation}) == 0) return;
  const layout& shape = former->second.shape;
  const bool are_replicas_copies = shape.replica_count > 1 && !c.spec.parallelism.shard_optimizer;
  const int holders_max = shape.replica_count > 1 ? shape.replica_count : shape.worker_count();
  const int copies = are_replicas_copies ? shape.replica_count - 1
                                         : std::min(c.spec.elasticity.copies, holders_max - 1);
  int remaining = 0;
  std::uint64_t newest = 0;
  for (const plan_member& m : former->second.members) {
    const bool stays = std::any_of(c.shape.members.begin(), c.shape.members.end(),
                                   [&m](const auto& n) { return n.process == m.process; });
    const auto answer = answers_.find({job, c.shape.generation, m.process});
    if (!stays || answer == answers_.end() || !answer->second.has_state) continue;
    ++remaining;
    newest = std::max(newest, answer->second.step);
  }
  if (remaining == 0 || shape.worker_count() - remaining > copies) return;
  ++result_.covered_losses;
  // A checkpoint that became durable meanwhile may be newer than all of them.
  if (c.step < newest || (c.source != source_kind::live && c.step == newest)) {
    violate("commit {} of job {} starts at step {}, though those who remain hold all of step {}",
            c.shape.generation, job, c.step, newest);
  }
}

void cluster::check_record(const job_record& record) {
  const std::uint64_t job = value(record.id);
  specs_.emplace(job, record.spec);
  const job_state before = std::exchange(states_[job], record.state);
  if (before != record.state) say("job {} is stored as {}", job, to_string(record.state));
  if (record.state != job_state::running) {
    std::erase_if(seat_, [job](const auto& seat) { return seat.second == job; });
    if (coordinator_) coordinator_->reported.erase(job);
  }
  if (record.state == job_state::paused && before == job_state::running) {
    // Orderly: while all of a generation run, a pause keeps every step that was done.
    const committed& newest = committed_[job];
    std::vector<prepared> held;
    for (const process_id& id : newest.members) {
      const process_ptr& p = by_id_.at(id);
      const bool runs = p->is_alive && p->trainer.hash == newest.hash &&
                        (p->trainer.now == toy_trainer::doing::running ||
                         p->trainer.now == toy_trainer::doing::held);
      if (runs) held.push_back(holding_of(p));
    }
    const auto step = newest_held(job, held);
    const auto& durable = durable_[job];
    const std::uint64_t saved = durable.empty() ? 0 : *durable.rbegin();
    // Decided before the coordinator slept, and a deputy has let them go on since, though it may
    // stand no more: taken back when they greet.
    const bool has_deputy = let_go_.count(job) != 0 ||
                            std::any_of(processes_.begin(), processes_.end(), [job](const auto& p) {
                              return p.second->is_alive && p.second->machine->is_deputy() &&
                                     p.second->machine->job() == job;
                            });
    if (held.size() == newest.members.size() && step && *step > saved && !is_shared(job) &&
        !has_deputy)
      violate("job {} is paused at step {}, durable is step {}", job, *step, saved);
  }
  if (record.state != job_state::running) committed_.erase(job);
  if (completed_.count(job) != 0 && record.state != job_state::completed) {
    violate("job {} was completed and is {} now", job, to_string(record.state));
  }
  if (record.state == job_state::completed && completed_.count(job) == 0) {
    completed_[job] = 1;
    check_log(job);
    const auto last = static_cast<std::uint64_t>(record.spec.stop_steps);
    const auto& have = manifests_[job];
    if (have.count(last) == 0) {
      violate("job {} is completed without a manifest of step {}", job, last);
    } else if (have.at(last).facts.weights_hash != hash_of(truth_of(job).at[last])) {
      violate("job {} ended with other bits", job);
    }
  }
  if (record.state == job_state::failed) violate("job {} failed: {}", job, record.reason);
}

void cluster::check_manifest(const actions::write_manifest& m) {
  const std::uint64_t job = value(m.job);
  values whole;
  for (const part_record& p : m.parts) {
    const auto part = parts_[job].find(p.file);
    if (part == parts_[job].end())
      return violate("manifest {} names {} that was never written", m.step, p.file);
    if (part->second.step != m.step)
      violate("manifest {} names a part of step {}", m.step, part->second.step);
    for (const auto& [name, v] : part->second.weights) {
      if (!whole.emplace(name, v).second) violate("manifest {} has {} twice", m.step, name);
    }
  }
  if (whole != truth_of(job).at[m.step])
    violate("manifest {} of job {} is not the whole model of that step", m.step, job);
  if (hash_of(whole) != m.weights_hash)
    violate("manifest {}: weights hash is not that of its parts", m.step);
  if (m.chain != truth_of(job).chain[m.step]) violate("manifest {}: wrong chain", m.step);
}

/// After every apply: the bits of an undisturbed run, tensor by tensor.
void cluster::check_state(const toy_trainer& t) {
  const truth& right = truth_of(value(t.shape.job));
  for (const auto& [name, v] : t.weights) {
    if (right.at[t.step].at(name) != v)
      violate("{} at step {} is not the undisturbed value", name, t.step);
  }
  if (right.chain[t.step] != t.chain)
    violate("the chain at step {} is not the undisturbed one", t.step);
}

// ---- what is told to whom ----
void cluster::check_sent(const std::shared_ptr<connection>& c, const to_worker& message) {
  const process_id& to = c->who->id;
  if (const auto* w = std::get_if<welcome>(&message)) {
    if (incarnations_.emplace(w->incarnation, c->whom.get()).first->second != c->whom.get())
      violate("two coordinators call themselves incarnation {}", w->incarnation);
    const auto row = rows_.find(keys::meta());
    const auto meta = row == rows_.end() ? result<meta_record>(meta_record{})
                                         : from_json_text<meta_record>(row->second);
    if (!meta || meta->incarnation < w->incarnation)
      violate("incarnation {} is told before it is stored", w->incarnation);
  } else if (const auto* x = std::get_if<prepare>(&message)) {
    const auto row = rows_.find(keys::job(static_cast<job_id>(x->job)));
    const auto record = row == rows_.end() ? result<job_record>(job_record{})
                                           : from_json_text<job_record>(row->second);
    if (!record || record->number < x->number)
      violate("prepare {} of job {} is sent before its number is stored", x->number, x->job);
    asked& a = asked_[{x->job, x->number}];
    if (a.incarnation == 0) a.since = now_;
    if (a.incarnation != 0 && a.incarnation != c->whom->incarnation)
      violate("two incarnations prepare number {} of job {}", x->number, x->job);
    if (a.is_committed)
      violate("number {} of job {} is prepared after its commit", x->number, x->job);
    a.incarnation = c->whom->incarnation;
    // Where it knows of no job itself, the word that it is free was its own.
    if (const auto seat = seat_.find(to);
        seat != seat_.end() && seat->second != x->job && c->who->machine->job() == seat->second)
      violate("{} is asked for job {} while it has a place in job {}", c->who->name, x->job,
              seat->second);
    c->whom->ran.erase(x->job);
    c->whom->resumed.erase(x->job);
  } else if (const auto* r = std::get_if<run_stage>(&message)) {
    c->whom->ran[r->job] = c->told_run[r->job] = r->generation;
  } else if (const auto* g = std::get_if<resume_stage>(&message)) {
    const std::uint64_t at = c->who->trainer.step;
    c->whom->resumed[g->job] = std::max(c->whom->resumed[g->job], at);
    c->told_resume[g->job] = std::max(c->told_resume[g->job], at);
  } else if (const auto* k = std::get_if<commit>(&message)) {
    check_commit(c->whom, *k);
  } else if (const auto* d = std::get_if<checkpoint_durable>(&message)) {
    if (durable_[d->job].count(d->step) == 0)
      violate("step {} of job {} is called durable and is not in the index", d->step, d->job);
  } else if (const auto* s = std::get_if<stop_stage>(&message)) {
    if (const auto seat = seat_.find(to); seat != seat_.end() && seat->second == s->job)
      seat_.erase(seat);
  }
}

/// When it is decided: it leaves when it is stored, and by then others may have come.
void cluster::check_decided(const coordinator_ptr& by, const commit& c) {
  const std::uint64_t job = value(c.shape.job), number = c.shape.generation;
  asked& a = asked_[{job, number}];
  if (a.is_committed || by->is_fenced) return;
  // Never below what is durable and whole; but a change that nobody forced goes on where the run is
  // (late parts of a generation that is gone may have made a later step durable meanwhile).
  const auto& former = committed_[job].members;
  const bool is_voluntary =
      c.source == source_kind::live && !former.empty() &&
      std::all_of(former.begin(), former.end(), [this, job](const process_id& id) {
        const process_ptr& p = by_id_.at(id);
        return p->is_alive && !p->is_frozen && holding_of(p).job == job;
      });
  for (const std::uint64_t step : durable_[job]) {
    if (is_voluntary) break;
    const auto m = manifests_[job].find(step);
    if (step > c.step && m != manifests_[job].end() && is_good(job, m->second)) {
      violate("commit {} of job {} starts at step {} though step {} is durable", number, job,
              c.step, step);
    }
  }
  if (is_shared(job)) return;  // what its members hold was decided by others, too
  // Nor below what those hold who answered, or who were there all the time and were not heard.
  std::vector<prepared> held;
  bool is_silent = false;
  for (const process_id& id : committed_[job].members) {
    const process_ptr& p = by_id_.at(id);
    const bool is_there =
        p->is_alive && p->channel && p->channel->is_open && p->channel->whom == by;
    if (!is_there) continue;
    const bool is_steady = now_ - p->steady_since > 8 * second && !p->is_frozen && !was_hung(p);
    if (const auto answer = a.answers.find(id); answer != a.answers.end()) {
      if (!p->is_frozen) held.push_back(answer->second);
    } else if (const prepared holds = holding_of(p);
               is_steady && rates_.slow == 0 && holds.job == job) {
      held.push_back(holds);
    } else {
      is_silent = is_silent || (holds.job == job && holds.step > c.step && !was_hung(p));
    }
  }
  if (const auto newest = newest_held(job, held); newest && *newest > c.step) {
    violate("commit {} of job {} starts at step {}, those who are there hold step {}", number, job,
            c.step, *newest);
  }
  // Nor below what was reported, while someone is silent who may hold it.
  constexpr us minority_wait = 10 * second;
  if (is_silent && by->reported[job] > c.step && now_ - a.since < minority_wait - second) {
    violate(
        "commit {} of job {} starts at step {} after {} ms, step {} was reported and a silent "
        "member may hold it",
        number, job, c.step, (now_ - a.since) / ms, by->reported[job]);
  }
}

void cluster::check_commit(const coordinator_ptr& by, const commit& c) {
  const std::uint64_t job = value(c.shape.job), number = c.shape.generation;
  // What was decided before may be said again, to who lost it with its channel.
  if (by->is_fenced && !asked_[{job, number}].is_committed)
    return violate("a coordinator that has a successor commits");
  const std::uint64_t hash = plan_hash(c.shape);
  if (plans_.emplace(std::tuple(job, number, std::string()), hash).first->second != hash)
    violate("two plans have number {} of job {}", number, job);
  asked& a = asked_[{job, number}];
  if (a.is_committed) return;
  const auto row = rows_.find(keys::generation(c.shape.job, number));
  if (row == rows_.end())
    return violate("commit {} of job {} is sent before it is saved", number, job);
  const auto saved = from_json_text<generation_record>(row->second);
  if (!saved || !(saved->shape == c.shape))
    violate("commit {} is not the plan that was saved", number);

  if (!is_shared(job)) check_nothing_lost(c);
  check_size(c);
  applied_[job] = c.step;  // that it is not less than it must be was judged above
  shared_.erase(job);      // its members are the coordinator's again
  let_go_.erase(job);
  newest_plans_[job] = c.shape;
  a.is_committed = true;
  std::erase_if(seat_, [job](const auto& seat) { return seat.second == job; });
  committed& now = committed_[job];
  now = {number, hash, {}};
  for (const plan_member& m : c.shape.members) {
    now.members.push_back(m.process);
    seat_[m.process] = job;
  }
  by->reported[job] = c.step;
}

// ---- the log of the votes ----
/// Of a job that ends, what the coordinator keeps lacks no step that was reported by somebody whose
/// channel has been quiet: who is dead or away can't be asked.
void cluster::check_log(std::uint64_t job) {
  const std::set<std::uint64_t>& log = vote_log_[job];
  for (const auto& [name, p] : processes_) {
    const bool is_there = p->is_alive && p->channel && p->channel->is_open &&
                          p->channel->whom == coordinator_ && p->welcomed_on == p->channel->id &&
                          now_ - p->welcomed_at > 5 * second;
    if (!is_there) continue;
    for (const auto& report : p->reported) {
      const bool is_heard = p->owed.count(report) == 0 && p->said.count(report) == 0;
      if (report.first == job && is_heard && log.count(report.second) == 0)
        return violate("the vote log of job {} lacks step {}, which {} reported", job,
                       report.second, name);
    }
  }
}

// ---- who holds what ----
prepared cluster::holding_of(const process_ptr& p) {
  const toy_trainer& t = p->trainer;
  prepared h;
  if (!t.has_state) return h;
  h.job = value(t.shape.job);
  h.has_state = true;
  h.step = t.step;
  h.chain = t.chain;
  h.last_vote = t.last_vote;
  h.has_pending = t.has_pending;
  for (const auto& [name, v] : t.weights) h.tensors.push_back(name);
  return h;
}

/// The newest step of which these together hold every tensor: at it, or one before it with the
/// gradient kept while one of them knows the vote.
std::optional<std::uint64_t> cluster::newest_held(std::uint64_t job,
                                                  const std::vector<prepared>& by) {
  std::set<std::uint64_t> steps;
  for (const prepared& h : by) {
    if (h.has_state && h.job == job) steps.insert(h.step);
  }
  const std::size_t all = truth_of(job).at[0].size();
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    const bool is_vote_known = std::any_of(by.begin(), by.end(), [&](const prepared& h) {
      return h.has_state && h.job == job && h.last_vote && h.last_vote->step == *step;
    });
    std::set<std::string> names;
    for (const prepared& h : by) {
      if (!h.has_state || h.job != job) continue;
      const bool rolls = h.step + 1 == *step && h.has_pending && is_vote_known;
      if (h.step == *step || rolls) names.insert(h.tensors.begin(), h.tensors.end());
    }
    if (names.size() == all) return *step;
  }
  return std::nullopt;
}

/// The newest step from which the job could go on: what living workers hold, or what was durable.
std::optional<std::uint64_t> cluster::newest_kept(std::uint64_t job, const process_ptr& without) {
  std::vector<prepared> by;
  for (const auto& [name, p] : processes_) {
    if (p->is_alive && p != without) by.push_back(holding_of(p));
  }
  std::optional<std::uint64_t> newest = newest_held(job, by);
  // What was durable when the order was given; that a disk forgets it later is another fault.
  if (const auto& written = written_[job]; !written.empty())
    newest = std::max(newest.value_or(0), *written.rbegin());
  return newest;
}

/// It is told to forget its state: then somebody else has it, or nobody wants it.
void cluster::check_drop(const process_ptr& p, const char* why) {
  const toy_trainer& t = p->trainer;
  const std::uint64_t job = value(t.shape.job);
  if (!t.has_state || states_[job] != job_state::running || is_shared(job)) return;
  const auto& members = committed_[job].members;
  const bool is_member = std::find(members.begin(), members.end(), p->id) != members.end();
  if (!is_member || was_hung(p)) return;  // the commit that left it out was judged already
  // Also one that was stored, and its coordinator died before it told anybody.
  const plan& stored = stored_plans_[job];
  const bool is_left_out = stored.generation > committed_[job].number &&
                           std::none_of(stored.members.begin(), stored.members.end(),
                                        [&p](const plan_member& m) { return m.process == p->id; });
  if (is_left_out) return;
  const auto with = newest_kept(job, nullptr), without = newest_kept(job, p);
  if (with && *with > without.value_or(0)) {
    violate("{} drops the last copy of step {} of job {} ({}); what is left is step {}", p->name,
            *with, job, why, without.value_or(0));
  }
}

// ---- what the coordinator hears ----
void cluster::heard(const std::shared_ptr<connection>& c, const to_coordinator& message) {
  const process_ptr& p = c->who;
  const auto reported = [&](std::uint64_t job, std::uint64_t generation, std::uint64_t step) {
    const committed& newest = committed_[job];
    const bool is_member =
        std::find(newest.members.begin(), newest.members.end(), p->id) != newest.members.end();
    if (!is_member || newest.number != generation) return;
    auto& known = c->whom->reported[job];
    known = std::max(known, step);
  };
  if (const auto* n = std::get_if<hello>(&message)) {
    if (c->whom == coordinator_) let_go_.erase(n->job);
  } else if (const auto* x = std::get_if<prepared>(&message)) {
    asked_[{x->job, x->number}].answers[p->id] = *x;
  } else if (const auto* b = std::get_if<beat>(&message)) {
    reported(b->job, b->generation, b->step);
    // A beat comes after a welcome, and after that all that was kept for it.
    if (!p->owed.empty()) {
      violate("{} does not send its report of step {} though it is connected again", p->name,
              p->owed.begin()->first.second);
    }
    check_not_forgotten(c, *b);
  } else if (const auto* g = std::get_if<progress>(&message)) {
    for (const step_report& s : g->steps) {
      reported(g->job, g->generation, s.step);
      p->owed.erase({g->job, s.step});
      p->said.erase({g->job, s.step});
    }
  } else if (const auto* h = std::get_if<held>(&message)) {
    reported(h->job, h->generation, h->step);
  } else if (const auto* f = std::get_if<finished>(&message)) {
    reported(f->job, f->generation, f->step);
  }
}

/// Nobody is left behind where the others were told to run, or to go on after a hold: what was told
/// to it may be lost with its channel, and it is told again on the next.
void cluster::check_not_forgotten(const std::shared_ptr<connection>& c, const beat& b) {
  const coordinator_ptr& by = c->whom;
  const process_ptr& p = c->who;
  const committed& newest = committed_[b.job];
  const bool is_decided = by->todo.empty() && !by->is_saving && !by->is_fenced;
  const auto seat = seat_.find(p->id);
  const bool is_member = b.job != 0 && !is_shared(b.job) && newest.number == b.generation &&
                         p->trainer.hash == newest.hash && seat != seat_.end() &&
                         seat->second == b.job;
  const auto ran = by->ran.find(b.job);
  if (!is_decided || !is_member || ran == by->ran.end() || ran->second != b.generation) return;
  if (b.phase == static_cast<int>(worker_phase::ready) && c->told_run[b.job] != b.generation)
    violate("{} is ready in generation {}, which runs, and is not told to", p->name, b.generation);
  const auto resumed = by->resumed.find(b.job);
  if (b.phase == static_cast<int>(worker_phase::held) && resumed != by->resumed.end() &&
      b.step <= resumed->second && c->told_resume[b.job] < b.step)
    violate("{} holds at step {} of job {}, and is not told that the others went on", p->name,
            b.step, b.job);
}

std::string words(std::string text) {
  constexpr std::size_t most = 300;
  if (text.size() > most) text = text.substr(0, most) + " ...";
  return text;
}

}  // namespace stagecoach::sim
