// A worker's side of the protocol: what it says to the coordinator and tells its trainer.
//
// Pure: the shell (worker_actor) brings events and carries out actions in order. Training goes on
// while the coordinator is away: what it must know is kept here (bounded) and said again after the
// next welcome, with the steps of the last seconds before the channel broke, which may be lost with
// it. A worker that answered prepare(n) takes no message of a smaller number, and answers
// no second decider of n.
//
// While the coordinator is away a member may stand in for it (worker/deputy_machine.hpp), this one
// or another: a member that agreed takes its orders and reports to it, and keeps for the
// coordinator what the coordinator must get on its return. When the control channel is up again the
// coordinator decides. That side is in worker_deputy.cpp.
//
//   idle --prepare--> (trainer drops) --> prepared --commit--> loading --> ready --run--> running
//   --> held, finished any --prepare--> ...      any --stop_stage--> idle      held --resume-->
//   running
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "coordinator/messages.hpp"
#include "worker/deputy_machine.hpp"
#include "worker/peer_messages.hpp"
#include "worker/trainer_pulse.hpp"

namespace stagecoach {

/// Facts about this process, fixed from start to end; job, generation, phase and step are filled
/// in.
using worker_identity = hello;

namespace worker_events {
struct connected {
  std::uint64_t step = 0;
};  // control channel stands; step: trainer's newest
struct disconnected {
  std::string why;
};
struct coordinator_said {
  to_worker message;
};
struct trainer_said {
  to_coordinator message;
};  // what the trainer emits, in its order
struct tick {
  std::int64_t now_ms = 0;
  std::uint64_t step = 0;
  trainer_pulse pulse{};
  std::int64_t unix_ms = 0;
  std::int64_t leaf_us = 0, layer_us = 0;  // see beat
};                                         // about every 100 ms
struct stopping {
  std::string reason;
};  // orderly end of this process
struct peer_said {
  process_id from;
  peer_message message;
};  // over the line between workers
struct peer_unreachable {
  process_id peer;
  bool is_gone = false;  // known dead; else silent
  std::string why;
};  // what was sent to it last is lost
struct stored {
  std::variant<checkpoint_found, manifest_written, checkpoints_retired> answer;
};
struct tie_break_made {
  std::uint64_t generation = 0;
  bool is_ours = false;
};
}  // namespace worker_events

using worker_event =
    std::variant<worker_events::connected, worker_events::disconnected,
                 worker_events::coordinator_said, worker_events::trainer_said, worker_events::tick,
                 worker_events::stopping, worker_events::peer_said, worker_events::peer_unreachable,
                 worker_events::stored, worker_events::tie_break_made>;

namespace worker_actions {
struct send {
  to_coordinator message;
};  // only while connected
struct tell_trainer {
  to_worker message;
};  // prepare: drop; commit: load; ...
struct reconnect {
  std::string why;
};  // drop this channel, dial again
struct give_up {
  std::string why;
};  // refused for good: end the process
struct ask_alive {
  probe question;
};                                       // over the peer line; answered by trainer_said{probed}
using send_peer = deputy_actions::send;  // over the line between workers
using store = deputy_actions::store;     // as deputy; answered by stored
using make_tie_break = deputy_actions::make_tie_break;
using note = deputy_actions::note;  // a log line
}  // namespace worker_actions

using worker_action =
    std::variant<worker_actions::send, worker_actions::tell_trainer, worker_actions::reconnect,
                 worker_actions::give_up, worker_actions::ask_alive, worker_actions::send_peer,
                 worker_actions::store, worker_actions::make_tie_break, worker_actions::note>;

class worker_machine {
 public:
  explicit worker_machine(worker_identity identity, deputy_rules rules = {});
  [[nodiscard]] std::vector<worker_action> step(const worker_event& e);

  worker_phase phase() const { return phase_; }
  std::uint64_t job() const { return job_; }
  std::uint64_t generation() const { return generation_; }
  std::uint64_t id() const { return id_; }  // 0 until the first welcome
  bool is_welcome() const { return is_welcome_; }
  bool is_deputy() const { return deputy_.is_standing(); }
  std::uint64_t stale_messages() const {
    return stale_messages_;
  }  // dropped: older number or other job
  std::uint64_t dropped_reports() const {
    return dropped_reports_;
  }  // steps that overflowed the queue

  static constexpr std::size_t queued_steps_max = 100'000;  // 14 MB; at 0.5 s a step 14 hours away
  static constexpr std::size_t retold_steps_max = 15'000;   // 15 s of 1 ms steps, 2.1 MB
  static constexpr std::size_t queued_parts_max = 64;       // a save or two per generation is usual
  static constexpr std::size_t uncommitted_saves_max = 2;   // while nobody writes their manifests
  static constexpr std::size_t queued_others_max = 1'000;

 private:
  void on(const worker_events::connected& e);
  void on(const worker_events::disconnected& e);
  void on(const worker_events::coordinator_said& e);
  void on(const worker_events::trainer_said& e);
  void on(const worker_events::tick& e);
  void on(const worker_events::stopping& e);
  void on(const worker_events::peer_said& e);
  void on(const worker_events::peer_unreachable& e);
  void on(const worker_events::stored& e);
  void on(const worker_events::tie_break_made& e);

