#include "worker/deputy_machine.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace stagecoach {

namespace {
constexpr int ranks_waited_for_max = 8;
// Saves whose manifests the coordinator had under way when it died: a deputy's own come after them.
constexpr std::uint64_t seq_headroom = 16;

/// Who is slow is no loss and can wait for the coordinator: a deputy shares leaves and
/// layers out by what was measured before, but makes no generation to move them.
balance_rules never_of_itself() {
  balance_rules rules;
  rules.gain_min = 1;
  return rules;
}
}  // namespace

detection deputy_detection() {
  detection rules;
  rules.reconnect_grace = 200;
  rules.unconfirmed_max = 5'000;
  rules.suspected_silence = 2'000;
  rules.silence_max = 5'000;
  rules.minority_wait = 3'000;
  return rules;
}

deputy_machine::deputy_machine(process_id process, deputy_rules rules)
    : process_(std::move(process)), rules_(rules) {}

std::vector<deputy_action> deputy_machine::step(const deputy_event& e, const deputy_facts& facts) {
  facts_ = &facts;
  now_ms_ = facts.now_ms;
  std::visit([this](const auto& x) { on(x); }, e);
  facts_ = nullptr;
  return std::exchange(out_, {});
}

// ---- events ----
void deputy_machine::on(const deputy_events::tick&) {
  const commit* newest = facts_->newest;
  if (newest == nullptr || facts_->away_ms < 0) {
    retire("the coordinator is back");
    phase_ = phase::off;
    return;
  }
  if (phase_ == phase::standing) {
    if (now_ms_ >= next_canvass_ms_) canvass_all();
    feed(job_events::tick{now_ms_, facts_->unix_ms});
    if (phase_ == phase::standing && rank_ >= 0) {
      feed(job_events::worker_said{plan_.members[static_cast<std::size_t>(rank_)].worker,
                                   facts_->pulse});
    }
    return;
  }
  if (plan_.job != newest->shape.job || plan_.generation != newest->shape.generation ||
      plan_hash_ != facts_->greeting.plan_hash) {
    take_plan(newest->shape);
    phase_ = phase::off;
  }
  if (rank_ < 0 || phase_ == phase::spent) return;
  if (facts_->follows_another) {
    phase_ = phase::off;
    return;
  }
  if (phase_ == phase::off) {
    const auto lower = std::count_if(peers_.begin(), peers_.end(), [this](const auto& p) {
      const auto& members = plan_.members;
      const auto at = std::find(members.begin(), members.end(), p.second.who);
      return !p.second.is_gone && at - members.begin() < rank_;
    });
    const auto wait = std::min<std::int64_t>(lower, ranks_waited_for_max) * rules_.rank_wait;
    if (facts_->away_ms < rules_.lease + wait || facts_->free_ms < wait) return;
    phase_ = phase::canvassing;
    canvassing_since_ms_ = now_ms_;
    is_tie_break_asked_ = false;
  }
  if (now_ms_ >= next_canvass_ms_) canvass_all();
  consider_mandate();
}

void deputy_machine::on(const deputy_events::answered& e) {
  peer* p = by_process(e.answer.from);
  if (p == nullptr || e.answer.job != value(plan_.job)) return;
  p->is_gone = false;
  p->greeting = e.answer.greeting;
  p->pulse = e.answer.pulse;
  p->durable = e.answer.durable;
  const auto why = static_cast<refusal>(e.answer.why);
  (why == refusal::none ? p->agreed_ms : p->refused_ms) = now_ms_;
  (why == refusal::none ? p->refused_ms : p->agreed_ms) = -1;
  if (phase_ == phase::canvassing) return consider_mandate();
  if (phase_ != phase::standing) return;
  if (why != refusal::none) {
    return retire(fmt::format(
        "{} does not follow: {}", p->who.name,
        why == refusal::has_coordinator ? "the coordinator is back" : "it has another decider"));
  }
  greet(*p);
}

