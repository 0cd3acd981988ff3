// The coordinator's mind: workers, the queue, gang placement, and the machines of all jobs.
//
// Pure: the shell (coordinator_actor) brings events and carries out actions in order; what follows
// a synced `save` waits for its acknowledgement, while later events may go on being delivered
// (their actions queue behind). Time comes as ticks (about every 100 ms; one more before any event
// makes its time exact). A request to store something (submit, drain, pause, ...) is answered after
// it is durable.
//
// Queue (cluster_compete.cpp): by rank, then age. Rank is priority, and a level more for each
// fairness::age_step that the job is owed: what it has waited, less what it has run since. A job
// starts with all of its minimum or not at all. One that does not fit takes from jobs below it, and
// only if it fits then: first their workers beyond their minimum, then all of theirs. These are its
// own until it starts; only a job of a higher priority may have them. What it can't have yet is
// kept for it; until it can, only jobs that would give the workers back start on them. A running
// job grows only when nobody waits for the workers.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "coordinator/job_machine.hpp"
#include "coordinator/messages.hpp"
#include "coordinator/records.hpp"

namespace stagecoach {

// ---- events ----
namespace events {
struct worker_attached {
  connection_id connection{};
  hello greeting;
};  // the first message of a connection
struct worker_detached {
  connection_id connection{};
  std::string why;
};
struct worker_said {
  connection_id connection{};
  to_coordinator message;
};  // a later hello counts as an attach
struct tick {
  std::int64_t now_ms = 0;
  std::int64_t unix_ms = 0;
};  // monotonic; wall clock
/// This process stood still for so long: before whatever else it then hears, and before the tick.
struct woke {
  std::int64_t slept_ms = 0;
};
struct submit_job {
  job_spec spec;
  std::string spec_text;
  reply_id reply{};
};
struct cancel_job {
  job_id job{};
  bool now = false;
  reply_id reply{};
};
struct pause_job {
  job_id job{};
  reply_id reply{};
};
struct resume_job {
  job_id job{};
  reply_id reply{};
};
struct save_now {
  job_id job{};
  reply_id reply{};
};
struct drain_worker {
  std::string name;
  std::string reason;
  reply_id reply{};
};  // name or "w-<id>"
struct undrain_worker {
  std::string name;
  reply_id reply{};
};
struct set_priority {
  job_id job{};
  int priority = 0;
  reply_id reply{};
};
struct audit_gathered {
  worker_id worker{};
  audit message;
  std::string problem;  // not empty: it can't be done
};
}  // namespace events

/// How jobs share workers, and the replicas of a job its leaves. Milliseconds.
struct fairness {
  // A job that was just placed has paid for its start: loading, and a checkpoint if it is taken out
  // again. Half a minute makes that a small part of what it runs.
  std::int64_t runtime_min = 30'000;
  // Slow enough that priorities mean something, fast enough that a person sees it happen.
  std::int64_t age_step = 600'000;
  balance_rules leaves;
};

using event =
    std::variant<events::worker_attached, events::worker_detached, events::worker_said,
                 events::tick, events::woke, events::submit_job, events::cancel_job,
                 events::pause_job, events::resume_job, events::save_now, events::drain_worker,
                 events::undrain_worker, events::set_priority, events::audit_gathered,
                 checkpoint_found, manifest_written, checkpoints_retired>;

// ---- views ----
struct worker_view {
  worker_id id{};
  std::string name, host, state;  // JOINING IDLE BUSY DRAINING DRAINED LOST
  job_id job{};
  std::string device, device_class;
  int threads = 0;
  std::uint64_t memory_bytes = 0;
  std::map<std::string, std::string> labels;
  std::string link_host;
  std::uint16_t link_port = 0;
  std::uint64_t step = 0;
  std::int64_t heard_ms_ago = 0;
  std::int64_t attached_unix_ms = 0;
  std::string version, reason;
};

class cluster_machine {
 public:
  /// From so long a sleep on the shell says woke.
  static constexpr std::int64_t sleep_ms_min = 500;

  /// incarnation becomes restored + 1; start() gives the actions that make it durable, to be
  /// carried out before anything else.
  /// checkpoint_root: a job without checkpoint.store gets checkpoint_root/<job id>.
  explicit cluster_machine(restored_records restored, std::string checkpoint_root = {},
                           detection rules = {}, fairness shares = {});
  [[nodiscard]] std::vector<action> start();
  [[nodiscard]] std::vector<action> step(const event& e);

