// The life of one job: generations, the choice of state, saves, orders, losses, the end.
//
// Pure: no clock, socket, disk, thread or random. Actions are carried out in order; all that
// follows a synced `save` waits for its acknowledgement. Whoever is given to the job
// (cluster_machine) is its own until it says `release`. Knows no connection and no other job.
//
//   PENDING --workers given--> preparing(n) --decide--> [finding] --commit--> loading --all
//   ready--> running
//      ^                          ^   ^                                          | |  ^ | pause,
//      too few for long  |   +------------- a loss: n + 1 --------------+--------------------+  |
//      +--------------------------+                                          order hold (grow,
//      drain, pause)
//                                 +------------- all held, workers changed ------------- holding
//                                 ---+---+
//   running --all finished, final manifest durable--> COMPLETED; fatal failure --> FAILED; cancel
//   --> CANCELLED restart of the coordinator: adopting --all members back--> running, else
//   preparing(n + 1)
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "config/ids.hpp"
#include "config/limits.hpp"
#include "config/result.hpp"
#include "coordinator/messages.hpp"
#include "coordinator/records.hpp"
#include "model/layer_shares.hpp"
#include "model/leaf_shares.hpp"
#include "model/plan.hpp"

namespace stagecoach {

struct candidate;  // coordinator/decision.hpp

enum class connection_id : std::uint64_t;  // given by coordinator/gateway.hpp; 0 is "none"
enum class reply_id : std::uint64_t {};    // given by the shell with a request; 0: nobody waits

/// When silence becomes a loss, and how long the job waits for what. Milliseconds.
struct detection {
  // With a witness (coordinator/job_watch.cpp): suspicion or a missed beat makes another worker
  // ask.
  std::int64_t beat_missed = 2'500;  // beats come each second: two, and half a one for a busy host
  std::int64_t beat_late = 1'400;    // no beat for so long is a second sign beside a silent link
  std::int64_t probe_wait = 800;     // a witness answers within 300 ms, or is in trouble itself
  std::int64_t probe_again = 1'000;  // an answer is that old, and there is still a reason to ask
  // A link is suspected and its peer alive: a process that was stopped for a moment sends again by
  // then, and with the second of silence before it makes a cut known within 1.5 s.
  std::int64_t link_settle = 300;
  // Without one: nobody to ask, or nobody answers.
  std::int64_t reconnect_grace = 3'000;     // control closed: a worker's back-off is under 2 s
  std::int64_t unconfirmed_max = 300'000;   // control away, but its process answers: a lost
                                            // control socket never evicts; five minutes on, orders
                                            // and saves wait for it too long
  std::int64_t suspected_silence = 3'000;   // three missed beats and a peer's word
  std::int64_t silence_max = 10'000;        // ten missed beats alone: frozen, or its host is
  std::int64_t link_lost_wait = 1'000;      // a link broke, both ends beat: the control loss may
                                            // be on its way
  std::int64_t link_suspected_max = 5'000;  // a link stands but carries nothing
  // A trainer's thread that stands still while it computes (watch_progress): 2 s, since an
  // instruction takes milliseconds, or this many median steps, since one may be most of a step.
  std::int64_t stand_ms = 2'000, stand_steps = 5;
  std::int64_t prepare_wait =
      2'000;  // an answer to prepare needs no computation, only a dropped step
  std::int64_t minority_wait = 10'000;  // a silent member may hold a newer step
  std::int64_t load_wait = 60'000;      // without any sign from a member that loads
  std::int64_t order_wait = 120'000;    // end without the final save, cancel without its save
  std::int64_t hold_wait = 10'000;      // all hold after one step, so within moments of each other
  std::int64_t finish_wait = 5'000;     // final manifest durable, a member has not said finished
  std::int64_t burst_wait = 500;        // joiners that come together make one generation
  std::int64_t feed_wait = 10'000;      // until the links of a feed stand
  std::int64_t feed_back_off = 2'000;   // a feed that failed is tried again
  std::int64_t retry_wait = 5'000;      // a failed save of the last step is tried again
  std::int64_t back_off_first = 200;    // after a generation that failed before it ran; doubles
  std::int64_t back_off_max = 10'000;
  std::int64_t failure_window = 3'600'000;  // elasticity.max_failures is per hour
};

/// What a job must know of a worker that is given to it.
struct worker_facts {
  worker_id id{};
  process_id process;
  std::string name, host, link_host;
  std::uint16_t link_port = 0;
  std::string device_class;
  std::uint64_t memory_bytes = 0;  // of its host; 0: not known
};

// ---- events of a job ----
namespace job_events {
struct workers_given {
  std::vector<worker_facts> workers;
};  // all connected
struct worker_connected {
  worker_id worker;
  hello greeting;
};  // a member is back (same process)
struct worker_disconnected {
  worker_id worker;
  std::string why;
};
struct worker_gone {
  worker_id worker;
  std::string why;
};  // its process is known to be no more
struct worker_said {
  worker_id worker;
  to_coordinator message;
};
struct worker_draining {
  worker_id worker;
  bool is_draining = true;
  std::string reason;
};
struct tick {
  std::int64_t now_ms = 0, unix_ms = 0;
};
struct submitted {  // the first event of a new job
  std::int64_t unix_ms = 0;
  reply_id reply{};
};
struct pause {
  reply_id reply{};
};
struct resume {
  reply_id reply{};
};
struct cancel {
  bool now = false;
  reply_id reply{};
};
struct save_now {
  reply_id reply{};
};
/// A worker without work has computed steps from + 1 .. to again, or could not.
struct window_audited {
  std::string by;
  std::uint64_t from = 0, to = 0;
  audited found;
};
struct set_priority {
  int priority = 0;
  reply_id reply{};
};
// From cluster_machine, for a job that waits. They act at a step boundary; nothing is redone.
struct give_back {
  int count = 0;
  std::set<worker_id> useful;  // the waiting job can use these and no others
  std::string to;              // words: who waits, with which priority
};
struct suspend {  // all workers, after a checkpoint; then pending again
  std::string to;
};
struct keep_workers {};  // who waited does not any more
}  // namespace job_events

/// Steps from + 1 .. to, from one checkpoint (or the start) to the next.
struct audit_window {
  std::uint64_t from = 0, to = 0;
  std::set<worker_id> computed_by{};
};

/// A usable checkpoint, verified by the shell.
struct checkpoint_facts {
  std::uint64_t step = 0, seq = 0, chain = 0;
  exact_double loss;
  std::string weights_hash;  // of the whole model
  std::vector<part_record> parts;
  std::uint64_t generation = 0;  // that saved it
};

struct checkpoint_found {  // answers find_checkpoint
  job_id job{};
  std::uint64_t request = 0;
  std::optional<checkpoint_facts> newest;
  std::vector<std::string> notes;  // newer ones that were skipped, and why
};
struct manifest_written {  // answers write_manifest
  job_id job{};
  std::uint64_t step = 0;
  bool is_ok = false;
  std::string problem;
};
struct checkpoints_retired {  // answers retire_checkpoints
  job_id job{};
  std::vector<std::uint64_t> steps;
};

using job_event =
    std::variant<job_events::submitted, job_events::workers_given, job_events::worker_connected,
                 job_events::worker_disconnected, job_events::worker_gone, job_events::worker_said,
                 job_events::worker_draining, job_events::tick, job_events::pause,
                 job_events::window_audited, job_events::resume, job_events::cancel,
                 job_events::save_now, job_events::set_priority, job_events::give_back,
                 job_events::suspend, job_events::keep_workers, checkpoint_found, manifest_written,
                 checkpoints_retired>;

// ---- actions ----
namespace actions {
struct row {
  std::string key;
  std::optional<std::string> value;  // none: erase
};
/// One batch. All actions that follow wait until it is durable, if synced.
struct save {
  std::vector<row> rows;
  bool is_synced = true;
};
struct send {
  worker_id worker{};
  connection_id connection{};
  to_worker message;
};
struct close {
  connection_id connection{};
  std::string reason;
};
/// Newest checkpoint of the job that verifies, at most step_max; answered by checkpoint_found.
/// folder: spec.checkpoint.store, empty for the shell's default.
struct find_checkpoint {
  job_id job{};
  std::string folder;
  std::uint64_t request = 0, step_max = ~0ull;
  distrust distrusted{};  // nothing of what this excludes
};
/// Idempotent: the same content may be written again after a restart. Answered by manifest_written.
struct write_manifest {
  job_id job{};
  std::uint64_t step = 0, seq = 0, chain = 0, generation = 0;
  exact_double loss;
  std::string weights_hash;
  std::vector<part_record> parts;
  bool is_final = false;
};
/// Never removes the newest durable one. Answered by checkpoints_retired, with what is gone.
struct retire_checkpoints {
  job_id job{};
  std::string folder;
  int keep_last = 3;
  std::int64_t keep_every_steps = 0;
  distrust distrusted{};                    // what it excludes counts as damaged
  std::vector<std::uint64_t> kept_steps{};  // stay: a patrol computes from one to the other
};
/// A row under keys::event (need not be synced) and a log line.
struct note {
  event_record record;
};
struct series {
  job_id job{};
  std::uint64_t generation = 0;
  std::vector<step_report> steps;
};
/// All that a worker needs to compute a window again; answered by events::audit_gathered.
struct gather_audit {
  job_id job{};
  std::uint64_t audit = 0;
  worker_id worker{};
  std::uint64_t from = 0, to = 0;
};
/// Steps after this one are forgotten: they are done again with other bits.
struct forget_series {
  job_id job{};
  std::uint64_t step = 0;
};
struct evaluation {
  job_id job{};
  std::uint64_t step = 0;
  exact_double loss;
};
struct log {
  job_id job{};
  worker_id worker{};
  log_line line;
};
struct reply_value {
  job_id job{};
  std::string text;
};
struct reply {
  reply_id id{};
  result<reply_value> outcome;
};
/// No member can be asked about a process: a worker without a job is, where there is one. Taken by
/// cluster_machine, never seen by the shell.
struct seek_witness {
  probe question;
  std::set<worker_id> mute;  // not these
};
/// Gives a worker back; taken by cluster_machine, never seen by the shell.
struct release {
  worker_id worker{};
  bool is_lost = false;
  std::string reason;
  bool is_distrusted = false;  // its memory or arithmetic gave wrong bits: no work until undrained
  bool is_member = true;       // false: was given back before, only its name is at stake
};
}  // namespace actions

using action = std::variant<actions::save, actions::send, actions::close, actions::find_checkpoint,
                            actions::write_manifest, actions::retire_checkpoints, actions::note,
                            actions::series, actions::forget_series, actions::gather_audit,
                            actions::evaluation, actions::log, actions::reply,
                            actions::seek_witness, actions::release>;

// ---- views ----
/// What a job would take from the free workers.
struct worker_wish {
  int least = 0;  // below it, giving any is of no use (a pending job's gang); else 0 or 1
  int most = 0;
  bool is_growth = false;  // it runs; only others' leavings
};

struct member_view {
  worker_id worker{};
  std::string name, host;
  int stage = -1, replica = -1;  // -1: a joiner, without a place yet
  std::string state;             // "running", "loading", "disconnected", "draining", ...
  std::uint64_t step = 0;
};

struct job_view {
  job_id id{};
  std::string name, state, reason;
  int priority = 0;
  int queue =
      0;  // place among those that wait, from 1; 0: it does not wait. Set by cluster_machine
  std::uint64_t step = 0, stop_steps = 0, generation = 0, plan_hash = 0;
  std::string phase;  // "running", "preparing", ...
  int stages = 0, replicas = 0;
  std::string schedule;
  std::vector<int> unit_cuts, leaf_cuts;
  int workers = 0, workers_min = 0, workers_max = 0;
  exact_double loss;  // of the newest step reported
  std::int64_t step_us = 0;
  std::optional<std::uint64_t> evaluated_step;
  exact_double evaluated_loss;
  std::uint64_t saved_step = 0;
  bool has_saved = false;
  std::string saved_hash;  // weights hash of the newest checkpoint
  std::int64_t saved_unix_ms = 0;
  int recovery_count = 0;
  std::uint64_t redone_steps = 0, divergences = 0, stale_messages = 0;
  int losses_survived = 0;            // further losses that lose no committed step now
  std::string weakest;                // the stage that the fewest hold: "stage 1 (h.2..head)"
  std::int64_t last_recovery_ms = 0;  // loss detected to first new step; 0: none yet
  std::int64_t submitted_unix_ms = 0, started_unix_ms = 0, ended_unix_ms = 0;
  std::vector<member_view> members;
};

class job_machine {
 public:
  /// restored: a new job (record only) or all that the store holds. A job whose record says running
  /// waits for the members of its newest generation (adopting). unix_ms, now_ms as of the first
  /// tick.
  explicit job_machine(restored_job restored, detection rules = {}, balance_rules balance = {});

