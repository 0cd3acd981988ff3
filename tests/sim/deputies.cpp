// The line between workers, what a deputy does on the disk, and cuts of the network.
#include "coordinator/wire.hpp"
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

/// In order and once, while both live and the network is whole; else its sender is told, as the
/// real line does: a host refuses a dead process's port at once, silence takes seconds.
void cluster::send_peer(const process_ptr& p, const plan_member& to, const peer_message& message) {
  const auto found = by_id_.find(to.process);
  const process_ptr other = found == by_id_.end() ? nullptr : found->second;
  const auto give_up = [this, p, process = to.process](us after, bool is_gone) {
    on(p, after, [this, p, process, is_gone] {
      step_worker(p, worker_events::peer_unreachable{process, is_gone, "no answer"});
    });
  };
  if (!other) return violate("{} sends to a process that never was", p->name);
  if (!can_reach(p, other)) return give_up(delay(second, 2 * second), false);
  peer_message sent = message;
  if (uses_wire_) {
    auto decoded = decode_peer_message(encode(message));
    if (!decoded) return violate("peer wire: {}", decoded.err().message);
    sent = std::move(*decoded);
  }
  if (const auto* order = std::get_if<deputy_order>(&sent)) {
    const auto* stop = std::get_if<stop_stage>(&order->message);  // given up
    if (const auto seat = seat_.find(other->id);
        stop != nullptr && seat != seat_.end() && seat->second == stop->job) {
      seat_.erase(seat);
    }
  }
  us& last = p->last_to[other->id];
  last = std::max(last + 1, now_ + travel());
  at(last, [this, p, other, give_up, sent = std::move(sent)] {
    if (!other->is_alive && !other->has_lost_host) return give_up(delay(100, 10 * ms), true);
    if (!other->is_alive) return give_up(delay(second, 2 * second), false);
    if (!can_reach(p, other)) return give_up(delay(second, 2 * second), false);
    on_now(other, [this, other, from = p->id, sent] {
      step_worker(other, worker_events::peer_said{from, sent});
    });
  });
}

void cluster::serve(const process_ptr& p, const deputy_actions::store& s) {
  const auto answer = [this, p](us after, auto what) {
    on(p, after, [this, p, what] { step_worker(p, worker_events::stored{what}); });
  };
  if (const auto* f = std::get_if<actions::find_checkpoint>(&s.what)) {
    answer(delay(ms, 300 * ms), find_on_disk(*f));
  } else if (const auto* m = std::get_if<actions::write_manifest>(&s.what)) {
    if (are_faults_on_ && chance(rates_.disk_full)) {
      return answer(delay(ms, 50 * ms), manifest_written{m->job, m->step, false, "disk full"});
    }
    check_manifest(*m);
    on(p, delay(ms, 30 * ms), [this, m = *m, answer, incarnation = s.place.incarnation] {
      answer(delay(ms, 30 * ms), put_manifest(m, incarnation));
    });
  } else if (const auto* r = std::get_if<actions::retire_checkpoints>(&s.what)) {
    const checkpoints_retired gone = retire_on_disk(*r);
    if (!gone.steps.empty()) answer(delay(ms, 20 * ms), gone);
  }
}

void cluster::make_tie_break(const process_ptr& p, const deputy_actions::make_tie_break& t) {
  on(p, delay(ms, 30 * ms), [this, p, t] {
    const auto [there, is_new] = tie_breaks_.emplace(t.file, t.content);
    const bool is_ours = is_new || there->second == t.content;
    on(p, delay(ms, 30 * ms), [this, p, t, is_ours] {
      step_worker(p, worker_events::tie_break_made{t.generation, is_ours});
    });
  });
}

/// A deputy decides each number once, and only for whom the generation before had.
void cluster::check_deputy(const process_ptr& p, const commit& c) {
  const std::uint64_t job = value(c.shape.job), hash = plan_hash(c.shape);
  const auto [known, is_new] =
      plans_.emplace(std::tuple(job, c.shape.generation, c.decided_by), hash);
  if (is_new) {
    ++result_.deputy_generations;
    shared_.insert(job);
    std::erase_if(seat_, [job](const auto& seat) { return seat.second == job; });
    disturb(60 * second);
  }
  if (known->second != hash)
    violate("{} decided two plans with number {} of job {}", c.decided_by, c.shape.generation, job);
  say("{} takes generation {} of deputy {}", p->name, c.shape.generation, c.decided_by);
}

/// Long after the end, nobody may still be at it: every side of every cut has become the one run.
void cluster::check_one_run() {
  for (const auto& [name, p] : processes_) {
    const auto now = p->trainer.now;
    if (p->is_alive && !p->is_frozen && now != toy_trainer::doing::nothing)
      violate("{} still runs job {}, which is completed", name, value(p->trainer.shape.job));
  }
}

/// Some workers on an island: neither the coordinator nor the other workers are reached from it.
/// The checkpoint folder is: it is shared by a storage network.
void cluster::cut_off() {
  for (const auto& [name, p] : processes_) {
    if (chance(0.5)) island_.insert(name);
  }
  if (island_.empty()) return;
  const us for_us = delay(500 * ms, 25 * second);
  disturb(for_us + 60 * second);
  std::string names;
  for (const std::string& name : island_) names += " " + name;
  say("the network is cut for {} ms; on the island:{}", for_us / ms, names);
  for (const auto& [name, p] : processes_) {
    if (!p->is_alive) continue;
    if (p->channel && !can_reach_coordinator(p)) {
      cut(p->channel, delay(2 * second, 3 * second), delay(2 * second, 10 * second));
    }
    toy_trainer& t = p->trainer;
    if (!t.are_links_open) continue;
    for (int r = 0; r < static_cast<int>(t.shape.members.size()); ++r) {
      const process_ptr other = peer_of(t, r);
      const bool is_apart = r != t.rank && other && other->is_alive && !can_reach(p, other) &&
                            other->trainer.hash == t.hash && t.lost_peers.count(r) == 0;
      if (!is_apart) continue;
      t.lost_peers.insert(r);
      report_link(p, r, "suspected", second);
      report_link(p, r, "lost", delay(second, 6 * second));
    }
  }
  in(for_us, [this] {
    say("the network is whole again");
    island_.clear();
  });
}

}  // namespace stagecoach::sim
