// job_machine, fourth part: among other jobs. Gives workers back to a job that waits, or all of
// them; counts what it is owed for having waited. Who must yield to whom is cluster_machine's
// decision.
//
//   give_back{n} --hold [+ save]--> n members released --prepare with the rest--> running, smaller
//   suspend      --hold + save----> all released --> PENDING "preempted by ...", with its age
#include <algorithm>
#include <set>

#include "coordinator/job_machine.hpp"

namespace stagecoach {

void job_machine::on(const job_events::set_priority& e) {
  if (is_end(record_.state)) {
    reply(e.reply, make_error(errc::conflict, "job {} is {}: its priority means nothing any more",
                              record_.spec.name, to_string(record_.state)));
    return;
  }
  const int before = priority();
  record_.priority = e.priority;
  save_record();
  note("priority_changed", fmt::format("from {} to {}", before, e.priority),
       {{"from", std::to_string(before)}, {"to", std::to_string(e.priority)}});
  agree(e.reply, fmt::format("priority {}", e.priority));
}

// ---- what it can give ----
int job_machine::surplus() const {
  if (!generation_ || phase_ == phase::none) return 0;
  return std::max(0, staying_count() - workers_least());
}

bool job_machine::can_yield() const {
  if (record_.is_pause_wanted || record_.is_cancel_wanted || !yielding().empty()) return false;
  // It can't run as it is, and what is durable is all that it would lose these workers with.
  if (is_short()) return true;
  const bool is_near_end = std::any_of(members_.begin(), members_.end(),
                                       [](const auto& m) { return m.second.is_finished; });
  return phase_ == phase::running && finished_ms_ < 0 && !is_near_end &&
         now_ms_ >= no_change_before_ms_;
}

std::vector<worker_id> job_machine::yielding() const {
  std::vector<worker_id> ids;
  for (const auto& [id, m] : members_) {
    if (m.is_leaving || !suspended_for_.empty()) ids.push_back(id);
  }
  return ids;
}

bool job_machine::is_leaving() const {
  return std::any_of(members_.begin(), members_.end(),
                     [](const auto& m) { return m.second.is_leaving; });
}

/// Every stage has a member that stays, and its replicas hold the same.
bool job_machine::is_leavers_state_elsewhere() const {
  if (record_.spec.parallelism.shard_optimizer) return false;
  std::set<int> stages;
  for (const auto& [id, m] : members_) {
    if (m.rank >= 0 && m.is_connected && !m.is_leaving && !m.is_draining)
      stages.insert(generation_->shape.stage_of(m.rank));
  }
  return static_cast<int>(stages.size()) == generation_->shape.shape.stage_count;
}

// ---- asked to yield ----
void job_machine::on(const job_events::give_back& e) {
  if (!can_yield() || phase_ != phase::running || e.count < 1 || e.count > surplus()) return;
  // First those that the plan does not use, then whole replicas from the last on: their stages have
  // other holders, so nothing moves. A single pipeline's last stages leave after a save.
  std::vector<std::pair<int, worker_id>> order;
  for (const auto& [id, m] : members_) {
    if (e.useful.count(id) != 0 && !m.is_draining) order.emplace_back(m.rank, id);
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    if ((a.first < 0) != (b.first < 0)) return a.first < 0;
    return a.first != b.first ? a.first > b.first : a.second > b.second;
  });
  if (static_cast<int>(order.size()) < e.count) return;
  std::string names;
  for (int i = 0; i < e.count; ++i) {
    member& m = members_.at(order[static_cast<std::size_t>(i)].second);
    m.is_leaving = true;
    names += " " + m.facts.name;
  }
  shrunk_for_ = e.to;
  note("shrink_ordered",
       fmt::format("gives {} of {} workers to {}:{}", e.count, members_.size(), e.to, names),
       {{"to", e.to}, {"workers", std::to_string(e.count)}});
  advance();
}

void job_machine::on(const job_events::suspend& e) {
  if (!can_yield()) return;
  note("preemption_ordered", fmt::format("gives its {} workers to {}", members_.size(), e.to),
       {{"to", e.to}, {"workers", std::to_string(members_.size())}});
  if (phase_ == phase::preparing) {
    return leave_workers(job_state::pending, "preempted by " + e.to);
  }
  suspended_for_ = e.to;
  advance();
}

void job_machine::on(const job_events::keep_workers&) {
  if (yielding().empty()) return;
  note("yield_withdrawn", "who waited for its workers does not need them any more");
  drop_yield();
  advance();
}

void job_machine::drop_yield() {
  suspended_for_.clear();
  shrunk_for_.clear();
  for (auto& [id, m] : members_) m.is_leaving = false;
}

bool job_machine::start_yielding() {
  if (!suspended_for_.empty()) {
    start_hold("suspend", {order_kind::save, order_kind::hold});
    return true;
  }
  if (!is_leaving()) return false;
  start_hold("shrink", is_leavers_state_elsewhere()
                           ? std::set<order_kind>{order_kind::hold}
                           : std::set<order_kind>{order_kind::save, order_kind::hold});
  return true;
}

void job_machine::consider_yielded_hold() {
  const bool is_suspend = hold_reason_ == "suspend";
  if (is_suspend ? suspended_for_.empty() : !is_leaving()) {
    return resume_after_hold("nobody waits for its workers any more");
  }
  const std::uint64_t step = planned().front()->step;
  const auto newest = newest_saved();
  const bool is_saved = newest && *newest >= step;
  // A smaller job needs no save where those who stay hold everything.
  const bool needs_save = is_suspend || !is_leavers_state_elsewhere();
  if (!is_saved && needs_save) {
    if (orders_.count(order_kind::save) == 0) {
      return resume_after_hold("a member that was to keep the state was lost");
    }
    if (!has_save_failed_ && now_ms_ - held_ms_ < rules_.order_wait) return;
    no_change_before_ms_ = now_ms_ + 6 * rules_.retry_wait;
    note("yield_failed", "the checkpoint could not be saved; the job keeps its workers for now", {},
         "error");
    return resume_after_hold("the checkpoint could not be saved");
  }
  if (is_suspend) return leave_workers(job_state::pending, "preempted by " + suspended_for_);
  const std::string why = "gives workers to " + shrunk_for_;
  for (const worker_id worker : workers()) {
    if (!members_.at(worker).is_leaving) continue;
    send(worker, stop_stage{value(id()), why});
    release(worker, why);
  }
  is_after_loss_ = false;
  keeps_size_ = true;
  start_preparing("shrink: " + why);
}

// ---- what it is owed ----
void job_machine::count_waiting(std::int64_t passed_ms) {
  if (is_waiting()) {
    owed_ms_ += passed_ms;
  } else if (running_since_ms_ >= 0) {
    owed_ms_ = std::max<std::int64_t>(0, owed_ms_ - passed_ms);
  }
}

}  // namespace stagecoach