  [[nodiscard]] std::vector<action> step(const job_event& e);  // carry out in this order

  job_id id() const { return record_.id; }
  const job_record& record() const { return record_; }
  const std::map<std::uint64_t, checkpoint_record>& checkpoints() const { return checkpoints_; }
  const std::optional<generation_record>& generation() const { return generation_; }
  job_state state() const;
  worker_wish wish(int free_suitable) const;
  bool has_worker(worker_id id) const { return members_.count(id) != 0; }
  /// False: this worker failed at this job on its own account (data file missing, ...); words in
  /// why.
  bool accepts(const worker_facts& worker, std::string* why = nullptr) const;
  std::vector<worker_id> workers() const;
  /// Was in the newest committed plan; a coordinator that restarts waits for it.
  bool expects(worker_id id) const;
  /// It holds a plan of this job that is newer than ours, or another of the same number: a deputy's
  /// (or a coordinator's whose store was lost). It is heard before it is told to stop.
  bool is_claimed_by(const hello& greeting) const;
  job_view view() const;
  /// What a patrol is to compute next: oldest first, so that all before it is known to be right.
  std::optional<audit_window> next_audit() const;
  /// Words on what it waits for; the cluster adds what it knows of the free workers.
  const std::string& waits_for() const { return waits_for_; }
  /// "preparing", "loading", ...; what is not in the state.
  const char* phase_name() const;

