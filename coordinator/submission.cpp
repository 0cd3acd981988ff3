#include "coordinator/submission.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "config/units.hpp"
#include "coordinator/wire_fields.hpp"
#include "model/plan.hpp"
#include "storage/dataset.hpp"
#include "storage/file.hpp"
#include "storage/huggingface.hpp"

namespace stagecoach {
namespace fs = std::filesystem;

namespace {

/// A problem that only the disk knows, with the place in the file where its words stand.
spec_problem problem_at(const submission_request& request, std::string code, std::string path,
                        std::string message, std::string fix, const std::string& words) {
  spec_problem p{request.file,   0, 0, std::move(code), std::move(path), std::move(message),
                 std::move(fix), {}};
  const auto found = words.empty() ? std::string::npos : request.yaml.find(words);
  if (found == std::string::npos) return p;
  const auto before = request.yaml.rfind('\n', found);
  const auto begin = before == std::string::npos ? 0 : before + 1;
  p.line = 1 + static_cast<int>(
                   std::count(request.yaml.begin(),
                              request.yaml.begin() + static_cast<std::ptrdiff_t>(found), '\n'));
  p.column = 1 + static_cast<int>(std::count_if(
                     request.yaml.begin() + static_cast<std::ptrdiff_t>(begin),
                     request.yaml.begin() + static_cast<std::ptrdiff_t>(found),
                     [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
  const auto end = request.yaml.find('\n', found);
  p.source_line = request.yaml.substr(begin, end == std::string::npos ? end : end - begin);
  return p;
}

void make_absolute(std::string& path, const std::string& folder) {
  if (path.empty() || folder.empty() || fs::path(path).is_absolute()) return;
  path = (fs::path(folder) / path).lexically_normal().string();
}

constexpr std::string_view hf_mark = "hf:";

void check_init(const submission_request& request, job_spec& spec,
                std::vector<spec_problem>& problems) {
  auto& init = spec.model.init;
  if (init.starts_with("checkpoint:")) {
    problems.push_back(problem_at(
        request, "E004", "model.init", fmt::format("{} is not supported in this version", init),
        "export that checkpoint (stagecoach export JOB@STEP --to hf DIR) and say init: hf:DIR",
        init));
    return;
  }
  if (!init.starts_with(hf_mark)) return;
  const auto words = init;
  auto folder = init.substr(hf_mark.size());
  make_absolute(folder, request.folder);
  std::error_code code;
  const auto absolute = fs::absolute(folder, code);
  if (!code) folder = absolute.lexically_normal().string();
  init = std::string(hf_mark) + folder;
  auto opened = hf_folder::open(folder);
  if (!opened) {
    problems.push_back(problem_at(request, "E302", "model.init", opened.err().message, {}, words));
    return;
  }
  const auto& c = opened->config();
  const auto compare = [&](const char* field, std::int64_t ours, std::int64_t theirs) {
    if (ours == theirs) return;
    problems.push_back(
        problem_at(request, "E302", fmt::format("model.{}", field),
                   fmt::format("model.{} is {}, but {} has {}", field, ours, folder, theirs),
                   fmt::format("{}: {}", field, theirs), field));
  };
  compare("n_layer", spec.model.n_layer, c.n_layer);
  compare("d_model", spec.model.d_model, c.n_embd);
  compare("n_head", spec.model.n_head, c.n_head);
  compare("vocab_size", spec.model.vocab_size, c.vocab_size);
  compare("context", spec.model.context, c.n_positions);
  compare("d_ff", spec.model.d_ff, c.n_inner > 0 ? c.n_inner : 4 * c.n_embd);
}

/// What a worker would refuse only when the job starts: ids that the model does not have, and less
/// text than one sample.
void check_tokens(const submission_request& request, const job_spec& spec,
                  std::vector<spec_problem>& problems) {
  std::int64_t total = 0;
  bool is_counted = true;
  const auto check = [&](const data_file& file, const std::string& where, bool is_train) {
    // To count a SentencePiece text is to encode it all; its ids are the tokenizer's.
    if (file.format == "text" && spec.data.tokenizer != "bytes") {
      is_counted = false;
      return;
    }
    auto seen = inspect_data(file.path, file.format);
    if (!seen) {
      problems.push_back(problem_at(request, "E301", where, seen.err().message, {}, file.path));
      return;
    }
    if (is_train) total += seen->layout.count;
    if (seen->max_token < spec.model.vocab_size) return;
    problems.push_back(problem_at(
        request, "E303", where,
        fmt::format("{}: token id {} at position {} is outside the vocabulary of {}", file.path,
                    seen->max_token, seen->max_position, spec.model.vocab_size),
        fmt::format("model.vocab_size: {} or more, or another file", seen->max_token + 1),
        file.path));
  };
  for (std::size_t i = 0; i < spec.data.train.size(); ++i)
    check(spec.data.train[i], fmt::format("data.train.{}.path", i), true);
  for (std::size_t i = 0; i < spec.data.valid.size(); ++i)
    check(spec.data.valid[i], fmt::format("data.valid.{}.path", i), false);
  if (!problems.empty() || !is_counted) return;
  if (spec.data.valid.empty())
    total -= static_cast<std::int64_t>(static_cast<double>(total) * spec.data.valid_fraction);
  if (total <= spec.batch.sequence_tokens)
    problems.push_back(
        problem_at(request, "E303", "data.train",
                   fmt::format("{} holds {} tokens to train on; one sample needs {}",
                               spec.data.train[0].path, total, spec.batch.sequence_tokens + 1),
                   "more text, or a smaller batch.sequence", spec.data.train[0].path));
}

void check_files(const submission_request& request, job_spec& spec,
                 std::vector<spec_problem>& problems) {
  auto& data = spec.data;
  const auto before = problems.size();
  const auto check = [&](std::string& path, const std::string& where) {
    const auto words = path;
    make_absolute(path, request.folder);
    if (auto file = open_to_read(path); !file)
      problems.push_back(problem_at(
          request, "E301", where, file.err().message,
          "the file must lie at this path on the coordinator's host and on each worker's", words));
  };
  for (std::size_t i = 0; i < data.train.size(); ++i)
    check(data.train[i].path, fmt::format("data.train.{}.path", i));
  for (std::size_t i = 0; i < data.valid.size(); ++i)
    check(data.valid[i].path, fmt::format("data.valid.{}.path", i));
  if (!data.tokenizer_path.empty()) check(data.tokenizer_path, "data.tokenizer.path");
  if (problems.size() > before) return;
  if (auto resolved = resolve_data_files(data); !resolved)
    problems.push_back(problem_at(request, "E301", "data", resolved.err().message, {}, "data:"));
  if (problems.size() == before) check_tokens(request, spec, problems);
}

void check_space(const job_spec& spec, const state_paths& paths,
                 std::vector<std::string>& warnings) {
  auto folder = paths.checkpoint_root(spec);
  std::error_code code;
  while (!fs::exists(folder, code) && folder.has_relative_path()) folder = folder.parent_path();
  auto free = free_bytes(folder);
  if (!free) return;
  // Weights and two moments in fp32; one checkpoint more than are kept exists while it is written.
  const auto one = static_cast<std::uint64_t>(parameter_count(spec.model)) * 12;
  const auto needed = one * static_cast<std::uint64_t>(std::max(spec.checkpoint.keep_last, 1) + 1);
  if (*free >= needed) return;
  warnings.push_back(fmt::format(
      "checkpoints will need about {:.1f} GB ({} of {:.1f} GB each), {} has {:.1f} GB free. fix: "
      "checkpoint.store on a larger disk, or a smaller checkpoint.keep",
      static_cast<double>(needed) * 1e-9, std::max(spec.checkpoint.keep_last, 1) + 1,
      static_cast<double>(one) * 1e-9, folder.string(), static_cast<double>(*free) * 1e-9));
}

nlohmann::json memory_json(const stage_memory& m) {
  return {{"weights", m.weights},     {"optimizer", m.optimizer},
          {"gradients", m.gradients}, {"activations", m.activations},
          {"buffers", m.buffers},     {"copies", m.copies},
          {"total", m.total()}};
}

/// Of a stage, the replica that needs most.
stage_memory worst_memory(const job_spec& spec, const layout& shape, int stage) {
  stage_memory worst;
  for (int r = 0; r < shape.replica_count; ++r) {
    const auto m = predict_memory(spec, shape, stage, r);
    if (m.total() > worst.total()) worst = m;
  }
  return worst;
}

nlohmann::json layout_json(const job_spec& spec, const layout& shape, int workers) {
  auto json = wire::to_json_value(shape);
  json["workers"] = workers;
  json["workers_used"] = shape.worker_count();
  json["leaf_balance"] = leaf_balance(spec.batch.leaf_count, shape.replica_count);
  const double microbatches =
      static_cast<double>(spec.batch.microbatch_count()) / shape.replica_count;
  json["bubble"] = (shape.stage_count - 1) / (microbatches + shape.stage_count - 1);
  auto& stages = json["stage_list"] = nlohmann::json::array();
  std::int64_t worst = 0;
  for (int s = 0; s < shape.stage_count; ++s) {
    const auto memory = worst_memory(spec, shape, s);
    worst = std::max(worst, memory.total());
    stages.push_back(
        {{"stage", s},
         {"units", describe_units(spec.model, shape.unit_cuts[s], shape.unit_cuts[s + 1])},
         {"memory", memory_json(memory)}});
  }
  json["worst_memory_bytes"] = worst;
  return json;
}

std::string placement_text(const job_spec& spec, std::int64_t worst_bytes,
                           const std::vector<worker_view>& workers, bool& fits) {
  int attached = 0, free = 0, small = 0;
  for (const auto& w : workers) {
    if (w.state == "LOST") continue;
    ++attached;
    if (w.state != "IDLE" || w.device != spec.device) continue;
    const bool has_labels =
        std::all_of(spec.labels.begin(), spec.labels.end(), [&](const auto& label) {
          const auto found = w.labels.find(label.first);
          return found != w.labels.end() && found->second == label.second;
        });
    if (!has_labels) continue;
    const bool is_small =
        w.memory_bytes > 0 && worst_bytes > static_cast<std::int64_t>(w.memory_bytes);
    (is_small ? small : free) += 1;
  }
  const int least = spec.elasticity.workers_min;
  fits = free >= least;
  auto text = fits ? fmt::format("fits now: {} of {} attached workers are free and suit, {} needed",
                                 free, attached, least)
                   : fmt::format(
                         "needs {} more free workers: {} needed, {} of {} attached are free "
                         "and suit",
                         least - free, least, free, attached);
  if (small > 0)
    text += fmt::format("; {} free ones have less than {:.2f} GB", small,
                        static_cast<double>(worst_bytes) * 1e-9);
  return text;
}

}  // namespace

std::string describe_units(const model_spec& m, int begin, int end) {
  const int head = unit_count(m) - 1;
  std::string text;
  const auto add = [&text](const std::string& word) { text += (text.empty() ? "" : ", ") + word; };
  if (begin == 0 && end > 0) add("embed");
  const int first = std::max(begin, 1), last = std::min(end, head) - 1;
  if (first == last) add(unit_name(m, first));
  if (first < last) add(fmt::format("h.{}-{}", first - 1, last - 1));
  if (begin <= head && end > head) add("head");
  return text;
}

submission prepare_submission(const submission_request& request, const state_paths& paths) {
  submission done;
  const auto name = request.file.empty() ? std::string("job.yaml") : request.file;
  auto parsed = parse_job_spec(request.yaml, name, request.set);
  done.problems = std::move(parsed.problems);
  if (!parsed.spec) return done;
  auto named = request;
  named.file = name;
  job_spec spec = std::move(*parsed.spec);
  check_init(named, spec, done.problems);
  check_files(named, spec, done.problems);
  make_absolute(spec.checkpoint.store, request.folder);
  if (!done.problems.empty()) return done;
  check_space(spec, paths, done.warnings);
  if (!spec.optimizer.exact)
    done.warnings.push_back(
        "optimizer.exact: false sums in plain order, so every change of the number of replicas, "
        "by a failure or a join too, CHANGES THE BITS of the weights, and nothing compares a step "
        "that is done again. It is there to measure what exactness costs. fix: exact: true");
  if (spec.parallelism.shard_optimizer && spec.elasticity.copies == 0)
    done.warnings.push_back(
        "parallelism.shard_optimizer without copies: each part of the optimizer's state is on one "
        "worker, so a lost worker takes the job back to its newest checkpoint. fix: "
        "elasticity.copies: 1");
  done.spec = std::move(spec);
  return done;
}

std::string plan_answer(const submission& checked, const std::vector<worker_view>& workers) {
  const job_spec& spec = *checked.spec;
  nlohmann::json answer;
  answer["spec"] = wire::to_json_value(spec);
  answer["resolved_yaml"] = write_job_spec_yaml(spec);
  answer["parameters"] = parameter_count(spec.model);
  answer["tokens_per_step"] = spec.batch.global_sequences * spec.batch.sequence_tokens;
  answer["warnings"] = checked.warnings;
  auto& layouts = answer["layouts"] = nlohmann::json::array();
  auto& memory = answer["memory"] = nlohmann::json::array();
  std::int64_t worst = 0;
  for (int n = spec.elasticity.workers_min; n <= spec.elasticity.workers_max; ++n) {
    auto shape = choose_layout(spec, n);
    if (!shape) {
      layouts.push_back({{"workers", n}, {"problem", shape.err().message}});
      continue;
    }
    auto json = layout_json(spec, *shape, n);
    const auto bytes = json["worst_memory_bytes"].get<std::int64_t>();
    if (memory.empty()) worst = bytes;
    memory.push_back({{"workers", n}, {"worst_memory_bytes", bytes}});
    layouts.push_back(std::move(json));
    if (layouts.size() >= 256) break;  // a table for people; 1,024 counts would be megabytes
  }
  bool fits = false;
  answer["placement"] = placement_text(spec, worst, workers, fits);
  answer["fits_now"] = fits;
  return answer.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace stagecoach
