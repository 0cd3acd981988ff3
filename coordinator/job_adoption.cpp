// job_machine, fourth part: the plans that deputies decided while this coordinator was away.
//
// Whoever holds such a plan says so after the welcome (plan_report), before anything else. One that
// is newer than ours is taken over and goes on running. Two that differ, both with members here,
// are the two sides of a cut: a PREPARE over both, with a number above both, makes them one run.
#include <algorithm>
#include <utility>

#include "coordinator/job_machine.hpp"
#include "coordinator/wire.hpp"

namespace stagecoach {

bool job_machine::is_claimed_by(const hello& h) const {
  if (h.job != value(id()) || h.generation == 0) return false;
  if (is_end(record_.state)) return false;
  if (record_.state == job_state::paused) return is_running_on(h);
  if (h.generation != number_of_plan()) return h.generation > number_of_plan();
  return h.plan_hash != plan_hash_;
}

/// It was paused in the belief that all hold; but this coordinator slept, and a deputy had let them
/// go on, beyond what is durable.
bool job_machine::is_running_on(const hello& h) const {
  const bool is_at_it = h.phase == static_cast<int>(worker_phase::running) ||
                        h.phase == static_cast<int>(worker_phase::held);
  return is_at_it && h.job == value(id()) && generation_ && h.generation >= number_of_plan() &&
         h.step > newest_saved().value_or(0);
}

/// They are taken over as after a restart, and paused again with what they have done.
void job_machine::take_back(const hello& h) {
  record_.state = job_state::running;
  record_.reason.clear();
  record_.is_pause_wanted = true;
  record_.waits_since_unix_ms = 0;
  save_record();
  for (const plan_member& m : generation_->shape.members) sought_.insert(m.worker);
  waits_for_ = "a deputy had let the job go on; waits for its workers, to pause it again";
  note("pause_overtaken",
       fmt::format("{} runs on at step {}, durable is step {}", h.name, h.step,
                   newest_saved().value_or(0)),
       {{"worker", h.name}}, "warn");
  enter(phase::adopting);
}

job_machine::member& job_machine::join(worker_id worker, const hello& h) {
  member m;
  m.facts = {worker,      h.process,   h.name,         h.host,
             h.link_host, h.link_port, h.device_class, h.memory_bytes};
  m.heard_ms = now_ms_;
  m.phase = static_cast<worker_phase>(h.phase);
  m.step = h.step;
  m.generation = h.generation;
  m.hash = h.plan_hash;
  if (generation_) {
    const auto& plan_members = generation_->shape.members;
    for (std::size_t rank = 0; rank < plan_members.size(); ++rank) {
      if (plan_members[rank].worker == worker) m.rank = static_cast<int>(rank);
    }
  }
  m.is_left_behind = m.rank < 0 && sought_.count(worker) + missed_.count(worker) != 0;
  sought_.erase(worker);
  missed_.erase(worker);
  claimants_.erase(worker);
  return members_[worker] = std::move(m);
}

/// Someone who is no member of ours says that it runs this job in a plan that we don't know.
void job_machine::on_claim(worker_id worker, const hello& h) {
  if (phase_ != phase::preparing && phase_ != phase::finding) {
    claimants_[worker] = h;
    return;
  }
  member& m = join(worker, h);
  m.rank = -1;
  if (std::max(h.generation, h.promised) < number_) return ask(m);
  record_.number = std::max({record_.number, h.generation, h.promised});
  start_preparing(reason_);
}

/// Its first word after the welcome was not the report: no deputy decided what it runs.
void job_machine::report_overdue(worker_id worker) {
  if (claimants_.erase(worker) != 0) {
    send(worker, stop_stage{value(id()), "it runs a plan that nobody answers for"});
    return release(worker, "it runs a plan that nobody answers for");
  }
  member& m = members_.at(worker);
  m.is_report_due = false;
  m.is_astray = true;
  if (is_committed() && m.rank >= 0) {
    fail_generation(fmt::format("{} came back without the generation", m.facts.name));
  }
}

void job_machine::said(member& m, const plan_report& x) {
  hello h;
  h.name = m.facts.name;
  h.process = m.facts.process;
  h.generation = m.generation;
  h.plan_hash = m.hash;
  h.phase = static_cast<int>(m.phase);
  h.step = m.step;
  if (m.is_report_due) take_report(m.facts.id, h, x);
}

void job_machine::take_report(worker_id from, const hello& h, const plan_report& x) {
  const std::uint64_t hash = plan_hash(x.shape);
  const bool is_sound = x.job == value(id()) && x.shape.job == id() &&
                        x.shape.generation == h.generation && hash == h.plan_hash &&
                        check_layout(record_.spec, x.shape.shape).has_value();
  if (!is_sound) {
    ++stale_messages_;
    return report_overdue(from);
  }
  const bool is_known = x.shape.generation == number_of_plan() && hash == plan_hash_;
  if (is_known) {  // another member's report came first
    const bool is_claimant = claimants_.count(from) != 0;
    member& m = is_claimant ? join(from, h) : members_.at(from);
    m.is_report_due = false;
    return;
  }
  if (x.shape.generation < number_of_plan()) return report_overdue(from);
  if (phase_ == phase::preparing || phase_ == phase::finding) {  // all are asked anyway
    if (claimants_.count(from) != 0) on_claim(from, h);
    return;
  }
  // Members of ours that run our plan and have no place in this one: the other side of a cut.
  const bool is_cut = std::any_of(members_.begin(), members_.end(), [&](const auto& entry) {
    const member& m = entry.second;
    const auto& others = x.shape.members;
    return m.is_connected && m.rank >= 0 && !m.is_astray && !m.is_report_due &&
           std::none_of(others.begin(), others.end(),
                        [&m](const plan_member& o) { return o.process == m.facts.process; });
  });
  if (is_cut) {
    return merge(from, h, x,
                 fmt::format("two sides of a cut: generation {} is ours, generation {} was decided "
                             "by {}",
                             number_of_plan(), x.shape.generation, x.decided_by));
  }
  if (x.shape.generation < record_.distrusted.fence) {
    return merge(
        from, h, x,
        fmt::format("generation {} was decided by {}, who had not heard that what it began "
                    "with is not trusted",
                    x.shape.generation, x.decided_by));
  }
  adopt(from, h, x);
}

/// All of both plans are asked, with a number above both, and the decision is made anew.
void job_machine::merge(worker_id from, const hello& h, const plan_report& x,
                        const std::string& why) {
  record_.number = std::max({record_.number, x.shape.generation, h.promised});
  const bool is_trusted = x.shape.generation >= record_.distrusted.fence;
  if (is_trusted) reported_step_ = std::max(reported_step_, h.step);
  if (claimants_.count(from) != 0) join(from, h).rank = -1;
  for (const plan_member& other : x.shape.members) {
    if (members_.count(other.worker) == 0) sought_.insert(other.worker);
  }
  note("generations_merged", why, {{"decided_by", x.decided_by}, {"reason", x.reason}}, "warn");
  if (!count_failure(why)) return;
  ++record_.recovery_count;
  is_after_loss_ = true;
  if (loss_ms_ < 0) loss_ms_ = now_ms_;
  start_preparing(is_trusted ? "two sides of a cut" : "a deputy's plan that is not trusted");
}

void job_machine::adopt(worker_id from, const hello& h, const plan_report& x) {
  const plan& p = x.shape;
  const std::uint64_t hash = plan_hash(p);
  if (claimants_.count(from) != 0) (void)join(from, h);
  members_.at(from).is_report_due = false;
  for (const std::uint64_t worker : x.distrusted.workers) {
    const auto known = static_cast<worker_id>(worker);
    if (is_distrusted(known)) continue;
    record_.distrusted.workers.push_back(worker);
    if (members_.count(known) != 0) continue;  // released below
    out_.push_back(actions::release{
        known, false, fmt::format("silent corruption, found by deputy {}", x.decided_by), true,
        false});
  }
  learn(x.distrusted);

  // As the deputy shared the leaves out by them; a plan with other shares knew no times.
  plan weighed = p;
  times known = weigh_leaves(weighed);
  if (weighed != p) known = {};
  generation_ = generation_record{p,
                                  x.source,
                                  x.step,
                                  x.chain,
                                  fmt::format("{} (decided by deputy {})", x.reason, x.decided_by),
                                  x.unix_ms,
                                  std::move(known.leaf_us),
                                  std::move(known.layer_us)};
  remember_generation();
  plan_hash_ = hash;
  number_ = std::max({number_, p.generation, h.promised});
  record_.generation = p.generation;
  record_.number = std::max(record_.number, number_);
  record_.state = job_state::running;
  record_.reason.clear();
  record_.step = x.step;
  ++record_.recovery_count;
  if (record_.started_unix_ms == 0) record_.started_unix_ms = unix_ms_;
  actions::save batch;
  batch.rows.push_back(record_row());
  batch.rows.push_back({keys::generation(id(), p.generation), to_json_text(*generation_)});
  out_.push_back(std::move(batch));

  commit_.reset();
  orders_.clear();
  hold_reason_.clear();
  resumed_step_.reset();
  change_since_ms_ = held_ms_ = finished_ms_ = final_saved_ms_ = short_since_ms_ = -1;
  reported_step_ = std::max(x.step, h.step);
  is_after_loss_ = false;
  loss_ms_ = -1;
  layer_move_.reset();

  sought_.clear();
  sought_lost_.clear();
  std::map<worker_id, int> ranks;
  for (std::size_t rank = 0; rank < p.members.size(); ++rank) {
    ranks[p.members[rank].worker] = static_cast<int>(rank);
  }
  for (const worker_id worker : workers()) {
    member& m = members_.at(worker);
    const auto rank = ranks.find(worker);
    const bool has_it = m.generation == p.generation && m.hash == hash;
    m.rank = rank == ranks.end() ? -1 : rank->second;
    m.is_held = m.is_finished = m.is_report_due = false;
    m.is_astray = !has_it || m.phase == worker_phase::idle || m.phase == worker_phase::prepared;
    m.lost_by.clear();
    m.suspected_by.clear();
    if (m.rank >= 0 && has_it) continue;
    // A member that has not come back yet is known by its old connection only.
    const bool is_out = m.rank < 0;
    if (is_out) send(worker, stop_stage{value(id()), "the deputy's plan does not need it"});
    release(worker, "not in the deputy's plan", !is_out || !m.is_connected);
  }
  for (const auto& [worker, rank] : ranks) {
    if (members_.count(worker) == 0) sought_.insert(worker);
  }
  waits_for_ = fmt::format("generation {} was decided by deputy {}; waits for its members",
                           p.generation, x.decided_by);
  enter(phase::adopting);
  note("deputy_decided",
       fmt::format("generation {}: {} stages x {} replicas from step {}, decided by deputy {} at "
                   "unix_ms {} while the coordinator was away: {}",
                   p.generation, p.shape.stage_count, p.shape.replica_count, x.step, x.decided_by,
                   x.unix_ms, x.reason),
       {{"generation", std::to_string(p.generation)},
        {"decided_by", x.decided_by},
        {"decided_unix_ms", std::to_string(x.unix_ms)},
        {"from_step", std::to_string(x.step)},
        {"reason", x.reason}},
       "warn");
}

}  // namespace stagecoach