  /// Words on the newest move of leaves between replicas, with the figures; empty: none yet.
  const std::string& balance() const { return balance_; }
  /// And of layers between stages.
  const std::string& layer_balance() const { return layer_balance_; }

  // ---- among other jobs (job_compete.cpp) ----
  int priority() const { return record_.priority.value_or(record_.spec.priority); }
  /// Waits for its first workers, or for all of them again.
  bool is_waiting() const { return phase_ == phase::none && record_.state == job_state::pending; }
  /// How long it has waited, less how long it has run since: what it is owed.
  std::int64_t owed_ms() const { return owed_ms_; }
  /// Since it last began to run after it waited; 0: it does not run.
  std::int64_t ran_ms() const { return running_since_ms_ < 0 ? 0 : now_ms_ - running_since_ms_; }
  /// Has lost workers and can't run with those it has left.
  bool is_short() const { return phase_ == phase::preparing && short_since_ms_ >= 0; }
  /// Workers beyond its minimum.
  int surplus() const;
  /// It could act on give_back or suspend now.
  bool can_yield() const;
  /// Workers on their way back; with all of them if it is being suspended.
  std::vector<worker_id> yielding() const;
  /// Workers of its newest plan that it has lost.
  int missing_count() const { return std::max(0, planned_count() - staying_count()); }

