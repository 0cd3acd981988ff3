// cluster_machine, third part: workers without work compute steps of jobs again (patrol).
//
// A worker that does it stays free: when a job gets it, the window is dropped and begun anew later.
// One window of a job at a time, oldest first. What is found is the job's to judge (job_audit.cpp).
#include <algorithm>
#include <utility>

#include "coordinator/cluster_machine.hpp"

namespace stagecoach {

/// After the placement: whoever is still free and suits may compute again.
void cluster_machine::consider_patrol() {
  for (auto& [id, w] : workers_) {
    const bool is_gone = w.connection == connection_id{} || w.is_lost || w.job != job_id{};
    if (w.audit && is_gone) end_patrol(w);
  }
  for (const auto& [id, job] : jobs_) {
    const auto window = job.next_audit();
    const auto doing = std::find_if(workers_.begin(), workers_.end(), [id = id](const auto& w) {
      return w.second.audit && w.second.audit->job == id;
    });
    if (doing != workers_.end()) {
      // Rolled back, or found otherwise: what is computed there is of no use any more.
      const bool is_current = window && window->from == doing->second.audit->from &&
                              window->to == doing->second.audit->to;
      if (!is_current) end_patrol(doing->second);
      continue;
    }
    if (!window || job.record().device_class.empty()) continue;
    // A defect that lasts is seen by others only; who computed it looks where nobody else is free.
    worker* chosen = nullptr;
    for (auto& [worker, w] : workers_) {
      if (!is_free(w) || w.audit || !unsuited(w, job).empty()) continue;
      const bool is_other = window->computed_by.count(worker) == 0;
      if (chosen == nullptr || is_other) chosen = &w;
      if (is_other) break;
    }
    if (chosen == nullptr) continue;
    // An answer to a former coordinator's order must not pass for one to this one's.
    const std::uint64_t number = meta_.incarnation << 32 | next_audit_++;
    chosen->audit = patrol_window{id, number, window->from, window->to};
    out_.push_back(actions::gather_audit{id, number, chosen->record.id, window->from, window->to});
  }
}

void cluster_machine::end_patrol(worker& w) {
  send(w, stop_audit{w.audit->number});
  w.audit.reset();
}

void cluster_machine::on(const events::audit_gathered& e) {
  const auto found = workers_.find(e.worker);
  const bool is_wanted = found != workers_.end() && found->second.audit &&
                         found->second.audit->number == e.message.audit;
  if (!is_wanted) return;
  if (e.problem.empty()) return send(found->second, e.message);
  audited none;
  none.job = e.message.job;
  none.audit = e.message.audit;
  none.is_done = false;
  none.text = e.problem;
  take_audited(found->second, none);
}

void cluster_machine::take_audited(worker& w, const audited& x) {
  if (!w.audit || w.audit->number != x.audit || value(w.audit->job) != x.job) {
    ++dropped_messages_;
    return;
  }
  const patrol_window window = *std::exchange(w.audit, std::nullopt);
  is_place_due_ = true;
  tell(window.job, job_events::window_audited{w.record.name, window.from, window.to, x});
}

}  // namespace stagecoach
