// What the coordinator keeps in its store: one row per record, JSON text under a prefix-scannable
// key.
//
// The records are the truth after a crash: the machines are rebuilt from them and from what the
// workers say. Keys are fixed-width hex, so that the store's order is the order of the numbers. A
// reader ignores fields it does not know and keeps defaults for those that are missing, so versions
// may mix.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "config/ids.hpp"
#include "config/job_spec.hpp"
#include "config/result.hpp"
#include "coordinator/messages.hpp"
#include "model/plan.hpp"

namespace stagecoach {

/// As shown to people; the store keeps pending, running, paused and the three ends only.
enum class job_state : int {
  pending = 0,  // waits for workers
  planning,     // first generation is being prepared or loaded
  running,
  recovering,  // a later generation is being prepared or loaded
  paused,
  checkpointing,  // last step done, final checkpoint not durable yet; or pausing
  completed,
  failed,
  cancelled,
};
inline constexpr int job_state_count = 9;
const char* to_string(job_state state);  // "PENDING"
inline bool is_end(job_state s) {
  return s == job_state::completed || s == job_state::failed || s == job_state::cancelled;
}

struct meta_record {
  std::uint64_t incarnation = 0;
  std::uint64_t next_worker = 1;
  std::uint64_t next_job = 1;
};

/// A worker process that was registered; kept so that it gets its id back when it attaches again.
struct worker_record {
  worker_id id{};
  std::string name;
  process_id process;
  std::string host;
  bool is_drained = false;
  std::string drain_reason;
};

struct job_record {
  job_id id{};
  job_spec spec;
  std::string spec_text;  // the file as submitted
  job_state state = job_state::pending;
  std::string reason;           // words: why it failed, paused, waits
  std::optional<int> priority;  // changed since the submission; none: the spec's
  bool is_pause_wanted = false;
  bool is_cancel_wanted = false;
  std::string device_class;      // of its first generation's rank 0; empty: none ran yet
  std::uint64_t generation = 0;  // newest number that was committed
  std::uint64_t number = 0;  // newest that was prepared: never used twice, not even after a crash
  std::uint64_t step = 0;    // newest known when the record was written
  distrust distrusted;
  std::uint64_t audited_step = 0;  // everything to here was computed again and is right
  int recovery_count = 0;
  std::int64_t submitted_unix_ms = 0;
  std::int64_t started_unix_ms = 0;
  std::int64_t ended_unix_ms = 0;
  std::int64_t waits_since_unix_ms = 0;  // 0: it has its workers
};

struct generation_record {
  plan shape;
  source_kind source = source_kind::initial;
  std::uint64_t step = 0;
  std::uint64_t chain = 0;
  std::string reason;  // "start", "worker_lost w-02", "grow", ...
  std::int64_t unix_ms = 0;
  std::vector<std::int64_t> leaf_us{}, layer_us{};  // as commit
};

struct checkpoint_record {
  job_id job{};
  std::uint64_t step = 0;
  std::uint64_t seq = 0;  // of saves of this job, only grows
  std::uint64_t chain = 0;
  exact_double loss;
  std::string weights_hash;  // of the whole model
  int part_count = 0;
  std::uint64_t bytes = 0;
  std::int64_t stall_us = 0;  // worst of the parts
  std::int64_t unix_ms = 0;
};

struct event_record {
  job_id job{};              // 0: of the cluster
  std::uint64_t number = 0;  // per job, from 1
  std::int64_t unix_ms = 0;
  std::string kind;            // "worker_lost"; also the log line's event name
  std::string level = "info";  // "debug" | "info" | "warn" | "error"
  std::string text;
  std::map<std::string, std::string> fields;
};

// ---- keys ----
namespace keys {
std::string meta();                                       // "meta/coordinator"
std::string worker(worker_id id);                         // "worker/<16 hex>"
std::string job(job_id id);                               // "job/<16 hex>/record"
std::string generation(job_id id, std::uint64_t number);  // "job/<16 hex>/generation/<16 hex>"
std::string checkpoint(job_id id, std::uint64_t step);    // "ckpt/<16 hex>/<16 hex step>"
std::string event(job_id id, std::uint64_t number);       // "event/<16 hex>/<16 hex>"
std::string events_prefix(job_id id);                     // "event/<16 hex>/"
}  // namespace keys

// ---- restoring ----
inline constexpr std::size_t generation_count_max = 256;  // kept of a job in memory

struct restored_job {
  job_record record;
  std::optional<generation_record> generation;             // the newest
  std::map<std::uint64_t, checkpoint_record> checkpoints;  // by step
  std::uint64_t next_event = 1;
  std::map<std::uint64_t, generation_record> generations{};  // by number, the newest of all
  bool is_deputys = false;  // in the hands of a deputy: its manifests get other numbers
};

struct restored_records {
  meta_record meta;
  std::map<worker_id, worker_record> workers;
  std::map<job_id, restored_job> jobs;
  std::uint64_t next_cluster_event = 1;
  std::vector<std::string> problems;  // rows that could not be read, in words
};

using store_row = std::pair<std::string, std::string>;

/// From rows in any order; unknown keys are ignored, unreadable rows are named in `problems` and
/// skipped.
restored_records restore_records(const std::vector<store_row>& rows);

// ---- field lists ----
#define STAGECOACH_FIELDS(type, ...)                  \
  template <class V, class M>                         \
  requires std::same_as<std::remove_const_t<M>, type> \
  void visit_fields(V&& v, M& m) { __VA_ARGS__; }

STAGECOACH_FIELDS(meta_record, v("incarnation", m.incarnation), v("next_worker", m.next_worker),
                  v("next_job", m.next_job))
STAGECOACH_FIELDS(worker_record, v("id", m.id), v("name", m.name), v("process", m.process),
                  v("host", m.host), v("is_drained", m.is_drained),
                  v("drain_reason", m.drain_reason))
STAGECOACH_FIELDS(job_record, v("id", m.id), v("spec", m.spec), v("spec_text", m.spec_text),
                  v("state", m.state), v("reason", m.reason),
                  v("is_pause_wanted", m.is_pause_wanted),
                  v("is_cancel_wanted", m.is_cancel_wanted), v("device_class", m.device_class),
                  v("generation", m.generation), v("number", m.number), v("step", m.step),
                  v("distrusted", m.distrusted), v("audited_step", m.audited_step),
                  v("recovery_count", m.recovery_count),
                  v("submitted_unix_ms", m.submitted_unix_ms),
                  v("started_unix_ms", m.started_unix_ms), v("ended_unix_ms", m.ended_unix_ms),
                  v("priority", m.priority), v("waits_since_unix_ms", m.waits_since_unix_ms))
STAGECOACH_FIELDS(generation_record, v("plan", m.shape), v("source", m.source), v("step", m.step),
                  v("chain", m.chain), v("reason", m.reason), v("unix_ms", m.unix_ms),
                  v("leaf_us", m.leaf_us), v("layer_us", m.layer_us))
STAGECOACH_FIELDS(checkpoint_record, v("job", m.job), v("step", m.step), v("seq", m.seq),
                  v("chain", m.chain), v("loss", m.loss), v("weights_hash", m.weights_hash),
                  v("part_count", m.part_count), v("bytes", m.bytes), v("stall_us", m.stall_us),
                  v("unix_ms", m.unix_ms))
STAGECOACH_FIELDS(event_record, v("job", m.job), v("number", m.number), v("unix_ms", m.unix_ms),
                  v("kind", m.kind), v("level", m.level), v("text", m.text), v("fields", m.fields))

#undef STAGECOACH_FIELDS

}  // namespace stagecoach