  void told(const welcome& x);
  void told(const refused& x);
  void told(const prepare& x);
  void told(const commit& x);
  void told(const run_stage& x);
  void told(const give_order& x);
  void told(const resume_stage& x);
  void told(const checkpoint_durable& x);
  void learn(const distrust& x);
  void told(const audit& x);
  void told(const stop_audit& x);
  void told(const stop_stage& x);
  void told(const probe& x) { out_.push_back(worker_actions::ask_alive{x}); }
  void told(const feed& x);
  void told(const stop_feed& x);
  void told(const trace_steps& x);
  template <class T>
  void told(const T&) {}  // what this machine has no part in

  void said(const prepared& x);
  void said(const ready& x);
  void said(const failed& x);
  void said(const progress& x);
  void said(const part_saved& x);
  void said(const held& x);
  void said(const finished& x);
  void said(const peer_report& x);
  void said(const probed& x);
  void said(const feed_ready& x);
  void said(const fed& x);
  void said(const traced& x);
  template <class T>
  void said(const T& x) {
    pass_on(x);
  }

  void watch_pulse(const worker_events::tick& e);
  void follow(std::uint64_t step);
  beat pulse_now() const;
  // A deputy: this one or the one that it follows.
  void heard(const process_id& from, const canvass& x);
  void heard(const process_id& from, const canvassed& x);
  void heard(const process_id& from, const deputy_order& x);
  void heard(const process_id& from, const deputy_report& x);
  refusal consider(const canvass& x) const;
  void answer(const plan_member& to, std::uint64_t job, refusal why);
  void follow_deputy(const plan_member& who, bool is_standing);
  void leave_deputy();
  void advise_deputy(const deputy_event& e);
  void serve_deputy();
  void say_state_to_deputy();
  deputy_facts facts() const;
  bool is_own_deputy() const { return decider_ && decider_->process == identity_.process; }
  int rank_of(const process_id& process) const;  // in the newest plan taken; -1: not in it

  void send(to_coordinator message);
  void lose_channel();
  void report(progress x);  // now; again if the channel breaks soon
  void queue(const progress& x);
  void forget_said_before(std::int64_t ms);
  void decide_by(const to_coordinator& message);  // to whoever decides now, the coordinator first
  void pass_on(to_coordinator message);           // now, or after the next welcome
  void tell(to_worker message);
  void say_hello();
  void say_plan();
  void say_state_again();
  void forget_job();
  hello greeting() const;
  bool is_mine(std::uint64_t job, std::uint64_t generation) const {
    return job == job_ && generation == generation_;
  }

  worker_identity identity_;
  bool is_connected_ = false, is_welcome_ = false;
  std::uint64_t id_ = 0, incarnation_ = 0;
  std::int64_t beat_ms_ = 1000, next_beat_ms_ = 0, now_ms_ = 0;
  trainer_pulse pulse_;
  std::int64_t leaf_us_ = 0, layer_us_ = 0;
  std::int64_t own_ms_ = 0, moved_own_ms_ = 0;  // time without what this process slept through

  worker_phase phase_ = worker_phase::idle;
  std::uint64_t job_ = 0;
  std::uint64_t generation_ = 0, plan_hash_ = 0;  // of the newest commit that was taken
  std::uint64_t promised_ = 0;                    // answered (or answering) prepare of this number
  distrust distrusted_;                           // of its job, the newest that it was told
  std::uint64_t audit_ = 0;                       // window that is computed again; 0: none
  bool is_dropping_ = false;                      // the trainer was told, its answer is not here
  std::uint64_t step_ = 0;
  std::optional<prepared> answer_;  // newest
  std::optional<ready> ready_;
  std::optional<failed> failed_;  // said again until a newer prepare
  std::optional<held> held_;
  std::optional<finished> finished_;
  std::uint64_t feed_ = 0;  // request of the newest feed that was taken
  std::optional<feed_ready> feed_ready_;
  std::optional<fed> fed_;
  std::map<std::uint64_t, peer_report> peer_states_;  // newest by peer, said again
  std::deque<progress> queued_progress_;
  std::size_t queued_steps_ = 0;
  struct said_progress {
    std::int64_t own_ms = 0;
    progress report;
  };
  std::deque<said_progress> said_progress_;  // on this channel, of the last seconds
  std::size_t said_steps_ = 0;
  std::vector<part_saved> parts_;  // until durable
  std::deque<to_coordinator> queued_others_;
  std::uint64_t stale_messages_ = 0, dropped_reports_ = 0;

  std::optional<commit> commit_;  // newest that was taken, without what only its load needs
  process_id promised_to_;        // who asked for promised_: a deputy; empty: the coordinator
  process_id speaker_;            // of the order that is being taken
  std::uint64_t said_promised_ = 0, said_generation_ = 0;  // in the last hello
  checkpoint_durable durable_;                             // newest that it was told of
  deputy_machine deputy_;
  std::optional<plan_member> decider_;  // the deputy that it agreed to; may be this worker
  bool does_decider_stand_ = false;
  std::int64_t unix_ms_ = 0;
  std::int64_t away_since_ms_ = 0;  // the coordinator, by own_ms_
  std::int64_t free_since_ms_ = 0;  // and nobody stands in
  std::int64_t decider_heard_ms_ = 0;
  std::deque<to_worker> own_orders_;        // from the deputy here to this member
  std::deque<to_coordinator> own_reports_;  // and back
  std::vector<worker_action> out_;
};

}  // namespace stagecoach