void deputy_machine::on(const deputy_events::reported& e) {
  if (phase_ != phase::standing) return;
  worker_id from{};
  if (e.from == process_) {
    if (rank_ >= 0) from = plan_.members[static_cast<std::size_t>(rank_)].worker;
  } else if (const peer* p = by_process(e.from)) {
    from = p->who.worker;
  }
  // A part counts whoever says it; all else is a member's.
  if (from == worker_id{} && !std::holds_alternative<part_saved>(e.message)) return;
  feed(job_events::worker_said{from, e.message});
  // A link that closed: whoever is behind it is asked at once, and its host answers for the dead.
  const auto* link = std::get_if<peer_report>(&e.message);
  if (link != nullptr && phase_ == phase::standing) next_canvass_ms_ = 0;
}

void deputy_machine::on(const deputy_events::unreachable& e) {
  peer* p = by_process(e.peer);
  if (p == nullptr) return;
  p->agreed_ms = p->refused_ms = -1;
  p->is_gone = p->is_gone || e.is_gone;
  const worker_id worker = p->who.worker;
  const bool was_connected = std::exchange(p->is_connected, false);
  if (phase_ == phase::canvassing) return consider_mandate();
  if (phase_ != phase::standing) return;
  if (e.is_gone) {
    feed(job_events::worker_gone{worker, e.why});
  } else if (was_connected) {
    feed(job_events::worker_disconnected{worker, e.why});
  }
}

void deputy_machine::on(const deputy_events::tie_break_made& e) {
  if (e.is_ours) tie_break_of_ = e.generation;
  if (phase_ == phase::canvassing) consider_mandate();
}

// ---- the mandate ----
void deputy_machine::take_plan(const plan& p) {
  std::map<worker_id, peer> before = std::exchange(peers_, {});
  plan_ = p;
  plan_hash_ = plan_hash(p);
  rank_ = -1;
  for (std::size_t rank = 0; rank < p.members.size(); ++rank) {
    const plan_member& m = p.members[rank];
    if (is_self(m)) {
      rank_ = static_cast<int>(rank);
      continue;
    }
    const auto known = before.find(m.worker);
    if (known != before.end() && known->second.who.process == m.process) {
      peers_[m.worker] = std::move(known->second);
    } else {
      peers_[m.worker].who = m;
    }
  }
}

void deputy_machine::canvass_all() {
  next_canvass_ms_ = now_ms_ + rules_.canvass_every;
  canvass x;
  x.from.process = process_;
  x.from.name = facts_->greeting.name;
  x.from.link_host = facts_->greeting.link_host;
  x.from.link_port = facts_->greeting.link_port;
  if (rank_ >= 0) x.from.worker = plan_.members[static_cast<std::size_t>(rank_)].worker;
  x.job = value(plan_.job);
  x.generation = plan_.generation;
  x.plan_hash = plan_hash_;
  x.is_standing = phase_ == phase::standing;
  for (const auto& [worker, p] : peers_) {
    if (!p.is_gone) out_.push_back(deputy_actions::send{p.who, x});
  }
}

/// Over the members of the newest generation, never over "whoever is there": or two sides that
/// lose and find each other would each be a majority of itself.
std::string deputy_machine::mandate() const {
  const std::size_t count = plan_.members.size();
  std::size_t present = rank_ >= 0 ? 1 : 0, gone = 0;
  for (const auto& [worker, p] : peers_) {
    if (is_recent(p.agreed_ms)) ++present;
    if (p.is_gone) ++gone;
  }
  if (present == count) return "all members agree";
  if (present + gone == count) return fmt::format("{} agree, {} are known dead", present, gone);
  if (2 * present > count) return fmt::format("{} of {} members agree", present, count);
  if (tie_break_of_ == plan_.generation) {
    return fmt::format("{} of {} members agree, the others are silent; its tie-break file is there",
                       present, count);
  }
  return {};
}

