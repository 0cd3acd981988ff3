// job_machine, third part: orders and voluntary changes, saves, the end.
#include <algorithm>
#include <set>
#include <tuple>
#include <utility>

#include "coordinator/job_machine.hpp"
#include "coordinator/wire.hpp"
#include "model/tensor_names.hpp"

namespace stagecoach {

namespace {
constexpr std::size_t open_saves_max = 8;  // newer ones make older ones worthless
constexpr std::uint64_t seqs_per_step = 64;
constexpr std::size_t parts_of_a_save_max = 4 * limits::worker_count_max;
}  // namespace

// ---- voluntary changes ----
void job_machine::consider_change() {
  const std::vector<member*> ranks = planned();
  const auto finished_count =
      std::count_if(ranks.begin(), ranks.end(), [](const member* m) { return m->is_finished; });
  if (finished_count > 0) {
    const bool are_all = finished_count == static_cast<std::ptrdiff_t>(ranks.size());
    if (are_all && finished_ms_ < 0) finished_ms_ = now_ms_;
    return;  // the last step is done, nothing is left to change
  }
  if (record_.is_cancel_wanted) return start_hold("cancel", {order_kind::save, order_kind::stop});
  if (record_.is_pause_wanted) return start_hold("pause", {order_kind::save, order_kind::hold});
  if (start_yielding()) return;
  if (now_ms_ < no_change_before_ms_) return;

  std::vector<worker_id> joiners;
  bool is_draining = false;
  for (const auto& [worker, m] : members_) {
    if (m.rank < 0) joiners.push_back(worker);
    is_draining = is_draining || (m.rank >= 0 && m.is_draining);
  }
  const int grown = grown_count(0);
  const bool can_drain = is_draining && grown >= workers_least();
  if (is_draining && !can_drain) {
    waits_for_ = "a drain waits for a free worker: the job would fall below its minimum";
  }
  const bool can_grow = !is_draining && grown > planned_count();
  if (!can_drain && !can_grow) {
    change_since_ms_ = -1;
    if (is_draining) layer_move_.reset();
    if (feed_ && !layer_move_) stop_feed("nothing is to be changed any more");
    // Of no use to any layout (or gone again): others may have them.
    for (const worker_id worker : joiners) {
      if (is_draining) break;
      send(worker, stop_stage{value(id()), "no layout uses it"});
      release(worker, "no layout uses it");
    }
    if (!is_draining && !move_layers()) start_balancing();
    return;
  }
  layer_move_.reset();
  if (change_since_ms_ < 0) change_since_ms_ = now_ms_;
  if (now_ms_ - change_since_ms_ < rules_.burst_wait) return;
  if (!is_prepared_for_change(can_drain ? "drain" : "grow")) return;
  // A drained worker's state may be nobody else's: where it could not be copied, it is saved first.
  if (can_drain && !feed_) return start_hold("drain", {order_kind::save, order_kind::hold});
  start_hold(can_drain ? "drain" : "grow", {order_kind::hold});
}

void job_machine::start_hold(const std::string& reason, std::set<order_kind> orders) {
  hold_reason_ = reason;
  orders_.clear();
  for (const order_kind kind : orders) orders_[kind] = next_order_++;
  held_ms_ = part_held_ms_ = -1;
  has_save_failed_ = false;
  waits_for_.clear();
  enter(phase::holding);
  note("hold_ordered", fmt::format("stops after a step: {}", reason), {{"reason", reason}});
  give_orders();
}

void job_machine::give_orders() {
  for (const member* m : planned()) {
    if (m->rank != 0 || !m->is_connected || orders_.empty()) continue;
    // One message: of two, a vote could come between, and the hold would stand a step after its
    // save.
    const auto& [kind, order] = *orders_.rbegin();
    std::uint64_t with = 0;
    for (const auto& [other, unused] : orders_) with |= other == kind ? 0 : order_bit(other);
    send(m->facts.id, give_order{value(id()), number_, order, static_cast<int>(kind), with});
  }
}

void job_machine::consider_hold() {
  const std::vector<member*> ranks = planned();
  const bool is_last_step = std::any_of(ranks.begin(), ranks.end(), [this](const member* m) {
    return m->is_finished || (m->is_held && m->step >= stop_step());
  });
  if (is_last_step) {  // the end overtook the order
    orders_.clear();
    hold_reason_.clear();
    drop_yield();
    return enter(phase::running);
  }
  const auto held_count =
      std::count_if(ranks.begin(), ranks.end(), [](const member* m) { return m->is_held; });
  if (held_count < static_cast<std::ptrdiff_t>(ranks.size())) {
    const bool are_here =
        std::all_of(ranks.begin(), ranks.end(), [](const member* m) { return m->is_connected; });
    if (held_count == 0 || !are_here) {
      part_held_ms_ = -1;
    } else if (part_held_ms_ < 0) {
      part_held_ms_ = now_ms_;
    } else if (now_ms_ - part_held_ms_ >= rules_.hold_wait) {
      resume_after_hold("only some members hold: a deputy let the others go on");
    }
    return;
  }
  const std::uint64_t step = ranks.front()->step;
  for (const member* m : ranks) {
    if (m->step != step) {
      return fail_generation(fmt::format("{} holds at step {}, {} at step {}",
                                         ranks.front()->facts.name, step, m->facts.name, m->step));
    }
  }
  if (held_ms_ < 0) held_ms_ = now_ms_;
  const auto newest = newest_saved();
  const bool is_saved = newest && *newest >= step;
  const bool is_save_hopeless = has_save_failed_ || now_ms_ - held_ms_ >= rules_.order_wait;

  if (hold_reason_ == "cancel") {
    if (is_saved || is_save_hopeless) end(job_state::cancelled, "cancelled");
    return;
  }
  if (record_.is_cancel_wanted) return resume_after_hold("a cancel came in between");
  if (hold_reason_ == "pause") {
    if (!record_.is_pause_wanted) return resume_after_hold("the pause was withdrawn");
    if (is_saved) return leave_workers(job_state::paused, "paused");
    if (!is_save_hopeless) return;
    record_.is_pause_wanted = false;
    save_record();
    note("pause_failed", "its checkpoint could not be saved; the job goes on", {}, "error");
    return resume_after_hold("the checkpoint could not be saved");
  }
  if (record_.is_pause_wanted) return resume_after_hold("a pause came in between");
  if (hold_reason_ == "suspend" || hold_reason_ == "shrink") return consider_yielded_hold();
  if (hold_reason_ == "drain") {
    const bool is_wanted =
        std::any_of(ranks.begin(), ranks.end(), [](const member* m) { return m->is_draining; }) &&
        grown_count(0) >= workers_least();
    if (!is_wanted) return resume_after_hold("the drain was withdrawn");
    const bool is_fed = feed_ && feed_->is_done;
    if (is_fed) {
      // Who leaves gives its last gradient on, so it is let go by the commit and not before.
      is_after_loss_ = false;
      return start_preparing("drain", step);
    }
    if (!is_saved && !is_save_hopeless) return;
    if (!is_saved) {
      no_change_before_ms_ = now_ms_ + 6 * rules_.retry_wait;
      note("drain_failed", "the checkpoint could not be saved; tried again later", {}, "error");
      return resume_after_hold("the checkpoint could not be saved");
    }
    std::string names;
    for (const worker_id worker : workers()) {
      const member& m = members_.at(worker);
      if (!m.is_draining) continue;
      names += " " + m.facts.name;
      send(worker, stop_stage{value(id()), "drained"});
      release(worker, "drained");
    }
    is_after_loss_ = false;
    return start_preparing("drain" + names);
  }
  if (hold_reason_ == "balance") {
    is_after_loss_ = false;
    keeps_size_ = true;
    return start_preparing("balance: " + balance_);
  }
  if (hold_reason_ == "layers") {
    is_after_loss_ = false;
    keeps_size_ = true;
    return start_preparing("balance: " + layer_balance_, feed_ && feed_->is_done ? step : 0);
  }
  if (hold_reason_ == "grow" && grown_count(0) > planned_count()) {
    is_after_loss_ = false;
    return start_preparing("grow", feed_ && feed_->is_done ? step : 0);
  }
  resume_after_hold("nothing is to be changed any more");
}

void job_machine::resume_after_hold(const std::string& why) {
  enter(phase::running);
  for (member* m : planned()) let_go(*m);
  orders_.clear();
  hold_reason_.clear();
  drop_yield();
  change_since_ms_ = held_ms_ = part_held_ms_ = -1;
  note("hold_ended", why);
}

void job_machine::let_go(member& m) {
  m.is_held = false;
  m.phase = worker_phase::running;
  resumed_step_ = std::max(resumed_step_.value_or(0), m.step);
  send(m.facts.id, resume_stage{value(id()), number_});
}

/// A hold acts after a step that is voted after the order was given, so a member that stands at a
/// step of an ended hold has missed that it ended. While none is ordered, nobody wants any hold.
bool job_machine::is_of_ended_hold(std::uint64_t step) const {
  return phase_ == phase::running || (resumed_step_ && step <= *resumed_step_);
}

// ---- saves ----
void job_machine::saved(const part_saved& x, worker_id from) {
  if (x.job != value(id()) || x.generation > number_ || x.generation < record_.distrusted.fence) {
    ++stale_messages_;
    return;
  }
  if (!x.problem.empty()) {
    if (x.is_final && finished_ms_ >= 0) finished_ms_ = now_ms_;  // it goes on trying
    return save_failed(x.step, x.problem);
  }
  const auto newest = newest_saved();
  if (newest && *newest >= x.step) {
    const checkpoint_record& c = checkpoints_.at(*newest);
    next_seq_ = std::max(next_seq_, x.seq + 1);
    send(from, checkpoint_durable{value(id()), c.step, c.seq, c.chain});
    return;
  }
  check_chain(x.step, x.chain, x.part.host);
  next_seq_ = std::max(next_seq_, x.seq + 1);
  pending_save& save = saves_[x.step];
  const auto is_same = [&x](const part_saved& p) {
    return p.part.file == x.part.file && p.part.folder == x.part.folder &&
           p.part.host == x.part.host;
  };
  std::erase_if(save.parts, is_same);
  if (save.parts.size() < parts_of_a_save_max) save.parts.push_back(x);
  // The newest manifest is the one with the largest number: an older step that became whole late
  // must not get one after a newer step's.
  if (save.whole.empty() && !is_overtaken(x.step)) {
    save.whole = whole_save(save.parts);
    if (!save.whole.empty()) write_manifest(x.step);
  }
  // The newest stays, though all before it are whole and wait for a slow disk: it may be the last.
  const auto newest_save = std::prev(saves_.end());
  for (auto old = saves_.begin(); saves_.size() > open_saves_max && old != newest_save;) {
    old = old->second.whole.empty() ? saves_.erase(old) : std::next(old);
  }
}

bool job_machine::is_overtaken(std::uint64_t step) const {
  return std::any_of(saves_.upper_bound(step), saves_.end(),
                     [](const auto& s) { return !s.second.whole.empty(); });
}

/// Parts that together are the whole model, each tensor once; empty: not yet. First those of one
/// generation. Else, since a part is what it contains and not who wrote it, any that fit together:
/// a part of a lost worker and others of the generation that did the step again.
std::vector<part_saved> job_machine::whole_save(const std::vector<part_saved>& parts) const {
  std::set<std::string> all;
  for (const tensor_size& t : all_tensor_sizes(record_.spec.model)) all.insert(t.name);
  const auto is_cover = [&all](const std::vector<part_saved>& some) {
    std::set<std::string> covered;
    for (const part_saved& p : some) covered.insert(p.part.tensors.begin(), p.part.tensors.end());
    return covered == all;
  };
  std::map<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>, std::vector<part_saved>> groups;
  for (const part_saved& p : parts) {
    auto& group = groups[{p.generation, p.plan_hash, p.chain}];
    group.push_back(p);
    if (static_cast<int>(group.size()) == p.part_count && is_cover(group)) return group;
  }
  if (record_.spec.checkpoint.placement == "two")
    return {};  // copies are counted by generation only
  std::vector<part_saved> fitting;
  std::set<std::string> taken;
  for (const part_saved& p : parts) {
    const bool is_fresh =
        std::none_of(p.part.tensors.begin(), p.part.tensors.end(),
                     [&taken](const auto& name) { return taken.count(name) != 0; });
    if (!is_fresh || (!fitting.empty() && p.chain != fitting.front().chain)) continue;
    fitting.push_back(p);
    taken.insert(p.part.tensors.begin(), p.part.tensors.end());
  }
  return taken == all ? fitting : std::vector<part_saved>{};
}

void job_machine::write_manifest(std::uint64_t step) {
  pending_save& save = saves_.at(step);
  save.retry_ms = -1;
  // Whatever order they came in: the same parts make the same manifest.
  std::sort(save.whole.begin(), save.whole.end(), [](const part_saved& a, const part_saved& b) {
    return std::tie(a.part.file, a.part.host) < std::tie(b.part.file, b.part.host);
  });
  const part_saved& first = save.whole.front();
  // A deputy put them into a manifest already: it is that one, and not another of the same step.
  // But not where an older step has got a number of this start of the coordinator: that would be
  // the newest, whatever number the deputy gave.
  const bool is_written = !save.is_tried && first.seq != 0 && !has_numbered_ &&
                          std::all_of(save.whole.begin(), save.whole.end(),
                                      [&first](const auto& p) { return p.seq == first.seq; });
  save.is_tried = true;
  // At least so large, so that the order of the numbers is the order of the steps also where a
  // deputy and a coordinator that was only frozen write without knowing of each other. And not the
  // same: the second one would be taken for the first.
  const std::uint64_t least = step * seqs_per_step + (is_deputys_ ? seqs_per_step / 2 : 1);
  next_seq_ = std::max(next_seq_, least);
  actions::write_manifest m;
  m.job = id();
  m.step = step;
  m.seq = is_written ? first.seq : next_seq_++;
  has_numbered_ = has_numbered_ || !is_written;
  m.chain = first.chain;
  m.generation = first.generation;
  m.loss = first.loss;
  m.is_final = step == stop_step();
  std::set<std::vector<std::string>> counted;  // a second copy adds nothing to the weights
  std::vector<std::string> hashes;
  for (const part_saved& p : save.whole) {
    m.parts.push_back(p.part);
    if (counted.insert(p.part.tensors).second) hashes.push_back(p.part.weights_hash);
  }
  m.weights_hash = add_tensor_hashes(hashes);
  save.seq = m.seq;
  out_.push_back(std::move(m));
}

void job_machine::on(const manifest_written& e) {
  const auto found = saves_.find(e.step);
  if (found == saves_.end() || found->second.whole.empty()) return;
  pending_save& save = found->second;
  if (!e.is_ok) {
    // Its parts are durable; only the manifest is written again.
    save.retry_ms = now_ms_ + rules_.retry_wait;
    if (finished_ms_ >= 0) finished_ms_ = now_ms_;
    save_failed(e.step, "manifest: " + e.problem);
    return advance();
  }
  checkpoint_record c;
  c.job = id();
  c.step = e.step;
  c.seq = save.seq;
  c.chain = save.whole.front().chain;
  c.loss = save.whole.front().loss;
  c.part_count = static_cast<int>(save.whole.size());
  c.unix_ms = unix_ms_;
  std::set<std::vector<std::string>> counted;
  std::vector<std::string> hashes;
  for (const part_saved& p : save.whole) {
    c.bytes += p.part.bytes;
    c.stall_us = std::max(c.stall_us, p.stall_us);
    if (counted.insert(p.part.tensors).second) hashes.push_back(p.part.weights_hash);
  }
  c.weights_hash = add_tensor_hashes(hashes);
  record_.step = std::max(record_.step, e.step);
  step_max_ = ~0ull;
  out_.push_back(
      actions::save{{{keys::checkpoint(id(), e.step), to_json_text(c)}, record_row()}, true});
  note("checkpoint_saved",
       fmt::format("step {}, {} parts, {} bytes", e.step, c.part_count, c.bytes),
       {{"step", std::to_string(e.step)},
        {"parts", std::to_string(c.part_count)},
        {"bytes", std::to_string(c.bytes)},
        {"stall_us", std::to_string(c.stall_us)},
        {"weights_hash", c.weights_hash}});
  checkpoints_[e.step] = std::move(c);
  saves_.erase(saves_.begin(), saves_.upper_bound(e.step));
  const checkpoint_record& newest = checkpoints_.rbegin()->second;
  for (const auto& [worker, m] : members_) {
    send(worker, checkpoint_durable{value(id()), newest.step, newest.seq, newest.chain});
  }
  check_saved(e.step);
  const checkpoint_spec& keep = record_.spec.checkpoint;
  std::vector<std::uint64_t> kept_steps;
  if (record_.spec.elasticity.patrol) {
    kept_steps.push_back(record_.audited_step);
    if (const auto to = checkpoints_.upper_bound(record_.audited_step); to != checkpoints_.end())
      kept_steps.push_back(to->first);
  }
  out_.push_back(actions::retire_checkpoints{id(), keep.store, keep.keep_last,
                                             keep.keep_every_steps, record_.distrusted,
                                             std::move(kept_steps)});
  // Parts of a worker that was given up came late: what loads now would do these steps again.
  if (phase_ == phase::loading && e.step > generation_->step) {
    start_preparing(fmt::format("step {} became durable", e.step));
  }
  advance();
}

void job_machine::save_failed(std::uint64_t step, const std::string& why) {
  if (orders_.count(order_kind::save) != 0) has_save_failed_ = true;
  const std::string text = fmt::format("step {}: {}", step, why);
  if (text != last_save_problem_) {
    note("save_failed", text, {{"step", std::to_string(step)}}, "error");
    last_save_problem_ = text;
  }
  // The last step's parts stay: the one that failed is written again by its worker.
  const auto found = saves_.find(step);
  if (step != stop_step() && found != saves_.end() && found->second.whole.empty())
    saves_.erase(found);
}

void job_machine::on(const checkpoints_retired& e) {
  actions::save batch;
  batch.is_synced = false;  // a row without files is found out when it is read
  for (const std::uint64_t step : e.steps) {
    if (checkpoints_.erase(step) != 0) batch.rows.push_back({keys::checkpoint(id(), step), {}});
  }
  if (!batch.rows.empty()) no_audit_before_ms_ = 0;  // a window that was not there, now not wanted
  if (!batch.rows.empty()) out_.push_back(std::move(batch));
}

// ---- the end ----
void job_machine::consider_end() {
  for (auto& [step, save] : saves_) {
    const bool is_due = save.retry_ms >= 0 && now_ms_ >= save.retry_ms;
    if (is_due && !is_overtaken(step)) write_manifest(step);
  }
  if (phase_ == phase::none) return;
  if (!is_final_saved()) {
    const bool is_lost = phase_ == phase::running && finished_ms_ >= 0 &&
                         now_ms_ - finished_ms_ >= rules_.order_wait;
    if (is_lost) start_preparing("the final checkpoint did not come");
    return;
  }
  if (final_saved_ms_ < 0) final_saved_ms_ = now_ms_;
  // A moment for an evaluation after the last step; whoever is lost now is not needed any more.
  const bool is_waiting = (phase_ == phase::running || phase_ == phase::holding) &&
                          now_ms_ - final_saved_ms_ < rules_.finish_wait;
  const std::vector<member*> ranks = planned();
  const bool are_all_finished =
      std::all_of(ranks.begin(), ranks.end(), [](const member* m) { return m->is_finished; });
  if (are_all_finished && !is_final_whole()) return;
  if (!is_waiting || are_all_finished) {
    end(job_state::completed, fmt::format("step {} is done and saved", stop_step()));
  }
}

}  // namespace stagecoach
