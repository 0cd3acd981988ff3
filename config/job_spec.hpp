// What a job asks for, fully resolved: every `auto` replaced, every count in its base unit.
//
// The resolved spec decides the bits (DESIGN 4): nothing outside it may enter a step's arithmetic.
// Reading a file is config/job_spec_yaml.hpp; canonical JSON text (storage, API) is
// coordinator/wire.hpp.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace stagecoach {

/// GPT-2 family shape. Shape letters: V vocab_size, T context, C d_model, H n_head.
struct model_spec {
  std::string preset;  // empty: custom
  std::int64_t n_layer = 0;
  std::int64_t d_model = 0;
  std::int64_t n_head = 0;
  std::int64_t d_ff = 0;  // 4 * d_model unless given
  std::int64_t vocab_size = 0;
  std::int64_t context = 0;  // learned positions = longest sequence
  std::string init;          // "random" | "hf:DIR" | "checkpoint:JOB@STEP"
  std::uint64_t init_seed = 1234;
  double init_std = 0.02;
  bool operator==(const model_spec&) const = default;
};

/// One data file; bytes and hash are filled in at submit and checked by each worker that opens it.
struct data_file {
  std::string path;    // absolute after submit
  std::string format;  // "text" | "llmc" | "nanogpt"
  std::uint64_t bytes = 0;
  std::string hash;  // XXH3-128 of the content, 32 hex digits
  bool operator==(const data_file&) const = default;
};

struct data_spec {
  std::string tokenizer;       // "bytes" | "sentencepiece" | "none" (token files)
  std::string tokenizer_path;  // sentencepiece model
  std::string tokenizer_hash;
  std::vector<data_file> train;
  std::vector<data_file> valid;  // empty: the tail `valid_fraction` of train's tokens
  double valid_fraction = 0.0;   // 0: no validation set
  std::uint64_t shuffle_seed = 1234;
  bool operator==(const data_spec&) const = default;
};

struct batch_spec {
  std::int64_t global_sequences = 0;  // sequences per step, over all replicas
  std::int64_t micro_sequences = 0;   // sequences per microbatch (B)
  std::int64_t sequence_tokens = 0;   // T of a sample; at most model.context
  std::int64_t leaf_count = 0;        // power of two, divides the microbatch count
  std::int64_t microbatch_count() const { return global_sequences / micro_sequences; }
  bool operator==(const batch_spec&) const = default;
};

struct optimizer_spec {
  double lr = 6e-4;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;  // decoupled; on tensors of two dimensions only
  double grad_clip = 1.0;     // global norm; 0 = off
  bool exact = true;
  bool operator==(const optimizer_spec&) const = default;
};

struct schedule_spec {
  std::string type = "cosine";  // "cosine" | "constant"
  std::int64_t warmup_steps = 0;
  std::int64_t decay_steps = 0;  // 0: to the last step
  double min_lr = 0.0;
  bool operator==(const schedule_spec&) const = default;
};

struct parallelism_spec {
  bool is_explicit = false;  // then stages x replicas is fixed
  int stages = 0;
  int replicas = 0;
  std::string schedule = "zb-h1";  // "zb-h1" | "1f1b" | "gpipe"
  std::vector<int> layers;         // optional: blocks per stage
  bool shard_optimizer = false;    // ZeRO-1: each replica keeps the moments of its share only
  bool operator==(const parallelism_spec&) const = default;
};

struct elasticity_spec {
  int workers_min = 1;
  int workers_max = 1;
  std::string on_loss = "replace";  // "replace" (spare, else shrink) | "shrink" | "wait"
  std::int64_t wait_for_min_ms = 600'000;
  int max_failures = 100;  // per hour; beyond it the job fails
  // Neighbours that keep a stage's state too where no replica does (model/copies.hpp). They are
  // given its reduced gradient, 4 B per parameter and step, and replay the optimizer: nothing is
  // ever redone. State every k steps would be 12/k B, but as much memory again on every worker, and
  // up to k steps redone. `stagecoach bench elastic` says what a copy costs.
  int copies = 0;
  bool patrol = false;  // an idle worker computes steps again and compares
  bool operator==(const elasticity_spec&) const = default;
};

struct checkpoint_spec {
  std::int64_t every_steps = 0;  // 0: only step 0 and the last
  std::int64_t every_ms = 0;     // wall clock of rank 0; 0 = off
  int keep_last = 3;
  std::int64_t keep_every_steps = 0;  // 0: none
  std::string store;                  // folder; empty: <state>/checkpoints/<job>
  std::string placement =
      "shared";  // "shared": one folder all workers reach | "two": on two workers
  bool operator==(const checkpoint_spec&) const = default;
};

struct job_spec {
  int version = 1;
  std::string name;
  int priority = 0;  // larger first
  model_spec model;
  data_spec data;
  batch_spec batch;
  optimizer_spec optimizer;
  schedule_spec schedule;
  std::string precision = "fp32";  // or "bf16": operands of matrix products; the rest stays fp32
  std::int64_t stop_steps = 0;
  std::int64_t eval_every_steps = 0;  // 0: off
  std::int64_t eval_batches = 0;      // microbatches per evaluation
  parallelism_spec parallelism;
  elasticity_spec elasticity;
  checkpoint_spec checkpoint;
  std::string device = "cpu";
  std::map<std::string, std::string> labels;  // a worker must carry all of them
  std::int64_t log_every_steps = 10;
  bool operator==(const job_spec&) const = default;
};

}  // namespace stagecoach