void deputy_machine::consider_mandate() {
  const bool is_refused = std::any_of(peers_.begin(), peers_.end(), [this](const auto& p) {
    return is_recent(p.second.refused_ms);
  });
  if (is_refused) {
    canvassing_since_ms_ = now_ms_;
    return;
  }
  if (const std::string why = mandate(); !why.empty()) return stand(why);
  if (is_tie_break_asked_ || now_ms_ - canvassing_since_ms_ < rules_.tie_wait) return;
  is_tie_break_asked_ = true;
  out_.push_back(deputy_actions::make_tie_break{
      facts_->newest->checkpoint_folder,
      fmt::format("deputy-{:06}-g{:06}", value(plan_.job), plan_.generation), process_,
      plan_.generation});
}

void deputy_machine::stand(const std::string& why) {
  const commit& newest = *facts_->newest;
  const hello& own = facts_->greeting;
  spec_ = newest.spec;
  folder_ = newest.checkpoint_folder;
  restored_job r;
  r.record.id = plan_.job;
  r.record.spec = newest.spec;
  r.record.state = job_state::running;
  r.record.device_class = own.device_class;
  r.record.generation = plan_.generation;
  r.record.number = std::max(own.promised, plan_.generation);
  r.record.step = own.step;
  r.record.started_unix_ms = 1;  // not told to anybody; it did start
  r.generation = generation_record{newest.shape,  newest.source,  newest.step,    newest.chain,
                                   newest.reason, newest.unix_ms, newest.leaf_us, newest.layer_us};
  r.record.distrusted = own.distrusted;
  for (const auto& [worker, p] : peers_) {
    const distrust& heard = p.greeting.distrusted;
    if (is_recent(p.agreed_ms) && heard.fence > r.record.distrusted.fence)
      r.record.distrusted = heard;
  }
  const distrust& distrusted = r.record.distrusted;
  checkpoint_durable durable = facts_->durable;
  for (const auto& [worker, p] : peers_) {
    if (is_recent(p.agreed_ms) && p.durable.seq > durable.seq) durable = p.durable;
  }
  const bool is_spoilt = plan_.generation < distrusted.fence && durable.step > distrusted.step;
  if (is_spoilt) durable = {};
  if (durable.seq > 0) {
    checkpoint_record c;
    c.job = plan_.job;
    c.step = durable.step;
    c.seq = durable.seq + seq_headroom;
    c.chain = durable.chain;
    r.checkpoints[c.step] = c;
  }
  r.is_deputys = true;
  machine_.emplace(std::move(r), deputy_detection(), never_of_itself());
  phase_ = phase::standing;
  stops_.clear();
  note("deputy_stands",
       fmt::format("{} stands in for the coordinator in generation {}: {}", own.name,
                   plan_.generation, why),
       "warn");
  canvass_all();
  feed(job_events::tick{now_ms_, facts_->unix_ms});
  if (phase_ == phase::standing && rank_ >= 0) {
    feed(job_events::worker_connected{plan_.members[static_cast<std::size_t>(rank_)].worker,
                                      translated(own)});
  }
  for (const plan_member& m : newest.shape.members) {  // by value: a decision may change peers_
    if (phase_ != phase::standing) return;
    const auto found = peers_.find(m.worker);
    if (found == peers_.end()) continue;
    if (is_recent(found->second.agreed_ms)) {
      found->second.is_connected = false;
      greet(found->second);
    } else if (found->second.is_gone) {
      feed(job_events::worker_gone{m.worker, "its process is gone"});
    }
  }
}

void deputy_machine::retire(const std::string& why) {
  if (phase_ == phase::standing) note("deputy_retires", why);
  machine_.reset();
  stops_.clear();
  phase_ = phase::off;
  for (auto& [worker, p] : peers_) p.is_connected = false;
}

// ---- between the members and the machine ----
/// A member that answered: it is back, or still there.
void deputy_machine::greet(peer& p) {
  const worker_id worker = p.who.worker;
  if (!std::exchange(p.is_connected, true)) {
    feed(job_events::worker_connected{worker, translated(p.greeting)});
  } else {
    feed(job_events::worker_said{worker, p.pulse});
  }
}