  std::uint64_t incarnation() const { return meta_.incarnation; }
  const std::map<job_id, job_machine>& jobs() const { return jobs_; }
  std::vector<job_view> job_views() const;
  std::optional<job_view> job(job_id id) const;
  /// By id text ("j-000012", "12") or by name (the newest of that name).
  std::optional<job_id> find_job(const std::string& text) const;
  std::vector<worker_view> workers() const;
  /// 0: it is away.
  connection_id connection_of(worker_id id) const {
    const auto found = workers_.find(id);
    return found == workers_.end() ? connection_id{} : found->second.connection;
  }
  /// 0: no worker greeted on this connection.
  worker_id worker_on(connection_id connection) const;
  /// Why is it pending, slow, restarting: words with numbers; empty if there is no such job.
  std::string why(job_id id) const;
  /// Messages dropped since they came from no registered connection or of a stale generation.
  std::uint64_t dropped_messages() const { return dropped_messages_; }

 private:
  struct patrol_window {
    job_id job{};
    std::uint64_t number = 0, from = 0, to = 0;
  };
  struct worker {
    worker_record record;
    connection_id connection{};  // 0: none
    hello greeting;
    std::int64_t heard_ms = 0;
    std::int64_t detached_ms = 0;
    std::int64_t attached_unix_ms = 0;
    std::uint64_t step = 0;
    job_id job{};          // who has it
    bool is_lost = false;  // a job gave it up; free again when it is heard
    std::int64_t avoid_until_ms = 0;
    bool is_stuck = false;  // told to stop, and its trainer's thread has not come back
    std::int64_t told_to_stop_ms = -1;
    std::optional<patrol_window> audit;  // it computes this again, while it is free
    std::string reason;
  };

  void on(const events::worker_attached& e);
  void on(const events::worker_detached& e);
  void on(const events::worker_said& e);
  void on(const events::tick& e);
  void on(const events::woke& e);
  void on(const events::submit_job& e);
  void on(const events::cancel_job& e);
  void on(const events::pause_job& e);
  void on(const events::resume_job& e);
  void on(const events::save_now& e);
  void on(const events::drain_worker& e);
  void on(const events::undrain_worker& e);
  void on(const events::set_priority& e);
  void on(const checkpoint_found& e);
  void on(const manifest_written& e);
  void on(const checkpoints_retired& e);

  // Placement (cluster_compete.cpp).
  enum class hold_kind {
    for_start,  // on its way, or soon to be taken: nobody else starts here
    for_later,  // who starts here gives it back when it is wanted
  };
  struct claim {
    job_id by{};
    int priority = 0;
    hold_kind kind = hold_kind::for_later;
  };
  struct pool {  // of one device class
    std::vector<worker_id> free, coming;
  };
  struct victim {
    job_id job{};
    int count = 0;              // workers that are of use
    bool is_suspended = false;  // else shrunk by count
    std::vector<worker_id> workers;
  };
  void place();
  void start_or_claim(job_id id);
  void start_waiting_jobs();
  void replace_lost(job_id id);
  void grow(job_id id);
  void give(job_id id, const std::vector<worker_id>& workers);
  void claim_for(job_id id, const std::vector<worker_id>& workers, hold_kind kind);
  void promise(job_id id, std::vector<worker_id> there, const std::vector<victim>& victims);
  void review_promises();
  bool is_promised_against(worker_id w, job_id id) const;
  bool is_claimed_against(worker_id w, const job_machine& job) const;
  std::map<std::string, pool> pools(const job_machine& job) const;
  std::vector<worker_id> largest_pool(const job_machine& job) const;
  std::vector<victim> jobs_below(job_id id, const std::string& device_class, bool only_ready) const;
  std::vector<victim> choose_victims(job_id id, const std::string& device_class, int missing,
                                     bool only_ready) const;
  void preempt(job_id id, const std::vector<worker_id>& there, const std::vector<victim>& victims);
  int reachable(const job_machine& job, const std::string& device_class) const;
  std::vector<job_id> queue() const;
  std::int64_t rank(const job_machine& job) const;
  std::string described(const job_machine& job) const;
  void attach(connection_id connection, const hello& greeting);
  void refuse(connection_id connection, const std::string& why, bool is_final);
  bool readmit(worker& w, const beat& b);
  void stop_stale(worker& w, std::uint64_t job, const std::string& why);
  void tell(job_id job, const job_event& e);
  void take(std::vector<action> from);
  void ask_job(job_id job, reply_id reply_to, const job_event& e);
  void send(const worker& w, to_worker message);
  void join(worker& w);
  void on(const events::audit_gathered& e);
  void consider_patrol();
  void end_patrol(worker& w);
  void take_audited(worker& w, const audited& x);
  void distrust(worker& w, const std::string& why);
  void forget(worker_id id, const std::string& why);
  bool is_free(const worker& w) const;
  /// Words why not, empty if it suits.
  std::string unsuited(const worker& w, const job_machine& job) const;
  void fill_queue_view(job_view& v) const;
  worker* by_connection(connection_id connection);
  worker* by_name(const std::string& name);
  worker_facts facts_of(const worker& w) const;
  actions::row meta_row() const;
  void note(const std::string& kind, const std::string& text,
            std::map<std::string, std::string> fields = {}, const std::string& level = "info");
  void reply(reply_id id, result<actions::reply_value> outcome);

