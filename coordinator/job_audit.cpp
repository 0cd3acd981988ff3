// job_machine, fourth part: silent corruption, what was found and what follows from it.
//
// The vote compares the weights of all replicas before a step is applied, so what a flipped bit
// would have given to the others is dropped with the step. Three or more versions to count: the
// minority is evicted and the rest goes on from its own state. Two: nobody's state is trusted, the
// job goes back to a checkpoint, and the same steps done again tell who was right (the open case).
#include <algorithm>
#include <iterator>
#include <utility>

#include "coordinator/job_machine.hpp"
#include "coordinator/wire.hpp"
#include "model/tensor_names.hpp"

namespace stagecoach {

namespace {
constexpr std::size_t hash_count_max = 8192;      // of the newest steps, as chains are kept
constexpr std::uint64_t deputy_numbers = 1'000;   // generations of one time without coordinator
constexpr std::uint64_t audit_steps_max = 4'000;  // their rows are one message, under 4 MiB
}  // namespace

std::string job_machine::name_of(worker_id worker) const {
  if (const auto m = members_.find(worker); m != members_.end()) return m->second.facts.name;
  if (generation_) {
    for (const plan_member& p : generation_->shape.members) {
      if (p.worker == worker) return p.name;
    }
  }
  for (auto g = generations_.rbegin(); g != generations_.rend(); ++g) {
    for (const plan_member& p : g->second.shape.members) {
      if (p.worker == worker) return p.name;
    }
  }
  return fmt::format("w-{}", value(worker));
}

/// The replicas' weights differ in a vote: nobody has applied the step.
void job_machine::dispute(const failed& x) {
  std::string names;
  for (const weights_suspect& s : x.suspects)
    names += (names.empty() ? "" : ", ") + name_of(static_cast<worker_id>(s.worker));
  ++divergences_;
  note("silent_corruption",
       fmt::format("{} {}: {}", x.is_certain ? "by" : "by one of", names, x.message),
       {{"step", std::to_string(x.step)}, {"workers", names}, {"found_by", "vote"}}, "error");
  if (x.is_certain) {
    std::map<worker_id, std::string> whom;
    for (const weights_suspect& s : x.suspects) {
      whom[static_cast<worker_id>(s.worker)] = fmt::format(
          "silent corruption of job {}: its weights after step {} differ "
          "from those of the other replicas",
          record_.spec.name, x.step);
    }
    return evict(whom);
  }
  record_.distrusted.disputed_step = x.step;
  record_.distrusted.suspects = x.suspects;
  go_back(x.step == 0 ? 0 : x.step - 1, "silent corruption by one of " + names);
}

/// They get no work until a person says that they are well.
void job_machine::evict(const std::map<worker_id, std::string>& whom) {
  for (const auto& [worker, why] : whom) {
    if (!is_distrusted(worker)) record_.distrusted.workers.push_back(value(worker));
    if (members_.count(worker) == 0)
      out_.push_back(actions::release{worker, false, why, true, false});
  }
  if (phase_ != phase::none) lose(whom);    // a paused job stays paused
  for (const auto& [worker, why] : whom) {  // its state is not wanted
    sought_.erase(worker);
    missed_.erase(worker);
  }
  save_record();
}

bool job_machine::is_distrusted(worker_id id) const {
  const auto& list = record_.distrusted.workers;
  return std::find(list.begin(), list.end(), value(id)) != list.end();
}

/// From someone who heard of it from a decider that is gone: a coordinator or a deputy.
void job_machine::learn(const distrust& told) {
  if (told.fence <= record_.distrusted.fence) return;
  distrust both = told;
  const auto add = [](auto& to, const auto& from) {
    for (const auto& one : from)
      if (std::find(to.begin(), to.end(), one) == to.end()) to.push_back(one);
  };
  add(both.bad_saves, record_.distrusted.bad_saves);
  add(both.workers, record_.distrusted.workers);
  record_.distrusted = std::move(both);
  record_.number = std::max(record_.number, told.fence - 1);
  actions::save batch;
  forget_after(told.step, batch);
  batch.rows.push_back(record_row());
  out_.push_back(std::move(batch));
}

/// To a checkpoint of at most step_max. What is newer was computed from weights that may be wrong.
void job_machine::go_back(std::uint64_t step_max, const std::string& why) {
  const bool has_generation = phase_ != phase::none;
  note("rolled_back", fmt::format("nothing after step {} is trusted: {}", step_max, why),
       {{"step_max", std::to_string(step_max)}, {"reported_step", std::to_string(reported_step_)}},
       "error");
  // Numbers below it are free: a deputy that has not heard of this takes one of them.
  record_.number = std::max(number_, record_.number) + deputy_numbers;
  record_.distrusted.fence = record_.number + 1;
  record_.distrusted.step = step_max;
  actions::save batch;
  forget_after(step_max, batch);
  step_max_ = std::min(step_max_, step_max);  // manifests that the index does not know yet
  final_saved_ms_ = -1;
  sought_.clear();  // whatever a silent one holds is not wanted
  batch.rows.push_back(record_row());
  out_.push_back(std::move(batch));
  out_.push_back(actions::forget_series{id(), step_max});
  if (!has_generation || !count_failure(why)) return;
  ++record_.recovery_count;
  is_after_loss_ = true;
  if (loss_ms_ < 0) loss_ms_ = now_ms_;
  start_preparing(why);
}

/// Saves, chains and hashes of what was computed after this step.
void job_machine::forget_after(std::uint64_t step_max, actions::save& batch) {
  for (auto c = checkpoints_.upper_bound(step_max); c != checkpoints_.end();) {
    record_.distrusted.bad_saves.push_back(c->second.seq);
    batch.rows.push_back({keys::checkpoint(id(), c->first), std::nullopt});
    c = checkpoints_.erase(c);
  }
  for (auto s = saves_.upper_bound(step_max); s != saves_.end(); s = saves_.erase(s)) {
    if (s->second.seq != 0) record_.distrusted.bad_saves.push_back(s->second.seq);
  }
  chains_.erase(chains_.upper_bound(step_max), chains_.end());
  weights_hashes_.erase(weights_hashes_.upper_bound(step_max), weights_hashes_.end());
  logged_.erase(logged_.upper_bound(step_max), logged_.end());
  reported_step_ = std::min(reported_step_, step_max);
  record_.step = std::min(record_.step, step_max);
  if (newest_report_.step > step_max) newest_report_ = {};
}

/// What generations before the fence hold is as if they held nothing.
prepared job_machine::trusted(const member& m) const {
  if (m.answer->loaded_in >= record_.distrusted.fence && !is_distrusted(m.facts.id))
    return *m.answer;
  prepared empty;
  empty.job = m.answer->job;
  empty.number = m.answer->number;
  return empty;
}

/// All ranks voted that these are the weights after `step`.
void job_machine::take_weights_hash(std::uint64_t step, const std::string& hash) {
  if (hash.empty()) return;
  const auto [known, is_new] = weights_hashes_.emplace(step, hash);
  if (!is_new && known->second != hash) {
    ++divergences_;
    note("divergence",
         fmt::format("after step {} the weights had hash {} and now, done again, {}", step,
                     known->second, hash),
         {{"step", std::to_string(step)}}, "error");
  }
  while (weights_hashes_.size() > hash_count_max) weights_hashes_.erase(weights_hashes_.begin());
  check_saved(step);
}

/// The disputed step was done again by workers that all agree: who had other weights was wrong.
void job_machine::judge(std::uint64_t step, const std::string& right_hash) {
  const auto suspects = std::exchange(record_.distrusted.suspects, {});
  const bool is_one_right = std::any_of(suspects.begin(), suspects.end(), [&](const auto& s) {
    return s.weights_hash == right_hash;
  });
  if (!is_one_right) {
    save_record();
    note("silent_corruption",
         fmt::format("step {} was done again and gives {}, which none of those had who disagreed "
                     "on it: nobody is named",
                     step, right_hash),
         {{"step", std::to_string(step)}, {"found_by", "redo"}}, "error");
    return;
  }
  std::map<worker_id, std::string> wrong;
  std::string names;
  for (const weights_suspect& s : suspects) {
    if (s.weights_hash == right_hash) continue;
    const auto worker = static_cast<worker_id>(s.worker);
    wrong[worker] = fmt::format(
        "silent corruption of job {}: its weights after step {} were not "
        "those of the same step done again",
        record_.spec.name, step);
    names += (names.empty() ? "" : ", ") + name_of(worker);
  }
  note("silent_corruption",
       fmt::format("step {} was done again and gives {}: the wrong weights were {}'s", step,
                   right_hash, names),
       {{"step", std::to_string(step)}, {"workers", names}, {"found_by", "redo"}}, "error");
  evict(wrong);
}

/// A checkpoint must hold what all voted. What differs was copied or written wrong.
void job_machine::check_saved(std::uint64_t step) {
  const auto saved = checkpoints_.find(step);
  const auto voted = weights_hashes_.find(step);
  if (saved == checkpoints_.end() || voted == weights_hashes_.end()) return;
  if (saved->second.weights_hash.empty() || saved->second.weights_hash == voted->second) return;
  ++divergences_;
  note("silent_corruption",
       fmt::format("the checkpoint of step {} has weights hash {}, all workers voted {}; it is not "
                   "used",
                   step, saved->second.weights_hash, voted->second),
       {{"step", std::to_string(step)}, {"found_by", "checkpoint"}}, "error");
  exclude_save(step);
}

void job_machine::exclude_save(std::uint64_t step) {
  const auto saved = checkpoints_.find(step);
  if (saved == checkpoints_.end()) return;
  record_.distrusted.bad_saves.push_back(saved->second.seq);
  checkpoints_.erase(saved);
  out_.push_back(actions::save{{{keys::checkpoint(id(), step), std::nullopt}, record_row()}, true});
}

// ---- the patrol ----
/// Who held what, should its steps be found wrong later.
void job_machine::remember_generation() {
  generations_[generation_->shape.generation] = *generation_;
  if (generations_.size() > generation_count_max) generations_.erase(generations_.begin());
}

std::optional<audit_window> job_machine::next_audit() const {
  const job_spec& s = record_.spec;
  // Without exact sums another layout gives other bits, without any fault.
  const bool is_wanted = s.elasticity.patrol && s.optimizer.exact && !is_patrol_over_;
  if (!is_wanted || now_ms_ < no_audit_before_ms_) return std::nullopt;
  // From the start, or from the oldest checkpoint that is left where that is gone.
  std::uint64_t from = record_.audited_step;
  if (from > 0 && checkpoints_.count(from) == 0) {
    const auto oldest = checkpoints_.lower_bound(from);
    if (oldest == checkpoints_.end()) return std::nullopt;
    from = oldest->first;
  }
  const auto next = checkpoints_.upper_bound(from);
  if (next == checkpoints_.end() || next->first - from > audit_steps_max) return std::nullopt;
  // The vote after it tells of the weights at its end.
  if (!is_end(record_.state) && reported_step_ <= next->first) return std::nullopt;
  audit_window window{from, next->first, {}};
  for (auto g = generations_.begin(); g != generations_.end(); ++g) {
    const auto later = std::next(g);
    const bool is_before = later != generations_.end() && later->second.step <= from;
    if (is_before || g->second.step >= window.to) continue;
    for (const plan_member& m : g->second.shape.members) window.computed_by.insert(m.worker);
  }
  return window;
}

/// Who held these stages (none named: all) when `step` was computed; a step that was done again
/// counts for who did it last.
std::map<worker_id, std::string> job_machine::holders_of(std::uint64_t step,
                                                         const std::vector<int>& stages) const {
  const generation_record* held = nullptr;
  for (const auto& [number, g] : generations_) {
    if (g.step < step) held = &g;
  }
  std::map<worker_id, std::string> names;
  if (held == nullptr) return names;
  for (std::size_t rank = 0; rank < held->shape.members.size(); ++rank) {
    const int stage = held->shape.stage_of(static_cast<int>(rank));
    if (!stages.empty() && std::find(stages.begin(), stages.end(), stage) == stages.end()) continue;
    names[held->shape.members[rank].worker] = held->shape.members[rank].name;
  }
  return names;
}

void job_machine::on(const job_events::window_audited& e) {
  const audited& x = e.found;
  const auto window = next_audit();
  // Steps that were rolled back meanwhile are not those that were computed again.
  if (!window || window->from != e.from || window->to != e.to) return;
  if (!x.is_done) {
    no_audit_before_ms_ = now_ms_ + 2 * rules_.minority_wait;
    if (x.text != last_audit_problem_) note("audit_not_done", x.text, {}, "warn");
    last_audit_problem_ = x.text;
    return;
  }
  std::map<std::string, std::string> fields{
      {"from", std::to_string(e.from + 1)}, {"to", std::to_string(e.to)}, {"by", e.by}};
  if (x.is_identical) {
    record_.audited_step = e.to;
    out_.push_back(actions::save{{record_row()}, false});
    note("window_audited",
         fmt::format("{} computed steps {} to {} again: identical", e.by, e.from + 1, e.to),
         fields);
    return;
  }
  ++divergences_;
  std::map<worker_id, std::string> suspects;
  // Weights that were wrong after a step were kept by whoever computed the next one.
  if (x.what != "checkpoint")
    suspects = holders_of(x.what == "weights" ? x.step + 1 : x.step, x.stages);
  std::string names, tensors;
  for (const auto& [worker, name] : suspects) names += (names.empty() ? "" : ", ") + name;
  for (std::size_t i = 0; i < std::min<std::size_t>(8, x.tensors.size()); ++i)
    tensors += (i == 0 ? "" : ", ") + x.tensors[i];
  fields["step"] = std::to_string(x.step);
  fields["workers"] = names;
  fields["tensors"] = tensors;
  fields["found_by"] = "patrol";
  note("silent_corruption",
       fmt::format(
           "by {}{}: {} computed steps {} to {} again: {}", suspects.size() > 1 ? "one of " : "",
           names.empty() ? "whoever wrote the checkpoint" : names, e.by, e.from + 1, e.to, x.text),
       fields, "error");
  if (x.what == "checkpoint" && !is_end(record_.state)) return exclude_save(e.to);
  if (is_end(record_.state)) {
    // Its end stands in the record and may be in use: what to do is for a person to decide.
    is_patrol_over_ = true;
    return;
  }
  go_back(e.from,
          "silent corruption" + (names.empty() ? "" : " by " + names) + ", found by a patrol");
  // With several it can't be told who it was.
  if (suspects.size() == 1 && !is_end(record_.state)) {
    evict({{suspects.begin()->first,
            fmt::format("silent corruption of job {}: step {} was computed again and differs",
                        record_.spec.name, x.step)}});
  }
  advance();
}

/// After the last step no vote follows, so what the members say at the end is compared here.
/// False: it was not whole; what is to be done about it has begun.
bool job_machine::is_final_whole() {
  const int stages = generation_->shape.shape.stage_count;
  std::map<int, std::map<std::string, std::vector<worker_id>>> by_stage;
  const std::vector<member*> ranks = planned();
  if (ranks.empty()) return true;
  for (const member* m : ranks) {
    if (m->finished_hash.empty()) return true;
    by_stage[m->rank % stages][m->finished_hash].push_back(m->facts.id);
  }
  failed verdict;
  verdict.step = stop_step();
  verdict.is_certain = true;
  std::vector<std::string> stage_hashes;  // what most say
  for (const auto& [stage, versions] : by_stage) {
    const auto most = std::max_element(
        versions.begin(), versions.end(),
        [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });
    stage_hashes.push_back(most->first);
  }
  for (const auto& [stage, versions] : by_stage) {
    const std::string& usual = stage_hashes[static_cast<std::size_t>(stage)];
    const std::size_t most = versions.at(usual).size();
    const bool is_majority = static_cast<int>(most) * 2 > generation_->shape.shape.replica_count;
    verdict.is_certain = verdict.is_certain && is_majority;
    for (const auto& [hash, who] : versions) {
      if (is_majority && hash == usual) continue;
      std::vector<std::string> whole = stage_hashes;
      whole[static_cast<std::size_t>(stage)] = hash;
      for (const worker_id worker : who)
        verdict.suspects.push_back({value(worker), add_tensor_hashes(whole)});
    }
  }
  if (!verdict.suspects.empty()) {
    verdict.message = "replicas hold other weights after the last step";
    // Whoever is in the minority may be the one that saved.
    if (verdict.is_certain) take_weights_hash(stop_step(), add_tensor_hashes(stage_hashes));
    dispute(verdict);
    return false;
  }
  take_weights_hash(stop_step(), add_tensor_hashes(stage_hashes));
  if (!record_.distrusted.suspects.empty() && record_.distrusted.disputed_step == stop_step()) {
    judge(stop_step(), weights_hashes_.at(stop_step()));
    return false;
  }
  if (is_final_saved()) return true;
  start_preparing("the final checkpoint held other weights than the workers");
  return false;
}

}  // namespace stagecoach