/// What a member promised to this deputy is no promise to another.
hello deputy_machine::translated(const hello& h) const {
  hello x = h;
  x.promised_to = h.promised_to == process_ ? "" : "another";
  return x;
}

void deputy_machine::feed(const job_event& e) {
  if (!machine_) return;
  std::vector<action> todo = machine_->step(e);
  for (action& a : todo) {
    if (!machine_) return;  // retired in between: no mandate for what follows
    carry_out(a);
  }
  if (!machine_) return;
  const auto& newest = machine_->generation();
  if (newest && newest->shape.generation != plan_.generation) take_plan(newest->shape);
  switch (machine_->state()) {
    case job_state::planning:
    case job_state::running:
    case job_state::recovering:
    case job_state::checkpointing:
      return;
    default:
      break;
  }
  // All is done and saved, or it can't go on: the coordinator's to say. The members keep what they
  // have.
  note("deputy_silent", fmt::format("waits for the coordinator: {} {}",
                                    to_string(machine_->state()), machine_->record().reason));
  machine_.reset();
  stops_.clear();
  phase_ = phase::spent;
}

void deputy_machine::carry_out(action& a) {
  if (auto* x = std::get_if<actions::send>(&a)) {
    if (const auto* stop = std::get_if<stop_stage>(&x->message)) {
      stops_[x->worker] = *stop;
      return;
    }
    if (auto* p = std::get_if<prepare>(&x->message)) {
      // Asked before each: members may have been lost since the canvass, or this process slept.
      if (mandate().empty()) return retire("too few members answer for another generation");
      p->decider = process_;
    } else if (auto* c = std::get_if<commit>(&x->message)) {
      c->checkpoint_folder = folder_;
      c->decided_by = facts_->greeting.name;
      c->reason = machine_->generation()->reason;
      c->unix_ms = machine_->generation()->unix_ms;
    }
    deliver(x->worker, std::move(x->message));
  } else if (const auto* r = std::get_if<actions::release>(&a)) {
    const auto stop = stops_.find(r->worker);
    if (stop != stops_.end() && r->is_lost) deliver(r->worker, stop->second);
    if (stop != stops_.end()) stops_.erase(stop);
  } else if (const auto* f = std::get_if<actions::find_checkpoint>(&a)) {
    out_.push_back(deputy_actions::store{place(), *f});
  } else if (const auto* m = std::get_if<actions::write_manifest>(&a)) {
    out_.push_back(deputy_actions::store{place(), *m});
  } else if (const auto* t = std::get_if<actions::retire_checkpoints>(&a)) {
    out_.push_back(deputy_actions::store{place(), *t});
  } else if (auto* n = std::get_if<actions::note>(&a)) {
    out_.push_back(deputy_actions::note{std::move(n->record)});
  }
  // save: every member holds the commit. The rest is for people, who see it when the coordinator
  // is back.
}

void deputy_machine::deliver(worker_id to, to_worker message) {
  if (rank_ >= 0 && plan_.members[static_cast<std::size_t>(rank_)].worker == to) {
    out_.push_back(deputy_actions::order_self{std::move(message)});
    return;
  }
  const auto found = peers_.find(to);
  if (found == peers_.end()) return;
  out_.push_back(
      deputy_actions::send{found->second.who, deputy_order{process_, std::move(message)}});
}

// ---- small ones ----
deputy_machine::peer* deputy_machine::by_process(const process_id& process) {
  for (auto& [worker, p] : peers_) {
    if (p.who.process == process) return &p;
  }
  return nullptr;
}

deputy_place deputy_machine::place() const {
  const layout& shape = plan_.shape;
  return {plan_.job,  spec_,
          folder_,    facts_->incarnation,
          plan_hash_, fmt::format("stages={} replicas={}", shape.stage_count, shape.replica_count)};
}

void deputy_machine::note(const std::string& kind, const std::string& text,
                          const std::string& level) {
  out_.push_back(
      deputy_actions::note{{plan_.job, next_event_++, facts_->unix_ms, kind, level, text, {}}});
}

}  // namespace stagecoach
