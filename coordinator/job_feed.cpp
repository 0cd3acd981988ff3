// job_machine, fourth part: what a voluntary change needs is copied while the generation runs.
//
//   change wanted --start_feed--> links --all feed_ready--> order feed rides in a vote --> copying
//   --all fed--> order hold rides in a vote --all held--> prepare(n + 1) at that step, nothing to
//   move
//
// A feed that fails costs the run nothing: it is tried again, and after a few times the change is
// made by holding and copying.
#include <algorithm>
#include <utility>

#include "coordinator/decision.hpp"
#include "coordinator/job_machine.hpp"
#include "model/copies.hpp"
#include "model/tensor_names.hpp"

namespace stagecoach {

namespace {
// What one sender copies out of its state between two steps; 16 MB are some 10 ms.
constexpr std::uint64_t step_bytes_max = 16'000'000;
constexpr int failed_feeds_max = 3;
}  // namespace

/// True: the change may be ordered now. False: its state is being copied, or will be.
bool job_machine::is_prepared_for_change(const std::string& reason) {
  std::set<worker_id> staff, leaving;
  for (const auto& [worker, m] : members_) {
    staff.insert(worker);
    if (m.is_draining) leaving.insert(worker);
  }
  if (feed_ && (feed_->staff != staff || feed_->leaving != leaving))
    stop_feed("its workers changed");
  if (feed_) {
    watch_feed();
    return feed_ && feed_->is_done;
  }
  if (failed_feeds_ >= failed_feeds_max) return true;
  return !start_feed(reason, std::move(staff), std::move(leaving));
}

/// What each holds now, as if it had been asked.
std::vector<candidate> job_machine::present_holdings(const std::vector<member*>& order) const {
  const job_spec& spec = record_.spec;
  const plan& p = generation_->shape;
  const std::vector<tensor_size> all = all_tensor_sizes(spec.model);
  std::vector<candidate> candidates;
  for (const member* m : order) {
    candidate c{m->facts.id, {}, m->facts.link_host};
    if (m->rank >= 0) {
      c.answer.has_state = true;
      const auto stage = static_cast<std::size_t>(p.stage_of(m->rank));
      c.answer.tensors =
          stage_tensor_names(spec.model, p.shape.unit_cuts[stage], p.shape.unit_cuts[stage + 1]);
      for (const kept_copy& copy : copies_kept(spec, p.shape, hosts_of(p), m->rank)) {
        for (const int tensor : copy.tensors)
          c.answer.tensors.push_back(all[static_cast<std::size_t>(tensor)].name);
      }
    }
    candidates.push_back(std::move(c));
  }
  return candidates;
}

/// False: there is nothing to copy, or it can't be copied this way.
bool job_machine::start_feed(const std::string& reason, std::set<worker_id> staff,
                             std::set<worker_id> leaving) {
  const job_spec& spec = record_.spec;
  std::vector<member*> order = planned();
  if (!is_whole()) return false;
  for (auto& [worker, m] : members_) {
    if (m.rank < 0) order.push_back(&m);
  }
  if (std::any_of(order.begin(), order.end(), [](const member* m) { return !m->is_connected; }))
    return true;  // a moment: it returns or is lost
  const int count = std::min(staying_count(), workers_most());
  std::vector<bool> is_leaving;
  for (const member* m : order) is_leaving.push_back(m->is_draining);
  const std::vector<candidate> holdings = present_holdings(order);
  const seating seats_of = [&](const layout& some) {
    std::vector<worker_id> by_rank;
    const auto fed = choose_feed(spec, some, holdings, is_leaving);
    for (const int i : fed ? fed->by_rank : std::vector<int>{})
      by_rank.push_back(order[static_cast<std::size_t>(i)]->facts.id);
    return by_rank;
  };
  const result<layout> shape =
      count < 1 ? error{errc::unplaceable, ""} : choose_shape(count, seats_of);
  // Whoever is to take layers over would sit elsewhere.
  if (layer_move_ && (!shape || shape->unit_cuts != layer_move_->unit_cuts)) {
    layer_move_.reset();
    return false;
  }
  // Moments that replicas share have no one holder who could give all of a tensor.
  if (!shape || is_sharded(spec, shape->replica_count) ||
      is_sharded(spec, generation_->shape.shape.replica_count))
    return false;
  auto choice = choose_feed(spec, *shape, holdings, is_leaving);
  if (!choice) return false;
  feed_.emplace();
  feed_->request = last_feed_ = std::max<std::uint64_t>(
      last_feed_ + 1, static_cast<std::uint64_t>(std::max<std::int64_t>(unix_ms_, 0)));
  feed_->staff = std::move(staff);
  feed_->leaving = std::move(leaving);
  feed_->since_ms = now_ms_;
  if (choice->transfers.empty()) {
    feed_->is_done = true;
    return false;
  }

  feed x;
  x.job = value(id());
  x.generation = number_;
  x.plan_hash = plan_hash_;
  x.request = feed_->request;
  x.spec = spec;
  x.step_bytes_max = step_bytes_max;
  std::vector<int> places(order.size(), -1);  // by candidate, among the participants
  for (std::size_t i = 0; i < order.size(); ++i) {
    const int c = static_cast<int>(i);
    const bool gives = std::any_of(choice->transfers.begin(), choice->transfers.end(),
                                   [c](const auto& t) { return t.from_rank == c; });
    const bool gets = std::any_of(choice->transfers.begin(), choice->transfers.end(),
                                  [c](const auto& t) { return t.to_rank == c; });
    if (!gives && !gets) continue;
    const worker_facts& f = order[i]->facts;
    places[i] = static_cast<int>(x.participants.size());
    x.participants.push_back({f.id, f.process, f.name, f.link_host, f.link_port});
    feed_->participants.insert(f.id);
    if (gets) feed_->receivers.insert(f.id);
  }
  for (transfer_record t : choice->transfers) {
    t.from_rank = places[static_cast<std::size_t>(t.from_rank)];
    t.to_rank = places[static_cast<std::size_t>(t.to_rank)];
    x.transfers.push_back(std::move(t));
  }
  for (const worker_id worker : feed_->participants) send(worker, x);
  note("feed_started",
       fmt::format("{}: {} tensors go to {} workers while the run goes on", reason,
                   x.transfers.size(), feed_->receivers.size()),
       {{"reason", reason}, {"transfers", std::to_string(x.transfers.size())}});
  return true;
}

void job_machine::watch_feed() {
  if (feed_->is_done) return;
  if (feed_->ready != feed_->participants) {
    if (now_ms_ - feed_->since_ms >= rules_.feed_wait) fail_feed("its links did not open");
    return;
  }
  if (feed_->fed == feed_->receivers) {
    feed_->is_done = true;
    return note("feed_done",
                fmt::format("{} workers hold what they need and keep up", feed_->receivers.size()));
  }
  // Again now and then: an order is lost with the connection of rank 0; a second one is idle.
  if (feed_->ordered_ms >= 0 && now_ms_ - feed_->ordered_ms < rules_.feed_wait / 2) return;
  feed_->ordered_ms = now_ms_;
  for (const member* m : planned()) {
    if (m->rank == 0 && m->is_connected)
      send(m->facts.id,
           give_order{value(id()), number_, feed_->request, static_cast<int>(order_kind::feed)});
  }
}

void job_machine::stop_feed(const std::string& why) {
  for (const worker_id worker : feed_->participants) {
    if (members_.count(worker) != 0)
      send(worker, stagecoach::stop_feed{value(id()), feed_->request});
  }
  note("feed_stopped", why);
  feed_.reset();
}

void job_machine::fail_feed(const std::string& why) {
  ++failed_feeds_;
  no_change_before_ms_ = now_ms_ + rules_.feed_back_off;
  stop_feed(why);
}

/// After a fed hold: those who stay have all of the held step. False: they do not, so whoever
/// drains is needed still.
bool job_machine::decide_fed(const std::vector<member*>& answered) {
  if (wait_step_ == 0) return false;
  // Late parts of a generation that is gone made a later step durable: the run need not do again
  // what lies between.
  if (newest_saved().value_or(0) > wait_step_) return false;
  std::vector<candidate> candidates;
  for (const member* m : answered) {
    if (!m->is_draining) candidates.push_back({m->facts.id, trusted(*m), m->facts.link_host});
  }
  const int count = std::min(static_cast<int>(candidates.size()), workers_most());
  if (count < workers_least()) return false;
  const result<layout> shape = choose_shape(count, [&](const layout& some) {
    std::vector<worker_id> by_rank;
    const auto live = choose_live(record_.spec, some, candidates, wait_step_);
    for (const int i : live ? live->by_rank : std::vector<int>{})
      by_rank.push_back(candidates[static_cast<std::size_t>(i)].worker);
    return by_rank;
  });
  if (!shape) return false;
  auto live = choose_live(record_.spec, *shape, candidates, wait_step_);
  if (!live) return false;
  choice c;
  c.shape = *shape;
  for (const int i : live->by_rank)
    c.by_rank.push_back(candidates[static_cast<std::size_t>(i)].worker);
  c.source = source_kind::live;
  c.step = live->step;
  c.chain = live->chain;
  c.roll_forward = std::move(live->roll_forward);
  c.transfers = std::move(live->transfers);
  commit_generation(c);
  return true;
}

void job_machine::note_switch(const step_report& first) {
  if (!before_switch_ || first.step != before_switch_->step + 1) return;
  const step_report last = *std::exchange(before_switch_, std::nullopt);
  const std::int64_t pause_ms = first.unix_ms - last.unix_ms - first.step_us / 1000;
  note(
      "switched",
      fmt::format("nobody computed for {} ms between steps {} and {}; a step took {:.1f} ms before",
                  pause_ms, last.step, first.step, static_cast<double>(last.step_us) / 1e3),
      {{"step", std::to_string(first.step)},
       {"pause_ms", std::to_string(pause_ms)},
       {"step_us", std::to_string(last.step_us)}});
}

void job_machine::said(member& m, const feed_ready& x) {
  if (feed_ && x.request == feed_->request) feed_->ready.insert(m.facts.id);
}

void job_machine::said(member& m, const fed& x) {
  if (!feed_ || x.request != feed_->request) return;
  if (x.problem.empty()) {
    feed_->fed.insert(m.facts.id);
    return;
  }
  if (phase_ != phase::running) return;  // a hold began: who lacks something gets it then
  const std::string why = fmt::format("{}: {}", m.facts.name, x.problem);
  fail_feed(why);
  if (!x.is_own || m.rank >= 0) return;
  refused_[m.facts.id] = x.problem;
  note("worker_refused", x.problem, {{"worker", m.facts.name}}, "error");
  send(m.facts.id, stop_stage{value(id()), "failed at this job"});
  release(m.facts.id, x.problem);
}

}  // namespace stagecoach
