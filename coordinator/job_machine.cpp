#include "coordinator/job_machine.hpp"

#include <algorithm>
#include <utility>

#include "coordinator/wire.hpp"
#include "model/copies.hpp"
#include "model/tensor_names.hpp"

// This file: events, what members say, views. Who is lost is in job_watch.cpp, generations in
// job_generation.cpp; orders, saves and the end in job_saves.cpp.
namespace stagecoach {

namespace {
// Chains of this many newest steps are kept to compare a redone step with its first report; a redo
// goes back to the newest checkpoint at most, and those chains are kept in the index.
constexpr std::size_t chain_count_max = 8192;
constexpr std::size_t logged_count_max = 16'384;  // more than is said again after a break
constexpr std::size_t step_us_count_max = 15;  // enough for a median, few enough to follow a change
}  // namespace

job_machine::job_machine(restored_job restored, detection rules, balance_rules balance)
    : rules_(rules),
      record_(std::move(restored.record)),
      generation_(std::move(restored.generation)),
      checkpoints_(std::move(restored.checkpoints)),
      next_event_(restored.next_event),
      is_deputys_(restored.is_deputys),
      watch_(balance),
      layer_watch_(balance) {
  number_ = std::max(record_.number, record_.generation);
  reported_step_ = record_.step;
  if (generation_) {
    plan_hash_ = plan_hash(generation_->shape);
    number_ = std::max(number_, generation_->shape.generation);
  }
  generations_ = std::move(restored.generations);
  for (const auto& [step, c] : checkpoints_) {
    next_seq_ = std::max(next_seq_, c.seq + 1);
    chains_[step] = c.chain;
  }
  if (record_.state == job_state::running) {
    if (generation_) {
      phase_ = phase::adopting;
      for (const plan_member& m : generation_->shape.members) {
        if (!is_distrusted(m.worker)) sought_.insert(m.worker);
      }
      waits_for_ =
          "the coordinator was started again; waits for the workers of the newest generation";
    } else {
      record_.state = job_state::pending;  // its generation's row was lost
    }
  }
}

std::vector<action> job_machine::step(const job_event& e) {
  std::visit([this](const auto& x) { on(x); }, e);
  return std::exchange(out_, {});
}

// ---- events ----
void job_machine::on(const job_events::submitted& e) {
  record_.submitted_unix_ms = record_.waits_since_unix_ms = e.unix_ms;
  unix_ms_ = e.unix_ms;
  save_record();
  note("job_submitted",
       fmt::format("{}: {} to {} workers", record_.spec.name, workers_least(), workers_most()));
  agree(e.reply, record_.spec.name);
}

void job_machine::on(const job_events::workers_given& e) {
  for (const worker_facts& facts : e.workers) {
    member m;
    m.facts = facts;
    m.heard_ms = now_ms_;
    members_[facts.id] = std::move(m);
    sought_.erase(facts.id);
    std::erase(record_.distrusted.workers, value(facts.id));
    missed_.erase(facts.id);
  }
  if (is_end(record_.state) || record_.state == job_state::paused) {
    release_all("the job takes no workers");
    return;
  }
  if (phase_ == phase::none) {
    start_preparing("start");
  } else if (phase_ == phase::preparing || phase_ == phase::finding) {
    for (const worker_facts& facts : e.workers) ask(members_.at(facts.id));
  }
  advance();
}

void job_machine::on(const job_events::worker_connected& e) {
  const hello& h = e.greeting;
  if (h.job == value(id())) learn(h.distrusted);
  if (record_.state == job_state::paused && is_running_on(h)) take_back(h);
  if (members_.count(e.worker) == 0) {
    if (!expects(e.worker)) {
      if (is_claimed_by(h)) on_claim(e.worker, h);
      return advance();
    }
    (void)join(e.worker, h);
  }
  member& m = members_.at(e.worker);
  m.generation = h.generation;
  m.hash = h.plan_hash;
  m.is_report_due = is_claimed_by(h);
  m.is_connected = true;
  m.pulse.reset();  // of before: it may have moved on since, unheard
  m.heard_ms = now_ms_;
  m.phase = static_cast<worker_phase>(h.phase);
  m.step = h.step;
  const bool is_ours = h.job == value(id()) && generation_ &&
                       h.generation == generation_->shape.generation && h.plan_hash == plan_hash_;
  if (is_ours) reported_step_ = std::max(reported_step_, h.step);
  // A number that another incarnation of the coordinator used and did not get to save.
  // Or a deputy, perhaps the very number that is in use here: it answers no second decider of it.
  const bool is_preparing = phase_ == phase::preparing || phase_ == phase::finding;
  const bool has_promised_more =
      h.job == value(id()) &&
      (h.promised > number_ || (is_preparing && h.generation >= number_) ||
       (h.promised == number_ && !h.promised_to.empty() && h.generation != h.promised));
  if (has_promised_more) record_.number = std::max(record_.number, h.promised);
  if (m.is_report_due && !is_preparing) return advance();
  m.is_report_due = false;

  switch (phase_) {
    case phase::none:
      break;
    case phase::backing_off:
      break;
    case phase::preparing:
    case phase::finding:
      if (has_promised_more) {
        start_preparing(reason_);
      } else {
        ask(m);
      }
      break;
    case phase::adopting:
      m.is_astray = !is_ours || has_promised_more || m.phase == worker_phase::idle ||
                    m.phase == worker_phase::prepared;
      break;
    case phase::loading:
      if (m.rank < 0) break;
      if (is_ours && m.phase != worker_phase::idle && m.phase != worker_phase::prepared) break;
      if (commit_ && !has_promised_more && !is_ours) {
        send_commit(m);  // it was lost with the connection
      } else {
        fail_generation(fmt::format("{} came back without the generation", m.facts.name));
      }
      break;
    case phase::running:
    case phase::holding:
      if (m.rank < 0) break;
      if (!is_ours || has_promised_more || m.phase == worker_phase::idle ||
          m.phase == worker_phase::prepared) {
        fail_generation(fmt::format("{} came back without the generation", m.facts.name));
      } else if (m.phase == worker_phase::ready) {
        send(e.worker, run_stage{value(id()), number_});
      } else if (m.phase == worker_phase::held && is_of_ended_hold(h.step)) {
        let_go(m);  // the order to go on was lost with the connection
      } else if (phase_ == phase::holding && m.rank == 0 && m.phase == worker_phase::running) {
        give_orders();
      }
      break;
  }
  advance();
}

void job_machine::on(const job_events::worker_disconnected& e) {
  if (claimants_.erase(e.worker) != 0) release(e.worker, e.why);
  const auto found = members_.find(e.worker);
  if (found == members_.end() || !found->second.is_connected) return;
  found->second.is_connected = false;
  found->second.disconnected_ms = now_ms_;
  found->second.disconnected_why = e.why;
  found->second.is_held =
      false;  // a deputy may let it go; if not, it says so again when it is back
  advance();
}

void job_machine::on(const job_events::worker_gone& e) {
  if (claimants_.erase(e.worker) != 0) release(e.worker, e.why);
  sought_.erase(e.worker);  // known dead: nothing to wait for
  missed_.erase(e.worker);
  if (members_.count(e.worker) != 0) lose({{e.worker, e.why}}, true);
  advance();
}

void job_machine::on(const job_events::worker_said& e) {
  if (is_end(record_.state)) return;
  const auto* report = std::get_if<plan_report>(&e.message);
  if (const auto claim = claimants_.find(e.worker); claim != claimants_.end()) {
    if (report == nullptr) {
      report_overdue(e.worker);
    } else {
      take_report(e.worker, hello(claim->second), *report);
    }
    return advance();
  }
  const auto found = members_.find(e.worker);
  if (found == members_.end()) {
    // Fenced by its content and not by who sends it: a part that was written counts for its step.
    if (const auto* part = std::get_if<part_saved>(&e.message)) {
      saved(*part, e.worker);
      advance();
    } else if (const auto* steps = std::get_if<progress>(&e.message)) {
      member former;  // what it did as a member is logged, though its job has given it back
      former.facts.name = fmt::format("w-{}", value(e.worker));
      said(former, *steps);
      advance();
    } else if (const auto* answer = std::get_if<probed>(&e.message)) {
      this->found(e.worker, fmt::format("w-{}", value(e.worker)), *answer);
      advance();
    } else {
      ++stale_messages_;
    }
    return;
  }
  found->second.heard_ms = now_ms_;
  if (found->second.is_report_due && report == nullptr) report_overdue(e.worker);
  if (members_.count(e.worker) == 0 || phase_ == phase::none) return advance();
  std::visit([this, &m = found->second](const auto& x) { said(m, x); }, e.message);
  advance();
}

void job_machine::on(const job_events::worker_draining& e) {
  const auto found = members_.find(e.worker);
  if (found == members_.end() || found->second.is_draining == e.is_draining) return;
  found->second.is_draining = e.is_draining;
  change_since_ms_ = -1;
  advance();
}

void job_machine::on(const job_events::tick& e) {
  count_waiting(has_ticked_ ? e.now_ms - now_ms_ : 0);
  now_ms_ = e.now_ms;
  unix_ms_ = e.unix_ms;
  if (!has_ticked_) {
    has_ticked_ = true;
    phase_since_ms_ = now_ms_;  // a restored machine starts its clocks here
    for (auto& [id, m] : members_) m.heard_ms = now_ms_;
    if (is_waiting() && record_.waits_since_unix_ms > 0) {
      owed_ms_ = std::max<std::int64_t>(0, unix_ms_ - record_.waits_since_unix_ms);
    }
    if (record_.state == job_state::pending && record_.is_pause_wanted) {
      leave_workers(job_state::paused, "paused");
    }
    if (record_.state == job_state::pending && record_.is_cancel_wanted) {
      end(job_state::cancelled, "cancelled");
    }
  }
  advance();
}

void job_machine::on(const job_events::pause& e) {
  if (is_end(record_.state)) {
    reply(e.reply, make_error(errc::conflict, "job {} is {}: nothing to pause", record_.spec.name,
                              to_string(record_.state)));
    return;
  }
  if (record_.state == job_state::paused) return agree(e.reply, "paused already");
  // Without a generation that runs there is no step after which to stop: what is durable is what is
  // kept. A silent member is worth its wait here as well.
  const bool is_idle = phase_ == phase::preparing && short_since_ms_ >= 0 && !is_hopeful();
  if (phase_ == phase::none || is_idle) {
    leave_workers(job_state::paused, "paused");
    return agree(e.reply, "paused");
  }
  record_.is_pause_wanted = true;
  save_record();
  note("pause_wanted", "pauses after a step, with a checkpoint");
  agree(e.reply, "pausing: after the step that runs, with a checkpoint");
  advance();
}

void job_machine::on(const job_events::resume& e) {
  if (record_.state == job_state::paused) {
    record_.state = job_state::pending;
    record_.reason.clear();
    record_.waits_since_unix_ms = unix_ms_;
    step_max_ = ~0ull;
    fruitless_count_ = 0;
    failure_ms_.clear();
    refused_.clear();
    save_record();
    note("job_resumed", "waits for workers");
    return agree(e.reply, "waits for workers");
  }
  if (record_.is_pause_wanted) {
    record_.is_pause_wanted = false;
    save_record();
    note("pause_withdrawn", "goes on");
    agree(e.reply, "the pause is withdrawn");
    return advance();
  }
  reply(e.reply, make_error(errc::conflict, "job {} is {}: only a paused job can be resumed",
                            record_.spec.name, to_string(state())));
}

void job_machine::on(const job_events::cancel& e) {
  if (is_end(record_.state)) {
    reply(e.reply, make_error(errc::conflict, "job {} is {} already", record_.spec.name,
                              to_string(record_.state)));
    return;
  }
  const bool can_save = phase_ == phase::running || phase_ == phase::holding;
  if (e.now || !can_save) {
    end(job_state::cancelled, "cancelled");
    return agree(e.reply, "cancelled");
  }
  record_.is_cancel_wanted = true;
  save_record();
  note("cancel_wanted", "stops after a step, with a checkpoint");
  agree(e.reply, "stopping: after the step that runs, with a checkpoint");
  advance();
}

void job_machine::on(const job_events::save_now& e) {
  const auto ranks = planned();
  if (phase_ != phase::running || ranks.empty() || ranks[0]->rank != 0 || !ranks[0]->is_connected) {
    reply(e.reply, make_error(errc::conflict, "job {} is {}: only a running job can save",
                              record_.spec.name, to_string(state())));
    return;
  }
  send(ranks[0]->facts.id,
       give_order{value(id()), number_, next_order_++, static_cast<int>(order_kind::save)});
  agree(e.reply, "saves after the step that runs");
}

// ---- what members say ----
void job_machine::said(member&, const hello&) {}

void job_machine::said(member& m, const beat& x) {
  if (x.job != value(id()) || !generation_ || x.generation != generation_->shape.generation) return;
  m.phase = static_cast<worker_phase>(x.phase);
  m.pulse = x;
  m.step = std::max(m.step, x.step);
  reported_step_ = std::max(reported_step_, x.step);
}

void job_machine::said(member& m, const prepared& x) {
  const bool is_asked = phase_ == phase::preparing || phase_ == phase::finding;
  if (x.job != value(id()) || x.number != number_ || !is_asked) {
    ++stale_messages_;
    return;
  }
  m.answer = x;
  m.phase = worker_phase::prepared;
  if (trusted(m).has_state) reported_step_ = std::max(reported_step_, x.step);
}

void job_machine::said(member& m, const ready& x) {
  const bool is_awaited = phase_ == phase::loading || phase_ == phase::adopting;
  if (!is_awaited || m.rank < 0 || !is_current(x.generation, x.plan_hash)) return;
  if (!m.loaded && phase_ == phase::loading)
    phase_since_ms_ = now_ms_;  // a sign of life for load_wait
  m.loaded = x;
  m.phase = worker_phase::ready;
  m.step = x.step;
}

void job_machine::said(member& m, const failed& x) {
  const bool is_of_vote = !x.suspects.empty() && is_committed_or_adopting() && m.rank >= 0;
  const bool is_news = x.generation == number_of_plan() && x.generation >= record_.distrusted.fence;
  if (is_of_vote && is_news) return dispute(x);
  if (phase_ == phase::adopting && x.generation == number_of_plan()) {
    m.is_astray = true;
    return;
  }
  if (!is_committed() || m.rank < 0 || x.generation != number_) {
    ++stale_messages_;
    return;
  }
  if (x.is_fatal) return end(job_state::failed, x.message);
  const bool is_of_links =
      x.code == to_string(errc::unreachable) || x.code == to_string(errc::cancelled) ||
      x.code == to_string(errc::conflict) || x.code == to_string(errc::timed_out);
  if (is_of_links || phase_ != phase::loading) return fail_generation(x.message);
  const bool is_of_checkpoint =
      generation_->source == source_kind::checkpoint && x.code == to_string(errc::corrupt);
  if (is_of_checkpoint && generation_->step > 0) {
    step_max_ = generation_->step - 1;
    return fail_generation(
        fmt::format("checkpoint {} does not load: {}", generation_->step, x.message));
  }
  // Its own host lacks something (a data file, memory): another worker may do better.
  const worker_id worker = m.facts.id;
  refused_[worker] = x.message;
  note("worker_refused", x.message, {{"worker", m.facts.name}}, "error");
  send(worker, stop_stage{value(id()), "failed at this job"});
  const std::string why = fmt::format("{} failed: {}", m.facts.name, x.message);
  release(worker, x.message);
  fail_generation(why);
}

void job_machine::said(member& m, const progress& x) {
  if (x.job != value(id()) || x.generation > number_ || x.generation < record_.distrusted.fence) {
    ++stale_messages_;
    return;
  }
  const bool is_of_this = is_committed() && x.generation == number_;
  std::vector<step_report> news;
  for (const step_report& s : x.steps) {
    // A step that its generation began after is told again, for want of a report, and not redone.
    const bool is_retold = is_of_this && s.step <= generation_->step;
    // Said again after a channel broke: it is in the log, and a later generation's may be by now.
    const auto logged = logged_.find(s.step);
    const bool is_known = logged != logged_.end() && logged->second >= x.generation;
    // Not by its chain: that of a step that was saved may be known before its report comes.
    if (!is_retold && !is_known && logged != logged_.end()) ++redone_steps_;
    if (is_retold ? s.step > told_ : !is_known) {
      news.push_back(s);
      logged_[s.step] = x.generation;
    }
    check_chain(s.step, s.chain, m.facts.name);
    if (s.step > 0) take_weights_hash(s.step - 1, s.weights_hash);
    if (is_retold || s.step == told_ + 1) told_ = std::max(told_, s.step);
    if (s.step > newest_report_.step) newest_report_ = s;
    if (x.generation == number_ && !is_retold && !is_known) step_us_.push_back(s.step_us);
    // Also while the next generation is prepared: it must not start below this one's late reports.
    const bool is_newest =
        x.generation == number_ || (x.generation == number_of_plan() && x.plan_hash == plan_hash_);
    if (is_newest) reported_step_ = std::max(reported_step_, s.step);
  }
  while (step_us_.size() > step_us_count_max) step_us_.pop_front();
  while (logged_.size() > logged_count_max) logged_.erase(logged_.begin());
  if (is_of_this && !x.steps.empty() && x.steps.back().step > generation_->step) {
    for (const step_report& s : x.steps) note_switch(s);
    fruitless_count_ = 0;
    m.step = std::max(m.step, x.steps.back().step);
    if (loss_ms_ >= 0) {
      last_recovery_ms_ = now_ms_ - loss_ms_;
      loss_ms_ = -1;
      note("recovered",
           fmt::format("step {} done {} ms after the loss was noticed", x.steps.back().step,
                       last_recovery_ms_),
           {{"step", std::to_string(x.steps.back().step)},
            {"recovery_ms", std::to_string(last_recovery_ms_)}});
    }
  }
  if (!news.empty()) out_.push_back(actions::series{id(), x.generation, std::move(news)});
  if (!record_.distrusted.suspects.empty()) {
    const auto known = weights_hashes_.find(record_.distrusted.disputed_step);
    if (known != weights_hashes_.end()) judge(known->first, known->second);
  }
}

void job_machine::said(member&, const evaluated& x) {
  if (x.job != value(id())) return;
  newest_evaluation_ = x;
  out_.push_back(actions::evaluation{id(), x.step, x.loss});
}

void job_machine::said(member& m, const part_saved& x) { saved(x, m.facts.id); }

void job_machine::said(member& m, const held& x) {
  if (!is_committed_or_adopting() || m.rank < 0 || !is_current(x.generation, plan_hash_)) return;
  m.phase = worker_phase::held;
  m.step = x.step;
  reported_step_ = std::max(reported_step_, x.step);
  if (phase_ == phase::adopting) return;
  if (x.step < stop_step() && is_of_ended_hold(x.step)) return let_go(m);
  m.is_held = true;
}

void job_machine::said(member& m, const finished& x) {
  if (!is_committed_or_adopting() || m.rank < 0 || !is_current(x.generation, plan_hash_)) return;
  m.is_finished = true;
  m.finished_hash = x.weights_hash;
  m.phase = worker_phase::finished;
  m.step = x.step;
  reported_step_ = std::max(reported_step_, x.step);
}

void job_machine::said(member& m, const peer_report& x) {
  // Also while the next generation is prepared: it tells who need not be waited for.
  if (!generation_ || x.generation != generation_->shape.generation || m.rank < 0) return;
  const auto about = members_.find(static_cast<worker_id>(x.peer));
  if (about == members_.end() && x.what == "lost")
    sought_lost_.insert(static_cast<worker_id>(x.peer));
  if (about == members_.end() || about->second.rank < 0) return;
  member& peer = about->second;
  if (x.what == "lost") {
    peer.lost_by.emplace(m.facts.id, now_ms_);
  } else if (x.what == "suspected") {
    peer.suspected_by.emplace(m.facts.id, now_ms_);
  } else if (x.what == "recovered") {
    peer.suspected_by.erase(m.facts.id);
  }
}

void job_machine::said(member& m, const log_line& x) {
  out_.push_back(actions::log{id(), m.facts.id, x});
}

void job_machine::said(member& m, const goodbye& x) {
  const worker_id worker = m.facts.id;
  lose({{worker, "said goodbye: " + x.reason}}, true);
}

/// The chain is a hash over all losses and norms so far: one step, one chain, whoever computes it.
void job_machine::check_chain(std::uint64_t step, std::uint64_t chain, const std::string& who) {
  const auto [known, is_new] = chains_.emplace(step, chain);
  if (is_new) {
    while (chains_.size() > chain_count_max) chains_.erase(chains_.begin());
    return;
  }
  if (known->second == chain) return;
  // In plain order another layout gives other bits; who asked for that was told.
  if (!record_.spec.optimizer.exact) {
    known->second = chain;
    return;
  }
  ++divergences_;
  note("divergence",
       fmt::format("step {} was reported with chain {:016x} and now, by {}, with {:016x}: the same "
                   "step gave "
                   "other bits",
                   step, known->second, who, chain),
       {{"step", std::to_string(step)}}, "error");
}

// ---- every event ends here ----
void job_machine::advance() {
  if (phase_ == phase::none) return;
  watch_members();
  consider_end();
  if (phase_ == phase::adopting) consider_adoption();
  if (phase_ == phase::backing_off && now_ms_ >= back_off_until_ms_) start_preparing(reason_);
  if (phase_ == phase::preparing) consider_decision();
  if (phase_ == phase::loading) consider_running();
  if (phase_ == phase::running) consider_change();
  if (phase_ == phase::holding) consider_hold();
}

// ---- small ones ----
void job_machine::enter(phase p) {
  phase_ = p;
  phase_since_ms_ = now_ms_;
}

void job_machine::release(worker_id worker, const std::string& reason, bool is_lost) {
  members_.erase(worker);
  out_.push_back(actions::release{worker, is_lost, reason, is_distrusted(worker)});
}

void job_machine::release_all(const std::string& reason) {
  while (!members_.empty()) {
    const worker_id worker = members_.begin()->first;
    send(worker, stop_stage{value(id()), reason});
    release(worker, reason);
  }
  if (!is_end(record_.state) && record_.state != job_state::paused)
    return;  // their report may help
  while (!claimants_.empty()) {
    const worker_id worker = claimants_.begin()->first;
    claimants_.erase(worker);
    send(worker, stop_stage{value(id()), reason});
    release(worker, reason);
  }
}

void job_machine::end(job_state state, const std::string& reason) {
  record_.state = state;
  record_.reason = state == job_state::completed ? "" : reason;
  record_.is_pause_wanted = record_.is_cancel_wanted = false;
  record_.ended_unix_ms = unix_ms_;
  record_.waits_since_unix_ms = 0;
  drop_yield();
  record_.step = std::max(record_.step, reported_step_);
  enter(phase::none);
  waits_for_.clear();
  saves_.clear();
  save_record();
  note(state == job_state::completed ? "job_completed"
       : state == job_state::failed  ? "job_failed"
                                     : "job_cancelled",
       reason, {{"step", std::to_string(record_.step)}},
       state == job_state::failed ? "error" : "info");
  release_all(reason);
}

/// Gives all workers back and becomes paused or pending; what is durable is what is kept.
void job_machine::leave_workers(job_state state, const std::string& reason) {
  record_.state = state;
  record_.reason = reason;
  record_.is_pause_wanted = false;
  record_.step = std::max(record_.step, reported_step_);
  record_.waits_since_unix_ms = state == job_state::pending ? unix_ms_ : 0;
  running_since_ms_ = -1;
  drop_yield();
  enter(phase::none);
  sought_.clear();
  missed_.clear();
  short_since_ms_ = -1;
  waits_for_.clear();
  hold_reason_.clear();
  orders_.clear();
  save_record();
  note(state == job_state::paused ? "job_paused" : "job_waits", reason,
       {{"step", std::to_string(newest_saved().value_or(0))}});
  release_all(reason);
}

actions::row job_machine::record_row() const { return {keys::job(id()), to_json_text(record_)}; }
void job_machine::save_record() { out_.push_back(actions::save{{record_row()}, true}); }

void job_machine::note(const std::string& kind, const std::string& text,
                       std::map<std::string, std::string> fields, const std::string& level) {
  out_.push_back(
      actions::note{{id(), next_event_++, unix_ms_, kind, level, text, std::move(fields)}});
}

void job_machine::send(worker_id to, to_worker message) {
  out_.push_back(actions::send{to, connection_id{}, std::move(message)});
}

void job_machine::reply(reply_id to, result<actions::reply_value> outcome) {
  if (to != reply_id{}) out_.push_back(actions::reply{to, std::move(outcome)});
}
void job_machine::agree(reply_id to, const std::string& text) {
  reply(to, actions::reply_value{id(), text});
}

bool job_machine::is_current(std::uint64_t generation, std::uint64_t hash) {
  if (is_committed_or_adopting() && generation == number_of_plan() && hash == plan_hash_)
    return true;
  ++stale_messages_;
  return false;
}

bool job_machine::is_committed() const {
  return phase_ == phase::loading || phase_ == phase::running || phase_ == phase::holding;
}

int job_machine::workers_least() const {
  const job_spec& s = record_.spec;
  const int least = std::max(1, s.elasticity.workers_min);
  if (!s.parallelism.is_explicit) return least;
  // A fixed layout starts whole; after a loss choose_layout may shrink it, unless it is to wait.
  const int fixed = std::max(1, s.parallelism.stages * s.parallelism.replicas);
  return record_.generation > 0 && s.elasticity.on_loss != "wait" ? std::min(least, fixed) : fixed;
}
int job_machine::workers_most() const {
  const parallelism_spec& p = record_.spec.parallelism;
  if (p.is_explicit) return std::max(1, p.stages * p.replicas);
  return std::max(workers_least(), record_.spec.elasticity.workers_max);
}

int job_machine::staying_count() const {
  return static_cast<int>(std::count_if(members_.begin(), members_.end(), [](const auto& m) {
    return !m.second.is_draining && !m.second.is_leaving;
  }));
}

std::optional<std::uint64_t> job_machine::newest_saved() const {
  if (checkpoints_.empty()) return std::nullopt;
  return checkpoints_.rbegin()->first;
}
bool job_machine::is_final_saved() const { return checkpoints_.count(stop_step()) != 0; }

std::vector<job_machine::member*> job_machine::planned() {
  std::vector<member*> list;
  for (auto& [id, m] : members_) {
    if (m.rank >= 0) list.push_back(&m);
  }
  std::sort(list.begin(), list.end(),
            [](const member* a, const member* b) { return a->rank < b->rank; });
  return list;
}
bool job_machine::is_whole() const {
  const auto count = std::count_if(members_.begin(), members_.end(),
                                   [](const auto& m) { return m.second.rank >= 0; });
  return count == planned_count();
}

// ---- views ----
job_state job_machine::state() const {
  if (is_end(record_.state) || record_.state == job_state::paused) return record_.state;
  switch (phase_) {
    case phase::none:
      return job_state::pending;
    case phase::adopting:
      return job_state::running;
    case phase::backing_off:
    case phase::preparing:
    case phase::finding:
    case phase::loading:
      return is_after_loss_ ? job_state::recovering : job_state::planning;
    case phase::running:
      return finished_ms_ >= 0 ? job_state::checkpointing : job_state::running;
    case phase::holding:
      return record_.is_pause_wanted || record_.is_cancel_wanted ? job_state::checkpointing
                                                                 : job_state::running;
  }
  return job_state::pending;
}

const char* job_machine::phase_name() const {
  switch (phase_) {
    case phase::none:
      return "none";
    case phase::adopting:
      return "adopting";
    case phase::backing_off:
      return "backing_off";
    case phase::preparing:
      return "preparing";
    case phase::finding:
      return "finding";
    case phase::loading:
      return "loading";
    case phase::running:
      return "running";
    case phase::holding:
      return "holding";
  }
  return "none";
}

/// Workers that the best layout for the staying ones and `more` others would use.
int job_machine::grown_count(int more) const {
  const int count = std::min(staying_count() + more, workers_most());
  if (count < 1) return 0;
  const result<layout> shape = choose_layout(record_.spec, count);
  return shape ? shape->worker_count() : 0;
}

worker_wish job_machine::wish(int free_suitable) const {
  if (is_end(record_.state) || record_.state == job_state::paused) return {};
  const int missing = std::max(0, workers_most() - staying_count());
  switch (phase_) {
    case phase::none:
      return {workers_least(), workers_most(), false};
    case phase::backing_off:
    case phase::preparing:
    case phase::finding: {
      // shrink: goes on with the survivors where they are enough; it may grow later.
      const bool is_smaller =
          keeps_size_ || (record_.spec.elasticity.on_loss == "shrink" && is_after_loss_);
      const bool shrinks = is_smaller && staying_count() >= workers_least();
      return shrinks ? worker_wish{} : worker_wish{std::min(1, missing), missing, false};
    }
    case phase::running: {
      if (finished_ms_ >= 0 || record_.is_pause_wanted || record_.is_cancel_wanted ||
          !yielding().empty()) {
        return {};
      }
      // The next come with the next change: a feed that begins anew for each would never end.
      if (feed_) return {};
      const int grown = grown_count(std::min(missing, free_suitable));
      const bool replaces = staying_count() < planned_count();  // someone is draining
      if (grown <= staying_count() || (grown <= planned_count() && !replaces)) return {};
      return {1, grown - staying_count(), !replaces};
    }
    case phase::adopting:
    case phase::loading:
    case phase::holding:
      return {};
  }
  return {};
}

bool job_machine::accepts(const worker_facts& worker, std::string* why) const {
  const auto refused = refused_.find(worker.id);
  if (refused != refused_.end()) {
    if (why != nullptr) *why = "failed at this job: " + refused->second;
    return false;
  }
  if (!record_.device_class.empty() && worker.device_class != record_.device_class) {
    if (why != nullptr) {
      *why = fmt::format("its arithmetic is class {}, the job's is {}", worker.device_class,
                         record_.device_class);
    }
    return false;
  }
  return true;
}

std::vector<worker_id> job_machine::workers() const {
  std::vector<worker_id> ids;
  for (const auto& [id, m] : members_) ids.push_back(id);
  return ids;
}

bool job_machine::expects(worker_id id) const {
  if (phase_ == phase::none || !generation_) return false;
  if (sought_.count(id) == 0 && missed_.count(id) == 0) return false;
  const bool can_join = phase_ == phase::adopting || phase_ == phase::backing_off ||
                        phase_ == phase::preparing || phase_ == phase::finding;
  return can_join;
}

job_view job_machine::view() const {
  job_view v;
  v.id = id();
  v.name = record_.spec.name;
  v.state = to_string(state());
  v.reason = !record_.reason.empty() ? record_.reason : waits_for_;
  v.priority = priority();
  // What was reported beyond the start of a generation that loads is lost if it comes to run.
  const std::uint64_t step = phase_ == phase::loading ? generation_->step : reported_step_;
  v.step = std::max(step, newest_saved().value_or(0));
  v.stop_steps = stop_step();
  v.phase = phase_name();
  if (generation_) {
    const layout& shape = generation_->shape.shape;
    v.generation = generation_->shape.generation;
    v.plan_hash = plan_hash_;
    v.stages = shape.stage_count;
    v.replicas = shape.replica_count;
    v.schedule = shape.schedule;
    v.unit_cuts = shape.unit_cuts;
    v.leaf_cuts = shape.leaf_cuts;
  }
  v.workers = static_cast<int>(members_.size());
  v.workers_min = workers_least();
  v.workers_max = workers_most();
  v.loss = newest_report_.loss;
  v.step_us = newest_report_.step_us;
  if (newest_evaluation_) {
    v.evaluated_step = newest_evaluation_->step;
    v.evaluated_loss = newest_evaluation_->loss;
  }
  if (!checkpoints_.empty()) {
    const checkpoint_record& c = checkpoints_.rbegin()->second;
    v.has_saved = true;
    v.saved_step = c.step;
    v.saved_hash = c.weights_hash;
    v.saved_unix_ms = c.unix_ms;
    if (v.loss.bits == 0) v.loss = c.loss;
  }
  v.recovery_count = record_.recovery_count;
  v.redone_steps = redone_steps_;
  v.divergences = divergences_;
  v.stale_messages = stale_messages_;
  v.last_recovery_ms = last_recovery_ms_;
  v.submitted_unix_ms = record_.submitted_unix_ms;
  v.started_unix_ms = record_.started_unix_ms;
  v.ended_unix_ms = record_.ended_unix_ms;
  for (const auto& [id, m] : members_) {
    member_view x;
    x.worker = id;
    x.name = m.facts.name;
    x.host = m.facts.host;
    x.step = m.step;
    if (m.rank >= 0 && generation_) {
      x.stage = generation_->shape.stage_of(m.rank);
      x.replica = generation_->shape.replica_of(m.rank);
    }
    x.state = !m.is_connected                                          ? "disconnected"
              : m.is_draining                                          ? "draining"
              : m.is_leaving                                           ? "leaving"
              : m.rank < 0                                             ? "joining"
              : m.is_finished                                          ? "finished"
              : m.is_held                                              ? "held"
              : is_committed() && m.loaded && phase_ == phase::loading ? "ready"
                                                                       : phase_name();
    v.members.push_back(std::move(x));
  }
  if (generation_) count_holders(v);
  return v;
}

/// How often each stage's state is held now, by replicas and neighbours that are here.
void job_machine::count_holders(job_view& v) const {
  const plan& p = generation_->shape;
  const auto stages = static_cast<std::size_t>(p.shape.stage_count);
  std::vector<int> holders(stages, 0);
  if (is_sharded(record_.spec, p.shape.replica_count)) {
    // By tensor: the least held one is what the next loss may take.
    std::vector<std::map<int, int>> count(stages);
    for (const auto& [worker, m] : members_) {
      if (m.rank < 0 || !m.is_connected) continue;
      const auto stage = static_cast<std::size_t>(p.stage_of(m.rank));
      for (const int t :
           kept_moments(record_.spec, p.shape.unit_cuts[stage], p.shape.unit_cuts[stage + 1],
                        p.replica_of(m.rank), p.shape.replica_count))
        ++count[stage][t];
    }
    for (std::size_t s = 0; s < stages; ++s) {
      const auto tensors =
          stage_tensor_indices(record_.spec.model, p.shape.unit_cuts[s], p.shape.unit_cuts[s + 1]);
      holders[s] = p.shape.replica_count;
      for (const int t : tensors) holders[s] = std::min(holders[s], count[s][t]);
    }
  } else {
    const auto kept = copied_ranks(record_.spec.elasticity.copies, p.shape, hosts_of(p));
    for (const auto& [worker, m] : members_) {
      if (m.rank < 0 || !m.is_connected) continue;
      ++holders[static_cast<std::size_t>(p.stage_of(m.rank))];
      for (const int owner : kept[static_cast<std::size_t>(m.rank)])
        ++holders[static_cast<std::size_t>(p.stage_of(owner))];
    }
  }
  const auto least = std::min_element(holders.begin(), holders.end());
  v.losses_survived = std::max(0, *least - 1);
  const auto stage = static_cast<std::size_t>(least - holders.begin());
  const model_spec& model = record_.spec.model;
  const std::string first = unit_name(model, p.shape.unit_cuts[stage]);
  const std::string last = unit_name(model, p.shape.unit_cuts[stage + 1] - 1);
  v.weakest = fmt::format("stage {} ({})", stage, first == last ? first : first + ".." + last);
}

}  // namespace stagecoach
