// cluster_machine, second part: who gets which workers. The rules are above the queue's sentence in
// cluster_machine.hpp; each placement looks at everything anew, so nothing here outlives an event
// but what people are shown.
#include <algorithm>
#include <iterator>
#include <set>
#include <utility>

#include "coordinator/cluster_machine.hpp"

namespace stagecoach {

namespace {
bool has(const std::vector<worker_id>& list, worker_id w) {
  return std::find(list.begin(), list.end(), w) != list.end();
}
void append(std::vector<worker_id>& to, const std::vector<worker_id>& from) {
  to.insert(to.end(), from.begin(), from.end());
}
}  // namespace

// ---- order ----
/// Priority, and a level for each age_step that the job is owed.
std::int64_t cluster_machine::rank(const job_machine& job) const {
  return job.priority() + job.owed_ms() / shares_.age_step;
}

std::string cluster_machine::described(const job_machine& job) const {
  const std::int64_t levels = rank(job) - job.priority();
  return fmt::format("priority {}{}", job.priority(),
                     levels > 0 ? fmt::format(" + {} for its waiting", levels) : "");
}

std::vector<job_id> cluster_machine::queue() const {
  std::vector<job_id> ids;
  for (const auto& [id, job] : jobs_) {
    if (!is_end(job.record().state) && job.record().state != job_state::paused) ids.push_back(id);
  }
  std::stable_sort(ids.begin(), ids.end(),
                   [this](job_id a, job_id b) { return rank(jobs_.at(a)) > rank(jobs_.at(b)); });
  return ids;
}

// ---- one placement ----
void cluster_machine::place() {
  is_place_due_ = false;
  claims_.clear();
  starts_.clear();
  waits_.clear();
  positions_.clear();
  review_promises();
  const std::vector<job_id> order = queue();
  for (const job_id id : order) {
    if (!jobs_.at(id).is_waiting()) {
      replace_lost(id);
    } else {
      positions_.emplace(id, static_cast<int>(positions_.size()) + 1);
      start_or_claim(id);
    }
  }
  start_waiting_jobs();
  for (const job_id id : order) grow(id);
  // Those who yield to nobody any more keep what they have.
  for (const job_id id : order) {
    const std::vector<worker_id> yielded = jobs_.at(id).yielding();
    const bool is_wanted = std::any_of(yielded.begin(), yielded.end(), [this](worker_id w) {
      const auto found = claims_.find(w);
      return found != claims_.end() && found->second.kind == hold_kind::for_start;
    });
    if (!yielded.empty() && !is_wanted) tell(id, job_events::keep_workers{});
  }
}

/// A waiting job, by its turn: starts, or says what is to become free for it.
void cluster_machine::start_or_claim(job_id id) {
  const job_machine& job = jobs_.at(id);
  const int least = std::max(1, job.wish(limits::worker_count_max).least);
  const auto lacks = [least](std::size_t count) { return least - static_cast<int>(count); };
  std::map<std::string, pool> all = pools(job);
  if (std::vector<worker_id> free = largest_pool(job); lacks(free.size()) <= 0) {
    // What is kept for another only where it must be.
    std::stable_partition(free.begin(), free.end(), [this, id](worker_id w) {
      return claims_.count(w) == 0 && !is_promised_against(w, id);
    });
    starts_[id] = {free.begin(), free.begin() + least};
    positions_.erase(id);
    return;
  }
  for (auto& [device_class, p] : all) {
    std::vector<worker_id> theirs = p.free;
    append(theirs, p.coming);
    if (lacks(theirs.size()) > 0) continue;
    theirs.resize(static_cast<std::size_t>(least));
    waits_[id] = fmt::format("for {} workers that are on their way to it", lacks(p.free.size()));
    return claim_for(id, theirs, hold_kind::for_start);
  }
  for (const bool only_ready : {true, false}) {
    for (auto& [device_class, p] : all) {
      std::vector<worker_id> theirs = p.free;
      append(theirs, p.coming);
      const std::vector<victim> victims =
          choose_victims(id, device_class, lacks(theirs.size()), only_ready);
      if (victims.empty()) continue;
      claim_for(id, theirs, hold_kind::for_start);
      if (only_ready) return preempt(id, theirs, victims);
      // Before the guard is over nobody is told, but nobody else begins on these workers, or takes
      // them from their jobs, either: else short jobs could take turns and it would never find
      // enough of them past their guard.
      for (const victim& v : victims) claim_for(id, v.workers, hold_kind::for_start);
      const job_machine& first = jobs_.at(victims.front().job);
      waits_[id] = fmt::format(
          "until {} may give workers to it (they run at least {} s, and change one thing at a "
          "time)",
          first.record().spec.name, shares_.runtime_min / 1000);
      return;
    }
  }
  for (auto& [device_class, p] : all) {
    const int there = reachable(job, device_class);
    if (there < least) continue;
    std::vector<worker_id> theirs = p.free;
    append(theirs, p.coming);
    // Also what lower jobs have: a later job that took it from them would not give it back.
    for (const victim& v : jobs_below(id, device_class, false)) append(theirs, v.workers);
    claim_for(id, theirs, hold_kind::for_later);
    waits_[id] = fmt::format(
        "until jobs that are not below it end: it needs {} of the {} workers "
        "that suit it, {} are free",
        least, there, p.free.size());
    return;
  }
  waits_[id] = fmt::format("for workers that suit it: it needs {}", least);
}

/// With the minimum of each put aside, what is left goes to them in turn.
void cluster_machine::start_waiting_jobs() {
  const auto starts = std::exchange(starts_, {});
  std::set<worker_id> taken;
  for (const auto& [id, workers] : starts) taken.insert(workers.begin(), workers.end());
  for (const job_id id : queue()) {
    const auto start = starts.find(id);
    if (start == starts.end()) continue;
    const job_machine& job = jobs_.at(id);
    std::vector<worker_id> workers = start->second;
    const std::string device_class = workers_.at(workers.front()).greeting.device_class;
    const int most = job.wish(limits::worker_count_max).most;
    for (const auto& [worker, w] : workers_) {
      if (static_cast<int>(workers.size()) >= most) break;
      const bool is_left = is_free(w) && taken.count(worker) == 0 && claims_.count(worker) == 0 &&
                           !is_promised_against(worker, id) &&
                           w.greeting.device_class == device_class && unsuited(w, job).empty();
      if (!is_left) continue;
      workers.push_back(worker);
      taken.insert(worker);
    }
    std::sort(workers.begin(), workers.end());
    give(id, workers);
  }
}

/// A job that has workers and can't go on without more. It is no newcomer: what is kept for a
/// later start is no bar to it, but it takes no more of that than it has lost.
void cluster_machine::replace_lost(job_id id) {
  const job_machine& job = jobs_.at(id);
  const worker_wish all = job.wish(limits::worker_count_max);
  if (all.most == 0 || all.is_growth) return;
  const std::vector<worker_id> members = job.workers();
  std::map<std::string, pool> all_pools = pools(job);
  // Before its first generation is committed the job has no class yet, its members have.
  const std::string device_class =
      members.empty() ? std::string() : workers_.at(members.front()).greeting.device_class;
  std::vector<worker_id> unclaimed, kept;
  for (const worker_id w : members.empty() ? largest_pool(job) : all_pools[device_class].free) {
    const bool is_kept = claims_.count(w) != 0 || is_promised_against(w, id);
    (is_kept ? kept : unclaimed).push_back(w);
  }
  const int lost = job.missing_count() - static_cast<int>(unclaimed.size());
  std::vector<worker_id> usable = unclaimed;
  for (const worker_id w : kept) {
    if (static_cast<int>(usable.size() - unclaimed.size()) >= lost) break;
    usable.push_back(w);
  }
  const worker_wish wish = job.wish(static_cast<int>(usable.size()));
  if (wish.most == 0 || wish.is_growth || usable.empty()) return;
  if (static_cast<int>(usable.size()) < wish.least) return;
  if (static_cast<int>(usable.size()) > wish.most)
    usable.resize(static_cast<std::size_t>(wish.most));
  give(id, usable);
}

void cluster_machine::grow(job_id id) {
  const job_machine& job = jobs_.at(id);
  if (!job.wish(limits::worker_count_max).is_growth) return;
  std::vector<worker_id> free = largest_pool(job);
  std::erase_if(free, [this, id](worker_id w) {
    return claims_.count(w) != 0 || is_promised_against(w, id);
  });
  const worker_wish wish = job.wish(static_cast<int>(free.size()));
  if (!wish.is_growth || free.empty()) return;
  if (static_cast<int>(free.size()) > wish.most) free.resize(static_cast<std::size_t>(wish.most));
  give(id, free);
}

void cluster_machine::give(job_id id, const std::vector<worker_id>& workers) {
  job_events::workers_given given;
  for (const worker_id w : workers) {
    if (workers_.at(w).audit) end_patrol(workers_.at(w));
    workers_.at(w).job = id;
    promised_.erase(w);
    given.workers.push_back(facts_of(workers_.at(w)));
  }
  tell(id, given);
}

// ---- what is there for a job ----
void cluster_machine::claim_for(job_id id, const std::vector<worker_id>& workers, hold_kind kind) {
  for (const worker_id w : workers) {
    // What was taken from others for a job is no longer there for a later one.
    if (kind == hold_kind::for_later && is_promised_against(w, id)) continue;
    claims_[w] = {id, jobs_.at(id).priority(), kind};
  }
}

/// Else a running job that grows, or a gang that can't start and whose waiting lets it rise past,
/// would have what was taken for this one, and the taking was in vain.
void cluster_machine::promise(job_id id, std::vector<worker_id> there,
                              const std::vector<victim>& victims) {
  for (const victim& v : victims) {
    const std::vector<worker_id> yielded = jobs_.at(v.job).yielding();
    int count = 0;
    for (const worker_id w : v.workers) {
      const bool comes = has(yielded, w) || workers_.at(w).job == job_id{};
      if (comes && count++ < v.count) there.push_back(w);
    }
  }
  for (const worker_id w : there) promised_[w] = id;
}

/// A promise ends when its job starts, ends or is paused, or can't start any more with what is left
/// of it: then all is seen anew.
void cluster_machine::review_promises() {
  std::map<job_id, int> counts;
  std::erase_if(promised_, [this, &counts](const auto& p) {
    const auto job = jobs_.find(p.second);
    const auto w = workers_.find(p.first);
    if (job == jobs_.end() || !job->second.is_waiting() || w == workers_.end()) return true;
    const worker& x = w->second;
    const bool is_there = x.connection != connection_id{} && !x.record.is_drained && !x.is_lost &&
                          unsuited(x, job->second).empty();
    const bool comes =
        x.job == job_id{} || (jobs_.count(x.job) != 0 && has(jobs_.at(x.job).yielding(), p.first));
    if (!is_there || !comes) return true;
    ++counts[p.second];
    return false;
  });
  std::erase_if(promised_, [this, &counts](const auto& p) {
    const int least = std::max(1, jobs_.at(p.second).wish(limits::worker_count_max).least);
    return counts[p.second] < least;
  });
}

bool cluster_machine::is_promised_against(worker_id w, job_id id) const {
  const auto found = promised_.find(w);
  return found != promised_.end() && found->second != id;
}

/// May a job not have this worker? A claim for later yields to whoever could be made to give back.
bool cluster_machine::is_claimed_against(worker_id w, const job_machine& job) const {
  for (const auto& [id, workers] : starts_) {
    if (has(workers, w)) return true;
  }
  // Whose priority is higher could take it from the one that has the promise, once that runs.
  if (is_promised_against(w, job.id()) && job.priority() <= rank(jobs_.at(promised_.at(w)))) {
    return true;
  }
  const auto found = claims_.find(w);
  if (found == claims_.end()) return false;
  const claim& c = found->second;
  if (!job.is_waiting()) return c.kind == hold_kind::for_start;
  return c.kind == hold_kind::for_start || rank(job) >= c.priority;
}

/// Workers of a job share a device class, since they must compute the same bits; its first
/// generation decides which.
std::map<std::string, cluster_machine::pool> cluster_machine::pools(const job_machine& job) const {
  std::set<worker_id> yielded;
  for (const auto& [id, other] : jobs_) {
    for (const worker_id w : other.yielding()) yielded.insert(w);
  }
  std::map<std::string, pool> all;
  for (const auto& [id, w] : workers_) {
    if (w.connection == connection_id{} || !unsuited(w, job).empty()) continue;
    pool& p = all[w.greeting.device_class];  // also one that has nothing free: victims may be there
    if (is_claimed_against(id, job)) continue;
    if (is_free(w)) p.free.push_back(id);
    if (yielded.count(id) != 0 && !w.record.is_drained) p.coming.push_back(id);
  }
  return all;
}

/// The class with the most free workers, ties to the one of the oldest worker.
std::vector<worker_id> cluster_machine::largest_pool(const job_machine& job) const {
  std::vector<worker_id> best;
  for (auto& [name, p] : pools(job)) {
    const bool is_better =
        p.free.size() > best.size() || (p.free.size() == best.size() && p.free < best);
    if (is_better) best = p.free;
  }
  return best;
}

/// Workers of a class that suit it, whoever has them now.
int cluster_machine::reachable(const job_machine& job, const std::string& device_class) const {
  return static_cast<int>(std::count_if(workers_.begin(), workers_.end(), [&](const auto& x) {
    const worker& w = x.second;
    return w.connection != connection_id{} && !w.record.is_drained &&
           w.greeting.device_class == device_class && unsuited(w, job).empty();
  }));
}

// ---- preemption ----
/// Jobs that rank below this one and have workers that it may use, lowest first, then youngest.
/// only_ready: those that could yield now, past their guard.
std::vector<cluster_machine::victim> cluster_machine::jobs_below(job_id id,
                                                                 const std::string& device_class,
                                                                 bool only_ready) const {
  const job_machine& job = jobs_.at(id);
  std::vector<victim> below;
  for (const auto& [other, machine] : jobs_) {
    if (other == id || rank(machine) >= rank(job) || machine.workers().empty()) continue;
    if (!machine.yielding().empty()) continue;  // promised already
    const bool is_past_guard = machine.ran_ms() >= shares_.runtime_min || machine.is_short();
    if (only_ready && !(machine.can_yield() && is_past_guard)) continue;
    victim v{other, 0, false, {}};
    for (const worker_id worker : machine.workers()) {
      const auto w = workers_.find(worker);
      const bool is_usable = w != workers_.end() && w->second.connection != connection_id{} &&
                             !w->second.record.is_drained &&
                             w->second.greeting.device_class == device_class &&
                             unsuited(w->second, job).empty() && !is_claimed_against(worker, job);
      if (is_usable) v.workers.push_back(worker);
    }
    if (!v.workers.empty()) below.push_back(std::move(v));
  }
  std::sort(below.begin(), below.end(), [this](const victim& a, const victim& b) {
    const std::int64_t x = rank(jobs_.at(a.job)), y = rank(jobs_.at(b.job));
    return x != y ? x < y : a.job > b.job;
  });
  return below;
}

/// Dry run: victims whose workers make up for what is missing; none if they can't. Elastic ones
/// first give what is beyond their minimum (to who ranks higher, its waiting counted), then whole
/// gangs go (to who has the higher priority: waiting alone stops nobody).
std::vector<cluster_machine::victim> cluster_machine::choose_victims(
    job_id id, const std::string& device_class, int missing, bool only_ready) const {
  const job_machine& job = jobs_.at(id);
  std::vector<victim> candidates = jobs_below(id, device_class, only_ready);
  int need = missing;
  for (victim& v : candidates) {
    const int spare = std::min(jobs_.at(v.job).surplus(), static_cast<int>(v.workers.size()));
    v.count = std::clamp(spare, 0, std::max(need, 0));
    need -= v.count;
  }
  for (victim& v : candidates) {
    if (need <= 0) break;
    if (rank(jobs_.at(v.job)) >= job.priority()) continue;
    need -= static_cast<int>(v.workers.size()) - v.count;
    v.count = static_cast<int>(v.workers.size());
    v.is_suspended = true;
  }
  if (need > 0) return {};
  // What turned out not to be needed is left alone, the highest first.
  for (auto v = candidates.rbegin(); v != candidates.rend(); ++v) {
    if (v->is_suspended && v->count > -need) continue;
    const int spared = std::min(v->count, -need);
    v->count -= spared;
    need += spared;
  }
  std::erase_if(candidates, [](const victim& v) { return v.count == 0; });
  return candidates;
}

void cluster_machine::preempt(job_id id, const std::vector<worker_id>& there,
                              const std::vector<victim>& victims) {
  const job_machine& job = jobs_.at(id);
  const std::string to = fmt::format("{} ({})", job.record().spec.name, described(job));
  std::string from;
  for (const victim& v : victims) {
    const job_machine& loser = jobs_.at(v.job);
    from += fmt::format("{}{} of {} ({}{})", from.empty() ? "" : ", ", v.count,
                        loser.record().spec.name, described(loser),
                        v.is_suspended ? ", suspended" : ", shrunk");
  }
  waits_[id] = "for workers that are on their way to it: " + from;
  note("preemption", fmt::format("{} gets workers: {}", to, from),
       {{"job", to_string(id)}, {"name", job.record().spec.name}});
  for (const victim& v : victims) {
    claim_for(id, v.workers, hold_kind::for_start);
    if (v.is_suspended) {
      tell(v.job, job_events::suspend{to});
    } else {
      tell(v.job, job_events::give_back{v.count, {v.workers.begin(), v.workers.end()}, to});
    }
  }
  promise(id, there, victims);
}

// ---- views ----
void cluster_machine::fill_queue_view(job_view& v) const {
  const auto position = positions_.find(v.id);
  if (position == positions_.end()) return;
  v.queue = position->second;
  const auto waits = waits_.find(v.id);
  if (waits == waits_.end()) return;
  v.reason +=
      fmt::format("{}queue {}: waits {}", v.reason.empty() ? "" : "; ", v.queue, waits->second);
}

}  // namespace stagecoach
