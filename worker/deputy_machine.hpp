// Standing in for the coordinator of one job while it is away: who may, and on whose word.
//
// What it decides is the coordinator's own job_machine, restored from the newest plan that this
// worker holds: a deputy has no rules of its own for a loss. This file asks for the mandate and
// keeps the machine within it: it may shrink, never admit, and never ends, pauses or gives back.
// When its machine ends it falls silent, and the members keep their state for the coordinator.
//
//   off --lease out, no lower rank lives--> canvassing --most agree | all others agree or are
//   gone | tie-break file--> standing --its machine ended--> spent
//   any --coordinator back, another follows--> off      standing --no mandate for a PREPARE--> off
//
// Pure: no clock, socket or disk. All that it saves is in memory: every member holds the commit, so
// any of them can report it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "coordinator/job_machine.hpp"
#include "worker/peer_messages.hpp"

namespace stagecoach {

/// When the coordinator's absence is one, and how long who is waited for. Milliseconds.
struct deputy_rules {
  std::int64_t lease = 1'500;        // control channel gone; a restart or a blip is shorter
  std::int64_t rank_wait = 250;      // for each lower rank that may live, so that they don't race
  std::int64_t canvass_every = 500;  // also a deputy's sign of life
  std::int64_t fresh = 2'500;        // an answer or refusal counts for so long
  std::int64_t follow = 3'000;       // a deputy that is silent for so long is one no more
  std::int64_t tie_wait = 2'000;     // others are silent, not known dead, and there is no majority
};

/// The job_machine's patience at a deputy: it asks who is silent over its own line every half
/// second, and a member that is known dead needs no wait.
detection deputy_detection();

/// Of the worker that it runs at, as of now.
struct deputy_facts {
  std::int64_t now_ms = 0, unix_ms = 0;
  std::int64_t away_ms = -1;  // the coordinator is away for so long; -1: its channel stands
  std::int64_t free_ms = 0;   // and nobody stands in for so long
  bool follows_another = false;
  const commit* newest = nullptr;  // that it took; none: no job, nothing to stand in for
  hello greeting;
  beat pulse;
  checkpoint_durable durable;
  std::uint64_t incarnation = 0;  // of the coordinator that it knew last
};

/// Whose checkpoints, for the shell (coordinator/checkpoint_keeper).
struct deputy_place {
  job_id job{};
  job_spec spec;
  std::string folder;
  std::uint64_t incarnation = 0, plan_hash = 0;
  std::string layout;  // for people
};

namespace deputy_actions {
struct send {
  plan_member to;
  peer_message message;
};
struct order_self {
  to_worker message;
};
struct store {
  deputy_place place;
  std::variant<actions::find_checkpoint, actions::write_manifest, actions::retire_checkpoints> what;
};
/// Make this file, with `content` in it, unless it is there; answered by tie_break_made.
struct make_tie_break {
  std::string folder, file, content;
  std::uint64_t generation = 0;
};
struct note {
  event_record record;
};
}  // namespace deputy_actions

using deputy_action =
    std::variant<deputy_actions::send, deputy_actions::order_self, deputy_actions::store,
                 deputy_actions::make_tie_break, deputy_actions::note>;

namespace deputy_events {
struct tick {};
struct answered {
  canvassed answer;
};
struct reported {
  process_id from;
  to_coordinator message;
};
struct unreachable {
  process_id peer;
  bool is_gone = false;
  std::string why;
};
struct tie_break_made {
  std::uint64_t generation = 0;
  bool is_ours = false;
};
struct retire {
  std::string why;
};
}  // namespace deputy_events

using deputy_event =
    std::variant<deputy_events::tick, deputy_events::answered, deputy_events::reported,
                 deputy_events::unreachable, deputy_events::tie_break_made, deputy_events::retire,
                 checkpoint_found, manifest_written, checkpoints_retired>;

class deputy_machine {
 public:
  explicit deputy_machine(process_id process, deputy_rules rules = {});
  [[nodiscard]] std::vector<deputy_action> step(const deputy_event& e, const deputy_facts& facts);

  bool is_standing() const { return machine_.has_value(); }
  const deputy_rules& rules() const { return rules_; }

 private:
  enum class phase { off, canvassing, standing, spent };

  struct peer {
    plan_member who;
    bool is_gone = false;       // its process is known to be no more
    bool is_connected = false;  // as the job_machine sees it
    std::int64_t agreed_ms = -1, refused_ms = -1;
    hello greeting;
    beat pulse;
    checkpoint_durable durable;
  };

  void on(const deputy_events::tick&);
  void on(const deputy_events::answered& e);
  void on(const deputy_events::reported& e);
  void on(const deputy_events::unreachable& e);
  void on(const deputy_events::tie_break_made& e);
  void on(const deputy_events::retire& e) { retire(e.why); }
  void on(const checkpoint_found& e) { feed(e); }
  void on(const manifest_written& e) { feed(e); }
  void on(const checkpoints_retired& e) { feed(e); }

  void take_plan(const plan& p);
  void canvass_all();
  void consider_mandate();
  std::string mandate() const;  // why it may decide; empty: it may not
  void stand(const std::string& why);
  void retire(const std::string& why);
  void greet(peer& p);
  void feed(const job_event& e);
  void carry_out(action& a);
  void deliver(worker_id to, to_worker message);
  bool is_self(const plan_member& m) const { return m.process == process_; }
  bool is_recent(std::int64_t at) const { return at >= 0 && now_ms_ - at <= rules_.fresh; }
  peer* by_process(const process_id& process);
  hello translated(const hello& h) const;
  deputy_place place() const;
  void note(const std::string& kind, const std::string& text, const std::string& level = "info");

  process_id process_;
  deputy_rules rules_;
  phase phase_ = phase::off;
  const deputy_facts* facts_ = nullptr;  // of the step that runs
  std::int64_t now_ms_ = 0;

  plan plan_;  // stood in for; while it stands: its machine's newest
  std::uint64_t plan_hash_ = 0;
  int rank_ = -1;                    // own, in plan_
  std::map<worker_id, peer> peers_;  // the other members
  std::int64_t canvassing_since_ms_ = 0, next_canvass_ms_ = 0;
  bool is_tie_break_asked_ = false;
  std::uint64_t tie_break_of_ = 0;  // the generation that its file stands for; 0: none

  job_spec spec_;
  std::string folder_;
  std::optional<job_machine> machine_;
  std::map<worker_id, stop_stage> stops_;  // held back until it is known who is given up
  std::uint64_t next_event_ = 1;
  std::vector<deputy_action> out_;
};

}  // namespace stagecoach