 private:
  enum class phase { none, adopting, backing_off, preparing, finding, loading, running, holding };

  /// Someone who is given to this job.
  struct member {
    worker_facts facts;
    bool is_connected = true;
    std::int64_t disconnected_ms = 0;
    std::string disconnected_why;
    std::int64_t heard_ms = 0;
    std::int64_t asked_ms = 0;         // prepare was sent, or would have been if it were connected
    std::int64_t first_asked_ms = -1;  // for number_; it is asked again whenever it greets
    int rank = -1;                     // in the newest committed plan; -1: not in it
    bool is_draining = false;
    bool is_leaving = false;  // given back to a job that waits
    worker_phase phase = worker_phase::idle;
    std::uint64_t step = 0;
    std::optional<prepared> answer;  // to the prepare of number_
    std::optional<ready> loaded;     // for the newest plan
    bool is_held = false, is_finished = false;
    std::string finished_hash;
    bool is_mute = false;         // did not answer the prepare of the newest plan
    bool is_left_behind = false;  // mute, and of a plan before: it may hold a newer step
    bool is_astray = false;       // came back without our generation
    bool is_report_due = false;   // it holds a newer plan than ours; its next word says which
    std::uint64_t generation = 0, hash = 0;                   // of the plan that its greeting named
    std::map<worker_id, std::int64_t> lost_by, suspected_by;  // who says so, since when
    std::optional<beat> pulse;                                // its newest of this generation
  };
  /// Somebody may be dead: another worker is asked to reach it.
  struct inquiry {
    worker_id witness{};         // who is asked; 0: whom the cluster found, if anybody
    std::int64_t asked_ms = -1;  // -1: nobody is asked now
    int reasons = 0;             // that there were when it was asked
    std::set<worker_id> mute;    // witnesses that did not answer
    std::string verdict, why;    // newest; empty: none
    worker_id answered_by{};
    std::int64_t answered_ms = 0;
  };
  struct pending_save {
    std::vector<part_saved> parts;
    std::vector<part_saved> whole;  // being put into a manifest
    std::uint64_t seq = 0;
    bool is_tried = false;
    std::int64_t retry_ms = -1;  // the manifest is to be written again then
  };
  struct choice {
    layout shape;
    std::vector<worker_id> by_rank;
    source_kind source = source_kind::initial;
    std::uint64_t step = 0, chain = 0;
    std::optional<vote_result> roll_forward;
    std::vector<transfer_record> transfers;
  };
  struct times {
    std::vector<std::int64_t> leaf_us, layer_us;  // as commit
  };
  /// Layers that go to other stages, once what that takes is copied.
  struct layer_move {
    std::vector<int> unit_cuts;
    int failed_feeds = 0;  // before it
    std::string text;
    std::map<std::string, std::string> fields;
  };
  /// Who would sit at which rank of a layout; empty: nobody can.
  using seating = std::function<std::vector<worker_id>(const layout&)>;

