// A worker's side of the protocol: what it says to the coordinator and tells its trainer.
//
// Pure: the shell (worker_actor) brings events and carries out actions in order. Training goes on
// while the coordinator is away: what it must know is kept here (bounded) and said again after the
// next welcome. A worker that answered prepare(n) takes no message of a smaller number.
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
};  // about every 100 ms
struct stopping {
  std::string reason;
};  // orderly end of this process
}  // namespace worker_events

using worker_event = std::variant<worker_events::connected, worker_events::disconnected,
                                  worker_events::coordinator_said, worker_events::trainer_said,
                                  worker_events::tick, worker_events::stopping>;

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
};  // over the peer line; answered by trainer_said{probed}
}  // namespace worker_actions

using worker_action =
    std::variant<worker_actions::send, worker_actions::tell_trainer, worker_actions::reconnect,
                 worker_actions::give_up, worker_actions::ask_alive>;

class worker_machine {
 public:
  explicit worker_machine(worker_identity identity);
  [[nodiscard]] std::vector<worker_action> step(const worker_event& e);

  worker_phase phase() const { return phase_; }
  std::uint64_t job() const { return job_; }
  std::uint64_t generation() const { return generation_; }
  std::uint64_t id() const { return id_; }  // 0 until the first welcome
  bool is_welcome() const { return is_welcome_; }
  std::uint64_t stale_messages() const {
    return stale_messages_;
  }  // dropped: older number or other job
  std::uint64_t dropped_reports() const {
    return dropped_reports_;
  }  // steps that overflowed the queue

  static constexpr std::size_t queued_steps_max = 100'000;  // 14 MB; at 0.5 s a step 14 hours away
  static constexpr std::size_t queued_parts_max = 64;       // a save or two per generation is usual
  static constexpr std::size_t queued_others_max = 1'000;

 private:
  void on(const worker_events::connected& e);
  void on(const worker_events::disconnected& e);
  void on(const worker_events::coordinator_said& e);
  void on(const worker_events::trainer_said& e);
  void on(const worker_events::tick& e);
  void on(const worker_events::stopping& e);

  void told(const welcome& x);
  void told(const refused& x);
  void told(const prepare& x);
  void told(const commit& x);
  void told(const run_stage& x);
  void told(const give_order& x);
  void told(const resume_stage& x);
  void told(const checkpoint_durable& x);
  void told(const stop_stage& x);
  void told(const probe& x) { out_.push_back(worker_actions::ask_alive{x}); }
  void told(const feed& x);
  void told(const stop_feed& x);
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
  template <class T>
  void said(const T& x) {
    pass_on(x);
  }

  void watch_pulse(const worker_events::tick& e);
  void follow(std::uint64_t step);
  void send(to_coordinator message);
  void pass_on(to_coordinator message);  // now, or after the next welcome
  void tell(to_worker message);
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
  std::int64_t own_ms_ = 0, moved_own_ms_ = 0;  // time without what this process slept through

  worker_phase phase_ = worker_phase::idle;
  std::uint64_t job_ = 0;
  std::uint64_t generation_ = 0, plan_hash_ = 0;  // of the newest commit that was taken
  std::uint64_t promised_ = 0;                    // answered (or answering) prepare of this number
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
  std::vector<part_saved> parts_;  // until durable
  std::deque<to_coordinator> queued_others_;
  std::uint64_t stale_messages_ = 0, dropped_reports_ = 0;
  std::vector<worker_action> out_;
};

}  // namespace stagecoach
