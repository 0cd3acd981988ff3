#include "config/job_spec_sections.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "config/job_spec_yaml.hpp"
#include "config/leaves.hpp"
#include "config/limits.hpp"
#include "config/presets.hpp"
#include "config/suggest.hpp"
#include "config/units.hpp"

namespace stagecoach {

using shape = yaml_node::shape;

namespace {

constexpr std::size_t data_file_count_max = 10'000;
constexpr std::size_t label_count_max = 64;
constexpr std::int64_t parameter_count_max = std::int64_t{1} << 50;
constexpr std::int64_t global_sequences_max = std::int64_t{1} << 24;
constexpr std::int64_t step_tokens_max = std::int64_t{1} << 40;
constexpr std::int64_t duration_ms_max = std::int64_t{366} * 86'400'000;

/// The divisors of n nearest to `wanted`, at most three, in order. n is bounded by the caller.
std::vector<std::string> nearest_divisors(std::int64_t n, std::int64_t wanted) {
  std::vector<std::int64_t> divisors;
  for (std::int64_t i = 1; i * i <= n; ++i) {
    if (n % i != 0) continue;
    divisors.push_back(i);
    if (i != n / i) divisors.push_back(n / i);
  }
  std::sort(divisors.begin(), divisors.end(), [wanted](std::int64_t a, std::int64_t b) {
    return std::pair(std::abs(a - wanted), a) < std::pair(std::abs(b - wanted), b);
  });
  divisors.resize(std::min<std::size_t>(divisors.size(), 3));
  std::sort(divisors.begin(), divisors.end());
  std::vector<std::string> words;
  for (const std::int64_t d : divisors) words.push_back(fmt::format("{}", d));
  return words;
}

bool is_power_of_two(std::int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

}  // namespace

void spec_reader::read_head(section& top) {
  std::int64_t version = 1;
  read_integer(top, "version", version, 1, std::numeric_limits<std::int32_t>::max());
  require(top, "version", "version: 1");
  if (version != 1)
    report(place_of({"version"}), "E004", "version",
           fmt::format("version {} {}; this program reads version 1", version, not_now),
           "version: 1, or use a newer stagecoach");
  if (const yaml_node* n = find_text(top, "name")) {
    const bool is_name =
        !n->text.empty() && n->text.size() <= limits::name_bytes_max &&
        n->text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") == std::string::npos &&
        n->text.front() != '-' && n->text.back() != '-';
    if (is_name)
      spec_.name = n->text;
    else
      report(n->place, "E007", "name", fmt::format("name {} is not a job name", quoted(n->text)),
             fmt::format("1 to {} of a-z, 0-9 and -, no - at the ends", limits::name_bytes_max));
  }
  require(top, "name", "name: my-job");
  read_small(top, "priority", spec_.priority, -1'000'000, 1'000'000);
}

void spec_reader::read_model(section& top) {
  model_spec& m = spec_.model;
  m.init = "random";
  require(top, "model", "model: {preset: tiny}");
  section s = open(top, "model");
  const preset* base = nullptr;
  bool is_preset_wrong = false;
  if (const yaml_node* n = find_text(s, "preset"); n && n->text != "custom") {
    base = find_preset(n->text);
    if (base) {
      m = base->model;
    } else {
      is_preset_wrong = true;
      const auto meant = nearest(n->text, preset_names());
      report(n->place, "E101", "model.preset",
             fmt::format("unknown preset {}{}", quoted(n->text),
                         meant ? fmt::format("; did you mean \"{}\"?", *meant) : ""),
             meant ? fmt::format("preset: {}", *meant)
                   : fmt::format("one of {}, custom", joined(preset_names())));
    }
  }
  read_integer(s, "n_layer", m.n_layer, 1, limits::layer_count_max);
  read_integer(s, "d_model", m.d_model, 1, limits::d_model_max);
  read_integer(s, "n_head", m.n_head, 1, limits::d_model_max);
  // A preset's d_ff belongs to its d_model; with another d_model the default holds again.
  if (s.is_present() && child(*s.node(), "d_model")) m.d_ff = 4 * m.d_model;
  read_integer(s, "d_ff", m.d_ff, 1, 8 * limits::d_model_max);
  read_integer(s, "vocab_size", m.vocab_size, 2, limits::vocab_size_max);
  read_integer(s, "context", m.context, 1, limits::context_max);
  if (const auto tied = read_bool(s, "tie_embeddings"); tied && !*tied)
    report(place_of({"model.tie_embeddings"}), "E004", "model.tie_embeddings",
           fmt::format("model.tie_embeddings false {}", not_now), "tie_embeddings: true");
  for (const char* key : {"dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"}) {
    const yaml_node* n = s.find_quietly(key);
    if (!n || !is_text(*n, s.path_of(key))) continue;
    const auto p = real_of(*n, s.path_of(key), 0, 1, true);
    if (p && *p != 0)
      report(n->place, "E004", s.path_of(key),
             fmt::format("{} {}: dropout {}; training here is without dropout", s.path_of(key), *p,
                         not_now),
             fmt::format("{}: 0", key));
  }
  read_init(s);
  if (s.is_present() && !base && !is_preset_wrong) {
    require(s, "n_layer", "n_layer: 4, or preset: tiny");
    require(s, "d_model", "d_model: 64");
    require(s, "n_head", "n_head: 4");
    require(s, "context", "context: 64");
  }
  finish(s);
}

void spec_reader::read_init(section& model) {
  model_spec& m = spec_.model;
  const yaml_node* n = model.find("init");
  if (!n) return;
  const std::string path = model.path_of("init");
  if (n->is == shape::map) {
    section s = open_node(*n, path);
    read_seed(s, "seed", m.init_seed);
    read_real(s, "std", m.init_std, 0, 100, false);
    finish(s);
    return;
  }
  if (!is_text(*n, path)) return;
  const std::string& text = n->text;
  if (text == "random") return;
  if (text.rfind("hf:", 0) == 0 && text.size() > 3) {
    yaml_node folder = *n;
    folder.text = text.substr(3);
    if (is_path(folder, path)) m.init = text;
    return;
  }
  const std::size_t at = text.rfind('@');
  if (text.rfind("checkpoint:", 0) == 0 && at != std::string::npos && at > 11) {
    const auto step = parse_count(std::string_view(text).substr(at + 1));
    if (step && *step >= 0 && *step <= limits::step_count_max &&
        text.size() <= spec_path_bytes_max) {
      m.init = fmt::format("{}@{}", text.substr(0, at), *step);
      return;
    }
  }
  report(n->place, "E007", path, fmt::format("{} {} is not understood", path, quoted(text)),
         "init: {seed: 1234, std: 0.02}, init: hf:DIR or init: checkpoint:JOB@STEP");
}

void spec_reader::read_data_file(const yaml_node& n, const std::string& path,
                                 std::vector<data_file>& out) {
  data_file file;
  if (n.is == shape::text) {
    if (!is_path(n, path)) return;
    file.path = n.text;
  } else if (n.is == shape::map) {
    section s = open_node(n, path);
    read_path(s, "path", file.path);
    require(s, "path", "path: FILE");
    read_choice(s, "format", file.format, {"text", "llmc", "nanogpt"}, {"megatron", "jsonl"});
    std::int64_t bytes = 0;
    read_integer(s, "bytes", bytes, 0, std::numeric_limits<std::int64_t>::max());
    file.bytes = static_cast<std::uint64_t>(bytes);
    read_hash(s, "hash", file.hash);
    if (const yaml_node* weight = s.find_quietly("weight"); weight && is_text(*weight, path)) {
      const auto value = real_of(*weight, s.path_of("weight"), 0, 1e9, false);
      if (value && *value != 1)
        report(weight->place, "E004", s.path_of("weight"),
               fmt::format("{} {}: weighted mixing {}", s.path_of("weight"), *value, not_now),
               "weight: 1, or leave it out; files are read one after the other");
    }
    refuse(s, "dtype", {"uint16"}, "dtype: uint16; other token sizes are stated by llmc headers");
    finish(s);
    if (s.find_quietly("format") && file.format.empty()) return;  // wrong, said above
  } else {
    report(n.place, "E006", path,
           fmt::format("{} is {}; expected a path or a map with path and format", path,
                       shape_name(n.is)),
           "- {path: train.txt, format: text}");
    return;
  }
  if (file.path.empty()) return;
  if (file.format.empty()) {
    // .bin is what both token formats are called, and reading one as the other trains on rubbish.
    if (file.path.size() > 4 && file.path.compare(file.path.size() - 4, 4, ".bin") == 0) {
      report(
          n.place, "E005", dotted(path, "format"),
          fmt::format("{}: the format of {} can't be told from its name", path, quoted(file.path)),
          fmt::format("{{path: {}, format: llmc}} (with a header) or format: nanogpt (bare uint16)",
                      file.path));
      return;
    }
    file.format = "text";
  }
  if (out.size() < data_file_count_max) out.push_back(std::move(file));
}

void spec_reader::read_data_files(section& data, const char* key, std::vector<data_file>& out) {
  const yaml_node* n = data.find(key);
  if (!n) return;
  const std::string path = data.path_of(key);
  if (n->is != shape::list) {
    if (n->is == shape::empty)
      is_text(*n, path);
    else
      read_data_file(*n, path, out);
    return;
  }
  if (n->items.empty())
    report(n->place, "E005", path, fmt::format("{} is an empty list", path), "name a file");
  if (n->items.size() > data_file_count_max)
    report(n->place, "E008", path, fmt::format("{} names {} files", path, n->items.size()),
           fmt::format("at most {}; join small files", data_file_count_max));
  for (std::size_t i = 0; i < n->items.size() && problems_.size() <= spec_problem_count_max; ++i)
    read_data_file(n->items[i], fmt::format("{}.{}", path, i), out);
}

void spec_reader::read_data(section& top) {
  data_spec& d = spec_.data;
  require(top, "data", "data: {tokenizer: bytes, train: input.txt}");
  section s = open(top, "data");
  const std::vector<std::string> types = {"bytes", "sentencepiece", "none"};
  const std::vector<std::string> later = {"hf-json", "gpt2-bpe"};
  const yaml_node* tokenizer = s.find("tokenizer");
  if (tokenizer && tokenizer->is == shape::map) {
    section t = open_node(*tokenizer, "data.tokenizer");
    read_choice(t, "type", d.tokenizer, types, later);
    require(t, "type", "type: bytes");
    read_path(t, "path", d.tokenizer_path);
    read_hash(t, "hash", d.tokenizer_hash);
    finish(t);
  } else if (tokenizer) {
    read_choice(s, "tokenizer", d.tokenizer, types, later);
  }
  if (d.tokenizer == "sentencepiece" && d.tokenizer_path.empty() &&
      !has_problem_at("data.tokenizer.path"))
    report(place_of({"data.tokenizer.type", "data.tokenizer"}), "E005", "data.tokenizer.path",
           "data.tokenizer.path is missing; sentencepiece needs its model file",
           "tokenizer: {type: sentencepiece, path: tokenizer.model}");
  if (d.tokenizer != "sentencepiece" && !d.tokenizer.empty() &&
      (!d.tokenizer_path.empty() || !d.tokenizer_hash.empty()))
    report(place_of({"data.tokenizer.path", "data.tokenizer.hash"}), "E110", "data.tokenizer.path",
           fmt::format("the tokenizer {} has no file", d.tokenizer), "remove path and hash");
  require(s, "train", "train: input.txt");
  read_data_files(s, "train", d.train);
  read_data_files(s, "valid", d.valid);
  read_real(s, "valid_fraction", d.valid_fraction, 0, 0.5, true);
  read_seed(s, "shuffle_seed", d.shuffle_seed);
  finish(s);

  const bool has_text = std::any_of(d.train.begin(), d.train.end(),
                                    [](const data_file& f) { return f.format == "text"; }) ||
                        std::any_of(d.valid.begin(), d.valid.end(),
                                    [](const data_file& f) { return f.format == "text"; });
  if (!tokenizer && s.is_present()) {
    if (has_text) require(s, "tokenizer", "tokenizer: bytes");
    d.tokenizer = "none";
  } else if (d.tokenizer == "none" && has_text) {
    report(place_of({"data.tokenizer.type", "data.tokenizer"}), "E110", "data.tokenizer",
           "data.tokenizer none with a text file; only token files need no tokenizer",
           "tokenizer: bytes, or sentencepiece, or format: llmc or nanogpt");
  }
  if (!d.valid.empty() && d.valid_fraction > 0)
    report(place_of({"data.valid_fraction"}), "E111", "data.valid_fraction",
           "data.valid and data.valid_fraction are both given", "keep one of them");
}

void spec_reader::read_elasticity(section& top) {
  elasticity_spec& e = spec_.elasticity;
  section s = open(top, "elasticity");
  if (const yaml_node* n = find_text(s, "workers")) {
    const auto range = parse_range(n->text);
    const auto fits = [](std::int64_t count) {
      return count >= 1 && count <= limits::worker_count_max;
    };
    if (!range)
      report(n->place, "E007", "elasticity.workers", range.err());
    else if (!fits(range->least) || !fits(range->most))
      report(n->place, "E102", "elasticity.workers",
             fmt::format("elasticity.workers {} is out of range", quoted(n->text)),
             fmt::format("1 to {} workers", limits::worker_count_max));
    else if (range->least > range->most)
      report(n->place, "E210", "elasticity.workers",
             fmt::format("elasticity.workers {}..{}: the minimum is larger than the maximum",
                         range->least, range->most),
             fmt::format("workers: {}..{}", range->most, range->least));
    else
      std::tie(e.workers_min, e.workers_max) =
          std::pair(static_cast<int>(range->least), static_cast<int>(range->most));
  }
  read_choice(s, "on_loss", e.on_loss, {"replace", "shrink", "wait"});
  if (const yaml_node* n = find_text(s, "wait_for_min")) {
    const auto ms = parse_duration_ms(n->text);
    if (!ms)
      report(n->place, "E007", "elasticity.wait_for_min", ms.err());
    else if (*ms > duration_ms_max)
      report(n->place, "E102", "elasticity.wait_for_min",
             fmt::format("elasticity.wait_for_min {} is out of range", n->text), "at most 366d");
    else
      e.wait_for_min_ms = *ms;
  }
  if (const yaml_node* n = find_text(s, "max_failures")) {
    const std::size_t per = n->text.find(" per ");
    const auto count = parse_count(n->text.substr(0, per));
    const auto window = per == std::string::npos ? result<std::int64_t>(std::int64_t{3'600'000})
                        : n->text.substr(per + 5) == "hour"
                            ? result<std::int64_t>(std::int64_t{3'600'000})
                            : parse_duration_ms(n->text.substr(per + 5));
    if (!count)
      report(n->place, "E007", "elasticity.max_failures", count.err());
    else if (!window)
      report(n->place, "E007", "elasticity.max_failures", window.err());
    else if (*window != 3'600'000)
      report(n->place, "E004", "elasticity.max_failures",
             fmt::format("elasticity.max_failures: a window other than 1h {}", not_now),
             "max_failures: 10 per 1h");
    else if (*count < 0 || *count > 1'000'000'000)
      report(n->place, "E102", "elasticity.max_failures",
             fmt::format("elasticity.max_failures {} is out of range", *count), "0 to 1000000000");
    else
      e.max_failures = static_cast<int>(*count);
  }
  read_small(s, "copies", e.copies, 0, 2);
  if (const auto patrol = read_bool(s, "patrol")) e.patrol = *patrol;
  finish(s);
}

void spec_reader::read_batch(section& top) {
  batch_spec& b = spec_.batch;
  require(top, "batch", "batch: {global: 64 sequences}");
  section s = open(top, "batch");
  const auto global = read_quantity(s, "global", "sequences", {"sequences", "tokens"});
  require(s, "global", "global: 64 sequences");
  b.sequence_tokens = spec_.model.context;
  if (const auto sequence = read_quantity(s, "sequence", "tokens", {"tokens"})) {
    if (sequence->count < 1 || sequence->count > limits::context_max)
      report(place_of({"batch.sequence"}), "E102", "batch.sequence",
             fmt::format("batch.sequence {} is out of range", sequence->count),
             fmt::format("1 to {} tokens", limits::context_max));
    else
      b.sequence_tokens = sequence->count;
  }
  if (b.sequence_tokens > spec_.model.context && spec_.model.context > 0)
    report(place_of({"batch.sequence"}), "E106", "batch.sequence",
           fmt::format("batch.sequence {} is longer than model.context {}", b.sequence_tokens,
                       spec_.model.context),
           fmt::format("sequence: {}, or context: {}", spec_.model.context, b.sequence_tokens));
  const yaml_node* micro = find_text(s, "micro");
  if (micro && micro->text != "auto")
    if (const auto q = quantity_of(*micro, "batch.micro", "sequences", {"sequences"})) {
      if (q->count < 1 || q->count > global_sequences_max)
        report(micro->place, "E102", "batch.micro",
               fmt::format("batch.micro {} is out of range", q->count),
               fmt::format("1 to {} sequences, or auto", global_sequences_max));
      else
        b.micro_sequences = q->count;
    }
  const yaml_node* leaves = find_text(s, "leaves");
  if (leaves && leaves->text != "auto") read_integer(s, "leaves", b.leaf_count, 1, 1 << 24);
  refuse(s, "ramp", {}, "remove ramp; the global batch is the same from the first step on");
  finish(s);
  resolve_batch(global);
}

void spec_reader::resolve_batch(const std::optional<quantity>& global) {
  batch_spec& b = spec_.batch;
  if (!global || b.sequence_tokens == 0) return;
  const yaml_place place = place_of({"batch.global"});
  std::int64_t sequences = global->count;
  if (global->unit == "tokens") {
    if (global->count % b.sequence_tokens != 0 || global->count == 0) {
      const std::int64_t below = std::max<std::int64_t>(global->count / b.sequence_tokens, 1);
      return report(
          place, "E120", "batch.global",
          fmt::format("batch.global {} tokens is not a multiple of the sequence length {}",
                      format_grouped(global->count), b.sequence_tokens),
          fmt::format("global: {} sequences, or global: {} sequences", below, below + 1));
    }
    sequences = global->count / b.sequence_tokens;
  }
  if (sequences < 1 || sequences > global_sequences_max ||
      sequences * b.sequence_tokens > step_tokens_max)
    return report(
        place, "E102", "batch.global",
        fmt::format("batch.global of {} sequences of {} tokens is out of range",
                    format_grouped(sequences), b.sequence_tokens),
        fmt::format("1 to {} sequences, at most {} tokens", format_grouped(global_sequences_max),
                    format_grouped(step_tokens_max)));
  b.global_sequences = sequences;
  step_tokens_ = sequences * b.sequence_tokens;
  if (has_problem_at("batch.micro")) return;
  if (b.micro_sequences == 0)
    b.micro_sequences = resolve_micro_sequences(
        sequences, b.sequence_tokens, spec_.elasticity.workers_min, spec_.elasticity.workers_max);
  if (sequences % b.micro_sequences != 0)
    return report(
        place_of({"batch.micro"}), "E121", "batch.micro",
        fmt::format("batch.micro {} does not divide batch.global of {} sequences",
                    b.micro_sequences, sequences),
        fmt::format("micro: {}, or auto", any_of(nearest_divisors(sequences, b.micro_sequences))));
  if (has_problem_at("batch.leaves")) return;
  const std::int64_t microbatches = b.microbatch_count();
  if (b.leaf_count == 0)
    b.leaf_count = resolve_leaf_count(microbatches, spec_.elasticity.workers_min,
                                      spec_.elasticity.workers_max);
  const std::int64_t largest = microbatches & -microbatches;
  if (!is_power_of_two(b.leaf_count))
    return report(place_of({"batch.leaves"}), "E122", "batch.leaves",
                  fmt::format("batch.leaves {} is not a power of two", b.leaf_count),
                  fmt::format("leaves: auto, or a power of two up to {}", largest));
  if (microbatches % b.leaf_count != 0)
    report(
        place_of({"batch.leaves"}), "E123", "batch.leaves",
        fmt::format("batch.leaves {} does not divide the {} microbatches of a step ({} sequences / "
                    "{} per microbatch)",
                    b.leaf_count, microbatches, sequences, b.micro_sequences),
        fmt::format("leaves: auto, or a power of two up to {}", largest));
}

void spec_reader::read_optimizer(section& top) {
  optimizer_spec& o = spec_.optimizer;
  section s = open(top, "optimizer");
  std::string type = "adamw";
  read_choice(s, "type", type, {"adamw"}, {"adam", "sgd", "muon", "lion", "adafactor"});
  read_real(s, "lr", o.lr, 0, 1e3, true);
  read_real(s, "eps", o.eps, 0, 1, false);
  read_real(s, "weight_decay", o.weight_decay, 0, 1e3, true);
  read_real(s, "grad_clip", o.grad_clip, 0, 1e9, true);
  if (const yaml_node* betas = s.find("betas")) {
    if (betas->is != shape::list || betas->items.size() != 2) {
      report(betas->place, "E006", "optimizer.betas",
             "optimizer.betas is not a list of two numbers", "betas: [0.9, 0.95]");
    } else {
      double* out[] = {&o.beta1, &o.beta2};
      for (std::size_t i = 0; i < 2; ++i) {
        const std::string path = fmt::format("optimizer.betas.{}", i);
        const yaml_node& n = betas->items[i];
        if (!is_text(n, path)) continue;
        const auto value = real_of(n, path, 0, 1, true);
        if (value && *value == 1)
          report(n.place, "E102", path, fmt::format("{} 1 is out of range", path), "less than 1");
        else if (value)
          *out[i] = *value;
      }
    }
  }
  if (const auto exact = read_bool(s, "exact")) o.exact = *exact;
  finish(s);
}

void spec_reader::read_stop_and_schedule(section& top) {
  require(top, "stop", "stop: {steps: 1000}");
  section stop = open(top, "stop");
  std::int64_t by_steps = 0;
  std::int64_t by_tokens = 0;
  read_steps(stop, "steps", by_steps, 1);
  if (const yaml_node* n = find_text(stop, "tokens")) {
    yaml_node tokens = *n;  // a bare number is of tokens here
    if (const auto q = parse_quantity(n->text); q && q->unit.empty()) tokens.text += " tokens";
    if (const auto steps = steps_of(tokens, "stop.tokens", 1)) by_tokens = *steps;
  }
  refuse(stop, "time", {}, "stop by steps or tokens");
  if (stop.is_present() && !child(*stop.node(), "steps") && !child(*stop.node(), "tokens") &&
      !child(*stop.node(), "time"))
    report(stop.place(), "E005", "stop.steps", "stop has neither steps nor tokens",
           "stop: {steps: 1000}");
  finish(stop);
  // The first one reached wins.
  spec_.stop_steps = by_steps == 0    ? by_tokens
                     : by_tokens == 0 ? by_steps
                                      : std::min(by_steps, by_tokens);

  schedule_spec& c = spec_.schedule;
  section s = open(top, "schedule");
  read_choice(s, "type", c.type, {"cosine", "constant"}, {"linear", "wsd", "inverse-sqrt"});
  read_steps(s, "warmup", c.warmup_steps, 0);
  read_steps(s, "decay", c.decay_steps, 0);
  read_real(s, "min_lr", c.min_lr, 0, 1e3, true);
  finish(s);
  if (c.min_lr > spec_.optimizer.lr)
    report(place_of({"schedule.min_lr"}), "E130", "schedule.min_lr",
           fmt::format("schedule.min_lr {} is more than optimizer.lr {}", c.min_lr,
                       spec_.optimizer.lr),
           fmt::format("min_lr: {}", spec_.optimizer.lr / 10));
  if (spec_.stop_steps > 0 && c.warmup_steps > spec_.stop_steps)
    report(place_of({"schedule.warmup"}), "E130", "schedule.warmup",
           fmt::format("schedule.warmup of {} steps is longer than the job, {} steps",
                       c.warmup_steps, spec_.stop_steps),
           fmt::format("warmup: {} steps", spec_.stop_steps / 100));
  if (c.decay_steps > 0 && c.decay_steps < c.warmup_steps)
    report(place_of({"schedule.decay"}), "E130", "schedule.decay",
           fmt::format("schedule.decay ends at step {}, before the warm-up does at step {}",
                       c.decay_steps, c.warmup_steps),
           fmt::format("decay: {} steps or more", c.warmup_steps));
}

void spec_reader::read_precision(section& top) {
  const std::vector<std::string> now = {"fp32", "bf16"};
  const std::vector<std::string> later = {"fp16", "fp8", "tf32"};
  const yaml_node* n = top.find("precision");
  if (n && n->is == shape::map) {
    section s = open_node(*n, "precision");
    read_choice(s, "compute", spec_.precision, now, later);
    std::string master = "fp32";
    read_choice(s, "master", master, {"fp32"}, {"bf16", "fp16"});
    finish(s);
  } else if (n) {
    read_choice(top, "precision", spec_.precision, now, later);
  }
}

void spec_reader::read_eval(section& top) {
  section s = open(top, "eval");
  if (const yaml_node* n = find_text(s, "every"); n && n->text != "never")
    read_steps(s, "every", spec_.eval_every_steps, 1);
  spec_.eval_batches = spec_.eval_every_steps > 0 ? 20 : 0;
  read_integer(s, "batches", spec_.eval_batches, 0, global_sequences_max);
  finish(s);
  if (spec_.eval_every_steps == 0) return;
  if (spec_.eval_batches == 0)
    report(place_of({"eval.batches", "eval"}), "E102", "eval.batches",
           "eval.batches 0 is out of range while eval.every is set", "batches: 20");
  if (spec_.data.valid.empty() && spec_.data.valid_fraction == 0 && !at("data.valid") &&
      (!at("data.valid_fraction") || !has_problem_at("data.valid_fraction")))
    report(place_of({"eval.every"}), "E111", "eval.every",
           "eval.every is set, but the job has no validation data",
           "data.valid_fraction: 0.01, or data.valid: FILE, or remove eval");
}

void spec_reader::read_parallelism(section& top) {
  parallelism_spec& p = spec_.parallelism;
  section s = open(top, "parallelism");
  std::string mode;
  read_choice(s, "mode", mode, {"auto", "explicit"});
  read_small(s, "stages", p.stages, 1, limits::stage_count_max);
  read_small(s, "replicas", p.replicas, 1, limits::replica_count_max);
  read_choice(s, "schedule", p.schedule, {"zb-h1", "1f1b", "gpipe"}, {"interleaved", "zb-v"});
  if (const yaml_node* n = s.find("layers")) {
    if (n->is != shape::list) {
      report(n->place, "E006", "parallelism.layers",
             fmt::format("parallelism.layers is {}; expected a list", shape_name(n->is)),
             "layers: [3, 3, 3, 3], the blocks of each stage");
    } else if (n->items.size() > static_cast<std::size_t>(limits::stage_count_max)) {
      report(n->place, "E102", "parallelism.layers",
             fmt::format("parallelism.layers has {} entries", n->items.size()),
             fmt::format("at most {}", limits::stage_count_max));
    } else {
      for (std::size_t i = 0; i < n->items.size(); ++i) {
        const yaml_node& item = n->items[i];
        const std::string path = fmt::format("parallelism.layers.{}", i);
        if (!is_text(item, path)) continue;
        const auto count = parse_count(item.text);
        if (!count)
          report(item.place, "E007", path, count.err());
        else if (*count < 0 || *count > limits::layer_count_max)
          report(item.place, "E102", path, fmt::format("{} {} is out of range", path, *count),
                 fmt::format("0 to {}", limits::layer_count_max));
        else
          p.layers.push_back(static_cast<int>(*count));
      }
      if (p.layers.size() != n->items.size()) p.layers.clear();
    }
  }
  refuse(s, "virtual_stages", {"1"}, "virtual_stages: 1, or leave it out");
  refuse(s, "recompute", {"none"}, "recompute: none, or leave it out");
  if (const auto sharded = read_bool(s, "shard_optimizer")) p.shard_optimizer = *sharded;
  refuse(s, "tensor", {"1"}, "leave it out; a stage is on one worker");
  finish(s);
  const bool names_layout =
      s.is_present() &&
      (child(*s.node(), "stages") || child(*s.node(), "replicas") || child(*s.node(), "layers"));
  p.is_explicit = mode == "explicit" || (mode.empty() && names_layout);
  if (mode == "auto" && names_layout)
    report(place_of({"parallelism.mode"}), "E204", "parallelism.mode",
           "parallelism.mode auto with stages, replicas or layers given",
           "mode: explicit, or remove stages, replicas and layers");
  if (!p.is_explicit) {
    p.stages = p.replicas = 0;
    p.layers.clear();
    return;
  }
  if (p.stages == 0 && !has_problem_at("parallelism.stages"))
    p.stages = p.layers.empty() ? 1 : static_cast<int>(p.layers.size());
  if (p.replicas == 0 && !has_problem_at("parallelism.replicas")) p.replicas = 1;
  check_layout();
}

void spec_reader::check_layout() {
  const parallelism_spec& p = spec_.parallelism;
  elasticity_spec& e = spec_.elasticity;
  const std::int64_t layers = spec_.model.n_layer;
  const std::int64_t units = layers + 2;
  if (layers > 0 && p.stages > units)
    report(place_of({"parallelism.stages", "parallelism.layers"}), "E201", "parallelism.stages",
           fmt::format("parallelism.stages {} is more than the model's {} units ({} blocks, the "
                       "embedding and the head)",
                       p.stages, units, layers),
           fmt::format("stages: {} or fewer", units));
  if (spec_.batch.leaf_count > 0 && p.replicas > spec_.batch.leaf_count)
    report(place_of({"parallelism.replicas"}), "E202", "parallelism.replicas",
           fmt::format("parallelism.replicas {} is more than the {} leaves of a step; a replica "
                       "needs one or more",
                       p.replicas, spec_.batch.leaf_count),
           fmt::format("replicas: {} or fewer, or more microbatches (batch.global, batch.micro, "
                       "batch.leaves)",
                       spec_.batch.leaf_count));
  if (!p.layers.empty()) {
    std::int64_t sum = 0;
    bool has_empty_middle = false;
    for (std::size_t i = 0; i < p.layers.size(); ++i) {
      sum += p.layers[i];
      // The first stage has the embedding and the last the head; one between them would have
      // nothing.
      if (p.layers[i] == 0 && i > 0 && i + 1 < p.layers.size()) has_empty_middle = true;
    }
    if (p.stages > 0 && static_cast<int>(p.layers.size()) != p.stages)
      report(
          place_of({"parallelism.layers"}), "E203", "parallelism.layers",
          fmt::format("parallelism.layers has {} entries for {} stages", p.layers.size(), p.stages),
          "one entry per stage");
    else if (layers > 0 && sum != layers)
      report(place_of({"parallelism.layers"}), "E203", "parallelism.layers",
             fmt::format("parallelism.layers [{}] adds up to {}; the model has {} blocks",
                         joined(p.layers), sum, layers),
             fmt::format("entries that add up to {}", layers));
    else if (has_empty_middle)
      report(place_of({"parallelism.layers"}), "E203", "parallelism.layers",
             "parallelism.layers leaves a middle stage without blocks",
             "0 only for the first and the last stage");
  }
  if (p.stages == 0 || p.replicas == 0 || has_problem_at("elasticity.workers")) return;
  const int workers = p.stages * p.replicas;
  const bool is_given = at("elasticity.workers") != nullptr;
  if (workers > limits::worker_count_max) {
    report(place_of({"parallelism.replicas", "parallelism.stages"}), "E102", "parallelism.replicas",
           fmt::format("{} stages x {} replicas is {} workers", p.stages, p.replicas, workers),
           fmt::format("at most {} workers", limits::worker_count_max));
  } else if (!is_given) {
    e.workers_min = e.workers_max = workers;
  } else if (workers > e.workers_max) {
    // A smaller minimum is fine: with fewer workers than the layout wants the planner lays it out
    // anew.
    report(place_of({"elasticity.workers"}), "E205", "elasticity.workers",
           fmt::format("the explicit layout of {} stages x {} replicas needs {} workers, "
                       "elasticity.workers allows at most {}",
                       p.stages, p.replicas, workers, e.workers_max),
           fmt::format("workers: {}, or parallelism: {{mode: auto}}", workers));
  }
}

void spec_reader::read_checkpoint(section& top) {
  checkpoint_spec& c = spec_.checkpoint;
  section s = open(top, "checkpoint");
  const auto read_every = [this, &c](const yaml_node& n, const std::string& path) {
    if (!is_text(n, path) || n.text == "never") return;
    const auto ms = parse_duration_ms(n.text);
    if (!ms) {
      if (const auto steps = steps_of(n, path, 1)) c.every_steps = *steps;
    } else if (*ms < 1'000 || *ms > duration_ms_max) {
      report(n.place, "E102", path, fmt::format("{} {} is out of range", path, n.text),
             "1s to 366d, or a number of steps");
    } else {
      c.every_ms = *ms;
    }
  };
  if (const yaml_node* n = s.find("every")) {
    if (n->is != shape::list) {
      read_every(*n, "checkpoint.every");
    } else if (n->items.size() > 2) {
      report(n->place, "E006", "checkpoint.every", "checkpoint.every has more than two entries",
             "every: [500 steps, 10m], whichever comes first");
    } else {
      for (std::size_t i = 0; i < n->items.size(); ++i)
        read_every(n->items[i], fmt::format("checkpoint.every.{}", i));
    }
  }
  section keep = open(s, "keep");
  read_small(keep, "last", c.keep_last, 1, 1'000'000);
  if (const yaml_node* n = find_text(keep, "every"); n && n->text != "never")
    read_steps(keep, "every", c.keep_every_steps, 1);
  refuse(keep, "best", {"0"}, "keep: {last: 3, every: 10000 steps}");
  finish(keep);
  read_path(s, "store", c.store);
  read_choice(s, "placement", c.placement, {"shared", "two"});
  if (c.placement == "two") {
    report(place_of({"checkpoint.placement"}), "E004", "checkpoint.placement",
           "placement two (each part on two workers' own disks) is not in this version",
           "placement: shared, with a store folder that all workers reach");
  }
  refuse(s, "async", {}, "remove async");
  finish(s);
}

void spec_reader::read_resources(section& top) {
  section s = open(top, "resources");
  read_choice(s, "device", spec_.device, {"cpu"}, {"gpu", "cuda"});
  refuse(s, "memory", {}, "remove memory; use labels to choose workers");
  section labels = open(s, "labels");
  if (labels.is_present()) {
    const yaml_node& map = *labels.node();
    if (map.keys.size() > label_count_max)
      report(labels.place(), "E008", "resources.labels",
             fmt::format("resources.labels has {} entries", map.keys.size()),
             fmt::format("at most {}", label_count_max));
    for (std::size_t i = 0; i < map.keys.size() && i < label_count_max; ++i) {
      const std::string path = dotted("resources.labels", map.keys[i]);
      if (!is_text(map.items[i], path)) continue;
      const std::size_t most = limits::name_bytes_max;
      if (map.keys[i].empty() || map.keys[i].size() > most || map.items[i].text.size() > most)
        report(map.key_places[i], "E007", path,
               fmt::format("the label {} or its value is empty or too long", quoted(map.keys[i])),
               fmt::format("at most {} bytes each", most));
      else
        spec_.labels[map.keys[i]] = map.items[i].text;
    }
  }
  finish(s);
}

void spec_reader::read_observe(section& top) {
  section s = open(top, "observe");
  if (const auto q = read_quantity(s, "log_every", "steps", {"steps"})) {
    if (q->count < 1 || q->count > limits::step_count_max)
      report(place_of({"observe.log_every"}), "E102", "observe.log_every",
             fmt::format("observe.log_every {} is out of range", q->count), "1 step or more");
    else
      spec_.log_every_steps = q->count;
  }
  refuse(s, "tensorboard", {}, "remove tensorboard; see  stagecoach metrics JOB --csv");
  refuse(s, "trace", {}, "remove trace");
  finish(s);
}

void spec_reader::check_model() {
  model_spec& m = spec_.model;
  const bool has_vocab = at("model.vocab_size") != nullptr;
  if (m.vocab_size == 0 && !has_vocab && spec_.data.tokenizer == "bytes") m.vocab_size = 256;
  if (m.vocab_size == 0 && !has_vocab && m.n_layer > 0 && !has_problem_at("model.preset"))
    report(place_of({"model"}), "E005", "model.vocab_size",
           "model.vocab_size is missing; only the bytes tokenizer implies it (256)",
           "add  vocab_size: 50257, the tokenizer's");
  if (m.vocab_size > 0 && m.vocab_size < 256 && spec_.data.tokenizer == "bytes")
    report(place_of({"model.vocab_size", "model.preset"}), "E107", "model.vocab_size",
           fmt::format("model.vocab_size {} is less than the 256 tokens of the bytes tokenizer",
                       m.vocab_size),
           "vocab_size: 256");
  if (m.d_model > 0 && m.n_head > 0 && m.d_model % m.n_head != 0) {
    const std::int64_t head_size = std::max<std::int64_t>(
        1, (2 * m.d_model + m.n_head) / (2 * m.n_head));  // rounded to the nearest
    report(place_of({"model.d_model", "model.n_head", "model.preset"}), "E104", "model.d_model",
           fmt::format("model.d_model {} is not divisible by model.n_head {}", m.d_model, m.n_head),
           fmt::format("use d_model: {} ({} heads of {}), or n_head: {}", head_size * m.n_head,
                       m.n_head, head_size, any_of(nearest_divisors(m.d_model, m.n_head))));
  }
  if (m.n_layer == 0 || m.d_model == 0 || m.d_ff == 0 || m.vocab_size == 0 || m.context == 0)
    return;
  // 4 C^2 + 2 C F + F + 9 C per block, 2 C for the last norm, (V + T) C for the two tables. The
  // limits keep C and F small enough for one block; the product with the layer count is checked.
  const std::int64_t block =
      4 * m.d_model * m.d_model + 2 * m.d_model * m.d_ff + m.d_ff + 9 * m.d_model;
  const std::int64_t tables = (m.vocab_size + m.context + 2) * m.d_model;
  std::int64_t total = 0;
  if (__builtin_mul_overflow(block, m.n_layer, &total) ||
      __builtin_add_overflow(total, tables, &total) || total > parameter_count_max)
    report(place_of({"model.d_ff", "model.d_model", "model"}), "E105", "model",
           "the model has more than 2^50 parameters", "a smaller n_layer, d_model or d_ff");
}

job_spec spec_reader::read() {
  if (root_.is != shape::map) {
    report(root_.place, "E006", "",
           root_.is == shape::empty
               ? std::string("the job file is empty")
               : fmt::format("the job file is {}; expected a map of keys", shape_name(root_.is)),
           "begin with  version: 1, or write a starter file with  stagecoach init");
    return spec_;
  }
  section top(&root_, "", root_.place);
  // Order matters: batch needs the model's context and the worker count, steps need the batch.
  read_head(top);
  read_model(top);
  read_data(top);
  check_model();
  read_elasticity(top);
  read_batch(top);
  read_optimizer(top);
  read_stop_and_schedule(top);
  read_precision(top);
  read_eval(top);
  read_parallelism(top);
  read_checkpoint(top);
  read_resources(top);
  read_observe(top);
  finish(top);
  return spec_;
}

}  // namespace stagecoach