  detection rules_;
  fairness shares_;
  // As of the newest placement; who waits for what.
  std::map<worker_id, claim> claims_;
  // For whom workers were taken from others, or are kept with those: theirs until it starts.
  std::map<worker_id, job_id> promised_;
  std::map<job_id, std::vector<worker_id>> starts_;  // being put together in this placement
  std::map<job_id, std::string> waits_;
  std::map<job_id, int> positions_;
  std::string checkpoint_root_;
  meta_record meta_;
  std::map<worker_id, worker> workers_;
  std::map<job_id, job_machine> jobs_;
  std::uint64_t next_event_ = 1;
  std::uint64_t next_audit_ = 1;
  std::int64_t now_ms_ = 0, unix_ms_ = 0;
  std::int64_t clock_ms_ = 0;  // of the shell's newest tick
  bool has_ticked_ = false, is_place_due_ = true;
  std::uint64_t dropped_messages_ = 0;
  std::vector<std::string> problems_;
  std::vector<action> out_;
};

/// "j-000012"
std::string to_string(job_id id);
/// "w-000003"; for workers that gave no name.
std::string to_string(worker_id id);

// ---- field lists ----
#define STAGECOACH_FIELDS(type, ...)                  \
  template <class V, class M>                         \
  requires std::same_as<std::remove_const_t<M>, type> \
  void visit_fields(V&& v, M& m) { __VA_ARGS__; }
STAGECOACH_FIELDS(member_view, v("worker", m.worker), v("name", m.name), v("host", m.host),
                  v("stage", m.stage), v("replica", m.replica), v("state", m.state),
                  v("step", m.step))
STAGECOACH_FIELDS(job_view, v("id", m.id), v("name", m.name), v("state", m.state),
                  v("reason", m.reason), v("priority", m.priority), v("queue", m.queue),
                  v("step", m.step), v("stop_steps", m.stop_steps), v("generation", m.generation),
                  v("plan_hash", m.plan_hash), v("phase", m.phase), v("stages", m.stages),
                  v("replicas", m.replicas), v("schedule", m.schedule), v("unit_cuts", m.unit_cuts),
                  v("leaf_cuts", m.leaf_cuts), v("workers", m.workers),
                  v("workers_min", m.workers_min), v("workers_max", m.workers_max),
                  v("loss", m.loss), v("step_us", m.step_us), v("evaluated_step", m.evaluated_step),
                  v("evaluated_loss", m.evaluated_loss), v("has_saved", m.has_saved),
                  v("saved_step", m.saved_step), v("saved_hash", m.saved_hash),
                  v("saved_unix_ms", m.saved_unix_ms), v("recovery_count", m.recovery_count),
                  v("redone_steps", m.redone_steps), v("divergences", m.divergences),
                  v("stale_messages", m.stale_messages), v("losses_survived", m.losses_survived),
                  v("weakest", m.weakest), v("last_recovery_ms", m.last_recovery_ms),
                  v("submitted_unix_ms", m.submitted_unix_ms),
                  v("started_unix_ms", m.started_unix_ms), v("ended_unix_ms", m.ended_unix_ms),
                  v("members", m.members))
STAGECOACH_FIELDS(worker_view, v("id", m.id), v("name", m.name), v("host", m.host),
                  v("state", m.state), v("job", m.job), v("device", m.device),
                  v("device_class", m.device_class), v("threads", m.threads),
                  v("memory_bytes", m.memory_bytes), v("labels", m.labels),
                  v("link_host", m.link_host), v("link_port", m.link_port), v("step", m.step),
                  v("heard_ms_ago", m.heard_ms_ago), v("attached_unix_ms", m.attached_unix_ms),
                  v("version", m.version), v("reason", m.reason))
#undef STAGECOACH_FIELDS

}  // namespace stagecoach
