// Commands about what a job has saved: checkpoints hash export; sample is in tools/sample.cpp.
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "storage/checkpoint_store.hpp"
#include "storage/file.hpp"
#include "tools/command.hpp"
#include "tools/follow.hpp"
#include "tools/sample.hpp"
#include "tools/state_api.hpp"
#include "tools/table.hpp"
#include "tools/weights.hpp"

namespace stagecoach {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct checkpoint_flags {
  std::string target, action = "list", state, folder, to = "hf", out;
  bool deep = false, quick = false, recompute = false;
};

// ---- checkpoints
// -----------------------------------------------------------------------------------------
std::string checkpoint_cell(const json& row, const std::string& key) {
  const auto at = row.find(key);
  const bool is_number = at != row.end() && at->is_number();
  if (key == "unix_ms") return is_number ? age_since(at->get<std::int64_t>()) : "-";
  if (key == "bytes") {
    std::string text = is_number ? format_bytes(at->get<double>()) : "-";
    std::erase(text, ' ');
    return text;
  }
  if (key == "loss") return is_number ? fmt::format("{:.4f}", at->get<double>()) : "-";
  if (key == "weights_hash") return plain(row, key).substr(0, 12);
  if (key == "reason") {
    std::string text = plain(row, key);
    for (char& c : text)
      if (c == ' ') c = '-';
    return text;
  }
  return plain(row, key);
}

void print_checkpoints(const global_flags& flags, const json& rows) {
  print_table(flags,
              {{"STEP", "step"},
               {"AGE", "unix_ms"},
               {"SIZE", "bytes"},
               {"PARTS", "parts"},
               {"STATE", "state"},
               {"LOSS", "loss"},
               {"LAYOUT", "layout", true},
               {"SEQ", "seq", true},
               {"HASH", "weights_hash"},
               {"REASON", "reason"}},
              rows, checkpoint_cell);
}

json entry_row(const checkpoint_entry& e) {
  const manifest& m = e.content;
  return {{"step", m.step},
          {"seq", m.seq},
          {"unix_ms", m.created_unix_ms},
          {"bytes", m.bytes},
          {"parts", m.parts.size()},
          {"state", to_string(e.state)},
          {"reason", e.reason},
          {"weights_hash", m.weights_hash},
          {"state_hash", m.state_hash},
          {"generation", m.generation},
          {"layout", m.layout},
          {"loss", nullptr}};
}

// The words that a person reads after a check; 1 if one is bad, so that scripts see it.
exit_code verdict(const global_flags& flags, const json& rows, const std::string& depth) {
  std::size_t bad = 0, away = 0;
  for (const auto& row : rows) {
    bad += plain(row, "state") == "bad";
    away += plain(row, "state") == "elsewhere";
  }
  if (!flags.quiet && !flags.is_json())
    std::fprintf(stderr, "%s check: %zu good, %zu bad%s\n", depth.c_str(), rows.size() - bad - away,
                 bad,
                 away == 0 ? ""
                           : fmt::format(", {} with parts on other hosts (check them there with "
                                         "--folder)",
                                         away)
                                 .c_str());
  return bad == 0 ? exit_code::success : exit_code::failed;
}

exit_code check_folder(const global_flags& flags, const checkpoint_flags& own) {
  std::error_code ignored;
  if (!fs::is_directory(own.folder, ignored))
    return complain(flags, make_error(errc::not_found, "{} is no folder", own.folder));
  const check_depth depth = own.deep ? check_depth::deep : check_depth::quick;
  auto entries = checkpoint_store({own.folder}).list(depth);
  if (!entries) return complain(flags, entries.err());
  json rows = json::array();
  for (const checkpoint_entry& e : *entries) rows.push_back(entry_row(e));
  print_checkpoints(flags, rows);
  return own.action == "verify" ? verdict(flags, rows, own.deep ? "deep" : "quick")
                                : exit_code::success;
}

exit_code show_manifest(const global_flags& flags, const api_client& api,
                        const job_target& target) {
  const std::string path = "/jobs/" + percent_encode(target.job) + "/checkpoints";
  std::optional<std::int64_t> step = target.step;
  if (!step) {
    auto list = api.get(path);
    if (!list) return complain(flags, list.err());
    if ((*list)["checkpoints"].empty())
      return complain(flags,
                      make_error(errc::not_found, "job {} has no checkpoint yet", target.job));
    step = (*list)["checkpoints"][0].value("step", std::int64_t{0});
  }
  auto reply = api.get(fmt::format("{}/{}", path, *step));
  if (!reply) return complain(flags, reply.err());
  if (print_object(flags, *reply)) return exit_code::success;
  const json& m = *reply;
  std::printf("checkpoint of %s at step %s: %s\n", target.job.c_str(), plain(m, "step").c_str(),
              plain(m, "state").c_str());
  std::printf("Saved     %s ago by generation %s, %s\n",
              age_since(m.value("unix_ms", std::int64_t{0})).c_str(),
              plain(m, "generation").c_str(), plain(m, "layout").c_str());
  std::printf("Weights   %s\nState     %s\n", plain(m, "weights_hash").c_str(),
              plain(m, "state_hash").c_str());
  for (const auto& part : m.value("parts", json::array()))
    std::printf("Part      %s/%s  %s  %zu tensors  %s%s\n", plain(part, "folder").c_str(),
                plain(part, "file").c_str(), checkpoint_cell(part, "bytes").c_str(),
                part.value("tensors", json::array()).size(), plain(part, "root_hash").c_str(),
                part.value("is_here", true) ? "" : "  NOT ON THIS HOST");
  return exit_code::success;
}

exit_code run_checkpoints(const global_flags& flags, checkpoint_flags own) {
  // Both orders read well: `checkpoints JOB verify`, `checkpoints verify JOB`.
  const auto is_action = [](const std::string& w) {
    return w == "list" || w == "show" || w == "verify";
  };
  if (is_action(own.target) && !is_action(own.action)) std::swap(own.target, own.action);
  if (!own.folder.empty()) {
    if (is_action(own.target)) own.action = own.target;
    return check_folder(flags, own);
  }
  if (!is_action(own.action))
    return complain(flags, make_error(errc::usage, "\"{}\" is no action. fix: list, show or verify",
                                      own.action));
  if (own.target.empty())
    return complain(flags, make_error(errc::usage, "which job? fix: stagecoach checkpoints JOB {}",
                                      own.action));
  auto target = parse_target(own.target);
  if (!target) return complain(flags, target.err());
  auto opened = state_api::open(flags, own.state);
  if (!opened) return complain(flags, opened.err());
  const api_client& api = opened->api();
  if (own.action == "show") return show_manifest(flags, api, *target);
  const std::string path = "/jobs/" + percent_encode(target->job) + "/checkpoints";
  json body = {{"deep", own.deep}};
  if (target->step) body["step"] = *target->step;
  auto reply = own.action == "verify" ? api.post(path + "/verify", body) : api.get(path);
  if (!reply) return complain(flags, reply.err());
  json rows = reply->value("checkpoints", json::array());
  if (target->step) {
    json wanted = json::array();
    for (const auto& row : rows)
      if (row.value("step", std::int64_t{-1}) == *target->step) wanted.push_back(row);
    if (wanted.empty())
      return complain(flags, make_error(errc::not_found,
                                        "job {} has no checkpoint of step {}. list them: "
                                        "stagecoach checkpoints {}",
                                        target->job, *target->step, target->job));
    rows = std::move(wanted);
  }
  print_checkpoints(flags, rows);
  return own.action == "verify" ? verdict(flags, rows, own.deep ? "deep" : "quick")
                                : exit_code::success;
}

// ---- hash
// ------------------------------------------------------------------------------------------------
exit_code print_hash(const global_flags& flags, const std::string& origin, std::int64_t step,
                     const std::string& hash, bool is_recomputed) {
  json out = {{"origin", origin}, {"weights_hash", hash}, {"recomputed", is_recomputed}};
  out["step"] = step < 0 ? json(nullptr) : json(step);
  if (print_object(flags, out)) return exit_code::success;
  std::printf("%s\n", hash.c_str());
  if (flags.verbose)
    std::fprintf(stderr, "%s, %s\n", origin.c_str(),
                 is_recomputed ? "computed from the values" : "as recorded");
  return exit_code::success;
}

exit_code run_hash(const global_flags& flags, const checkpoint_flags& own) {
  if (is_folder_target(own.target)) {
    auto source = open_weights(flags, own.target, own.state, nullptr);
    if (!source) return complain(flags, source.err());
    auto hash = source->compute_hash();
    if (!hash) return complain(flags, hash.err());
    return print_hash(flags, source->origin(), source->step(), *hash, true);
  }
  auto target = parse_target(own.target);
  if (!target) return complain(flags, target.err());
  auto opened = state_api::open(flags, own.state);
  if (!opened) return complain(flags, opened.err());
  if (own.recompute) {
    auto source = weight_source::of_job(opened->api(), *target);
    if (!source) return complain(flags, source.err());
    auto hash = source->compute_hash();
    if (!hash) return complain(flags, hash.err());
    return print_hash(flags, source->origin(), source->step(), *hash, true);
  }
  const std::string path = "/jobs/" + percent_encode(target->job);
  auto view = opened->api().get(path);
  if (!view) return complain(flags, view.err());
  const std::string name = view->value("name", target->job);
  if (view->contains("hash_step") && (*view)["hash_step"].is_number() &&
      !view->value("weights_hash", "").empty()) {
    const auto step = (*view)["hash_step"].get<std::int64_t>();
    if (!target->step || *target->step == step)
      return print_hash(flags, fmt::format("{}@{}", name, step), step, (*view)["weights_hash"],
                        false);
  }
  auto list = opened->api().get(path + "/checkpoints");
  if (!list) return complain(flags, list.err());
  for (const auto& c : (*list)["checkpoints"]) {
    const auto step = c.value("step", std::int64_t{-1});
    const std::string hash = c.value("weights_hash", "");
    if (hash.empty() || (target->step && *target->step != step)) continue;
    return print_hash(flags, fmt::format("{}@{}", name, step), step, hash, false);
  }
  return complain(
      flags,
      make_error(errc::not_found, "no hash of {}{} is known. list them: stagecoach checkpoints {}",
                 name, target->step ? fmt::format("@{}", *target->step) : "", name));
}

// ---- export
// ----------------------------------------------------------------------------------------------
exit_code run_export(const global_flags& flags, const checkpoint_flags& own) {
  std::error_code ignored;
  const fs::path out = own.out;
  if (fs::exists(out / "model.safetensors", ignored) && !flags.yes)
    return complain(flags, make_error(errc::conflict,
                                      "{} holds a model already. fix: another folder, or --yes to "
                                      "replace it",
                                      own.out));
  std::optional<state_api> api;
  auto source = open_weights(flags, own.target, own.state, &api);
  if (!source) return complain(flags, source.err());
  const model_spec& m = source->model();
  if (m.n_head == 0)
    return complain(flags, make_error(errc::usage,
                                      "{} does not say how many heads the model has. fix: export "
                                      "the job: stagecoach export JOB --state DIR --to hf OUT",
                                      source->origin()));
  std::vector<loaded_tensor> tensors;
  tensor_hash sum;
  std::int64_t parameters = 0;
  for (const tensor_info& t : all_tensors(m)) {
    loaded_tensor one{t.name, t.shape, std::vector<float>(static_cast<std::size_t>(t.count()))};
    if (auto got = source->read(t, one.data.data()); !got) return complain(flags, got.err());
    sum += hash_tensor(t.name, one.data.data(), t.count());
    parameters += t.count();
    tensors.push_back(std::move(one));
  }
  const std::string hash = to_string(sum);
  if (!source->recorded_hash().empty() && source->recorded_hash() != hash)
    return complain(flags, make_error(errc::corrupt,
                                      "{}: the weights have hash {}, the manifest says {}; nothing "
                                      "was exported",
                                      source->origin(), hash, source->recorded_hash()));
  hf_config config;
  config.vocab_size = m.vocab_size;
  config.n_positions = m.context;
  config.n_embd = m.d_model;
  config.n_layer = m.n_layer;
  config.n_head = m.n_head;
  config.n_inner = m.d_ff == 4 * m.d_model ? 0 : m.d_ff;
  config.initializer_range = m.init_std;
  std::vector<tensor_view> views;
  for (const loaded_tensor& t : tensors) views.push_back({t.name, t.shape, t.data.data()});
  if (auto written = write_hf_folder(out, config, views); !written)
    return complain(flags, written.err());
  std::vector<std::string> files = {"config.json", "generation_config.json", "model.safetensors"};
  if (source->data().tokenizer == "sentencepiece") {
    // The largest real model is under 10 MB.
    auto model = read_whole_file(source->data().tokenizer_path, std::int64_t{256} << 20);
    if (!model) return complain(flags, model.err());
    if (auto copied = write_file_durably(out / tokenizer_file_name, *model); !copied)
      return complain(flags, copied.err());
    files.push_back(tokenizer_file_name);
  }
  if (print_object(flags, {{"origin", source->origin()},
                           {"folder", own.out},
                           {"files", files},
                           {"tensors", tensors.size()},
                           {"parameters", parameters},
                           {"weights_hash", hash}}))
    return exit_code::success;
  if (flags.quiet) return exit_code::success;
  std::printf("%s exported: %zu tensors, %s parameters, fp32, hash %s\n", source->origin().c_str(),
              tensors.size(), format_count(static_cast<double>(parameters)).c_str(), hash.c_str());
  std::printf("%s:", own.out.c_str());
  for (const std::string& file : files) std::printf(" %s", file.c_str());
  std::printf("\nload it:  GPT2LMHeadModel.from_pretrained(\"%s\")\n", own.out.c_str());
  return exit_code::success;
}

}  // namespace

