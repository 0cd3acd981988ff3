#include "coordinator/wire.hpp"
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

void cluster::dial(const process_ptr& p) {
  if (p->is_dialling || !p->is_alive) return;
  p->is_dialling = true;
  on(p, delay(50 * ms, are_faults_on_ ? 2 * second : 500 * ms), [this, p] {
    p->is_dialling = false;
    // One that woke beside its successor still listens somewhere.
    const bool finds_former = former_ && former_->is_alive && chance(0.5);
    const coordinator_ptr whom = finds_former ? former_ : coordinator_;
    if (!whom || whom->is_frozen || !can_reach_coordinator(p)) return dial(p);
    auto c = std::make_shared<connection>();
    c->id = static_cast<connection_id>(next_connection_++);
    c->who = p;
    c->whom = whom;
    connections_[static_cast<std::uint64_t>(c->id)] = c;
    p->channel = c;
    step_worker(p, worker_events::connected{p->trainer.has_state ? p->trainer.step : 0});
  });
}

/// -1: that side is never told (it is gone).
void cluster::cut(const std::shared_ptr<connection>& c, us to_worker, us to_coordinator) {
  if (!c->is_open) return;
  c->is_open = false;
  if (to_worker >= 0) {
    on(c->who, to_worker, [this, c] {
      if (c->who->channel != c) return;
      c->who->channel = nullptr;
      step_worker(c->who, worker_events::disconnected{"cut"});
      dial(c->who);
    });
  }
  if (to_coordinator >= 0) {
    on(c->whom, to_coordinator, [this, c] {
      tell(c->whom, events::worker_detached{c->id, "cut"});
    });
  }
}

void cluster::up(const process_ptr& p, const to_coordinator& message) {
  const auto c = p->channel;
  if (!c || !c->is_open) return;
  const bool is_greeting =
      std::holds_alternative<hello>(message) || std::holds_alternative<goodbye>(message);
  if (c->whom->incarnation < p->obeys && !is_greeting) {
    violate("{} reports to incarnation {}, though {} has welcomed it", p->name,
            c->whom->incarnation, p->obeys);
  }
  to_coordinator sent = message;
  if (uses_wire_) {
    auto decoded = decode_to_coordinator(encode(message));
    if (!decoded) return violate("wire: {}", decoded.err().message);
    sent = std::move(*decoded);
  }
  c->last_up = std::max(c->last_up, now_ + travel());
  at(c->last_up, [this, c, sent = std::move(sent)] {
    if (!c->is_open) return;
    on_now(c->whom, [this, c, sent] {
      if (!c->is_open) return;
      if (is_loud_) say("{} -> coordinator {}", c->who->name, words(encode(sent)));
      heard(c, sent);
      if (chance(0.5)) tick(c->whom);
      if (const auto* h = std::get_if<hello>(&sent)) {
        tell(c->whom, events::worker_attached{c->id, *h});
      } else {
        tell(c->whom, events::worker_said{c->id, sent});
      }
    });
  });
}

void cluster::down(const coordinator_ptr& from, connection_id id, const to_worker& message) {
  const auto found = connections_.find(static_cast<std::uint64_t>(id));
  if (found == connections_.end() || !found->second->is_open) return;
  const auto c = found->second;
  if (c->whom != from) return violate("a coordinator sends on a connection that is not its own");
  to_worker sent = message;
  if (uses_wire_) {
    auto decoded = decode_to_worker(encode(message));
    if (!decoded) return violate("wire: {}", decoded.err().message);
    sent = std::move(*decoded);
  }
  check_sent(c, sent);
  c->last_down = std::max(c->last_down, now_ + travel());
  at(c->last_down, [this, c, sent = std::move(sent)] {
    if (!c->is_open) return;
    on_now(c->who, [this, c, sent] {
      if (c->who->channel != c) return;
      if (is_loud_) say("coordinator -> {} {}", c->who->name, words(encode(sent)));
      step_worker(c->who, worker_events::coordinator_said{sent});
    });
  });
}

}  // namespace stagecoach::sim