  // Events.
  void on(const job_events::submitted& e);
  void on(const job_events::workers_given& e);
  void on(const job_events::worker_connected& e);
  void on(const job_events::worker_disconnected& e);
  void on(const job_events::worker_gone& e);
  void on(const job_events::worker_said& e);
  void on(const job_events::worker_draining& e);
  void on(const job_events::tick& e);
  void on(const job_events::window_audited& e);
  void on(const job_events::pause& e);
  void on(const job_events::resume& e);
  void on(const job_events::cancel& e);
  void on(const job_events::save_now& e);
  void on(const job_events::set_priority& e);
  void on(const job_events::give_back& e);
  void on(const job_events::suspend& e);
  void on(const job_events::keep_workers& e);
  void on(const checkpoint_found& e);
  void on(const manifest_written& e);
  void on(const checkpoints_retired& e);

  // Messages of members.
  void said(member& m, const hello& x);
  void said(member& m, const beat& x);
  void said(member& m, const prepared& x);
  void said(member& m, const ready& x);
  void said(member& m, const failed& x);
  void said(member& m, const progress& x);
  void said(member& m, const evaluated& x);
  void said(member& m, const part_saved& x);
  void said(member& m, const held& x);
  void said(member& m, const finished& x);
  void said(member& m, const peer_report& x);
  void said(member& m, const probed& x) { found(m.facts.id, m.facts.name, x); }
  void found(worker_id witness, const std::string& witness_name, const probed& x);
  void said(member& m, const log_line& x);
  void said(member& m, const goodbye& x);
  void said(member& m, const feed_ready& x);
  void said(member& m, const fed& x);
  void said(member& m, const plan_report& x);
  template <class T>
  void said(member&, const T&) {}  // what this machine has no part in