void add_state_option(CLI::App* app, std::string& state) {
  app->add_option("--state", state,
                  "ask the store in this folder, where no coordinator runs (of train, prove, ...)");
}

void add_checkpoint_commands(command_line c) {
  {
    auto own = std::make_shared<checkpoint_flags>();
    CLI::App* app = c.app.add_subcommand("checkpoints", "a job's checkpoints: list, show, verify");
    app->footer(
        "examples:\n"
        "  stagecoach checkpoints my-job\n"
        "  stagecoach checkpoints my-job@300 show\n"
        "  stagecoach checkpoints my-job verify --deep\n"
        "  stagecoach checkpoints verify --folder /data/checkpoints/my-job    no coordinator "
        "needed");
    app->add_option("JOB", own->target, "name or id, or JOB@STEP");
    app->add_option("ACTION", own->action, "list (default), show or verify");
    auto deep = app->add_flag("--deep", own->deep, "read and check every byte");
    app->add_flag("--quick", own->quick, "headers and lengths only (default)")->excludes(deep);
    app->add_option("--folder", own->folder, "check this checkpoint folder of this host");
    add_state_option(app, own->state);
    app->callback([c, own] { c.run = [c, own] { return run_checkpoints(c.flags, *own); }; });
  }
  {
    auto own = std::make_shared<checkpoint_flags>();
    CLI::App* app = c.app.add_subcommand("hash", "the hash of a job's weights, of any layout");
    app->footer(
        "examples:\n"
        "  stagecoach hash my-job\n"
        "  stagecoach hash my-job@300 --recompute\n"
        "  stagecoach hash ./exported          a folder: Hugging Face's form or checkpoints");
    app->add_option("JOB|DIR", own->target, "JOB, JOB@STEP or a folder")->required();
    app->add_flag("--recompute", own->recompute, "from the values, not as recorded");
    add_state_option(app, own->state);
    app->callback([c, own] { c.run = [c, own] { return run_hash(c.flags, *own); }; });
  }
  {
    auto own = std::make_shared<checkpoint_flags>();
    CLI::App* app = c.app.add_subcommand(
        "export", "write a checkpoint's weights for Hugging Face transformers");
    app->footer(
        "examples:\n"
        "  stagecoach export my-job --to hf ./my-model\n"
        "  stagecoach export my-job@0 --to hf ./untrained\n"
        "  stagecoach export my-job --to hf ./my-model --state stagecoach-state");
    app->add_option("JOB", own->target, "JOB or JOB@STEP")->required();
    // One option of two words, as `--to hf DIR`.
    auto words = std::make_shared<std::vector<std::string>>();
    app->add_option("--to", *words, "the form (hf) and the folder")
        ->type_name("hf DIR")
        ->expected(2)
        ->required();
    add_state_option(app, own->state);
    app->callback([c, own, words] {
      c.run = [c, own, words] {
        own->to = (*words)[0];
        own->out = (*words)[1];
        if (own->to != "hf")
          return complain(c.flags, make_error(errc::usage, "--to {}: unknown form. fix: --to hf {}",
                                              own->to, own->out));
        return run_export(c.flags, *own);
      };
    });
  }
  add_sample(c);
}

}  // namespace stagecoach
