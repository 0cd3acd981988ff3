// Background copies between toy trainers: links of their own, some tensors per step, then each
// step's gradient.
#include "coordinator/wire.hpp"
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

process_ptr cluster::participant(const toy_feed& f, int index) {
  const auto found = by_id_.find(f.order.participants[static_cast<std::size_t>(index)].process);
  return found == by_id_.end() ? nullptr : found->second;
}

bool cluster::share_feed(const process_ptr& a, const process_ptr& b) {
  if (!a || !b || !a->is_alive || !b->is_alive) return false;
  const auto& x = a->trainer.copying;
  const auto& y = b->trainer.copying;
  return x && y && x->is_open && y->is_open && !x->is_broken && !y->is_broken &&
         x->order.request == y->order.request;
}

void cluster::open_feed(const process_ptr& p, const feed& order) {
  close_feed(p);
  toy_feed f;
  f.order = order;
  for (int i = 0; i < static_cast<int>(order.participants.size()); ++i) {
    if (order.participants[static_cast<std::size_t>(i)].process == p->id) f.index = i;
  }
  if (f.index < 0) return violate("{} got a feed in which it has no part", p->name);
  for (const transfer_record& t : order.transfers) {
    if (t.to_rank == f.index) f.senders.insert(t.from_rank);
    if (t.to_rank == f.index && !f.wanted.insert(t.tensor).second)
      return violate("{} would be fed {} twice", p->name, t.tensor);
    const auto& held = p->trainer.weights;
    if (t.from_rank == f.index && held.count(t.tensor) == 0)
      return violate("{} is to feed {}, which it does not hold", p->name, t.tensor);
  }
  p->trainer.copying = std::move(f);
  on(p, delay(ms, 300 * ms), [this, p, request = order.request] {
    auto& f = p->trainer.copying;
    if (!f || f->order.request != request) return;
    f->is_open = true;
    const int count = static_cast<int>(f->order.participants.size());
    for (int i = 0; i < count; ++i) {
      if (!share_feed(p, participant(*f, i))) return;  // the last one to open says it
    }
    for (int i = 0; i < count; ++i) {
      emit(participant(*f, i), feed_ready{f->order.job, f->order.generation, request});
    }
  });
}

void cluster::break_feed(const process_ptr& p, const char* why) {
  auto& f = p->trainer.copying;
  if (!f || f->is_broken) return;
  f->is_broken = true;
  fed x{f->order.job, f->order.generation, f->order.request, f->step};
  x.problem = why;
  emit(p, x);
}

/// The others' links to it close.
void cluster::close_feed(const process_ptr& p) {
  auto& f = p->trainer.copying;
  if (!f) return;
  for (int i = 0; i < static_cast<int>(f->order.participants.size()); ++i) {
    const process_ptr other = participant(*f, i);
    if (i == f->index || !share_feed(p, other)) continue;
    on(other, delay(500, 20 * ms), [this, other, request = f->order.request] {
      const auto& g = other->trainer.copying;
      if (g && g->order.request == request) break_feed(other, "a link of the feed closed");
    });
  }
  f.reset();
}

/// After an applied step.
void cluster::give_to_feed(const process_ptr& p, const vote_result& vote) {
  auto& f = p->trainer.copying;
  if (!f || !f->is_open || f->is_broken) return;
  const bool is_ordered = (vote.orders & order_bit(order_kind::feed)) != 0 &&
                          std::find(vote.order_ids.begin(), vote.order_ids.end(),
                                    f->order.request) != vote.order_ids.end();
  if (!f->has_begun && !is_ordered) return;
  f->has_begun = true;
  const std::uint64_t tensors_a_step = 1 + f->order.request % 5;
  std::map<int, feed_frame> frames;
  for (const transfer_record& t : f->order.transfers) {
    if (t.from_rank == f->index) frames[t.to_rank].vote = vote;
  }
  for (auto& [to, frame] : frames) frame.gradients = f->given[to];
  std::uint64_t now_given = 0;
  for (const transfer_record& t : f->order.transfers) {
    if (t.from_rank != f->index || f->given[t.to_rank].count(t.tensor) != 0) continue;
    if (++now_given > tensors_a_step) break;
    frames[t.to_rank].state[t.tensor] = p->trainer.weights.at(t.tensor);
    f->given[t.to_rank].insert(t.tensor);
  }
  for (auto& [to, frame] : frames) {
    const process_ptr other = participant(*f, to);
    if (!share_feed(p, other)) continue;
    us& last = f->last_sent[to];
    last = std::max(last + 1, now_ + delay(100, 80 * ms));
    at(last, [this, other, from = f->index, request = f->order.request, frame] {
      on_now(other, [this, other, from, request, frame] {
        auto& g = other->trainer.copying;
        if (!g || g->order.request != request || g->is_taken) return;
        g->inbox[from].push_back(frame);
        follow_feed(other);
      });
    });
  }
}

/// Replays what has come from all senders.
void cluster::follow_feed(const process_ptr& p) {
  toy_feed& f = *p->trainer.copying;
  const auto has_next = [&f] {
    return std::all_of(f.senders.begin(), f.senders.end(),
                       [&f](int s) { return !f.inbox[s].empty(); });
  };
  while (has_next()) {
    const vote_result vote = f.inbox[*f.senders.begin()].front().vote;
    if (f.step != 0 && vote.step != f.step + 1)
      return violate("{} is fed step {} after {}", p->name, vote.step, f.step);
    const truth& right = truth_of(f.order.job);
    values next;
    for (const int s : f.senders) {
      feed_frame frame = std::move(f.inbox[s].front());
      f.inbox[s].pop_front();
      if (frame.vote.step != vote.step || frame.vote.chain != vote.chain)
        return violate("{} is fed two steps at once", p->name);
      for (const std::string& name : frame.gradients)
        next[name] = mix(f.shadow.at(name), vote.step);
      next.merge(frame.state);
    }
    f.shadow = std::move(next);
    f.step = vote.step;
    f.chain = vote.chain;
    f.last_vote = vote;
    for (const auto& [name, v] : f.shadow) {
      if (right.at[f.step].at(name) != v)
        violate("{} fed to {} at step {} is not the undisturbed value", name, p->name, f.step);
    }
    if (f.shadow.size() == f.wanted.size() && !f.is_complete) {
      f.is_complete = true;
      emit(p, fed{f.order.job, f.order.generation, f.order.request, f.step});
    }
  }
}

/// What it was fed becomes a part of what it holds, where both are of one step.
void cluster::take_fed(const process_ptr& p, std::uint64_t job) {
  toy_trainer& t = p->trainer;
  auto& f = t.copying;
  if (!f || f->order.job != job || f->is_taken) return;
  f->is_taken = true;
  if (!f->is_complete) return;
  if (t.has_state && value(t.shape.job) == job) {
    if (t.step == f->step && t.chain == f->chain && !t.has_pending)
      t.weights.insert(f->shadow.begin(), f->shadow.end());
    return;
  }
  t.recent.clear();
  t.shape = plan{};
  t.shape.job = static_cast<job_id>(job);
  t.spec = f->order.spec;
  t.has_state = true;
  t.step = f->step;
  t.chain = f->chain;
  t.last_vote = f->last_vote;
  t.has_pending = false;
  t.weights = f->shadow;
}

}  // namespace stagecoach::sim