  // Losses.
  void watch_members();
  int reasons_to_ask(const member& m) const;
  void inquire();
  void ask_witness(worker_id about, const plan_member& peer, int reasons);
  worker_id choose_witness(worker_id about, const inquiry& q) const;
  std::string verdict_on(worker_id id) const;      // empty: none
  std::string other_sign(const member& m) const;   // beside its witness's; empty: none
  std::string reason_lost(const member& m) const;  // empty: it is not lost
  std::string reason_link_fault() const;           // empty: none
  std::int64_t stand_ms_max() const;
  const member* end_of_wait(const member& m) const;
  void watch_progress();
  void lose(const std::map<worker_id, std::string>& lost, bool are_hopeless = false);
  bool count_failure(const std::string& why);  // false: over the budget, the job has failed
  void fail_generation(const std::string& why);

  // Silent corruption (job_audit.cpp).
  void dispute(const failed& x);
  void evict(const std::map<worker_id, std::string>& whom);
  void go_back(std::uint64_t step_max, const std::string& why);
  void take_weights_hash(std::uint64_t step, const std::string& hash);
  void judge(std::uint64_t step, const std::string& right_hash);
  void check_saved(std::uint64_t step);
  void exclude_save(std::uint64_t step);
  void remember_generation();
  std::map<worker_id, std::string> holders_of(std::uint64_t step,
                                              const std::vector<int>& stages) const;
  bool is_final_whole();
  prepared trusted(const member& m) const;
  void learn(const distrust& told);
  void forget_after(std::uint64_t step_max, actions::save& batch);
  bool is_distrusted(worker_id id) const;
  std::string name_of(worker_id id) const;

  // A generation, from prepare to run.
  void start_preparing(const std::string& reason, std::uint64_t wait_step = 0);
  void ask(member& m);
  void consider_decision();
  void decide(const std::vector<member*>& answered);
  int silent_count() const;
  bool is_hopeful() const;  // a silent one is still worth the wait
  bool decide_fed(const std::vector<member*>& answered);
  bool is_one_unheard() const;
  bool is_held_back(std::uint64_t step);
  void commit_generation(const choice& c);
  void send_commit(const member& m);
  void consider_running();
  void consider_adoption();

  // What a deputy decided while this coordinator was away (job_adoption.cpp).
  bool is_running_on(const hello& h) const;
  void take_back(const hello& h);
  void on_claim(worker_id worker, const hello& h);
  void report_overdue(worker_id worker);
  void take_report(worker_id from, const hello& h, const plan_report& x);
  void adopt(worker_id from, const hello& h, const plan_report& x);
  void merge(worker_id from, const hello& h, const plan_report& x, const std::string& why);
  member& join(worker_id worker, const hello& h);

  // Orders and voluntary changes.
  void consider_change();
  void start_hold(const std::string& reason, std::set<order_kind> orders);
  void give_orders();
  void consider_hold();
  void resume_after_hold(const std::string& why);
  void let_go(member& m);
  bool is_of_ended_hold(std::uint64_t step) const;
  int grown_count(int more) const;
  void count_holders(job_view& v) const;

  // Among other jobs.
  bool is_leaving() const;
  bool is_leavers_state_elsewhere() const;
  bool start_yielding();         // true: a hold was ordered
  void consider_yielded_hold();  // all stand, for "suspend" or "shrink"
  void drop_yield();
  void count_waiting(std::int64_t passed_ms);
  // What a change needs, copied while the generation runs.
  bool is_prepared_for_change(const std::string& reason);
  std::vector<candidate> present_holdings(const std::vector<member*>& order) const;
  bool start_feed(const std::string& reason, std::set<worker_id> staff,
                  std::set<worker_id> leaving);
  void watch_feed();
  void stop_feed(const std::string& why);
  void fail_feed(const std::string& why);
  void note_switch(const step_report& first);

