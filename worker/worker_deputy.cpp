// worker_machine, second part: the deputy that it follows, and the one that it may be itself.
#include <algorithm>
#include <utility>

#include "worker/worker_machine.hpp"

namespace stagecoach {

// ---- what other workers say ----
void worker_machine::on(const worker_events::peer_said& e) {
  std::visit([this, &e](const auto& x) { heard(e.from, x); }, e.message);
}

void worker_machine::on(const worker_events::peer_unreachable& e) {
  advise_deputy(deputy_events::unreachable{e.peer, e.is_gone, e.why});
  if (!decider_ || decider_->process != e.peer) return;
  if (e.is_gone) return leave_deputy();
  does_decider_stand_ = false;  // what was said to it is lost: all is said again when it asks next
}

void worker_machine::on(const worker_events::stored& e) {
  std::visit([this](const auto& x) { advise_deputy(x); }, e.answer);
}

void worker_machine::on(const worker_events::tie_break_made& e) {
  advise_deputy(deputy_events::tie_break_made{e.generation, e.is_ours});
}

void worker_machine::heard(const process_id& from, const canvass& x) {
  if (from != x.from.process) return;
  const refusal why = consider(x);
  if (why == refusal::none) follow_deputy(x.from, x.is_standing);
  answer(x.from, x.job, why);
}

void worker_machine::heard(const process_id& from, const canvassed& x) {
  if (from == x.from) advise_deputy(deputy_events::answered{x});
}

void worker_machine::heard(const process_id& from, const deputy_order& x) {
  const bool is_followed = !is_welcome_ && decider_ && decider_->process == from;
  const bool is_of_channel =
      std::holds_alternative<welcome>(x.message) || std::holds_alternative<refused>(x.message);
  if (!is_followed || is_own_deputy() || is_of_channel) {
    ++stale_messages_;
    return;
  }
  decider_heard_ms_ = own_ms_;
  speaker_ = from;
  std::visit([this](const auto& m) { told(m); }, x.message);
  speaker_.clear();
}

void worker_machine::heard(const process_id& from, const deputy_report& x) {
  advise_deputy(deputy_events::reported{from, x.message});
}

/// Whether this member takes x.from for its decider.
refusal worker_machine::consider(const canvass& x) const {
  if (job_ == 0 || x.job != job_ || !commit_) return refusal::other_identity;
  if (is_welcome_) return refusal::has_coordinator;
  if (x.generation < generation_) return refusal::other_identity;
  if (x.generation > generation_) return refusal::none;  // a plan that did not reach this worker
  if (x.plan_hash != plan_hash_) return refusal::other_identity;
  const int rank = rank_of(x.from.process), own = rank_of(identity_.process);
  const bool is_lower = rank >= 0 && own >= 0 && rank < own;
  if (deputy_.is_standing()) {
    return x.is_standing && is_lower ? refusal::none : refusal::follows_another;
  }
  if (decider_ && decider_->process == x.from.process) return refusal::none;
  if (decider_) {
    const bool is_better = !does_decider_stand_ && rank >= 0 && rank < rank_of(decider_->process);
    if (!is_better && !x.is_standing) return refusal::follows_another;
    if (does_decider_stand_) return refusal::follows_another;
  }
  return is_lower || x.is_standing ? refusal::none : refusal::lower_rank;
}

void worker_machine::answer(const plan_member& to, std::uint64_t job, refusal why) {
  canvassed x;
  x.from = identity_.process;
  x.job = job;
  x.why = static_cast<int>(why);
  x.greeting = greeting();
  x.pulse = pulse_now();
  x.durable = durable_;
  out_.push_back(worker_actions::send_peer{to, x});
}

void worker_machine::follow_deputy(const plan_member& who, bool is_standing) {
  const bool is_other = !decider_ || decider_->process != who.process;
  if (is_other) advise_deputy(deputy_events::retire{"follows " + who.name});
  decider_ = who;
  decider_heard_ms_ = own_ms_;
  const bool is_new = is_standing && (is_other || !does_decider_stand_);
  does_decider_stand_ = is_standing;
  if (is_new) say_state_to_deputy();
}

void worker_machine::leave_deputy() {
  if (!decider_) return;
  decider_.reset();
  does_decider_stand_ = false;
  free_since_ms_ = own_ms_;
}

/// What a deputy that begins, or that this worker lost for a while, may have missed.
void worker_machine::say_state_to_deputy() {
  for (const part_saved& p : parts_) decide_by(p);
  for (const auto& [peer, report] : peer_states_) decide_by(report);
  if (failed_) decide_by(*failed_);
  if (ready_) decide_by(*ready_);
  if (held_) decide_by(*held_);
  if (finished_) decide_by(*finished_);
}

// ---- the deputy here ----
deputy_facts worker_machine::facts() const {
  deputy_facts f;
  f.now_ms = own_ms_;
  f.unix_ms = unix_ms_;
  f.away_ms = is_welcome_ ? -1 : own_ms_ - away_since_ms_;
  f.free_ms = own_ms_ - free_since_ms_;
  f.follows_another = decider_ && !is_own_deputy();
  f.newest = commit_ ? &*commit_ : nullptr;
  f.greeting = greeting();
  f.pulse = pulse_now();
  f.durable = durable_;
  f.incarnation = incarnation_;
  return f;
}

void worker_machine::advise_deputy(const deputy_event& e) {
  for (deputy_action& a : deputy_.step(e, facts())) {
    if (auto* own = std::get_if<deputy_actions::order_self>(&a)) {
      own_orders_.push_back(std::move(own->message));
    } else if (auto* x = std::get_if<deputy_actions::send>(&a)) {
      out_.push_back(std::move(*x));
    } else if (auto* s = std::get_if<deputy_actions::store>(&a)) {
      out_.push_back(std::move(*s));
    } else if (auto* t = std::get_if<deputy_actions::make_tie_break>(&a)) {
      out_.push_back(std::move(*t));
    } else if (auto* n = std::get_if<deputy_actions::note>(&a)) {
      log_line line{job_, n->record.unix_ms, n->record.level,
                    fmt::format("{}: {}", n->record.kind, n->record.text)};
      pass_on(std::move(line));  // `logs` shows what went on while the coordinator was away
      out_.push_back(std::move(*n));
    }
  }
  const int own = rank_of(identity_.process);
  if (deputy_.is_standing() && !is_own_deputy() && own >= 0) {
    decider_ = commit_->shape.members[static_cast<std::size_t>(own)];
    does_decider_stand_ = true;
    say_state_to_deputy();
  } else if (!deputy_.is_standing() && is_own_deputy()) {
    leave_deputy();
  }
}

/// Orders and reports between the deputy here and the member that it is, until both are quiet.
void worker_machine::serve_deputy() {
  while (!own_orders_.empty() || !own_reports_.empty()) {
    if (!own_orders_.empty()) {
      const to_worker order = std::move(own_orders_.front());
      own_orders_.pop_front();
      if (is_welcome_ || !is_own_deputy()) continue;
      speaker_ = identity_.process;
      std::visit([this](const auto& m) { told(m); }, order);
      speaker_.clear();
    } else {
      const to_coordinator report = std::move(own_reports_.front());
      own_reports_.pop_front();
      advise_deputy(deputy_events::reported{identity_.process, report});
    }
  }
}

int worker_machine::rank_of(const process_id& process) const {
  if (!commit_) return -1;
  const auto& members = commit_->shape.members;
  const auto at = std::find_if(members.begin(), members.end(),
                               [&process](const auto& m) { return m.process == process; });
  return at == members.end() ? -1 : static_cast<int>(at - members.begin());
}

}  // namespace stagecoach
