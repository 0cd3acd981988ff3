// The writing half of config/job_spec_yaml.hpp: the resolved form and the starter file.
#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "config/job_spec_yaml.hpp"
#include "config/units.hpp"

namespace stagecoach {

namespace {

/// A YAML scalar that reads back as the same text. Quoted always: `no`, `1e3` and `a: b` are traps.
std::string yaml_text(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

std::string data_file_text(const data_file& f) {
  std::string out = fmt::format("{{path: {}, format: {}", yaml_text(f.path), f.format);
  if (f.bytes > 0) out += fmt::format(", bytes: {}", f.bytes);
  if (!f.hash.empty()) out += fmt::format(", hash: \"{}\"", f.hash);
  return out + "}";
}

std::string range_text(int least, int most) {
  return least == most ? fmt::format("{}", least) : fmt::format("{}..{}", least, most);
}

}  // namespace

std::string write_job_spec_yaml(const job_spec& s) {
  std::string out;
  const auto line = [&out]<class... A>(fmt::format_string<A...> format, A&&... args) {
    fmt::format_to(std::back_inserter(out), format, std::forward<A>(args)...);
    out += '\n';
  };
  line("version: {}", s.version);
  line("name: {}", yaml_text(s.name));
  line("priority: {}", s.priority);
  line("model:");
  if (!s.model.preset.empty()) line("  preset: {}", s.model.preset);
  line("  n_layer: {}", s.model.n_layer);
  line("  d_model: {}", s.model.d_model);
  line("  n_head: {}", s.model.n_head);
  line("  d_ff: {}", s.model.d_ff);
  line("  vocab_size: {}", s.model.vocab_size);
  line("  context: {}", s.model.context);
  line("  tie_embeddings: true");
  if (s.model.init.empty() || s.model.init == "random")
    line("  init: {{seed: {}, std: {}}}", s.model.init_seed, s.model.init_std);
  else
    line("  init: {}", yaml_text(s.model.init));
  line("data:");
  line("  tokenizer:");
  line("    type: {}", s.data.tokenizer);
  if (!s.data.tokenizer_path.empty()) line("    path: {}", yaml_text(s.data.tokenizer_path));
  if (!s.data.tokenizer_hash.empty()) line("    hash: \"{}\"", s.data.tokenizer_hash);
  line("  train:");
  for (const data_file& f : s.data.train) line("    - {}", data_file_text(f));
  if (!s.data.valid.empty()) line("  valid:");
  for (const data_file& f : s.data.valid) line("    - {}", data_file_text(f));
  line("  valid_fraction: {}", s.data.valid_fraction);
  line("  shuffle_seed: {}", s.data.shuffle_seed);
  line("batch:");
  line("  global: {} sequences", s.batch.global_sequences);
  line("  micro: {}", s.batch.micro_sequences);
  line("  sequence: {} tokens", s.batch.sequence_tokens);
  line("  leaves: {}", s.batch.leaf_count);
  line("optimizer:");
  line("  type: adamw");
  line("  lr: {}", s.optimizer.lr);
  line("  betas: [{}, {}]", s.optimizer.beta1, s.optimizer.beta2);
  line("  eps: {}", s.optimizer.eps);
  line("  weight_decay: {}", s.optimizer.weight_decay);
  line("  grad_clip: {}", s.optimizer.grad_clip);
  line("  exact: {}", s.optimizer.exact);
  line("schedule:");
  line("  type: {}", s.schedule.type);
  line("  warmup: {} steps", s.schedule.warmup_steps);
  line("  decay: {} steps{}", s.schedule.decay_steps,
       s.schedule.decay_steps == 0 ? "   # to the last step" : "");
  line("  min_lr: {}", s.schedule.min_lr);
  line("precision: {{compute: {}, master: fp32}}", s.precision);
  line("stop: {{steps: {}}}", s.stop_steps);
  line("eval:");
  if (s.eval_every_steps > 0)
    line("  every: {} steps", s.eval_every_steps);
  else
    line("  every: never");
  line("  batches: {}", s.eval_batches);
  line("parallelism:");
  line("  mode: {}", s.parallelism.is_explicit ? "explicit" : "auto");
  if (s.parallelism.is_explicit) {
    line("  stages: {}", s.parallelism.stages);
    line("  replicas: {}", s.parallelism.replicas);
    if (!s.parallelism.layers.empty()) line("  layers: [{}]", joined(s.parallelism.layers));
  }
  line("  schedule: {}", s.parallelism.schedule);
  line("  shard_optimizer: {}", s.parallelism.shard_optimizer);
  line("elasticity:");
  line("  workers: {}", range_text(s.elasticity.workers_min, s.elasticity.workers_max));
  line("  on_loss: {}", s.elasticity.on_loss);
  line("  wait_for_min: {}", format_duration_ms(s.elasticity.wait_for_min_ms));
  line("  max_failures: {} per 1h", s.elasticity.max_failures);
  line("  copies: {}", s.elasticity.copies);
  line("  patrol: {}", s.elasticity.patrol);
  line("checkpoint:");
  std::vector<std::string> every;
  if (s.checkpoint.every_steps > 0)
    every.push_back(fmt::format("{} steps", s.checkpoint.every_steps));
  if (s.checkpoint.every_ms > 0) every.push_back(format_duration_ms(s.checkpoint.every_ms));
  if (every.empty())
    line("  every: never   # only step 0 and the last");
  else
    line("  every: [{}]", joined(every));
  line("  keep:");
  line("    last: {}", s.checkpoint.keep_last);
  if (s.checkpoint.keep_every_steps > 0) line("    every: {} steps", s.checkpoint.keep_every_steps);
  if (!s.checkpoint.store.empty()) line("  store: {}", yaml_text(s.checkpoint.store));
  line("  placement: {}", s.checkpoint.placement);
  line("resources:");
  line("  device: {}", s.device);
  if (!s.labels.empty()) line("  labels:");
  for (const auto& [key, value] : s.labels) line("    {}: {}", yaml_text(key), yaml_text(value));
  line("observe:");
  line("  log_every: {} steps", s.log_every_steps);
  return out;
}

std::string starter_job_yaml(const preset& p) {
  const model_spec& m = p.model;
  const bool is_bytes = m.vocab_size == 256;
  // Learning rates of the GPT-3 table by width; small models take more.
  const double lr = m.d_model <= 128    ? 3e-3
                    : m.d_model <= 400  ? 1e-3
                    : m.d_model <= 768  ? 6e-4
                    : m.d_model <= 1024 ? 3e-4
                    : m.d_model <= 1536 ? 2.5e-4
                    : m.d_model <= 2048 ? 2e-4
                    : m.d_model <= 2560 ? 1.6e-4
                    : m.d_model <= 4096 ? 1.2e-4
                    : m.d_model <= 5120 ? 1e-4
                                        : 6e-5;
  std::string name = p.name;  // a job's name has no dots
  std::replace(name.begin(), name.end(), '.', '-');
  const std::string data = is_bytes ? R"(data:
  tokenizer: bytes                  # bytes | sentencepiece | none (token files)
  train: input.txt                  # UTF-8 text; or a list:  [{path: a.bin, format: llmc}, ...]
  valid_fraction: 0.05              # the tail of the text is kept for validation
)"
                                    : R"(data:
  tokenizer: none                   # bytes | sentencepiece | none (token files)
  train: [{path: train.bin, format: llmc}]    # text | llmc | nanogpt
  valid: [{path: valid.bin, format: llmc}]
)";
  const std::string batch = is_bytes ? "64 sequences" : "512Ki tokens";
  const std::string stop = is_bytes ? "{steps: 2000}" : "{tokens: 10B}";
  const std::string warmup = is_bytes ? "100 steps" : "375M tokens";
  return fmt::format(R"(# {about}
version: 1                          # of this file's format
name: {name:<30}# a-z, 0-9 and -; unique among live jobs

model:
  preset: {preset:<26}# {n_layer} layers, {d_model} wide, {n_head} heads, context {context}
  # n_layer, d_model, n_head, d_ff, vocab_size and context here override the preset
  init: {{seed: 1234, std: 0.02}}     # or  init: hf:DIR  |  init: checkpoint:JOB@STEP

{data}  shuffle_seed: 1234                # the order of samples is a pure function of it

batch:
  global: {batch:<26}# per step, over all replicas; never changes with the worker count
  micro: auto                       # sequences per microbatch
  leaves: auto                      # units of exact summation; fixed with the job

optimizer: {{type: adamw, lr: {lr:g}, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0}}
schedule:
  type: cosine                      # or constant
  warmup: {warmup:<26}# or a number of {other_unit}
  min_lr: {min_lr:g}
precision: fp32                     # or bf16: operands of products; sums and weights stay fp32
stop: {stop:<30}# steps, tokens or both; the first one reached wins
eval: {{every: 250 steps, batches: 20}}

parallelism: {{mode: auto}}           # or  {{stages: 2, replicas: 1, schedule: zb-h1}}  (zb-h1 | 1f1b | gpipe)
elasticity:
  workers: 1..4                     # min..max; fewer than min: the job waits
  on_loss: replace                  # replace (a spare, else fewer workers) | shrink | wait

checkpoint:
  every: 500 steps                  # or 10m, or [500 steps, 10m]
  keep: {{last: 3}}

resources: {{device: cpu}}
observe: {{log_every: 10 steps}}
)",
                     fmt::arg("about", p.about), fmt::arg("name", name), fmt::arg("preset", p.name),
                     fmt::arg("n_layer", m.n_layer), fmt::arg("d_model", m.d_model),
                     fmt::arg("n_head", m.n_head), fmt::arg("context", m.context),
                     fmt::arg("data", data), fmt::arg("batch", batch), fmt::arg("lr", lr),
                     fmt::arg("warmup", warmup),
                     fmt::arg("other_unit", is_bytes ? "tokens" : "steps"),
                     fmt::arg("min_lr", lr / 10), fmt::arg("stop", stop));
}

}  // namespace stagecoach
