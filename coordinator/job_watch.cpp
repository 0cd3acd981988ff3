// job_machine, fourth part: who is lost, and which link is.
//
// A closed socket, a suspicion or missed beats are reasons to ask, not to evict: another member is
// asked to reach the process, over the peer line (worker/peer_line.hpp).
//   gone    its port refuses, or another process answers there: known dead, lost at once
//   silent  lost if there is a second sign beside the witness's: its control channel is closed or
//           late, or another member's link to it is closed or silent
//   alive   never lost for it; if a link to it is closed, or carries nothing, the link is at fault:
//           the generation ends and the links are dialled again
// Where no member can be asked, a worker without a job is. Where nobody can be asked, or nobody
// answers, patience decides (`detection`). What the coordinator slept through is no silence: its
// ticks advance by a bounded time (cluster_machine).
//
// A process that beats may still do nothing. Beats say what its trainer's thread is at and for how
// long: who stands in compute is stuck and lost; who waits for another never is, but the one at the
// end of its chain; a chain that ends in itself, or at one that is idle, ends the generation.
#include <algorithm>
#include <utility>

#include "coordinator/job_machine.hpp"

namespace stagecoach {

void job_machine::watch_members() {
  if (phase_ == phase::none || !has_ticked_) return;
  inquire();
  std::map<worker_id, std::string> lost;
  for (const auto& [worker, m] : members_) {
    if (std::string why = reason_lost(m); !why.empty()) lost[worker] = std::move(why);
  }
  if (!lost.empty()) return lose(lost);
  if (!is_committed()) return;
  if (const std::string fault = reason_link_fault(); !fault.empty()) return fail_generation(fault);
  // In a hold too: who is to stop after its step may stand in the middle of it.
  if (phase_ == phase::running || phase_ == phase::holding) watch_progress();
}

// ---- asking ----
int job_machine::reasons_to_ask(const member& m) const {
  const bool is_late = m.is_connected && now_ms_ - m.heard_ms >= rules_.beat_missed;
  return static_cast<int>(m.lost_by.size() + m.suspected_by.size()) + (m.is_connected ? 0 : 1) +
         (is_late ? 1 : 0);
}

void job_machine::inquire() {
  std::erase_if(inquiries_, [this](const auto& q) {
    const auto found = members_.find(q.first);
    return found != members_.end() ? reasons_to_ask(found->second) == 0
                                   : sought_.count(q.first) == 0;
  });
  for (const auto& [worker, m] : members_) {
    const worker_facts& f = m.facts;
    if (const int reasons = reasons_to_ask(m); reasons > 0)
      ask_witness(worker, {f.id, f.process, f.name, f.link_host, f.link_port}, reasons);
  }
  if (sought_.empty() || !generation_) return;
  for (const plan_member& peer : generation_->shape.members) {
    if (sought_.count(peer.worker) != 0) ask_witness(peer.worker, peer, 1);
  }
  std::erase_if(sought_, [this](worker_id id) { return verdict_on(id) == "gone"; });
}

void job_machine::ask_witness(worker_id about, const plan_member& peer, int reasons) {
  if (peer.link_port == 0) return;
  inquiry& q = inquiries_[about];
  if (q.verdict == "gone") return;
  if (q.asked_ms >= 0) {
    const auto witness = members_.find(q.witness);
    const bool is_there = q.witness == worker_id{}
                              ? choose_witness(about, q) == worker_id{}
                              : witness != members_.end() && witness->second.is_connected;
    if (is_there && now_ms_ - q.asked_ms < rules_.probe_wait) return;
    if (q.witness != worker_id{}) q.mute.insert(q.witness);
    q.asked_ms = -1;
  } else if (!q.verdict.empty() && reasons <= q.reasons &&
             now_ms_ - q.answered_ms < rules_.probe_again) {
    return;
  }
  const worker_id witness = choose_witness(about, q);
  if (reasons > q.reasons && q.verdict == "alive") q.verdict.clear();  // it may have died since
  q.witness = witness;
  q.asked_ms = now_ms_;
  q.reasons = reasons;
  const probe question{value(id()), number_, peer};
  if (witness == worker_id{}) {
    out_.push_back(actions::seek_witness{question, q.mute});
  } else {
    send(witness, question);
  }
}

/// Rather one whose own links work and who has no part in the quarrel; where all have, one that a
/// single other accuses knows more than the accuser. 0: nobody.
worker_id job_machine::choose_witness(worker_id about, const inquiry& q) const {
  const auto accused = members_.find(about);
  worker_id best{};
  std::size_t best_doubt = 0;
  for (const auto& [worker, m] : members_) {
    const bool can = worker != about && m.is_connected &&
                     now_ms_ - m.heard_ms < rules_.beat_missed && q.mute.count(worker) == 0;
    if (!can) continue;
    const bool is_accuser =
        accused != members_.end() &&
        (accused->second.lost_by.count(worker) != 0 || accused->second.suspected_by.count(worker));
    const std::size_t doubt = 2 * (m.lost_by.size() + m.suspected_by.size()) + (is_accuser ? 3 : 0);
    if (best != worker_id{} && doubt >= best_doubt) continue;
    best = worker;
    best_doubt = doubt;
  }
  return best;
}

void job_machine::found(worker_id witness, const std::string& witness_name, const probed& x) {
  const auto about = static_cast<worker_id>(x.peer);
  const auto asked = inquiries_.find(about);
  // An outsider is chosen by the cluster, which lets nobody with another job answer.
  const bool is_witness = asked != inquiries_.end() && asked->second.asked_ms >= 0 &&
                          (asked->second.witness == witness ||
                           (asked->second.witness == worker_id{} && members_.count(witness) == 0));
  const bool is_verdict = x.verdict == "alive" || x.verdict == "gone" || x.verdict == "silent";
  if (!is_witness || !is_verdict) {
    ++stale_messages_;
    return;
  }
  inquiry& q = asked->second;
  const bool is_news = q.verdict != x.verdict;
  q.asked_ms = -1;
  q.mute.clear();
  q.verdict = x.verdict;
  q.why = x.why;
  q.answered_by = witness;
  q.answered_ms = now_ms_;
  // That the peers of a generation that ends have closed their links is no news.
  if (!is_news || (x.verdict == "alive" && !is_committed())) return;
  std::string name = fmt::format("w-{}", x.peer);
  if (const auto known = members_.find(about); known != members_.end())
    name = known->second.facts.name;
  note("worker_probed",
       fmt::format("{} finds {} {}{}", witness_name, name, x.verdict,
                   x.why.empty() ? "" : ": " + x.why),
       {{"worker", name}, {"witness", witness_name}, {"verdict", x.verdict}});
}

std::string job_machine::verdict_on(worker_id id) const {
  const auto q = inquiries_.find(id);
  return q == inquiries_.end() ? "" : q->second.verdict;
}

// ---- judging ----
/// Who else than the witness finds it silent.
std::string job_machine::other_sign(const member& m) const {
  if (!m.is_connected) return "its connection is closed";
  if (const std::int64_t ms = now_ms_ - m.heard_ms; ms >= rules_.beat_late)
    return fmt::format("no beat for {} ms", ms);
  const worker_id witness = inquiries_.at(m.facts.id).answered_by;
  for (const auto* reports : {&m.lost_by, &m.suspected_by}) {
    for (const auto& [by, since] : *reports) {
      const auto other = members_.find(by);
      if (by != witness && other != members_.end() && other->second.is_connected)
        return fmt::format("{}'s link to it is silent", other->second.facts.name);
    }
  }
  return {};
}

std::string job_machine::reason_lost(const member& m) const {
  const auto is_said_by_peer = [this](const std::map<worker_id, std::int64_t>& reports) {
    return std::any_of(reports.begin(), reports.end(), [this](const auto& r) {
      const auto by = members_.find(r.first);
      return by != members_.end() && by->second.is_connected;
    });
  };
  const std::int64_t silent_ms = now_ms_ - m.heard_ms, closed_ms = now_ms_ - m.disconnected_ms;
  if (!m.is_connected && m.rank < 0 && is_committed())
    return "connection closed: " + m.disconnected_why;

  const auto asked = inquiries_.find(m.facts.id);
  if (asked == inquiries_.end() && m.is_connected && silent_ms < rules_.silence_max) return {};
  const inquiry none;
  const inquiry& q = asked == inquiries_.end() ? none : asked->second;
  if (q.verdict == "gone") return "its process is gone: " + q.why;
  if (q.verdict == "silent") {
    if (const std::string sign = other_sign(m); !sign.empty())
      return fmt::format("a witness finds it silent ({}), and {}", q.why, sign);
  }
  if (q.verdict == "alive") {
    const std::int64_t away_ms = m.is_connected ? silent_ms : closed_ms;
    if (away_ms < rules_.unconfirmed_max) return {};
    return fmt::format("its process answers, but the coordinator can't hear it for {} ms", away_ms);
  }
  if (q.asked_ms >= 0 && q.witness != worker_id{}) return {};  // its witness has the word

  const bool is_lost_by = is_said_by_peer(m.lost_by);
  if (m.is_connected) {
    if (silent_ms >= rules_.silence_max) return fmt::format("no beat for {} ms", silent_ms);
    if (silent_ms >= rules_.suspected_silence && (is_lost_by || is_said_by_peer(m.suspected_by)))
      return fmt::format("no beat for {} ms, and its links are silent", silent_ms);
    return {};
  }
  if (is_lost_by) return "connection and links closed: " + m.disconnected_why;
  if (closed_ms < rules_.reconnect_grace) return {};
  return fmt::format("connection closed ({}) and not back in {} ms", m.disconnected_why, closed_ms);
}

std::string job_machine::reason_link_fault() const {
  for (const auto& [worker, m] : members_) {
    const auto asked = inquiries_.find(worker);
    const std::string verdict = asked == inquiries_.end() ? "" : asked->second.verdict;
    // Where all witnesses are mute there is nobody whose word is still to come.
    const bool is_asked = asked != inquiries_.end() && asked->second.asked_ms >= 0 &&
                          asked->second.witness != worker_id{};
    // A frozen process accuses nobody: two that accuse each other are alive.
    const auto is_mutual = [this, worker = worker](worker_id by) {
      const auto other = members_.find(by);
      return other != members_.end() && (other->second.lost_by.count(worker) != 0 ||
                                         other->second.suspected_by.count(worker) != 0);
    };
    // How long a silent one is given: one that is dead gives a second sign by then.
    const auto patience = [&](worker_id by, std::int64_t since, std::int64_t if_alive,
                              std::int64_t if_unknown) {
      if (verdict == "alive" && asked->second.answered_ms >= since) return if_alive;
      if (verdict == "silent") return is_mutual(by) ? if_alive : rules_.beat_late;
      return if_unknown;
    };
    for (const auto& [by, since] : m.lost_by) {
      const std::int64_t wait_ms = patience(by, since, 0, rules_.link_lost_wait);
      if (wait_ms == 0 || (!is_asked && now_ms_ - since >= wait_ms))
        return fmt::format("the link between {} and w-{} broke, both are alive", m.facts.name,
                           value(by));
    }
    for (const auto& [by, since] : m.suspected_by) {
      const std::int64_t wait_ms =
          patience(by, since, rules_.link_settle, rules_.link_suspected_max);
      if (!is_asked && now_ms_ - since >= wait_ms)
        return fmt::format("the link between {} and w-{} carries nothing, both are alive",
                           m.facts.name, value(by));
    }
  }
  return {};
}

// ---- progress ----
std::int64_t job_machine::stand_ms_max() const {
  if (step_us_.empty()) return rules_.load_wait;  // a first step may also fault in its memory
  std::vector<std::int64_t> times(step_us_.begin(), step_us_.end());
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return std::max(rules_.stand_ms, rules_.stand_steps * *middle / 1000);
}

/// Whom this waiting member's wait ends at: one that does not wait, or one that was met already.
/// Null: somebody on the way is not known, or has moved lately.
const job_machine::member* job_machine::end_of_wait(const member& m) const {
  std::set<worker_id> met;
  const member* at = &m;
  while (met.insert(at->facts.id).second) {
    const auto next = members_.find(static_cast<worker_id>(at->pulse->waits_for));
    if (next == members_.end() || next->second.rank < 0 || !next->second.pulse) return nullptr;
    at = &next->second;
    if (at->pulse->stands_ms < stand_ms_max()) return nullptr;
    if (at->pulse->activity != static_cast<int>(trainer_activity::wait)) break;
  }
  return at;
}

void job_machine::watch_progress() {
  const auto is_at = [](const member& m, trainer_activity what) {
    return m.pulse && m.pulse->activity == static_cast<int>(what);
  };
  const std::int64_t bound_ms = stand_ms_max();
  std::map<worker_id, std::string> stuck;
  std::string circle;
  for (const auto& [worker, m] : members_) {
    const bool stands = m.rank >= 0 && m.is_connected && m.pulse &&
                        m.phase == worker_phase::running && m.pulse->stands_ms >= bound_ms;
    if (!stands) continue;
    if (is_at(m, trainer_activity::compute)) {
      stuck[worker] =
          fmt::format("stuck: its trainer stands in one instruction for {} ms (bound {})",
                      m.pulse->stands_ms, bound_ms);
    } else if (is_at(m, trainer_activity::wait)) {
      const member* end = end_of_wait(m);
      if (end == nullptr) continue;
      const bool waits = is_at(*end, trainer_activity::wait);
      if (!waits && !is_at(*end, trainer_activity::idle)) continue;
      circle =
          fmt::format("{} waits for {} ms, in the end for {}, which {}", m.facts.name,
                      m.pulse->stands_ms, end->facts.name, waits ? "waits itself" : "does nothing");
    }
  }
  if (!stuck.empty()) {
    lose(stuck, true);
  } else if (!circle.empty()) {
    fail_generation(circle);
  }
}

}  // namespace stagecoach