  // Slow and fast workers (job_balance.cpp).
  void start_balancing();
  void start_leaf_move(const leaf_change& change, const std::vector<replica_pace>& paces);
  void plan_layer_move(const layer_change& change);
  bool move_layers();
  times weigh_leaves(plan& p) const;
  std::optional<pace_table> paces_of(const std::vector<worker_id>& by_rank) const;
  bool sits_as_before(const std::vector<worker_id>& by_rank) const;
  result<layout> choose_shape(int count, const seating& seats_of) const;

  // Saves and the end.
  void saved(const part_saved& x, worker_id from);
  std::vector<part_saved> whole_save(const std::vector<part_saved>& parts) const;
  bool is_overtaken(std::uint64_t step) const;  // a newer step's manifest is being written
  void write_manifest(std::uint64_t step);
  void save_failed(std::uint64_t step, const std::string& why);
  void consider_end();

  // Small ones.
  void advance();
  void enter(phase p);
  void release(worker_id id, const std::string& reason, bool is_lost = false);
  void release_all(const std::string& reason);
  void end(job_state state, const std::string& reason);
  void leave_workers(job_state state, const std::string& reason);
  actions::row record_row() const;
  void save_record();
  void note(const std::string& kind, const std::string& text,
            std::map<std::string, std::string> fields = {}, const std::string& level = "info");
  void send(worker_id to, to_worker message);
  void reply(reply_id id, result<actions::reply_value> outcome);
  void agree(reply_id id, const std::string& text);
  void check_chain(std::uint64_t step, std::uint64_t chain, const std::string& who);
  bool is_current(std::uint64_t generation, std::uint64_t hash);
  bool is_committed() const;  // a committed generation loads, runs or holds
  bool is_committed_or_adopting() const { return is_committed() || phase_ == phase::adopting; }
  int workers_least() const;
  int workers_most() const;
  int staying_count() const;  // members that are neither draining nor given back
  int planned_count() const { return generation_ ? generation_->shape.shape.worker_count() : 0; }
  std::uint64_t number_of_plan() const { return generation_ ? generation_->shape.generation : 0; }
  std::optional<std::uint64_t> newest_saved() const;
  bool is_final_saved() const;
  std::vector<member*> planned();  // members of the newest plan that are here, by rank
  bool is_whole() const;           // all of them are here
  std::uint64_t stop_step() const { return static_cast<std::uint64_t>(record_.spec.stop_steps); }

  detection rules_;
  job_record record_;
  std::optional<generation_record> generation_;  // newest committed
  std::uint64_t plan_hash_ = 0;                  // its
  std::map<std::uint64_t, checkpoint_record> checkpoints_;
  std::uint64_t next_event_ = 1;
  std::uint64_t next_seq_ = 1;
  bool has_numbered_ = false;  // a manifest, since this machine began
  bool is_deputys_ = false;
  std::uint64_t next_order_ = 1;
  std::uint64_t next_request_ = 1;

  phase phase_ = phase::none;
  std::int64_t now_ms_ = 0, unix_ms_ = 0;
  bool has_ticked_ = false;
  std::int64_t phase_since_ms_ = 0;
  std::map<worker_id, member> members_;
  std::map<worker_id, std::string> refused_;  // failed at this job on their own account: why
  std::map<worker_id, hello> claimants_;      // no members; they hold a newer plan than ours

