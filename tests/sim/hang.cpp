// Trainers that hang while their process lives: it beats, its links stand, its port answers.
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

/// What the beats say of the trainer's thread.
trainer_pulse cluster::pulse_of(const process_ptr& p) {
  const toy_trainer& t = p->trainer;
  trainer_pulse pulse;
  pulse.op = t.epoch * 1'000'000 + t.step * 4 + (t.is_computed ? 1 : 0) + (t.has_pending ? 2 : 0);
  const auto waits_for = [&](int rank) {
    pulse.activity = trainer_activity::wait;
    pulse.waits_for = value(t.shape.members[static_cast<std::size_t>(rank)].worker);
  };
  if (t.now == toy_trainer::doing::loading) {
    // A toy that was told to stop before it opened its links does not notice; a real one does.
    pulse.activity = p->machine->job() != 0 ? trainer_activity::load : trainer_activity::idle;
  } else if (t.now != toy_trainer::doing::running) {
    pulse.activity = p->is_hung ? trainer_activity::compute : trainer_activity::idle;
  } else if (p->is_hung || (!t.is_computed && t.lost_peers.empty())) {
    pulse.activity = trainer_activity::compute;
  } else if (!t.lost_peers.empty()) {
    pulse.activity = trainer_activity::idle;  // the step is broken
  } else if (!t.has_pending) {
    for (int r = 0; r < static_cast<int>(t.shape.members.size()); ++r) {
      const process_ptr other = peer_of(t, r);
      if (r != t.rank && other && !other->trainer.is_computed) return waits_for(r), pulse;
    }
  } else if (t.rank != 0) {
    waits_for(0);
  } else {
    const auto voted = t.ballots.find(t.step + 1);
    for (int r = 0; r < static_cast<int>(t.shape.members.size()); ++r) {
      if (r != 0 && (voted == t.ballots.end() || voted->second.count(r) == 0))
        return waits_for(r), pulse;
    }
  }
  return pulse;
}

/// Generators of their own: histories without a hang stay as they were.
void cluster::hangs(std::uint64_t seed) {
  auto own = std::make_shared<std::mt19937_64>(mix(seed, hash_name("hang")));
  if ((*own)() % 4 != 0) return;
  const double rate = 0.1 * static_cast<double>((*own)() % 100) / 100;
  every(second, 100 * ms, [this, own, rate] {
    const double drawn = static_cast<double>((*own)() >> 11) * 0x1p-53;
    const std::uint64_t which = (*own)(), for_ms = 1'000 + (*own)() % 20'000;
    if (!are_faults_on_) return false;
    if (drawn >= rate * 0.1) return true;
    std::vector<process_ptr> computing;
    for (auto& [name, p] : processes_) {
      const toy_trainer& t = p->trainer;
      if (p->is_alive && !p->is_hung && t.now == toy_trainer::doing::running && !t.is_computed)
        computing.push_back(p);
    }
    if (computing.empty()) return true;
    const process_ptr p = computing[which % computing.size()];
    say("{}'s trainer hangs for {} ms", p->name, for_ms);
    p->is_hung = true;
    p->hung_until = now_ + static_cast<us>(for_ms) * ms;
    ++result_.hangs;
    in(static_cast<us>(for_ms) * ms, [this, p] {
      p->is_hung = false;
      auto late = std::move(p->after_hang);
      p->after_hang.clear();
      for (auto& what : late) on_now(p, what);
    });
    return true;
  });
}

/// Only one that hangs, or did a moment ago, may be given up as stuck; who waits for it never.
void cluster::check_stuck(const event_record& noted) {
  if (noted.kind != "worker_lost" || noted.text.find(": stuck: ") == std::string::npos) return;
  const auto found = processes_.find(noted.fields.at("worker"));
  // Beats are a second apart and may be slow.
  if (found == processes_.end() || now_ > found->second->hung_until + 6 * second)
    violate("given up though it does not hang: {}", noted.text);
}

}  // namespace stagecoach::sim
