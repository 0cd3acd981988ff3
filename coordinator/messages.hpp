// Control messages between the coordinator and its workers: plain structs, one field list each.
//
// The same field lists serve the wire (coordinator/wire.hpp: JSON text), the API and the records in
// the store. Unknown fields are ignored on reading, missing ones keep their default, so that
// versions may mix; `protocol` in the greeting says which rules hold. Small messages only: tensors
// go over links. Numbers that carry exact bits (losses, scalars of a vote) are written as their bit
// pattern.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "config/ids.hpp"
#include "config/job_spec.hpp"
#include "model/plan.hpp"
#include "model/schedule.hpp"

namespace stagecoach {

inline constexpr int protocol_version = 1;

/// A double that travels as its bits: NaN and every last digit survive JSON.
struct exact_double {
  std::uint64_t bits = 0;
  static exact_double of(double x) { return {std::bit_cast<std::uint64_t>(x)}; }
  double get() const { return std::bit_cast<double>(bits); }
  bool operator==(const exact_double&) const = default;
};

// ---- what a step's vote decided: enough to apply the step, so it is kept and shown in `prepared`
// --------
struct vote_result {
  std::uint64_t step = 0;
  bool finite = true;  // false: the update is skipped, by all
  exact_double loss;   // mean over the step's tokens
  exact_double norm;   // global gradient norm before clipping
  exact_double lr;
  exact_double bias1, bias2;  // 1 - beta^t
  exact_double grad_scale;
  std::uint64_t orders = 0;              // order bits that act after this step, see order_kind
  std::vector<std::uint64_t> order_ids;  // the coordinator's ids among them
  std::uint64_t chain = 0;               // H(previous chain, step, loss, norm)
  std::string weights_hash;  // of the whole model at step - 1, every few steps; else empty
  bool operator==(const vote_result&) const = default;
};

enum class order_kind : int {
  save = 0,  // checkpoint after this step
  evaluate = 1,
  hold = 2,  // stop after this step, keep everything, wait for resume or prepare
  stop = 3,  // as hold; the job ends here
  feed = 4,  // from this step's end on state is copied in the background, see `feed`
};
inline constexpr std::uint64_t order_bit(order_kind kind) { return 1ull << static_cast<int>(kind); }

/// Where a generation's state comes from.
enum class source_kind : int {
  initial = 0,     // step 0 from the job's init
  live = 1,        // survivors' state at `step`
  checkpoint = 2,  // parts of the checkpoint of `step`
};

/// One file of a checkpoint and the tensors in it.
struct part_record {
  std::string file;    // name inside folder
  std::string folder;  // absolute
  std::uint64_t bytes = 0;
  std::string root_hash;
  std::vector<std::string>
      tensors;               // parameter names; moments lie beside them as opt.m.NAME, opt.v.NAME
  std::string host;          // who wrote it
  std::string weights_hash;  // tensor_hash of this part's parameters
  std::string state_hash;    // with moments
  bool operator==(const part_record&) const = default;
};

/// A tensor that a member needs and another member has (ranks of the new plan).
struct transfer_record {
  std::string tensor;
  int from_rank = 0;
  int to_rank = 0;
  bool is_parameter_only{};  // sharded optimizer: the moments stay with their owner
  bool operator==(const transfer_record&) const = default;
};

struct step_report {
  std::uint64_t step = 0;
  exact_double loss, norm, lr;
  bool skipped = false;
  std::uint64_t chain = 0;
  std::string weights_hash;  // of the whole model at step - 1; empty where the vote has none
  std::vector<std::string> stage_hashes;  // of each stage's part of it, if there are several
  std::int64_t step_us = 0;               // wall time since the previous step's end
  std::int64_t unix_ms = 0;
  bool operator==(const step_report&) const = default;
};

/// Whose weights differ from a replica's; `weights_hash` of the whole model if this one is right.
struct weights_suspect {
  std::uint64_t worker = 0;
  std::string weights_hash;
  bool operator==(const weights_suspect&) const = default;
};

/// What silent corruption has spoilt. Whoever may have to decide must know it: the job's record
/// keeps it, each prepare and commit brings it, and members greet with it.
struct distrust {
  // What generations below `fence` computed after `step` may be wrong; 0: nothing is.
  std::uint64_t fence = 0, step = 0;
  std::vector<std::uint64_t> bad_saves;  // checkpoints (their seq) that hold corrupt weights
  std::vector<std::uint64_t> workers;    // what these hold is wrong, until they are given again
  // One of these had the right weights after disputed_step: it is done again, and tells which.
  std::uint64_t disputed_step = 0;
  std::vector<weights_suspect> suspects;  // empty: nothing is disputed
  bool operator==(const distrust&) const = default;
};

// ---- worker to coordinator
// --------------------------------------------------------------------------
struct hello {
  int protocol = protocol_version;
  std::string name;
  process_id process;
  std::string host;
  std::string link_host;
  std::uint16_t link_port = 0;
  std::string device;        // "cpu"
  std::string device_class;  // hash of the probe
  int threads = 1;
  std::uint64_t memory_bytes = 0;
  std::map<std::string, std::string> labels;
  // What it is doing, so that a coordinator that was away can adopt it:
  std::uint64_t job = 0;  // 0: nothing
  std::uint64_t generation = 0;
  std::uint64_t plan_hash = 0;
  int phase = 0;               // worker_phase
  std::uint64_t step = 0;      // newest applied
  std::uint64_t promised = 0;  // newest prepare it answered: takes nothing of smaller numbers
  std::string version;
  std::string promised_to{};  // process of the deputy that asked; empty: the coordinator
  distrust distrusted{};      // newest that it was told of its job
};
enum class worker_phase : int { idle = 0, prepared, loading, ready, running, held, finished };

/// What the trainer's thread is at; how long it may stand still depends on it.
enum class trainer_activity : int { idle = 0, compute, wait, load, save, evaluate };

struct beat {
  std::uint64_t job = 0, generation = 0, step = 0;
  int phase = 0;
  std::uint64_t op = 0;  // instructions done since the process started; stands still if stuck
  int activity = 0;      // trainer_activity
  std::uint64_t waits_for = 0;  // worker_id whose frame the trainer waits for; 0: none
  std::int64_t stands_ms = 0;   // since op and activity changed last, by the worker's own time
  std::int64_t leaf_us = 0;     // compute time of one leaf on its stage, lately; 0: not known
  std::int64_t layer_us = 0;    // of it, that of one layer; 0: not known, or it has none
};

/// What a survivor (or an empty worker) answers to prepare.
struct prepared {
  std::uint64_t job = 0, number = 0;
  bool has_state = false;
  std::uint64_t step = 0;                // newest applied step of its state
  std::uint64_t chain = 0;               // vote chain at that step
  std::vector<std::string> tensors;      // whose parameters and moments it holds
  std::optional<vote_result> last_vote;  // the vote that led to `step`
  bool has_pending = false;              // holds the reduced gradient of step + 1
  std::uint64_t loaded_in = 0;           // generation in which its state was last put together
};

struct ready {
  std::uint64_t job = 0, generation = 0, plan_hash = 0, step = 0;
  std::string weights_hash;  // of the part of the weights that this stage counts
};

struct failed {  // can't do its part: wrong data file, out of memory, ...
  std::uint64_t job = 0, generation = 0;
  std::string code, message;                // errc name; names path and host
  bool is_fatal = false;                    // true: no other worker would do better, fail the job
  std::vector<weights_suspect> suspects{};  // corrupt in a vote: who holds other bits
  bool is_certain = false;                  // they are in the minority; else one of them is right
  std::uint64_t step = 0;                   // the state that is disputed
};

struct progress {  // from rank 0; queued while the coordinator is away
  std::uint64_t job = 0, generation = 0, plan_hash = 0;
  std::vector<step_report> steps;
};

struct evaluated {
  std::uint64_t job = 0, generation = 0, step = 0;
  exact_double loss;
};

struct part_saved {
  std::uint64_t job = 0, generation = 0, plan_hash = 0;
  std::uint64_t step = 0;
  part_record part;
  int part_count = 1;  // parts that make this checkpoint whole
  exact_double loss;
  std::uint64_t chain = 0;
  std::int64_t stall_us = 0, write_us = 0;
  std::string problem;    // not empty: this part could not be written (disk full, ...)
  bool is_final = false;  // after the job's last step
  std::uint64_t seq = 0;  // of the manifest that a deputy wrote with it; 0: none
};

struct held {  // every member, after a hold or stop order acted
  std::uint64_t job = 0, generation = 0, step = 0;
};

struct finished {  // every member, after the last step; state kept until stop_stage
  std::uint64_t job = 0, generation = 0, step = 0;
  std::string weights_hash{};  // of the part of the weights that this stage counts, as in ready
};

struct peer_report {
  std::uint64_t job = 0, generation = 0;
  std::uint64_t peer = 0;  // worker_id
  std::string what;        // "lost" | "suspected" | "recovered"
  std::string why;
};

struct log_line {  // shown by `stagecoach logs`
  std::uint64_t job = 0;
  std::int64_t unix_ms = 0;
  std::string level, text;
};

/// After each welcome: the generation it is in, where a deputy and not the coordinator decided it.
struct plan_report {
  std::uint64_t job = 0;
  plan shape;
  source_kind source = source_kind::initial;
  std::uint64_t step = 0, chain = 0;
  std::string reason;
  std::string decided_by;  // the deputy's name
  std::int64_t unix_ms = 0;
  distrust distrusted{};  // as the deputy knew it
};

struct feed_ready {  // the links of a feed stand
  std::uint64_t job = 0, generation = 0, request = 0;
};
struct fed {  // all that the feed brings is here and keeps up; step: where it stands
  std::uint64_t job = 0, generation = 0, request = 0, step = 0;
  std::string problem{};  // not empty: it can't go on, and why
  bool is_own = false;    // the problem is this worker's own (a data file, ...), no link's
};

struct probed {  // answers probe
  std::uint64_t job = 0, generation = 0;
  std::uint64_t peer = 0;  // worker_id
  std::string verdict;  // "alive" | "gone" (its port refuses, or another process has it) | "silent"
  std::string why;
};

struct audited {  // answers audit
  std::uint64_t job = 0, audit = 0;
  bool is_identical = false;
  bool is_done = true;               // false: could not be carried out, see text
  std::uint64_t step = 0;            // first that differs, or the last that was compared
  std::vector<std::string> tensors;  // that differ, where that could be told
  std::string text;
  std::string what;         // differs: "weights", "loss", "checkpoint" (the run was right)
  std::vector<int> stages;  // of the run, that held the weights that differ
};

/// What one rank did in one step, for `stagecoach trace`. Flat, four numbers an instruction, since
/// a step may have thousands: traced_op, microbatch, begin and end in ns after began_ns.
struct traced {
  std::uint64_t job = 0, generation = 0, request = 0, step = 0;
  std::int64_t began_ns = 0;  // this host's steady clock
  std::vector<std::int64_t> spans;
  bool is_cut = false;  // there were more than traced_spans_max
};
inline constexpr std::size_t traced_spans_max = 20'000;
/// op of model/schedule.hpp, and behind them what follows the table.
inline constexpr int traced_op_apply = static_cast<int>(op::step) + 1;
struct clock_answer {
  std::uint64_t number = 0;
  std::int64_t asked_ns = 0, worker_ns = 0;
};

struct goodbye {  // orderly end of a worker process
  std::string reason;
};

// ---- coordinator to worker
// --------------------------------------------------------------------------
struct welcome {
  std::uint64_t worker = 0;
  std::uint64_t incarnation = 0;
  std::int64_t beat_ms = 1000;
};

struct refused {
  std::string reason;
  bool is_final = false;  // true: do not try again
};

struct prepare {
  std::uint64_t job = 0, number = 0;
  std::string decider{};        // process of the deputy that asks; empty: the coordinator
  std::uint64_t wait_step = 0;  // a fed worker answers when its copy stands there; 0: at once
  distrust distrusted{};
};

struct commit {
  plan shape;  // with members; generation = the prepared number
  job_spec spec;
  source_kind source = source_kind::initial;
  std::uint64_t step = 0;  // state to start from; the first step run is step + 1
  std::uint64_t chain = 0;
  std::vector<transfer_record> transfers;   // source live
  std::optional<vote_result> roll_forward;  // for members that stand at step - 1 with has_pending
  std::vector<part_record> parts;           // source checkpoint
  std::string expected_weights_hash;        // source checkpoint: of the whole model
  bool save_at_start = false;               // step 0, or a restart at a step without a checkpoint
  std::string checkpoint_folder;
  // This rank tells the steps up to `step` that it remembers, beginning after retell_after: the
  // coordinator lacks some, for who had done them died before it told. -1: nobody.
  int retell_rank = -1;
  std::uint64_t retell_after = 0;
  std::string decided_by{}, reason{};  // a deputy's name and why; empty: the coordinator decided
  std::int64_t unix_ms = 0;            // when, in that case
  distrust distrusted{};
  // By rank, as measured when leaves or layers last moved, so that a deputy shares them out as the
  // coordinator would; empty: even shares.
  std::vector<std::int64_t> leaf_us{}, layer_us{};
};

struct run_stage {
  std::uint64_t job = 0, generation = 0;
};

struct give_order {  // to rank 0; acts after the step in whose vote it rides
  std::uint64_t job = 0, generation = 0, order = 0;  // order: id, for events
  int kind = 0;                                      // order_kind
  std::uint64_t with = 0;  // bits of others that ride in the same vote: a save and its hold
};

struct resume_stage {  // ends a hold without a new plan; to every member
  std::uint64_t job = 0, generation = 0;
};

struct checkpoint_durable {  // frees the worker's copy; the newest durable step
  std::uint64_t job = 0, step = 0;
  std::uint64_t seq = 0, chain = 0;  // of its manifest; a deputy goes on from there
};

/// Copy state in the background while the generation runs. Every participant opens links of this
/// feed and says feed_ready. From the step on in whose vote order_kind::feed rides with this
/// request as its id, the sender of a transfer gives the tensor's state once, and after every later
/// step the reduced gradient and the vote, with which the receiver replays the optimizer.
struct feed {
  std::uint64_t job = 0, generation = 0, plan_hash = 0, request = 0;
  job_spec spec;
  std::vector<plan_member> participants;   // who gives or gets; members by rank, then joiners
  std::vector<transfer_record> transfers;  // from_rank, to_rank: indices into participants
  std::uint64_t step_bytes_max = 0;        // state that one sender gives per step, about
};
struct stop_feed {
  std::uint64_t job = 0, request = 0;
};

struct probe {  // ask this worker's port whether it is there; answered by probed
  std::uint64_t job = 0, generation = 0;
  plan_member peer;
};

/// The layout of a run from a step on.
struct layout_span {
  std::uint64_t first_step = 0;
  layout shape;
};

/// Compute steps again from a checkpoint and compare with the log; by a worker that has no job.
struct audit {
  std::uint64_t job = 0, audit = 0;
  job_spec spec;
  std::uint64_t step = 0, chain = 0;  // of the checkpoint
  std::vector<part_record> parts;     // none: the job's initial state (step 0)
  std::uint64_t last = 0;             // newest step to compute
  std::vector<step_report> log;       // steps step + 1 .. last + 1 of the run
  std::vector<part_record> after;     // of the checkpoint at the last step, if there is one
  std::vector<layout_span> layouts;   // of the run, rising
};
struct stop_audit {
  std::uint64_t audit = 0;
};

/// Say what is done in the steps first .. last (traced), if they are still to come.
struct trace_steps {
  std::uint64_t job = 0, request = 0, first = 0, last = 0;
};
struct clock_question {  // answered at once, by clock_answer: how far apart the clocks are
  std::uint64_t number = 0;
  std::int64_t asked_ns = 0;  // the coordinator's steady clock
};

struct stop_stage {  // forget the job
  std::uint64_t job = 0;
  std::string reason;
};

using to_coordinator =
    std::variant<hello, beat, prepared, ready, failed, progress, evaluated, part_saved, held,
                 finished, peer_report, log_line, goodbye, plan_report, feed_ready, fed, probed,
                 audited, traced, clock_answer>;
using to_worker = std::variant<welcome, refused, prepare, commit, run_stage, give_order,
                               resume_stage, checkpoint_durable, stop_stage, feed, stop_feed, probe,
                               audit, stop_audit, trace_steps, clock_question>;

// ---- field lists
// ------------------------------------------------------------------------------------
// visit_fields(v, m) calls v("name", m.member) for each field. v is a template: reader, writer,
// printer.
#define STAGECOACH_FIELDS(type, ...)                  \
  template <class V, class M>                         \
  requires std::same_as<std::remove_const_t<M>, type> \
  void visit_fields(V&& v, M& m) { __VA_ARGS__; }

STAGECOACH_FIELDS(vote_result, v("step", m.step), v("finite", m.finite), v("loss", m.loss),
                  v("norm", m.norm), v("lr", m.lr), v("bias1", m.bias1), v("bias2", m.bias2),
                  v("grad_scale", m.grad_scale), v("orders", m.orders), v("order_ids", m.order_ids),
                  v("chain", m.chain), v("weights_hash", m.weights_hash))
STAGECOACH_FIELDS(part_record, v("file", m.file), v("folder", m.folder), v("bytes", m.bytes),
                  v("root_hash", m.root_hash), v("tensors", m.tensors), v("host", m.host),
                  v("weights_hash", m.weights_hash), v("state_hash", m.state_hash))
STAGECOACH_FIELDS(transfer_record, v("tensor", m.tensor), v("from_rank", m.from_rank),
                  v("to_rank", m.to_rank), v("parameter_only", m.is_parameter_only))
STAGECOACH_FIELDS(step_report, v("step", m.step), v("loss", m.loss), v("norm", m.norm),
                  v("lr", m.lr), v("skipped", m.skipped), v("chain", m.chain),
                  v("weights_hash", m.weights_hash), v("stage_hashes", m.stage_hashes),
                  v("step_us", m.step_us), v("unix_ms", m.unix_ms))
STAGECOACH_FIELDS(plan_member, v("worker", m.worker), v("process", m.process), v("name", m.name),
                  v("link_host", m.link_host), v("link_port", m.link_port))
STAGECOACH_FIELDS(layout, v("stages", m.stage_count), v("replicas", m.replica_count),
                  v("schedule", m.schedule), v("unit_cuts", m.unit_cuts),
                  v("leaf_cuts", m.leaf_cuts))
STAGECOACH_FIELDS(plan, v("job", m.job), v("generation", m.generation), v("layout", m.shape),
                  v("members", m.members))

STAGECOACH_FIELDS(model_spec, v("preset", m.preset), v("n_layer", m.n_layer),
                  v("d_model", m.d_model), v("n_head", m.n_head), v("d_ff", m.d_ff),
                  v("vocab_size", m.vocab_size), v("context", m.context), v("init", m.init),
                  v("init_seed", m.init_seed), v("init_std", m.init_std))
STAGECOACH_FIELDS(data_file, v("path", m.path), v("format", m.format), v("bytes", m.bytes),
                  v("hash", m.hash))
STAGECOACH_FIELDS(data_spec, v("tokenizer", m.tokenizer), v("tokenizer_path", m.tokenizer_path),
                  v("tokenizer_hash", m.tokenizer_hash), v("train", m.train), v("valid", m.valid),
                  v("valid_fraction", m.valid_fraction), v("shuffle_seed", m.shuffle_seed))
STAGECOACH_FIELDS(batch_spec, v("global_sequences", m.global_sequences),
                  v("micro_sequences", m.micro_sequences), v("sequence_tokens", m.sequence_tokens),
                  v("leaf_count", m.leaf_count))
STAGECOACH_FIELDS(optimizer_spec, v("lr", m.lr), v("beta1", m.beta1), v("beta2", m.beta2),
                  v("eps", m.eps), v("weight_decay", m.weight_decay), v("grad_clip", m.grad_clip),
                  v("exact", m.exact))
STAGECOACH_FIELDS(schedule_spec, v("type", m.type), v("warmup_steps", m.warmup_steps),
                  v("decay_steps", m.decay_steps), v("min_lr", m.min_lr))
STAGECOACH_FIELDS(parallelism_spec, v("explicit", m.is_explicit), v("stages", m.stages),
                  v("replicas", m.replicas), v("schedule", m.schedule), v("layers", m.layers),
                  v("shard_optimizer", m.shard_optimizer))
STAGECOACH_FIELDS(elasticity_spec, v("workers_min", m.workers_min), v("workers_max", m.workers_max),
                  v("on_loss", m.on_loss), v("wait_for_min_ms", m.wait_for_min_ms),
                  v("max_failures", m.max_failures), v("copies", m.copies), v("patrol", m.patrol))
STAGECOACH_FIELDS(checkpoint_spec, v("every_steps", m.every_steps), v("every_ms", m.every_ms),
                  v("keep_last", m.keep_last), v("keep_every_steps", m.keep_every_steps),
                  v("store", m.store), v("placement", m.placement))
STAGECOACH_FIELDS(job_spec, v("version", m.version), v("name", m.name), v("priority", m.priority),
                  v("model", m.model), v("data", m.data), v("batch", m.batch),
                  v("optimizer", m.optimizer), v("schedule", m.schedule),
                  v("precision", m.precision), v("stop_steps", m.stop_steps),
                  v("eval_every_steps", m.eval_every_steps), v("eval_batches", m.eval_batches),
                  v("parallelism", m.parallelism), v("elasticity", m.elasticity),
                  v("checkpoint", m.checkpoint), v("device", m.device), v("labels", m.labels),
                  v("log_every_steps", m.log_every_steps))

STAGECOACH_FIELDS(weights_suspect, v("worker", m.worker), v("weights_hash", m.weights_hash))
STAGECOACH_FIELDS(distrust, v("fence", m.fence), v("step", m.step), v("bad_saves", m.bad_saves),
                  v("workers", m.workers), v("disputed_step", m.disputed_step),
                  v("suspects", m.suspects))
STAGECOACH_FIELDS(hello, v("protocol", m.protocol), v("name", m.name), v("process", m.process),
                  v("host", m.host), v("link_host", m.link_host), v("link_port", m.link_port),
                  v("device", m.device), v("device_class", m.device_class), v("threads", m.threads),
                  v("memory_bytes", m.memory_bytes), v("labels", m.labels), v("job", m.job),
                  v("generation", m.generation), v("plan_hash", m.plan_hash), v("phase", m.phase),
                  v("step", m.step), v("promised", m.promised), v("version", m.version),
                  v("promised_to", m.promised_to), v("distrusted", m.distrusted))
STAGECOACH_FIELDS(beat, v("job", m.job), v("generation", m.generation), v("step", m.step),
                  v("phase", m.phase), v("op", m.op), v("activity", m.activity),
                  v("waits_for", m.waits_for), v("stands_ms", m.stands_ms), v("leaf_us", m.leaf_us),
                  v("layer_us", m.layer_us))
STAGECOACH_FIELDS(prepared, v("job", m.job), v("number", m.number), v("has_state", m.has_state),
                  v("step", m.step), v("chain", m.chain), v("tensors", m.tensors),
                  v("last_vote", m.last_vote), v("has_pending", m.has_pending),
                  v("loaded_in", m.loaded_in))
STAGECOACH_FIELDS(ready, v("job", m.job), v("generation", m.generation),
                  v("plan_hash", m.plan_hash), v("step", m.step), v("weights_hash", m.weights_hash))
STAGECOACH_FIELDS(failed, v("job", m.job), v("generation", m.generation), v("code", m.code),
                  v("message", m.message), v("is_fatal", m.is_fatal), v("suspects", m.suspects),
                  v("is_certain", m.is_certain), v("step", m.step))
STAGECOACH_FIELDS(progress, v("job", m.job), v("generation", m.generation),
                  v("plan_hash", m.plan_hash), v("steps", m.steps))
STAGECOACH_FIELDS(evaluated, v("job", m.job), v("generation", m.generation), v("step", m.step),
                  v("loss", m.loss))
STAGECOACH_FIELDS(part_saved, v("job", m.job), v("generation", m.generation),
                  v("plan_hash", m.plan_hash), v("step", m.step), v("part", m.part),
                  v("part_count", m.part_count), v("loss", m.loss), v("chain", m.chain),
                  v("stall_us", m.stall_us), v("write_us", m.write_us), v("problem", m.problem),
                  v("is_final", m.is_final), v("seq", m.seq))
STAGECOACH_FIELDS(held, v("job", m.job), v("generation", m.generation), v("step", m.step))
STAGECOACH_FIELDS(finished, v("job", m.job), v("generation", m.generation), v("step", m.step),
                  v("weights_hash", m.weights_hash))
STAGECOACH_FIELDS(peer_report, v("job", m.job), v("generation", m.generation), v("peer", m.peer),
                  v("what", m.what), v("why", m.why))
STAGECOACH_FIELDS(log_line, v("job", m.job), v("unix_ms", m.unix_ms), v("level", m.level),
                  v("text", m.text))
STAGECOACH_FIELDS(goodbye, v("reason", m.reason))
STAGECOACH_FIELDS(welcome, v("worker", m.worker), v("incarnation", m.incarnation),
                  v("beat_ms", m.beat_ms))
STAGECOACH_FIELDS(refused, v("reason", m.reason), v("is_final", m.is_final))
STAGECOACH_FIELDS(prepare, v("job", m.job), v("number", m.number), v("decider", m.decider),
                  v("wait_step", m.wait_step), v("distrusted", m.distrusted))
STAGECOACH_FIELDS(commit, v("plan", m.shape), v("spec", m.spec), v("source", m.source),
                  v("step", m.step), v("chain", m.chain), v("transfers", m.transfers),
                  v("roll_forward", m.roll_forward), v("parts", m.parts),
                  v("expected_weights_hash", m.expected_weights_hash),
                  v("save_at_start", m.save_at_start), v("checkpoint_folder", m.checkpoint_folder),
                  v("retell_rank", m.retell_rank), v("retell_after", m.retell_after),
                  v("decided_by", m.decided_by), v("reason", m.reason), v("unix_ms", m.unix_ms),
                  v("distrusted", m.distrusted), v("leaf_us", m.leaf_us), v("layer_us", m.layer_us))
STAGECOACH_FIELDS(run_stage, v("job", m.job), v("generation", m.generation))
STAGECOACH_FIELDS(give_order, v("job", m.job), v("generation", m.generation), v("order", m.order),
                  v("kind", m.kind), v("with", m.with))
STAGECOACH_FIELDS(resume_stage, v("job", m.job), v("generation", m.generation))
STAGECOACH_FIELDS(checkpoint_durable, v("job", m.job), v("step", m.step), v("seq", m.seq),
                  v("chain", m.chain))
STAGECOACH_FIELDS(stop_stage, v("job", m.job), v("reason", m.reason))
STAGECOACH_FIELDS(plan_report, v("job", m.job), v("plan", m.shape), v("source", m.source),
                  v("step", m.step), v("chain", m.chain), v("reason", m.reason),
                  v("decided_by", m.decided_by), v("unix_ms", m.unix_ms),
                  v("distrusted", m.distrusted))
STAGECOACH_FIELDS(feed_ready, v("job", m.job), v("generation", m.generation),
                  v("request", m.request))
STAGECOACH_FIELDS(fed, v("job", m.job), v("generation", m.generation), v("request", m.request),
                  v("step", m.step), v("problem", m.problem), v("is_own", m.is_own))
STAGECOACH_FIELDS(probed, v("job", m.job), v("generation", m.generation), v("peer", m.peer),
                  v("verdict", m.verdict), v("why", m.why))
STAGECOACH_FIELDS(audited, v("job", m.job), v("audit", m.audit), v("is_identical", m.is_identical),
                  v("is_done", m.is_done), v("step", m.step), v("tensors", m.tensors),
                  v("text", m.text), v("what", m.what), v("stages", m.stages))
STAGECOACH_FIELDS(feed, v("job", m.job), v("generation", m.generation), v("plan_hash", m.plan_hash),
                  v("request", m.request), v("spec", m.spec), v("participants", m.participants),
                  v("transfers", m.transfers), v("step_bytes_max", m.step_bytes_max))
STAGECOACH_FIELDS(stop_feed, v("job", m.job), v("request", m.request))
STAGECOACH_FIELDS(probe, v("job", m.job), v("generation", m.generation), v("peer", m.peer))
STAGECOACH_FIELDS(layout_span, v("first_step", m.first_step), v("layout", m.shape))
STAGECOACH_FIELDS(audit, v("job", m.job), v("audit", m.audit), v("spec", m.spec), v("step", m.step),
                  v("chain", m.chain), v("parts", m.parts), v("last", m.last), v("log", m.log),
                  v("after", m.after), v("layouts", m.layouts))
STAGECOACH_FIELDS(stop_audit, v("audit", m.audit))
STAGECOACH_FIELDS(traced, v("job", m.job), v("generation", m.generation), v("request", m.request),
                  v("step", m.step), v("began_ns", m.began_ns), v("spans", m.spans),
                  v("is_cut", m.is_cut))
STAGECOACH_FIELDS(clock_answer, v("number", m.number), v("asked_ns", m.asked_ns),
                  v("worker_ns", m.worker_ns))
STAGECOACH_FIELDS(trace_steps, v("job", m.job), v("request", m.request), v("first", m.first),
                  v("last", m.last))
STAGECOACH_FIELDS(clock_question, v("number", m.number), v("asked_ns", m.asked_ns))

#undef STAGECOACH_FIELDS

}  // namespace stagecoach