  // Being prepared.
  std::uint64_t number_ = 0;
  std::string reason_;
  bool is_after_loss_ = false;
  std::int64_t prepare_began_ms_ = 0;
  std::set<worker_id> sought_;              // of the former generation, silent, not known dead
  std::set<worker_id> sought_lost_;         // of these: a peer says that its link to it closed
  std::map<worker_id, inquiry> inquiries_;  // about members and sought ones
  std::int64_t short_since_ms_ = -1;        // too few workers since; -1: enough
  std::set<worker_id> missed_;  // of it and not here: asked again if they come back in time
  std::string waits_for_;
  std::uint64_t request_ = 0;                      // find_checkpoint under way
  bool has_looked_ = false;                        // and answered, for this number
  std::optional<std::uint64_t> saved_when_asked_;  // newest durable step then
  std::optional<checkpoint_facts> found_;
  std::uint64_t step_max_ = ~0ull;  // newer checkpoints did not load as their manifests say
  int fruitless_count_ = 0;         // generations in a row that made no step
  std::int64_t back_off_until_ms_ = 0;
  std::vector<std::int64_t> failure_ms_;

  // Committed.
  std::optional<commit> commit_;                   // to send again; none after a restart
  std::uint64_t reported_step_ = 0;                // newest that anyone reported
  std::map<std::uint64_t, std::uint64_t> chains_;  // of the newest steps
  std::uint64_t told_ = 0;  // all steps up to it were reported, as far as can be had
  std::map<std::uint64_t, std::uint64_t> logged_;  // newest steps in the log: by which generation
  std::map<std::uint64_t, pending_save> saves_;
  step_report newest_report_;
  std::deque<std::int64_t> step_us_;  // of this generation's newest steps
  std::optional<evaluated> newest_evaluation_;

  // Silent corruption.
  std::map<std::uint64_t, std::string> weights_hashes_;     // that all voted, of the newest steps
  std::map<std::uint64_t, generation_record> generations_;  // by number, the newest
  std::int64_t no_audit_before_ms_ = 0;
  bool is_patrol_over_ = false;  // found wrong after the job's end: a person's to decide
  std::string last_audit_problem_;
  // A feed, see job_feed.cpp.
  struct feeding {
    std::uint64_t request = 0;
    std::set<worker_id> staff, leaving;  // members, and who drains, when it began
    std::set<worker_id> participants, receivers, ready, fed;
    bool is_done = false;  // all that a change needs is where it must be
    std::int64_t since_ms = 0, ordered_ms = -1;
  };
  std::optional<feeding> feed_;
  std::uint64_t last_feed_ = 0;
  std::optional<step_report> before_switch_;  // last of the generation that a fed switch ended
  int failed_feeds_ = 0;                      // of this generation
  std::uint64_t wait_step_ = 0;               // of the prepare that ends a fed hold; 0: another one

  // Among other jobs.
  std::string suspended_for_;  // words: for whom; empty: it is not to be suspended
  std::string shrunk_for_;     // words: for whom members leave
  bool keeps_size_ = false;    // the generation being prepared is no larger on purpose
  std::int64_t owed_ms_ = 0;
  std::int64_t running_since_ms_ = -1;  // -1: it waits

  // Slow and fast workers.
  leaf_watch watch_;
  layer_watch layer_watch_;
  std::optional<layer_move> layer_move_;
  std::string balance_, layer_balance_;  // words: the newest moves, with their figures

  // A hold.
  std::int64_t change_since_ms_ = -1;  // a voluntary change is wanted since; -1: no
  std::int64_t no_change_before_ms_ = 0;
  std::string hold_reason_;
  std::map<order_kind, std::uint64_t> orders_;  // given in this hold, with their ids
  std::int64_t held_ms_ = -1;                   // all stand since
  std::int64_t part_held_ms_ = -1;              // some stand since, all are here
  std::optional<std::uint64_t> resumed_step_;   // newest step at which a hold of this plan ended
  bool has_save_failed_ = false;                // since they were given
  std::string last_save_problem_;

  std::int64_t finished_ms_ = -1;     // all finished since, or the last sign of the final save
  std::int64_t final_saved_ms_ = -1;  // the final manifest is durable since
  std::int64_t loss_ms_ = -1;         // when the loss was detected that is being recovered
  std::int64_t last_recovery_ms_ = 0;
  std::uint64_t redone_steps_ = 0, divergences_ = 0, stale_messages_ = 0;
  std::vector<action> out_;
};

}  // namespace stagecoach
