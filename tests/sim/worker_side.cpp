// A worker's shell: its process, its control channel, its links.
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

void cluster::start_process(const std::string& name) {
  auto p = std::make_shared<process>();
  p->name = name;
  p->id = fmt::format("{:032x}", next_process_++);
  p->step_ms = static_cast<int>(draw(5, 150));
  p->steady_since = p->paced_at = now_;
  worker_identity identity;
  identity.name = name;
  identity.process = p->id;
  identity.host = "host-" + name;
  identity.link_host = fmt::format("host-{}", hash_name(name) % 3);
  identity.link_port = 4000;
  identity.device = "cpu";
  identity.device_class = "c";
  p->machine = std::make_unique<worker_machine>(identity);
  processes_[name] = p;
  by_id_[p->id] = p;
  say("{} starts, process {}", name, p->id.substr(28));
  dial(p);
  every(delay(0, 100 * ms), 100 * ms, [this, p] {
    if (!p->is_alive) return false;
    const std::uint64_t step = p->trainer.has_state ? p->trainer.step : 0;
    if (!p->is_frozen)
      step_worker(
          p, worker_events::tick{now_ / ms, step, pulse_of(p), now_ / ms, leaf_us(p), layer_us(p)});
    return true;
  });
}

void cluster::step_worker(const process_ptr& p, const worker_event& e) {
  ++result_.events;
  if (const auto* said = std::get_if<worker_events::coordinator_said>(&e)) {
    if (const auto* w = std::get_if<welcome>(&said->message); w && w->incarnation >= p->obeys) {
      p->obeys = w->incarnation;
      p->welcomed_on = p->channel->id;
      p->welcomed_at = now_;
      for (auto& [what, said_at] : p->owed) said_at = now_;
    }
  } else if (std::holds_alternative<worker_events::disconnected>(e)) {
    p->steady_since = now_;
    // What was sent on the old channel may be lost with it, and what was sent last is sent again.
    if (std::exchange(p->welcomed_on, connection_id{}) != connection_id{}) {
      p->owed.merge(std::exchange(p->said, {}));
      std::erase_if(p->owed, [this](const auto& o) { return now_ - o.second > 14 * second; });
    }
  } else if (const auto* own = std::get_if<worker_events::trainer_said>(&e)) {
    const auto* made = std::get_if<progress>(&own->message);
    auto& unheard = p->welcomed_on == connection_id{} ? p->owed : p->said;
    if (made) {
      for (const step_report& s : made->steps) {
        unheard[{made->job, s.step}] = now_;
        p->reported.insert({made->job, s.step});
      }
    }
  }
  for (const worker_action& a : p->machine->step(e)) {
    if (!p->is_alive) return;
    if (are_faults_on_ && chance(rates_.worker_action_crash)) {
      say("{} dies between two actions", p->name);
      return kill(p);
    }
    if (const auto* s = std::get_if<worker_actions::send>(&a)) {
      up(p, s->message);
    } else if (const auto* t = std::get_if<worker_actions::tell_trainer>(&a)) {
      // In order: the trainer's commands are one queue.
      p->last_command = std::max(p->last_command + 1, now_ + delay(0, 5 * ms));
      at(p->last_command, [this, p, message = t->message] {
        on_now(p, [this, p, message] { to_trainer(p, message); });
      });
    } else if (std::holds_alternative<worker_actions::reconnect>(a)) {
      if (p->channel) cut(p->channel, ms, ms);
    } else if (const auto* g = std::get_if<worker_actions::give_up>(&a)) {
      say("{} gives up: {}", p->name, g->why);
      kill(p);
    } else if (const auto* q = std::get_if<worker_actions::ask_alive>(&a)) {
      ask_alive(p, q->question);
    } else if (const auto* m = std::get_if<worker_actions::send_peer>(&a)) {
      send_peer(p, m->to, m->message);
    } else if (const auto* x = std::get_if<worker_actions::store>(&a)) {
      serve(p, *x);
    } else if (const auto* b = std::get_if<worker_actions::make_tie_break>(&a)) {
      make_tie_break(p, *b);
    } else if (const auto* n = std::get_if<worker_actions::note>(&a)) {
      const event_record& r = n->record;
      say("   [{}] {} as deputy: {}: {}", value(r.job), p->name, r.kind, r.text);
      if (r.kind == "divergence") violate("divergence: {}", r.text);
      if (r.kind != "deputy_stands") continue;
      ++result_.deputies;
      let_go_.insert(value(r.job));
    }
  }
}

/// The peer line: a process that lives answers within a round trip, a frozen one not in time.
void cluster::ask_alive(const process_ptr& p, const probe& question) {
  const auto found = by_id_.find(question.peer.process);
  const auto answer = [this, p, question](us after, const char* verdict) {
    on(p, after, [this, p, question, verdict] {
      emit(p, probed{question.job, question.generation, value(question.peer.worker), verdict, ""});
    });
  };
  if (found == by_id_.end()) return violate("{} is to ask after a stranger", p->name);
  const process_ptr other = found->second;
  in(travel(), [this, p, other, answer] {
    if (!can_reach(p, other)) return answer(300 * ms, "silent");
    if (!other->is_alive) return answer(travel(), other->has_lost_host ? "silent" : "gone");
    answer(other->is_frozen ? 300 * ms : travel(), other->is_frozen ? "silent" : "alive");
  });
}

void cluster::emit(const process_ptr& p, to_coordinator message) {
  p->last_emit = std::max(p->last_emit + 1, now_ + (chance(0.5) ? 0 : travel()));
  at(p->last_emit, [this, p, message = std::move(message)] {
    on_now(p, [this, p, message] { step_worker(p, worker_events::trainer_said{message}); });
  });
}

process_ptr cluster::peer_of(const toy_trainer& t, int rank) {
  const auto found = by_id_.find(t.shape.members[static_cast<std::size_t>(rank)].process);
  return found == by_id_.end() ? nullptr : found->second;
}

bool cluster::share_links(const process_ptr& a, const process_ptr& b) {
  if (!a || !b || !a->is_alive || !b->is_alive) return false;
  const toy_trainer& x = a->trainer;
  const toy_trainer& y = b->trainer;
  return can_reach(a, b) && x.are_links_open && y.are_links_open && x.hash == y.hash &&
         x.shape.job == y.shape.job && x.lost_peers.count(y.rank) == 0 &&
         y.lost_peers.count(x.rank) == 0;
}

void cluster::report_link(const process_ptr& p, int peer, const char* what, us after) {
  const toy_trainer& t = p->trainer;
  peer_report r;
  r.job = value(t.shape.job);
  r.generation = t.shape.generation;
  r.peer = value(t.shape.members[static_cast<std::size_t>(peer)].worker);
  r.what = what;
  on(p, after, [this, p, r] { emit(p, r); });
}

void cluster::close_links(const process_ptr& p) {
  toy_trainer& t = p->trainer;
  if (!t.are_links_open) return;
  for (int rank = 0; rank < static_cast<int>(t.shape.members.size()); ++rank) {
    const process_ptr other = peer_of(t, rank);
    if (rank == t.rank || !share_links(p, other)) continue;
    other->trainer.lost_peers.insert(t.rank);
    report_link(other, t.rank, "lost", delay(500, 20 * ms));
  }
  t.are_links_open = false;
}

}  // namespace stagecoach::sim
