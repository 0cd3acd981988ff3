// job_machine, second part: losses, and a generation's way from prepare to run. Who is lost is
// job_watch.cpp's.
#include <algorithm>
#include <utility>

#include "coordinator/decision.hpp"
#include "coordinator/job_machine.hpp"
#include "coordinator/wire.hpp"
#include "model/tensor_names.hpp"

namespace stagecoach {

// ---- losses ----
/// are_hopeless: their state can't be had (dead, or a trainer that stands still).
void job_machine::lose(const std::map<worker_id, std::string>& lost, bool are_hopeless) {
  bool breaks_generation = false;
  std::string last;
  for (const auto& [worker, why] : lost) {
    const auto found = members_.find(worker);
    if (found == members_.end()) continue;
    const member& m = found->second;
    const bool is_in_plan = m.rank >= 0;
    const bool may_hold = is_in_plan || m.is_left_behind;
    breaks_generation =
        breaks_generation || (is_in_plan && (is_committed() || phase_ == phase::adopting));
    last = fmt::format("worker_lost {}", m.facts.name);
    note("worker_lost", fmt::format("{}: {}", m.facts.name, why),
         {{"worker", m.facts.name}, {"host", m.facts.host}, {"step", std::to_string(m.step)}},
         is_in_plan ? "warn" : "info");
    // Silent is not dead: it may stand at a newer step than the others, or hold what nobody else
    // does. So it is worth a wait, and it is not told to forget its state: when it is heard again
    // in time, it is asked like the others (cluster_machine, expects).
    const std::string verdict = verdict_on(worker);
    const bool is_said_dead =
        verdict.empty() ? !m.is_connected && !m.lost_by.empty() : verdict == "gone";
    if (may_hold && !are_hopeless && !is_distrusted(worker)) {
      missed_.insert(worker);
      if (!is_said_dead) sought_.insert(worker);
    } else if (m.is_connected) {
      send(worker, stop_stage{value(id()), "given up: " + why});
    }
    release(worker, why, true);
  }
  if (breaks_generation) {
    if (!count_failure(last)) return;
    ++record_.recovery_count;
    is_after_loss_ = true;
    if (loss_ms_ < 0) loss_ms_ = now_ms_;
  }
  if (members_.empty() && sought_.empty()) {
    return leave_workers(job_state::pending,
                         "all its workers were lost; starts again from its "
                         "newest checkpoint when there are workers");
  }
  if (breaks_generation) start_preparing(last);
}

/// False: too many in an hour, the job has failed.
bool job_machine::count_failure(const std::string& why) {
  failure_ms_.push_back(now_ms_);
  std::erase_if(failure_ms_,
                [this](std::int64_t at) { return at < now_ms_ - rules_.failure_window; });
  const int limit = record_.spec.elasticity.max_failures;
  if (static_cast<int>(failure_ms_.size()) <= limit) return true;
  end(job_state::failed,
      fmt::format("{} failures within an hour; elasticity.max_failures is {}. The last: {}",
                  failure_ms_.size(), limit, why));
  return false;
}

void job_machine::fail_generation(const std::string& why) {
  note("generation_failed", why, {{"generation", std::to_string(number_)}}, "warn");
  if (!count_failure(why)) return;
  ++fruitless_count_;
  std::int64_t wait = rules_.back_off_first;
  for (int i = 1; i < fruitless_count_ && wait < rules_.back_off_max; ++i) wait *= 2;
  back_off_until_ms_ = now_ms_ + std::min(wait, rules_.back_off_max);
  is_after_loss_ = true;
  if (loss_ms_ < 0) loss_ms_ = now_ms_;
  reason_ = "again: " + why;
  waits_for_ = why;
  enter(phase::backing_off);
}

// ---- prepare ----
void job_machine::start_preparing(const std::string& reason, std::uint64_t wait_step) {
  number_ = std::max(number_, record_.number) + 1;
  record_.number = number_;
  // Before anyone hears of the number: after a crash it must not be used for another plan.
  save_record();
  enter(phase::preparing);
  prepare_began_ms_ = now_ms_;
  reason_ = reason;
  has_looked_ = false;
  found_.reset();
  request_ = 0;
  commit_.reset();
  short_since_ms_ = -1;
  waits_for_.clear();
  change_since_ms_ = held_ms_ = finished_ms_ = -1;
  if (hold_reason_ != "layers" || is_after_loss_) layer_move_.reset();
  hold_reason_.clear();
  orders_.clear();
  has_save_failed_ = false;
  drop_yield();  // who waits asks again once this job runs
  if (is_after_loss_) keeps_size_ = false;
  feed_.reset();  // workers end it with the prepare
  wait_step_ = wait_step;
  before_switch_.reset();
  if (wait_step != 0 && newest_report_.step == wait_step) before_switch_ = newest_report_;
  for (auto& [worker, m] : members_) {
    m.loaded.reset();
    m.is_held = m.is_finished = m.is_astray = m.is_report_due = false;
    m.first_asked_ms = -1;
    ask(m);
  }
}

void job_machine::ask(member& m) {
  m.answer.reset();
  m.asked_ms = now_ms_;
  if (m.first_asked_ms < 0) m.first_asked_ms = now_ms_;
  if (m.is_connected)
    send(m.facts.id, prepare{value(id()), number_, "", wait_step_, record_.distrusted});
}

void job_machine::consider_decision() {
  std::vector<member*> answered;
  bool has_state = false;
  for (auto& [worker, m] : members_) {
    if (m.answer) {
      answered.push_back(&m);
      has_state = has_state || m.answer->has_state;
    } else if (now_ms_ - m.asked_ms < rules_.prepare_wait &&
               now_ms_ - m.first_asked_ms < rules_.minority_wait) {
      return;
    }
  }
  const int count = static_cast<int>(answered.size());
  const bool is_short = count < workers_least();
  const bool waits_for_all = is_after_loss_ && record_.spec.elasticity.on_loss == "wait" &&
                             count < std::min(planned_count(), workers_most());
  if (is_short || waits_for_all) {
    const int wanted = is_short ? workers_least() : planned_count();
    // Without state there is nothing to keep these workers for; the queue may use them better.
    if (is_short && !has_state && !is_hopeful()) {
      return leave_workers(job_state::pending,
                           fmt::format("{} of {} workers answered", count, wanted));
    }
    if (short_since_ms_ < 0) {
      short_since_ms_ = now_ms_;
      waits_for_ = fmt::format("{} workers are there, {} are needed", count, wanted);
      note("too_few_workers", waits_for_,
           {{"workers", std::to_string(count)}, {"needed", std::to_string(wanted)}}, "warn");
    }
    const bool is_over = now_ms_ - short_since_ms_ >= record_.spec.elasticity.wait_for_min_ms;
    if (is_short && is_over) {
      return leave_workers(job_state::pending,
                           fmt::format("fewer than {} workers for {} s", wanted,
                                       record_.spec.elasticity.wait_for_min_ms / 1000));
    }
    if (is_short && record_.is_pause_wanted && !is_hopeful()) {
      return leave_workers(job_state::paused, "paused");
    }
    if (!is_over) return;
  }
  if (!is_short && !waits_for_all) short_since_ms_ = -1;
  decide(answered);
}

void job_machine::decide(const std::vector<member*>& answered) {
  if (decide_fed(answered)) return;
  const int count = std::min(static_cast<int>(answered.size()), workers_most());
  std::vector<candidate> candidates;
  for (const member* m : answered)
    candidates.push_back({m->facts.id, trusted(*m), m->facts.link_host});
  const auto seat = [&candidates](const std::vector<int>& by_rank) {
    std::vector<worker_id> ids;
    for (const int i : by_rank) ids.push_back(candidates[static_cast<std::size_t>(i)].worker);
    return ids;
  };

  // One that became durable while an older one was being verified.
  if (has_looked_ && newest_saved() != saved_when_asked_) has_looked_ = false;
  // What is durable but damaged is no reason to give up a live state that is older.
  const std::uint64_t step_min =
      has_looked_ ? (found_ ? found_->step : 0) : newest_saved().value_or(0);
  const result<layout> shape = choose_shape(count, [&](const layout& some) {
    const auto live = choose_live(record_.spec, some, candidates, step_min);
    return seat(live ? live->by_rank : choose_fresh(some, candidates));
  });
  if (!shape) return end(job_state::failed, shape.err().message);
  choice c;
  c.shape = *shape;
  auto live = choose_live(record_.spec, *shape, candidates, step_min);
  // The best layout may have fewer seats than it takes holders; any that goes on is better than
  // going back, and a better one may follow while it runs.
  for (int stages = 1; !live && stages <= count; ++stages) {
    job_spec wide = record_.spec;
    wide.parallelism.is_explicit = true;
    wide.parallelism.layers.clear();
    wide.parallelism.stages = stages;
    wide.parallelism.replicas =
        static_cast<int>(std::min<std::int64_t>(count / stages, wide.batch.leaf_count));
    if (stages * wide.parallelism.replicas <= shape->worker_count()) continue;
    const result<layout> other = choose_layout(wide, stages * wide.parallelism.replicas);
    if (!other) continue;
    live = choose_live(record_.spec, *other, candidates, step_min);
    if (live) c.shape = *other;
  }
  if (live) {
    if (is_held_back(live->step)) return;
    c.by_rank = seat(live->by_rank);
    c.source = source_kind::live;
    c.step = live->step;
    c.chain = live->chain;
    c.roll_forward = std::move(live->roll_forward);
    c.transfers = std::move(live->transfers);
    return commit_generation(c);
  }
  c.by_rank = seat(choose_fresh(*shape, candidates));
  const bool is_first = record_.generation == 0 && checkpoints_.empty();
  // Parts are written and only the manifest is on its way: worth the moment that it takes.
  const bool is_save_near = std::any_of(saves_.begin(), saves_.end(), [](const auto& s) {
    return !s.second.whole.empty() && s.second.retry_ms < 0;
  });
  if (is_save_near && now_ms_ - prepare_began_ms_ < rules_.prepare_wait) return;
  if (!is_first && !has_looked_) {
    request_ = next_request_++;
    saved_when_asked_ = newest_saved();
    out_.push_back(actions::find_checkpoint{id(), record_.spec.checkpoint.store, request_,
                                            step_max_, record_.distrusted});
    return enter(phase::finding);
  }
  if (is_hopeful() && is_one_unheard()) {
    waits_for_ = "a worker that lives is not heard; what it holds may be newer than what is saved";
    return;
  }
  if (found_) {
    if (is_held_back(found_->step)) return;
    c.source = source_kind::checkpoint;
    c.step = found_->step;
    c.chain = found_->chain;
    return commit_generation(c);
  }
  if (const auto newest = newest_saved()) {
    // Training from step 0 again would give the same bits, but a folder that is not mounted is the
    // likelier cause, and it can be mended.
    record_.reason.clear();
    note("no_usable_checkpoint", "", {}, "error");
    return leave_workers(
        job_state::paused,
        fmt::format(
            "no usable checkpoint in {} though step {} was saved there. fix: bring the folder "
            "back, then resume the job",
            record_.spec.checkpoint.store, *newest));
  }
  if (!is_held_back(0)) commit_generation(c);
}

/// Of the newest plan, or of one before it while the newest has not run, not known to be dead, and
/// without an answer to this prepare.
int job_machine::silent_count() const {
  const auto mute = std::count_if(members_.begin(), members_.end(), [](const auto& m) {
    return (m.second.rank >= 0 || m.second.is_left_behind) && !m.second.answer;
  });
  return static_cast<int>(sought_.size()) + static_cast<int>(mute);
}

bool job_machine::is_hopeful() const {
  return silent_count() > 0 && now_ms_ - prepare_began_ms_ < rules_.minority_wait;
}

/// Silent here, but a witness reaches it, or has not answered yet: only its channel to this decider
/// is lost. It may have gone on, further than anybody reported.
bool job_machine::is_one_unheard() const {
  const auto is_reached = [this](worker_id id) {
    const auto q = inquiries_.find(id);
    if (q == inquiries_.end()) return false;
    const bool is_asked = q->second.asked_ms >= 0 && q->second.witness != worker_id{};
    return q->second.verdict.empty() ? is_asked : q->second.verdict == "alive";
  };
  return std::any_of(sought_.begin(), sought_.end(), is_reached) ||
         std::any_of(members_.begin(), members_.end(), [&is_reached](const auto& m) {
           return m.second.rank >= 0 && !m.second.answer && is_reached(m.first);
         });
}

/// A member that is silent, but not known to be dead, may stand at the newest step that was
/// reported.
bool job_machine::is_held_back(std::uint64_t step) {
  if (step >= reported_step_ || !is_hopeful()) return false;
  waits_for_ =
      fmt::format("step {} was reported, those who answer have {}; waits for {} silent ones",
                  reported_step_, step, silent_count());
  return true;
}

void job_machine::on(const checkpoint_found& e) {
  if (phase_ != phase::finding || e.request != request_) return;
  if (e.newest && e.newest->generation >= number_) {
    // Of a generation that nobody lives to tell of: its number is used.
    record_.number = std::max(record_.number, e.newest->generation);
    start_preparing(reason_);
    return advance();
  }
  has_looked_ = true;
  found_ = e.newest;
  for (const std::string& text : e.notes) note("checkpoint_skipped", text, {}, "warn");
  enter(phase::preparing);
  advance();
}

// ---- commit ----
void job_machine::commit_generation(const choice& c) {
  plan p;
  p.job = id();
  p.generation = number_;
  p.shape = c.shape;
  for (const worker_id worker : c.by_rank) {
    const worker_facts& f = members_.at(worker).facts;
    p.members.push_back({f.id, f.process, f.name, f.link_host, f.link_port});
  }
  const times known = weigh_leaves(p);
  invariant(static_cast<int>(p.members.size()) == p.shape.worker_count(),
            "a plan has a member for every stage of every replica");
  generation_ = generation_record{p,       c.source, c.step,        c.chain,
                                  reason_, unix_ms_, known.leaf_us, known.layer_us};
  remember_generation();
  plan_hash_ = plan_hash(p);
  record_.generation = number_;
  record_.state = job_state::running;
  record_.waits_since_unix_ms = 0;
  record_.reason.clear();
  record_.step = c.step;
  if (record_.device_class.empty()) {
    record_.device_class = members_.at(c.by_rank.front()).facts.device_class;
  }
  if (record_.started_unix_ms == 0) record_.started_unix_ms = unix_ms_;

  actions::save batch;
  batch.rows.push_back(record_row());
  batch.rows.push_back({keys::generation(id(), number_), to_json_text(*generation_)});
  if (c.source == source_kind::checkpoint) {
    // Newer ones were read and found damaged: what they stood for is not durable, so live state
    // that is older than they is worth more.
    for (auto x = checkpoints_.upper_bound(c.step); x != checkpoints_.end();) {
      batch.rows.push_back({keys::checkpoint(id(), x->first), std::nullopt});
      x = checkpoints_.erase(x);
    }
  }
  if (c.source == source_kind::checkpoint && checkpoints_.count(c.step) == 0) {
    // On disk but not in the index, which was lost or older.
    checkpoint_record row{id(),
                          c.step,
                          found_->seq,
                          c.chain,
                          found_->loss,
                          found_->weights_hash,
                          static_cast<int>(found_->parts.size()),
                          0,
                          0,
                          unix_ms_};
    for (const part_record& part : found_->parts) row.bytes += part.bytes;
    next_seq_ = std::max(next_seq_, row.seq + 1);
    batch.rows.push_back({keys::checkpoint(id(), c.step), to_json_text(row)});
    checkpoints_[c.step] = std::move(row);
  }
  out_.push_back(std::move(batch));  // durable before anyone may act on it

  commit x;
  x.shape = p;
  x.spec = record_.spec;
  x.source = c.source;
  x.step = c.step;
  x.chain = c.chain;
  x.transfers = c.transfers;
  x.roll_forward = c.roll_forward;
  x.leaf_us = known.leaf_us;
  x.layer_us = known.layer_us;
  if (c.source == source_kind::checkpoint) {
    x.parts = found_->parts;
    x.expected_weights_hash = found_->weights_hash;
  }
  const bool is_unsaved_edge = c.step == 0 || c.step == stop_step();
  x.save_at_start = is_unsaved_edge && checkpoints_.count(c.step) == 0;
  x.checkpoint_folder = record_.spec.checkpoint.store;
  x.distrusted = record_.distrusted;
  const auto remembers = std::find_if(c.by_rank.begin(), c.by_rank.end(), [this](worker_id w) {
    return members_.at(w).answer && members_.at(w).answer->has_state;
  });
  told_ = std::min(told_, c.step);  // later ones are done, and told, again
  if (remembers != c.by_rank.end() && told_ < c.step) {
    x.retell_rank = static_cast<int>(remembers - c.by_rank.begin());
    x.retell_after = told_;
  }
  commit_ = std::move(x);

  for (auto& [worker, m] : members_) {
    m.is_left_behind = (m.rank >= 0 || m.is_left_behind) && !m.answer;
    m.rank = -1;
    m.lost_by.clear();
    m.suspected_by.clear();
    m.pulse.reset();
  }
  for (std::size_t rank = 0; rank < c.by_rank.size(); ++rank) {
    member& m = members_.at(c.by_rank[rank]);
    m.rank = static_cast<int>(rank);
    m.phase = worker_phase::loading;
    m.step = c.step;
    send_commit(m);
  }
  for (const worker_id worker : workers()) {
    member& m = members_.at(worker);
    m.is_mute = m.rank < 0 && !m.answer;
    if (m.rank >= 0 || m.is_mute || m.answer->has_state) continue;
    send(worker, stop_stage{value(id()), "the plan does not need it"});
    release(worker, "the plan does not need it");
  }
  sought_.clear();
  missed_.clear();
  failed_feeds_ = 0;
  layer_move_.reset();
  resumed_step_.reset();
  reported_step_ = std::max(reported_step_, c.step);
  step_us_.clear();
  waits_for_.clear();
  enter(phase::loading);
  const char* sources[] = {"initial", "live", "checkpoint"};
  note("generation_committed",
       fmt::format("generation {}: {} stages x {} replicas from step {} ({}), {}", number_,
                   p.shape.stage_count, p.shape.replica_count, c.step,
                   sources[static_cast<int>(c.source)], reason_),
       {{"generation", std::to_string(number_)},
        {"stages", std::to_string(p.shape.stage_count)},
        {"replicas", std::to_string(p.shape.replica_count)},
        {"from_step", std::to_string(c.step)},
        {"source", sources[static_cast<int>(c.source)]},
        {"transfers", std::to_string(c.transfers.size())},
        {"reason", reason_}});
}

/// With the transfers that it has a part in: all of a large model's would not fit a message.
void job_machine::send_commit(const member& m) {
  commit own = *commit_;
  std::erase_if(own.transfers, [&m](const transfer_record& t) {
    return t.from_rank != m.rank && t.to_rank != m.rank;
  });
  send(m.facts.id, std::move(own));
  if (!checkpoints_.empty()) {  // whoever stands in for the coordinator goes on from there
    const checkpoint_record& c = checkpoints_.rbegin()->second;
    send(m.facts.id, checkpoint_durable{value(id()), c.step, c.seq, c.chain});
  }
}

// ---- load and run ----
void job_machine::consider_running() {
  const std::vector<member*> ranks = planned();
  std::string missing;
  for (const member* m : ranks) {
    if (!m->loaded) missing += (missing.empty() ? "" : ", ") + m->facts.name;
  }
  if (!missing.empty()) {
    if (now_ms_ - phase_since_ms_ < rules_.load_wait) return;
    return fail_generation(fmt::format("not ready in {} ms: {}", rules_.load_wait, missing));
  }
  const int stages = generation_->shape.shape.stage_count;
  std::vector<std::string> stage_hashes;
  bool has_hashes = true;
  for (const member* m : ranks) {
    if (m->loaded->step != generation_->step) {
      return fail_generation(fmt::format("{} is ready at step {}, the plan is for step {}",
                                         m->facts.name, m->loaded->step, generation_->step));
    }
    const std::string& hash = m->loaded->weights_hash;
    has_hashes = has_hashes && !hash.empty();
    if (m->rank < stages) {
      stage_hashes.push_back(hash);
    } else if (const member* twin = ranks[static_cast<std::size_t>(m->rank % stages)];
               has_hashes && hash != twin->loaded->weights_hash) {
      ++divergences_;
      note("divergence",
           fmt::format("{} and {} hold stage {} with other bits at step {}: {} and {}",
                       m->facts.name, twin->facts.name, m->rank % stages, generation_->step, hash,
                       twin->loaded->weights_hash),
           {{"step", std::to_string(generation_->step)}}, "error");
      return fail_generation("replicas disagree on the weights they loaded");
    }
  }
  const std::string expected = commit_ ? commit_->expected_weights_hash : "";
  if (const std::string whole = add_tensor_hashes(stage_hashes);
      has_hashes && !expected.empty() && whole != expected) {
    if (generation_->step > 0) step_max_ = generation_->step - 1;
    return fail_generation(
        fmt::format("checkpoint {} loaded with weights hash {}; its manifest says {}",
                    generation_->step, whole, expected));
  }
  for (const member* m : ranks) send(m->facts.id, run_stage{value(id()), number_});
  // Only now: until the new members stood, who leaves may have been the last to hold a state, and
  // who did not answer may hold one.
  for (const worker_id worker : workers()) {
    const member& m = members_.at(worker);
    if (m.rank >= 0) continue;
    const char* why = m.is_mute       ? "did not answer prepare"
                      : m.is_draining ? "drained"
                                      : "the plan does not need it";
    send(worker, stop_stage{value(id()), why});
    release(worker, why, m.is_mute);
  }
  enter(phase::running);
  // Until now a newer step that was reported, and who may hold it, were worth a wait.
  reported_step_ = generation_->step;
  sought_.clear();
  missed_.clear();
  if (running_since_ms_ < 0) running_since_ms_ = now_ms_;
  watch_.restart(now_ms_);
  layer_watch_.restart(now_ms_);
  keeps_size_ = false;
  final_saved_ms_ = -1;
  note("generation_started",
       fmt::format("generation {} runs from step {}", number_, generation_->step),
       {{"generation", std::to_string(number_)}, {"from_step", std::to_string(generation_->step)}});
}

// ---- after a restart of the coordinator ----
void job_machine::consider_adoption() {
  if (!has_ticked_) return;
  const std::int64_t waited = now_ms_ - phase_since_ms_;
  const bool is_report_due = std::any_of(members_.begin(), members_.end(),
                                         [](const auto& m) { return m.second.is_report_due; });
  if (is_report_due && waited < rules_.minority_wait) return;
  if (!is_whole()) {
    // A link that closed says little where a witness has just heard the process.
    const bool are_known_lost = std::all_of(sought_.begin(), sought_.end(), [this](worker_id w) {
      return sought_lost_.count(w) != 0 && verdict_on(w) != "alive";
    });
    const std::int64_t patience = sought_.empty()  ? 0  // all that are missing are known dead
                                  : are_known_lost ? rules_.reconnect_grace
                                                   : rules_.minority_wait;
    const bool is_over = waited >= (members_.empty() ? rules_.minority_wait : patience);
    if (!is_over) return;
    const auto missing = planned_count() - static_cast<int>(planned().size());
    const std::string why = fmt::format("{} workers did not return to the coordinator", missing);
    note("worker_lost", why, {}, "warn");
    missed_.insert(sought_.begin(), sought_.end());
    // That links to them closed is no proof of death: who may hold a newer step is waited for.
    if (members_.empty() || waited >= rules_.minority_wait) sought_.clear();
    if (members_.empty()) {
      return leave_workers(job_state::pending, why + "; starts again from its newest checkpoint");
    }
    if (!count_failure(why)) return;
    ++record_.recovery_count;
    is_after_loss_ = true;
    loss_ms_ = now_ms_;
    return start_preparing(why);
  }
  const std::vector<member*> ranks = planned();
  const auto count = [&ranks](auto is) {
    return std::count_if(ranks.begin(), ranks.end(), [is](const member* m) { return is(*m); });
  };
  const auto loading_count =
      count([](const member& m) { return m.phase == worker_phase::loading; });
  const auto ready_count = count([](const member& m) { return m.phase == worker_phase::ready; });
  const auto up_count = static_cast<std::ptrdiff_t>(ranks.size()) - loading_count - ready_count;
  const bool is_astray = count([](const member& m) { return m.is_astray || m.is_report_due; }) != 0;
  if (number_of_plan() < record_.distrusted.fence) {
    // Its end was decided before the restart, and perhaps nobody was told.
    is_after_loss_ = true;
    return start_preparing("silent corruption: what the newest generation holds is not trusted");
  }
  // run_stage is sent when all are ready, so some that load and some that run can't be.
  if (is_astray || (loading_count > 0 && up_count > 0)) {
    is_after_loss_ = true;
    return start_preparing("the generation was not whole when the coordinator returned");
  }
  waits_for_.clear();
  note("generation_adopted",
       fmt::format("generation {} goes on: {} run, {} are ready, {} load", number_of_plan(),
                   up_count, ready_count, loading_count),
       {{"generation", std::to_string(number_of_plan())}});
  number_ = number_of_plan();
  if (up_count == 0) return enter(phase::loading);
  enter(phase::running);
  running_since_ms_ = now_ms_;
  watch_.restart(now_ms_);
  layer_watch_.restart(now_ms_);
  for (member* m : ranks) {
    m->is_finished = m->phase == worker_phase::finished;
    if (m->phase == worker_phase::ready) send(m->facts.id, run_stage{value(id()), number_});
    // Nobody remembers why it was to hold: it is let go, and what is wanted is ordered again.
    if (m->phase == worker_phase::held && m->step < stop_step()) let_go(*m);
  }
}

}  // namespace stagecoach
