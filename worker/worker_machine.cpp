#include "worker/worker_machine.hpp"

#include <algorithm>
#include <set>
#include <utility>

namespace stagecoach {

namespace {
constexpr std::size_t steps_of_a_message_max = 1'000;  // 200 KB of JSON
constexpr std::int64_t tick_gap_ms_max = 300;          // ticks come every 100 ms
// A second of a running trainer without an instruction done is rare; from then on beats come
// closer, so that a stuck one is known at its bound and not up to a second later.
constexpr std::int64_t odd_stand_ms = 1'000, odd_beat_ms = 200;
// A channel on which nothing comes is given up after 10 s (control_options::idle).
constexpr std::int64_t retold_ms_max = 15'000;
}  // namespace

worker_machine::worker_machine(worker_identity identity, deputy_rules rules)
    : identity_(std::move(identity)), deputy_(identity_.process, rules) {}

std::vector<worker_action> worker_machine::step(const worker_event& e) {
  std::visit([this](const auto& x) { on(x); }, e);
  serve_deputy();
  return std::exchange(out_, {});
}

// ---- the control channel ----
void worker_machine::on(const worker_events::connected& e) {
  lose_channel();
  is_connected_ = true;
  follow(e.step);
  say_hello();
}

void worker_machine::say_hello() {
  said_promised_ = promised_;
  said_generation_ = generation_;
  send(greeting());
}

void worker_machine::on(const worker_events::disconnected&) { lose_channel(); }

/// What was sent last may be lost with it: a coordinator that was frozen closes it unread, and no
/// other message asks for it.
void worker_machine::lose_channel() {
  is_connected_ = false;
  if (!std::exchange(is_welcome_, false)) return;
  away_since_ms_ = free_since_ms_ = own_ms_;
  forget_said_before(own_ms_ - retold_ms_max);
  std::deque<progress> queued = std::exchange(queued_progress_, {});
  for (said_progress& s : said_progress_) queue(std::move(s.report));
  for (progress& p : queued) queue(std::move(p));
  said_progress_.clear();
  said_steps_ = 0;
}

void worker_machine::on(const worker_events::coordinator_said& e) {
  std::visit([this](const auto& x) { told(x); }, e.message);
}

void worker_machine::on(const worker_events::trainer_said& e) {
  std::visit([this](const auto& x) { said(x); }, e.message);
}

/// A trainer's thread that stands still is the coordinator's to judge; what this process slept
/// through (a stop, a swamped host) is no standing still.
void worker_machine::watch_pulse(const worker_events::tick& e) {
  own_ms_ += std::clamp<std::int64_t>(e.now_ms - now_ms_, 0, tick_gap_ms_max);
  if (e.pulse != pulse_) moved_own_ms_ = own_ms_;
  pulse_ = e.pulse;
}

void worker_machine::on(const worker_events::tick& e) {
  watch_pulse(e);
  now_ms_ = e.now_ms;
  follow(e.step);
  unix_ms_ = e.unix_ms;
  leaf_us_ = e.leaf_us;
  layer_us_ = e.layer_us;
  if (decider_ && !is_own_deputy() && own_ms_ - decider_heard_ms_ >= deputy_.rules().follow) {
    leave_deputy();
  }
  advise_deputy(deputy_events::tick{});
  const std::int64_t stands_ms = own_ms_ - moved_own_ms_;
  const bool is_odd = phase_ == worker_phase::running && stands_ms >= odd_stand_ms;
  const std::int64_t due_ms = is_odd ? next_beat_ms_ - beat_ms_ + odd_beat_ms : next_beat_ms_;
  if (!is_welcome_ || now_ms_ < std::min(due_ms, next_beat_ms_)) return;
  next_beat_ms_ = now_ms_ + beat_ms_;
  send(pulse_now());
}

beat worker_machine::pulse_now() const {
  beat b{job_, generation_, step_, static_cast<int>(phase_)};
  b.op = pulse_.op;
  b.activity = static_cast<int>(pulse_.activity);
  b.waits_for = pulse_.waits_for;
  b.stands_ms = own_ms_ - moved_own_ms_;
  b.leaf_us = leaf_us_;
  b.layer_us = layer_us_;
  return b;
}

void worker_machine::on(const worker_events::stopping& e) {
  if (is_connected_) out_.push_back(worker_actions::send{goodbye{e.reason}});
}

// ---- what the coordinator says ----
void worker_machine::told(const welcome& x) {
  if (x.incarnation < incarnation_) {
    // A coordinator that was thought dead: it must not decide beside its successor.
    if (std::exchange(is_welcome_, false)) away_since_ms_ = free_since_ms_ = own_ms_;
    out_.push_back(worker_actions::reconnect{"this coordinator has a successor"});
    return;
  }
  id_ = x.worker;
  incarnation_ = x.incarnation;
  beat_ms_ = std::clamp<std::int64_t>(x.beat_ms, 10, 60'000);
  next_beat_ms_ = now_ms_ + beat_ms_;
  // Before it is welcome, so that what the deputy says of its end comes after the plan that it
  // made.
  leave_deputy();
  advise_deputy(deputy_events::retire{"the coordinator is back"});
  is_welcome_ = true;
  // A deputy went on between the greeting and this answer to it.
  if (promised_ != said_promised_ || generation_ != said_generation_) say_hello();
  say_plan();
  say_state_again();
}

void worker_machine::told(const refused& x) {
  if (x.is_final) out_.push_back(worker_actions::give_up{x.reason});
}

// A worker without work computes steps of a job again, until it gets work of its own.
void worker_machine::told(const audit& x) {
  if (job_ != 0) return;  // it was given to a job meanwhile; the coordinator knows
  audit_ = x.audit;
  tell(x);
}
void worker_machine::told(const stop_audit& x) {
  if (x.audit != audit_) return;
  audit_ = 0;
  tell(x);
}

void worker_machine::told(const prepare& x) {
  if (audit_ != 0) told(stop_audit{audit_});
  if (x.job != job_) {
    if (!speaker_.empty()) {  // a deputy has one job, its own
      ++stale_messages_;
      return;
    }
    if (job_ != 0) tell(stop_stage{job_, "given to another job"});
    forget_job();
    job_ = x.job;
  }
  if (x.number < promised_ || x.number <= generation_) {
    ++stale_messages_;
    return;
  }
  if (x.number == promised_) {
    if (speaker_ != promised_to_) {
      ++stale_messages_;  // a second decider of one number
    } else if (answer_) {
      decide_by(*answer_);  // else the trainer's answer is on its way
    }
    return;
  }
  learn(x.distrusted);
  promised_ = x.number;
  promised_to_ = speaker_;
  phase_ = worker_phase::prepared;
  is_dropping_ = true;
  answer_.reset();
  ready_.reset();
  failed_.reset();
  held_.reset();
  finished_.reset();
  feed_ready_.reset();
  fed_.reset();
  tell(x);
}

/// What is durable, or written and on its way to be, may be among what is not trusted: of no use to
/// who decides next.
void worker_machine::learn(const distrust& x) {
  const bool is_new = x.fence > distrusted_.fence;
  if (x.fence >= distrusted_.fence) distrusted_ = x;
  if (!is_new) return;
  if (durable_.step > x.step) durable_ = {};
  std::erase_if(parts_,
                [&x](const part_saved& p) { return p.generation < x.fence && p.step > x.step; });
}

/// A joiner is given its job by its first feed.
void worker_machine::told(const feed& x) {
  if (job_ == 0) job_ = x.job;
  const bool is_joiner = generation_ == 0 && promised_ == 0;
  if (x.job != job_ || x.request <= feed_ || (!is_joiner && x.generation != generation_) ||
      x.generation < promised_) {
    ++stale_messages_;
    return;
  }
  feed_ = x.request;
  feed_ready_.reset();
  fed_.reset();
  tell(x);
}

void worker_machine::told(const stop_feed& x) {
  if (x.job != job_ || x.request != feed_) {
    ++stale_messages_;
    return;
  }
  feed_ready_.reset();
  fed_.reset();
  tell(x);
}

void worker_machine::told(const trace_steps& x) {
  if (x.job == job_ && job_ != 0) tell(x);
}

void worker_machine::told(const commit& x) {
  const bool is_awaited = value(x.shape.job) == job_ && x.shape.generation == promised_ &&
                          x.shape.generation > generation_ && speaker_ == promised_to_;
  if (!is_awaited) {
    ++stale_messages_;
    return;
  }
  learn(x.distrusted);
  generation_ = x.shape.generation;
  plan_hash_ = plan_hash(x.shape);
  phase_ = worker_phase::loading;
  is_dropping_ = false;
  step_ = x.step;
  peer_states_.clear();
  commit_ = x;
  commit_->transfers.clear();
  commit_->parts.clear();
  commit_->roll_forward.reset();
  tell(x);
}

void worker_machine::told(const run_stage& x) {
  if (!is_mine(x.job, x.generation) || phase_ != worker_phase::ready) {
    ++stale_messages_;
    return;
  }
  phase_ = worker_phase::running;
  ready_.reset();
  tell(x);
}

void worker_machine::told(const give_order& x) {
  if (!is_mine(x.job, x.generation) || phase_ != worker_phase::running) {
    ++stale_messages_;
    return;
  }
  tell(x);
}

void worker_machine::told(const resume_stage& x) {
  if (!is_mine(x.job, x.generation) || phase_ != worker_phase::held) {
    ++stale_messages_;
    return;
  }
  phase_ = worker_phase::running;
  held_.reset();
  tell(x);
}

void worker_machine::told(const checkpoint_durable& x) {
  // A deputy's manifest is a file that the coordinator does not know of: the parts of the newest
  // are kept for it, with the manifest's number, so that it finds the same manifest and not
  // another.
  const bool is_by_deputy = !speaker_.empty();
  std::erase_if(parts_, [&x, is_by_deputy](const part_saved& p) {
    return p.job == x.job && (is_by_deputy ? p.step < x.step : p.step <= x.step);
  });
  for (part_saved& p : parts_) {
    if (p.job == x.job && p.step == x.step) p.seq = x.seq;
  }
  if (x.job != job_) return;
  if (x.seq >= durable_.seq) durable_ = x;
  tell(x);
}

void worker_machine::told(const stop_stage& x) {
  if (x.job == 0 || x.job != job_) {
    ++stale_messages_;
    return;
  }
  tell(x);
  forget_job();
}

void worker_machine::forget_job() {
  phase_ = worker_phase::idle;
  job_ = generation_ = plan_hash_ = promised_ = step_ = feed_ = 0;
  feed_ready_.reset();
  fed_.reset();
  promised_to_.clear();
  commit_.reset();
  durable_ = {};
  distrusted_ = {};
  leave_deputy();
  is_dropping_ = false;
  answer_.reset();
  ready_.reset();
  failed_.reset();
  held_.reset();
  finished_.reset();
  peer_states_.clear();
  parts_.clear();
}

// ---- what the trainer says ----
void worker_machine::said(const prepared& x) {
  if (x.job != job_ || x.number != promised_ || !is_dropping_)
    return;  // a newer prepare came since
  is_dropping_ = false;
  answer_ = x;
  step_ = x.has_state ? x.step : 0;
  decide_by(x);
}

void worker_machine::said(const ready& x) {
  if (!is_mine(x.job, x.generation) || phase_ != worker_phase::loading) return;
  phase_ = worker_phase::ready;
  step_ = x.step;
  ready_ = x;
  decide_by(x);
}

void worker_machine::said(const failed& x) {
  const bool is_of_this = is_mine(x.job, x.generation) && phase_ != worker_phase::prepared;
  if (!is_of_this) return;  // the generation is gone already
  phase_ = worker_phase::prepared;
  failed_ = x;
  decide_by(x);
}

void worker_machine::said(const progress& x) {
  if (x.job == job_ && !x.steps.empty()) step_ = std::max(step_, x.steps.back().step);
  if (is_welcome_) return report(x);
  decide_by(x);
  queue(x);
}

/// On a channel that may be about to break: kept for a while, to be said again.
void worker_machine::report(progress x) {
  send(x);
  said_steps_ += x.steps.size();
  said_progress_.push_back({own_ms_, std::move(x)});
  forget_said_before(own_ms_ - retold_ms_max);
}

void worker_machine::forget_said_before(std::int64_t ms) {
  while (!said_progress_.empty() &&
         (said_progress_.front().own_ms < ms || said_steps_ > retold_steps_max)) {
    said_steps_ -= said_progress_.front().report.steps.size();
    said_progress_.pop_front();
  }
}

void worker_machine::queue(const progress& x) {
  for (std::size_t first = 0; first < x.steps.size(); first += steps_of_a_message_max) {
    progress piece{x.job, x.generation, x.plan_hash, {}};
    const std::size_t last = std::min(x.steps.size(), first + steps_of_a_message_max);
    piece.steps.assign(x.steps.begin() + static_cast<std::ptrdiff_t>(first),
                       x.steps.begin() + static_cast<std::ptrdiff_t>(last));
    queued_steps_ += piece.steps.size();
    // Small reports of one generation become one message.
    const bool joins =
        !queued_progress_.empty() && queued_progress_.back().job == x.job &&
        queued_progress_.back().generation == x.generation &&
        queued_progress_.back().steps.size() + piece.steps.size() <= steps_of_a_message_max;
    if (joins) {
      auto& into = queued_progress_.back().steps;
      into.insert(into.end(), piece.steps.begin(), piece.steps.end());
    } else {
      queued_progress_.push_back(std::move(piece));
    }
  }
  while (queued_steps_ > queued_steps_max) {
    queued_steps_ -= queued_progress_.front().steps.size();
    dropped_reports_ += queued_progress_.front().steps.size();
    queued_progress_.pop_front();
  }
}

void worker_machine::said(const part_saved& x) {
  if (!x.problem.empty()) {
    if (!is_welcome_) decide_by(x);
    return pass_on(x);
  }
  if (x.job == job_) {
    if (parts_.size() >= queued_parts_max) parts_.erase(parts_.begin());
    parts_.push_back(x);
    // Nobody writes manifests: the oldest save would be of no use any more when somebody does.
    std::set<std::uint64_t> steps;
    for (const part_saved& p : parts_) steps.insert(p.step);
    if (!is_welcome_ && steps.size() > uncommitted_saves_max) {
      std::erase_if(parts_, [&steps](const part_saved& p) { return p.step == *steps.begin(); });
    }
  }
  decide_by(x);
}

void worker_machine::said(const held& x) {
  if (!is_mine(x.job, x.generation) || phase_ != worker_phase::running) return;
  phase_ = worker_phase::held;
  step_ = x.step;
  held_ = x;
  decide_by(x);
}

void worker_machine::said(const finished& x) {
  const bool ran = phase_ == worker_phase::running || phase_ == worker_phase::held;
  if (!is_mine(x.job, x.generation) || !ran) return;
  phase_ = worker_phase::finished;
  step_ = x.step;
  finished_ = x;
  decide_by(x);
}

void worker_machine::said(const feed_ready& x) {
  if (x.job != job_ || x.request != feed_) return;
  feed_ready_ = x;
  if (is_welcome_) send(x);
}

void worker_machine::said(const fed& x) {
  if (x.job != job_ || x.request != feed_) return;
  fed_ = x;
  if (is_welcome_) send(x);
}

/// For people, and of this moment: nobody waits for it after a while away.
void worker_machine::said(const traced& x) {
  if (x.job == job_ && is_welcome_) send(x);
}

void worker_machine::said(const peer_report& x) {
  if (!is_mine(x.job, x.generation)) return;
  peer_report& newest = peer_states_[x.peer];
  if (newest.what != "lost") newest = x;  // a link that closed does not come back in its generation
  decide_by(x);
  // Is it the deputy that is lost? Its host answers for the dead.
  const bool is_decider = decider_ && !is_own_deputy() && value(decider_->worker) == x.peer;
  if (is_decider && x.what == "lost") answer(*decider_, job_, refusal::none);
}

void worker_machine::said(const probed& x) {
  decide_by(x);  // or nobody: after a while away nobody waits for it
}

// ---- small ones ----
/// The trainer's step counter counts while it runs; before, it is that of a generation that is
/// gone.
void worker_machine::follow(std::uint64_t step) {
  if (phase_ == worker_phase::running) step_ = std::max(step_, step);
}

void worker_machine::send(to_coordinator message) {
  if (is_connected_) out_.push_back(worker_actions::send{std::move(message)});
}

void worker_machine::pass_on(to_coordinator message) {
  if (is_welcome_) return send(std::move(message));
  if (queued_others_.size() >= queued_others_max) {
    queued_others_.pop_front();
    ++dropped_reports_;
  }
  queued_others_.push_back(std::move(message));
}

void worker_machine::tell(to_worker message) {
  out_.push_back(worker_actions::tell_trainer{std::move(message)});
}

/// The coordinator where its channel stands, else the deputy that this worker follows.
void worker_machine::decide_by(const to_coordinator& message) {
  if (is_welcome_) return send(message);
  if (is_own_deputy()) {
    own_reports_.push_back(message);
  } else if (decider_) {
    out_.push_back(worker_actions::send_peer{*decider_, deputy_report{identity_.process, message}});
  }
}

/// First after each welcome, so that what follows is understood.
void worker_machine::say_plan() {
  if (!commit_ || commit_->decided_by.empty()) return;
  send(plan_report{job_, commit_->shape, commit_->source, commit_->step, commit_->chain,
                   commit_->reason, commit_->decided_by, commit_->unix_ms, commit_->distrusted});
}

/// After each welcome: all that a coordinator may have missed. It drops what it knows.
void worker_machine::say_state_again() {
  for (progress& p : queued_progress_) report(std::move(p));
  queued_progress_.clear();
  queued_steps_ = 0;
  for (const part_saved& p : parts_) send(p);
  for (const auto& [peer, report] : peer_states_) send(report);
  for (to_coordinator& message : queued_others_) send(std::move(message));
  queued_others_.clear();
  if (failed_) send(*failed_);
  if (ready_) send(*ready_);
  if (feed_ready_) send(*feed_ready_);
  if (fed_) send(*fed_);
  if (held_) send(*held_);
  if (finished_) send(*finished_);
}

hello worker_machine::greeting() const {
  hello h = identity_;
  h.job = job_;
  h.generation = generation_;
  h.plan_hash = plan_hash_;
  h.phase = static_cast<int>(phase_);
  h.step = step_;
  h.promised = promised_;
  h.promised_to = promised_to_;
  h.distrusted = distrusted_;
  return h;
}

}  // namespace stagecoach
