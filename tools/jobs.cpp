// Commands about jobs: plan submit jobs status why logs events metrics pause resume cancel
// priority wait.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <thread>

#include "config/job_spec_yaml.hpp"
#include "config/leaves.hpp"
#include "model/plan.hpp"
#include "tools/command.hpp"
#include "tools/follow.hpp"
#include "tools/job_file.hpp"
#include "tools/table.hpp"

namespace stagecoach {
namespace {

using nlohmann::json;

struct job_flags {
  std::string file, job, until, since, timeout = "0", level = "debug", worker;
  std::vector<std::string> jobs, overrides;
  bool detach = false, follow = false, all = false, now = false, wait = false, dry_run = false,
       resolved = false;
  double watch = 0;
  int tail = 0, priority = 0;
  std::int64_t from = 0, to = 0;
};
using shared_flags = std::shared_ptr<job_flags>;

double number(const json& j, const char* key, double fallback = std::nan("")) {
  const auto at = j.find(key);
  return at != j.end() && at->is_number() ? at->get<double>() : fallback;
}

// "30m", "10s", "2h", "500ms"; plain numbers are seconds. Negative: not a duration.
double parse_seconds(const std::string& text) {
  std::size_t used = 0;
  double value = -1;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    return -1;
  }
  const std::string unit = text.substr(used);
  if (unit.empty() || unit == "s") return value;
  if (unit == "ms") return value / 1e3;
  if (unit == "m") return value * 60;
  if (unit == "h") return value * 3600;
  return -1;
}

std::string clock_text(std::int64_t unix_ms) {
  const std::time_t seconds = unix_ms / 1000;
  std::tm parts{};
  localtime_r(&seconds, &parts);
  return fmt::format("{:02}:{:02}:{:02}.{:03}", parts.tm_hour, parts.tm_min, parts.tm_sec,
                     unix_ms % 1000);
}

// ---- plan
// ------------------------------------------------------------------------------------------------
json plan_json(const job_spec& spec) {
  json out = {{"name", spec.name},
              {"parameters", parameter_count(spec.model)},
              {"steps", spec.stop_steps},
              {"tokens_per_step", spec.batch.global_sequences * spec.batch.sequence_tokens},
              {"microbatches", spec.batch.microbatch_count()},
              {"leaves", spec.batch.leaf_count},
              {"layouts", json::array()}};
  for (int n = spec.elasticity.workers_min; n <= spec.elasticity.workers_max; ++n) {
    auto shape = choose_layout(spec, n);
    if (!shape) {
      out["layouts"].push_back({{"workers", n}, {"problem", shape.err().message}});
      continue;
    }
    json entry = {{"workers", n},
                  {"stages", shape->stage_count},
                  {"replicas", shape->replica_count},
                  {"schedule", shape->schedule},
                  {"unit_cuts", shape->unit_cuts},
                  {"leaf_cuts", shape->leaf_cuts},
                  {"leaf_balance", leaf_balance(spec.batch.leaf_count, shape->replica_count)}};
    stage_memory worst;
    int at = 0;
    for (int s = 0; s < shape->stage_count; ++s) {
      const stage_memory m = predict_memory(spec, *shape, s, 0);
      if (m.total() >= worst.total()) {
        worst = m;
        at = s;
      }
    }
    entry["memory"] = {{"stage", at},
                       {"bytes", worst.total()},
                       {"weights", worst.weights},
                       {"optimizer", worst.optimizer},
                       {"gradients", worst.gradients},
                       {"activations", worst.activations},
                       {"buffers", worst.buffers},
                       {"copies", worst.copies}};
    const double microbatches =
        static_cast<double>(spec.batch.microbatch_count()) / shape->replica_count;
    entry["bubble_theory"] = (shape->stage_count - 1) / (microbatches + shape->stage_count - 1);
    out["layouts"].push_back(std::move(entry));
  }
  return out;
}

/// Leaves are whole microbatches, so a step with few of them can't be dealt out evenly.
void print_balance_gap(const job_spec& spec, const json& plan) {
  std::string at;
  for (const auto& l : plan["layouts"])
    if (number(l, "leaf_balance", 1) < 0.9)
      at += (at.empty() ? "" : ", ") + std::to_string(l["workers"].get<int>());
  if (at.empty()) return;
  const elasticity_spec& e = spec.elasticity;
  const auto wanted = resolve_leaf_count(std::int64_t{1} << 40, e.workers_min, e.workers_max);
  const std::string fix =
      spec.batch.microbatch_count() % wanted == 0
          ? fmt::format("batch.leaves: {}, or auto", wanted)
          : fmt::format(
                "{} microbatches a step or a multiple (it has {}): a larger batch.global, or "
                "a smaller batch.micro",
                wanted, spec.batch.microbatch_count());
  std::printf("balance     below 90%% at %s workers. fix: %s\n", at.c_str(), fix.c_str());
}

exit_code run_plan(const global_flags& flags, const job_flags& own) {
  exit_code code = exit_code::success;
  auto job = load_job_file(flags, own.file, own.overrides, code);
  if (!job) return code;
  if (own.resolved) {
    std::fputs(job->resolved_yaml.c_str(), stdout);
    return code;
  }
  const json plan = plan_json(job->spec);
  if (print_object(flags, plan)) return code;
  const job_spec& s = job->spec;
  std::printf("%s ok: %s, %s parameters, %lld steps of %lld tokens\n", own.file.c_str(),
              s.model.preset.empty() ? "custom" : s.model.preset.c_str(),
              format_count(static_cast<double>(parameter_count(s.model))).c_str(),
              static_cast<long long>(s.stop_steps),
              static_cast<long long>(s.batch.global_sequences * s.batch.sequence_tokens));
  std::printf(
      "batch       %lld sequences of %lld tokens = %lld microbatches of %lld, %lld leaves\n",
      static_cast<long long>(s.batch.global_sequences),
      static_cast<long long>(s.batch.sequence_tokens),
      static_cast<long long>(s.batch.microbatch_count()),
      static_cast<long long>(s.batch.micro_sequences), static_cast<long long>(s.batch.leaf_count));
  std::printf("%-8s %-18s %-9s %-8s %-9s %s\n", "WORKERS", "LAYOUT", "SCHEDULE", "BUBBLE",
              "BALANCE",
              "WORST STAGE (weights + optimizer + gradients + activations + buffers + copies)");
  for (const auto& l : plan["layouts"]) {
    if (l.contains("problem")) {
      std::printf("%-8d %s\n", l["workers"].get<int>(), l["problem"].get<std::string>().c_str());
      continue;
    }
    const auto& m = l["memory"];
    std::printf(
        "%-8d %-18s %-9s %-8s %-9s %d: %s (%s + %s + %s + %s + %s + %s)\n", l["workers"].get<int>(),
        fmt::format("{} stages x {} rep", l["stages"].get<int>(), l["replicas"].get<int>()).c_str(),
        l["schedule"].get<std::string>().c_str(),
        fmt::format("{:.1f}%", l["bubble_theory"].get<double>() * 100).c_str(),
        fmt::format("{:.0f}%", l["leaf_balance"].get<double>() * 100).c_str(),
        m["stage"].get<int>(), format_bytes(m["bytes"].get<double>()).c_str(),
        format_bytes(m["weights"].get<double>()).c_str(),
        format_bytes(m["optimizer"].get<double>()).c_str(),
        format_bytes(m["gradients"].get<double>()).c_str(),
        format_bytes(m["activations"].get<double>()).c_str(),
        format_bytes(m["buffers"].get<double>()).c_str(),
        format_bytes(m["copies"].get<double>()).c_str());
  }
  print_balance_gap(s, plan);
  std::printf("submit it:  stagecoach submit %s\n", own.file.c_str());
  return code;
}

// ---- submit
// ----------------------------------------------------------------------------------------------
exit_code run_submit(const global_flags& flags, const job_flags& own) {
  exit_code code = exit_code::success;
  auto job = load_job_file(flags, own.file, own.overrides, code);
  if (!job) return code;
  if (own.dry_run) return run_plan(flags, own);
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  auto id = submit_job_file(flags, *api, *job, code);
  if (!id) return code;
  const bool watch = own.wait || (!own.detach && is_terminal(STDOUT_FILENO) && !flags.quiet);
  if (flags.quiet) {
    std::printf("%s\n", id->c_str());
  } else if (flags.is_json() && !watch) {
    print_object(flags, {{"id", *id}, {"name", job->spec.name}});
  } else if (!flags.is_json()) {
    std::printf("job/%s submitted  (%s)\n", job->spec.name.c_str(), id->c_str());
    if (!watch) std::printf("follow it: stagecoach logs -f %s\n", job->spec.name.c_str());
  }
  if (!watch) return exit_code::success;
  if (!flags.is_json()) std::printf("streaming; Ctrl-C stops watching, the job keeps running\n");
  watch_interrupts();
  const follow_outcome end = follow_job(flags, *api, *id, job->spec.log_every_steps);
  if (flags.is_json()) print_object(flags, end.job);
  if (end.code == exit_code::interrupted && !flags.is_json())
    std::printf("follow again: stagecoach logs -f %s      stop: stagecoach cancel %s\n",
                job->spec.name.c_str(), job->spec.name.c_str());
  return end.code;
}

// ---- jobs
// ------------------------------------------------------------------------------------------------
const char* short_state(const std::string& state) {
  static const std::pair<const char*, const char*> codes[] = {
      {"PENDING", "PD"},    {"PLANNING", "PL"}, {"RUNNING", "R"},
      {"RECOVERING", "RE"}, {"PAUSED", "S"},    {"CHECKPOINTING", "CP"},
      {"COMPLETED", "CD"},  {"FAILED", "F"},    {"CANCELLED", "CA"}};
  for (const auto& [name, code] : codes)
    if (state == name) return code;
  return "?";
}

std::string job_cell(const json& row, const std::string& key) {
  if (key == "step") return fmt::format("{}/{}", plain(row, "step"), plain(row, "steps"));
  if (key == "loss" || key == "valid_loss") {
    const double x = number(row, key.c_str());
    return std::isnan(x) ? "-" : fmt::format("{:.4f}", x);
  }
  if (key == "tokens_per_s") {
    const double x = number(row, key.c_str(), 0);
    return x > 0 ? format_count(x) : "-";
  }
  if (key == "workers")
    return fmt::format("{}/{}", plain(row, "workers"), plain(row, "workers_max"));
  if (key == "eta_s") {
    const double x = number(row, key.c_str(), -1);
    return x >= 0 && !is_end_state(plain(row, "state")) ? format_duration(x) : "-";
  }
  if (key == "weights_hash") return plain(row, key).substr(0, 12);
  if (key == "code") return short_state(plain(row, "state"));
  if (key == "submitted_unix_ms") return age_since(row.value("submitted_unix_ms", std::int64_t{0}));
  if (key == "reason") {
    std::string text = plain(row, key);
    for (char& c : text)
      if (c == ' ') c = '-';
    return text.size() > 48 ? text.substr(0, 45) + "..." : text;
  }
  return plain(row, key);
}

exit_code run_jobs(const global_flags& flags, const job_flags& own) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  watch_interrupts();
  for (;;) {
    auto reply = api->get(own.all ? "/jobs?all=1" : "/jobs");
    if (!reply) return complain(flags, reply.err());
    print_table(flags,
                {{"NAME", "name"},
                 {"ID", "id"},
                 {"STATE", "state"},
                 {"ST", "code", true},
                 {"STEP", "step"},
                 {"LOSS", "loss"},
                 {"VALID", "valid_loss", true},
                 {"TOK/S", "tokens_per_s"},
                 {"WORKERS", "workers"},
                 {"ETA", "eta_s"},
                 {"PRIORITY", "priority", true},
                 {"QUEUE", "queue", true},
                 {"AGE", "submitted_unix_ms", true},
                 {"HASH", "weights_hash", true},
                 {"REASON", "reason"}},
                (*reply)["jobs"], job_cell);
    if (own.watch <= 0 || is_interrupted()) return exit_code::success;
    std::fflush(stdout);
    std::this_thread::sleep_for(std::chrono::duration<double>(own.watch));
    if (is_interrupted()) return exit_code::interrupted;
  }
}

// ---- status
// ----------------------------------------------------------------------------------------------
exit_code show_status(const global_flags& flags, const api_client& api, const std::string& job) {
  auto view = api.get("/jobs/" + percent_encode(job));
  if (!view) {
    if (view.err().code == errc::not_found && !flags.is_json()) {
      complain(flags, view.err());
      std::fprintf(stderr, "  list them: stagecoach jobs --all\n");
      return exit_code::not_found;
    }
    return complain(flags, view.err());
  }
  if (print_object(flags, *view)) return exit_code::success;
  const json& v = *view;
  const double steps = number(v, "steps", 0), step = number(v, "step", 0);
  std::printf("%s  %s   %s%s\n", plain(v, "name").c_str(), plain(v, "id").c_str(),
              plain(v, "state").c_str(),
              number(v, "recoveries", 0) > 0
                  ? fmt::format("  (recovered {} times)", plain(v, "recoveries")).c_str()
                  : "");
  if (!v.value("reason", "").empty())
    std::printf("Reason    %s\n", v["reason"].get<std::string>().c_str());
  std::string bar(30, '.');
  for (std::size_t i = 0; i < bar.size() && steps > 0 && static_cast<double>(i) < step / steps * 30;
       ++i)
    bar[i] = '#';
  std::printf("Progress  %.0f / %.0f steps  [%s]  %.1f%%  ETA %s\n", step, steps, bar.c_str(),
              steps > 0 ? 100 * step / steps : 0, job_cell(v, "eta_s").c_str());
  std::printf("Loss      train %s   valid %s\n", job_cell(v, "loss").c_str(),
              job_cell(v, "valid_loss").c_str());
  const double ms = number(v, "step_ms", 0);
  std::printf("Speed     %s tok/s   %s ms/step\n", job_cell(v, "tokens_per_s").c_str(),
              ms > 0 ? fmt::format("{:.1f}", ms).c_str() : "-");
  if (v.contains("checkpoint") && v["checkpoint"].is_object()) {
    const auto& c = v["checkpoint"];
    std::printf("Saved     step %s, %s ago, %s parts, %s, %s\n", plain(c, "step").c_str(),
                age_since(c.value("unix_ms", std::int64_t{0})).c_str(), plain(c, "parts").c_str(),
                format_bytes(number(c, "bytes", 0)).c_str(), plain(c, "state").c_str());
  }
  if (!is_end_state(plain(v, "state")))
    std::printf(
        "Safe      survives %s more losses without redoing a step, weakest %s   generation %s\n",
        plain(v, "survives_losses").c_str(), plain(v, "weakest").c_str(),
        plain(v, "generation").c_str());
  std::printf("Hash      %s at step %s\n", plain(v, "weights_hash").c_str(),
              plain(v, "hash_step").c_str());
  if (v.contains("plan") && v["plan"].is_object() && v["plan"].contains("members") &&
      !v["plan"]["members"].empty()) {
    const auto& p = v["plan"];
    std::printf("Layout    %s stages x %s replicas, %s\n", plain(p, "stages").c_str(),
                plain(p, "replicas").c_str(), plain(p, "schedule").c_str());
    global_flags table = flags;
    table.output = "table";
    print_table(table,
                {{"RANK", "rank"},
                 {"STAGE", "stage"},
                 {"REPLICA", "replica"},
                 {"UNITS", "units"},
                 {"WORKER", "name"}},
                p["members"], [](const json& row, const std::string& key) {
                  std::string text = plain(row, key);
                  std::erase_if(text, [](char c) { return c == '"' || c == '[' || c == ']'; });
                  return text;
                });
    std::string joining;
    for (const auto& name : p.value("joining", json::array()))
      joining += (joining.empty() ? "" : ", ") + name.get<std::string>();
    if (!joining.empty()) std::printf("Joining   %s\n", joining.c_str());
  }
  if (auto events = api.get("/jobs/" + percent_encode(job) + "/events")) {
    const auto& list = (*events)["events"];
    const std::size_t shown = std::min<std::size_t>(3, list.size());
    std::printf("Events (last %zu of %zu; stagecoach events %s)\n", shown, list.size(),
                plain(v, "name").c_str());
    for (std::size_t i = list.size() - shown; i < list.size(); ++i)
      std::printf("  %-5s  %s\n", age_since(list[i].value("unix_ms", std::int64_t{0})).c_str(),
                  plain(list[i], "text").c_str());
  }
  return exit_code::success;
}

exit_code run_status(const global_flags& flags, const job_flags& own) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  if (own.job.empty()) return run_jobs(flags, own);
  watch_interrupts();
  for (;;) {
    if (own.watch > 0 && is_terminal(STDOUT_FILENO)) std::printf("\033[H\033[2J");
    const exit_code code = show_status(flags, *api, own.job);
    if (own.watch <= 0 || code != exit_code::success) return code;
    std::fflush(stdout);
    std::this_thread::sleep_for(std::chrono::duration<double>(own.watch));
    if (is_interrupted()) return exit_code::interrupted;
  }
}

exit_code run_why(const global_flags& flags, const job_flags& own) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  auto reply = api->get("/jobs/" + percent_encode(own.job) + "/why");
  if (!reply) return complain(flags, reply.err());
  if (!print_object(flags, *reply)) std::printf("%s\n", plain(*reply, "text").c_str());
  return exit_code::success;
}

// ---- logs, events: lists that grow
// ---------------------------------------------------------------------
bool is_shown(const job_flags& own, const json& line) {
  static const std::vector<std::string> order = {"debug", "info", "warn", "error"};
  const auto rank = [](const std::string& name) {
    return std::find(order.begin(), order.end(), name) - order.begin();
  };
  if (!own.worker.empty() && line.value("worker", "") != own.worker) return false;
  if (line.contains("level") && line["level"].is_string() && rank(line["level"]) < rank(own.level))
    return false;
  if (!own.since.empty()) {
    const double seconds = parse_seconds(own.since);
    const auto now = std::chrono::duration_cast<std::chrono::milliseconds>(
                         std::chrono::system_clock::now().time_since_epoch())
                         .count();
    if (static_cast<double>(now - line.value("unix_ms", std::int64_t{0})) > seconds * 1e3)
      return false;
  }
  return true;
}

exit_code run_list(const global_flags& flags, const job_flags& own, const std::string& kind) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  if (!own.since.empty() && parse_seconds(own.since) < 0)
    return complain(
        flags, make_error(errc::usage, "--since {}: not a time. fix: 10m, 30s, 2h", own.since));
  watch_interrupts();
  const std::string path =
      own.job.empty() ? "/events" : "/jobs/" + percent_encode(own.job) + "/" + kind;
  const std::string key = kind == "logs" ? "lines" : "events";
  std::int64_t next = 0;
  bool is_first = true;
  json all = json::array();
  for (;;) {
    auto reply = api->get(fmt::format("{}?since={}", path, next));
    if (!reply) {
      if (!own.follow || reply.err().code == errc::not_found) return complain(flags, reply.err());
      std::this_thread::sleep_for(std::chrono::milliseconds(500));  // away; it will be back
      if (is_interrupted()) return exit_code::interrupted;
      continue;
    }
    next = reply->value("next", next);
    json lines = json::array();
    for (const auto& line : (*reply)[key])
      if (is_shown(own, line)) lines.push_back(line);
    std::size_t begin = 0;
    if (is_first && own.tail > 0 && lines.size() > static_cast<std::size_t>(own.tail))
      begin = lines.size() - static_cast<std::size_t>(own.tail);
    for (std::size_t i = begin; i < lines.size(); ++i) {
      const json& line = lines[i];
      if (flags.output == "json" && !own.follow) {
        all.push_back(line);
      } else if (flags.is_json()) {
        std::printf("%s\n", line.dump().c_str());
      } else {
        const std::string tag = kind == "logs" ? plain(line, "worker") : plain(line, "kind");
        std::printf("%s  %-5s  %-20s  %s\n",
                    clock_text(line.value("unix_ms", std::int64_t{0})).c_str(),
                    line.value("level", "info").c_str(), tag.c_str(), plain(line, "text").c_str());
      }
    }
    std::fflush(stdout);
    is_first = false;
    if (!own.follow) break;
    if (!own.job.empty()) {
      auto view = api->get("/jobs/" + percent_encode(own.job));
      if (view && is_end_state(view->value("state", "")) && lines.empty())
        return exit_code::success;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    if (is_interrupted()) return exit_code::interrupted;
  }
  if (flags.output == "json") print_object(flags, all);
  return exit_code::success;
}

// `logs -f` shows the steps too, as `submit` does.
exit_code run_logs(const global_flags& flags, const job_flags& own) {
  if (!own.follow || flags.is_json() || !own.worker.empty()) return run_list(flags, own, "logs");
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  auto view = api->get("/jobs/" + percent_encode(own.job));
  if (!view) return complain(flags, view.err());
  watch_interrupts();
  const auto every =
      (*view)["spec"].is_object() ? (*view)["spec"].value("log_every_steps", 10) : 10;
  return follow_job(flags, *api, percent_encode(own.job), std::max(1, every)).code;
}

exit_code run_metrics(const global_flags& flags, const job_flags& own) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  std::string query = fmt::format("/jobs/{}/series?from={}", percent_encode(own.job), own.from);
  if (own.to > 0) query += fmt::format("&to={}", own.to);
  auto reply = api->get(query);
  if (!reply) return complain(flags, reply.err());
  if (flags.output == "json" || flags.output == "yaml") {
    print_object(flags, *reply);
    return exit_code::success;
  }
  print_table(flags,
              {{"STEP", "step"},
               {"LOSS", "loss"},
               {"NORM", "norm"},
               {"LR", "lr"},
               {"MS", "step_ms"},
               {"TOK/S", "tokens_per_s"}},
              (*reply)["steps"], [](const json& row, const std::string& key) {
                const double x = number(row, key.c_str());
                if (key == "step") return plain(row, key);
                return std::isnan(x) ? std::string("-") : fmt::format("{:.6g}", x);
              });
  return exit_code::success;
}

// ---- verbs that change a job
// -----------------------------------------------------------------------------
exit_code run_verb(const global_flags& flags, const job_flags& own, const std::string& verb) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  exit_code code = exit_code::success;
  json replies = json::array();
  for (const std::string& job : own.jobs) {
    json body = json::object();
    if (verb == "cancel") body["now"] = own.now;
    auto reply = api->post("/jobs/" + percent_encode(job) + "/" + verb, body);
    if (!reply) {
      code = complain(flags, reply.err());
      continue;
    }
    replies.push_back(*reply);
    if (!flags.is_json() && !flags.quiet) {
      const char* done = verb == "pause"    ? "pausing after a checkpoint"
                         : verb == "resume" ? "resumed"
                         : verb == "save"   ? "saving a checkpoint"
                         : own.now          ? "cancelled"
                                            : "cancelling after a checkpoint";
      std::printf("job/%s %s\n", job.c_str(), done);
    }
  }
  if (flags.is_json()) print_object(flags, replies);
  return code;
}

exit_code run_priority(const global_flags& flags, const job_flags& own) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  auto reply =
      api->post("/jobs/" + percent_encode(own.job) + "/priority", {{"priority", own.priority}});
  if (!reply) return complain(flags, reply.err());
  if (!print_object(flags, *reply) && !flags.quiet)
    std::printf("job/%s has priority %d\n", own.job.c_str(), own.priority);
  return exit_code::success;
}

exit_code run_wait(const global_flags& flags, const job_flags& own) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  const double timeout = parse_seconds(own.timeout);
  if (timeout < 0)
    return complain(
        flags, make_error(errc::usage, "--timeout {}: not a time. fix: 30m, 90s", own.timeout));
  std::int64_t target = -1;
  if (own.until.rfind("step=", 0) == 0) {
    target = std::atoll(own.until.c_str() + 5);
  } else if (own.until != "completed" && own.until != "running" && own.until != "paused") {
    return complain(
        flags, make_error(errc::usage, "--for {}: expected completed, running, paused or step=N",
                          own.until));
  }
  watch_interrupts();
  const auto began = std::chrono::steady_clock::now();
  for (;;) {
    if (is_interrupted()) return exit_code::interrupted;
    auto view = api->get("/jobs/" + percent_encode(own.job), std::chrono::seconds(5));
    if (!view && view.err().code != errc::unreachable && view.err().code != errc::timed_out)
      return complain(flags, view.err());
    if (view) {
      const std::string state = view->value("state", "");
      const bool reached = target >= 0              ? view->value("step", std::int64_t{0}) >= target
                           : own.until == "running" ? state == "RUNNING"
                           : own.until == "paused"  ? state == "PAUSED"
                                                    : state == "COMPLETED";
      if (reached || is_end_state(state)) {
        if (!print_object(flags, *view) && !flags.quiet)
          std::printf("job/%s %s at step %s\n", own.job.c_str(), state.c_str(),
                      plain(*view, "step").c_str());
        return reached ? exit_code::success : exit_code_of_state(state);
      }
    }
    const double waited =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    if (timeout > 0 && waited > timeout)
      return complain(flags, make_error(errc::timed_out, "job/{} was not {} within {}", own.job,
                                        own.until, own.timeout));
    // A coordinator that is away may come back; without a time limit give it a minute.
    if (!view && timeout == 0 && waited > 60) return complain(flags, view.err());
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

CLI::App* add(command_line c, const char* name, const char* about, const shared_flags& own,
              exit_code (*run)(const global_flags&, const job_flags&),
              const std::string& examples) {
  CLI::App* app = c.app.add_subcommand(name, about);
  app->footer("examples:\n" + examples);
  app->callback([c, own, run] { c.run = [c, own, run] { return run(c.flags, *own); }; });
  return app;
}

}  // namespace

void add_job_commands(command_line c) {
  const auto fresh = [] { return std::make_shared<job_flags>(); };
  {
    auto own = fresh();
    auto app =
        add(c, "plan", "check a job file and show its layouts and memory; changes nothing", own,
            run_plan,
            "  stagecoach plan job.yaml\n  stagecoach plan job.yaml --set batch.micro=8 -o json\n"
            "  stagecoach plan job.yaml --resolved > resolved.yaml");
    app->add_option("FILE", own->file, "job file (- is stdin)")->required();
    app->add_option("--set", own->overrides, "PATH=VALUE over the file (repeatable)");
    app->add_flag("--resolved", own->resolved, "print the job with every auto replaced");
  }
  {
    auto own = fresh();
    auto app = add(c, "submit", "submit a job; streams its progress on a terminal", own, run_submit,
                   "  stagecoach submit job.yaml\n  stagecoach submit job.yaml -d\n"
                   "  stagecoach submit job.yaml --wait -q     exit code is the job's");
    app->add_option("FILE", own->file, "job file (- is stdin)")->required();
    app->add_option("--set", own->overrides, "PATH=VALUE over the file (repeatable)");
    app->add_flag("-d,--detach", own->detach, "return at once");
    app->add_flag("--wait", own->wait, "wait for its end, on a pipe too");
    app->add_flag("--dry-run", own->dry_run, "as plan");
  }
  {
    auto own = fresh();
    auto app = add(c, "jobs", "list jobs", own, run_jobs,
                   "  stagecoach jobs\n  stagecoach jobs --all -o wide");
    app->alias("ps");
    app->add_flag("--all", own->all, "finished ones too");
    app->add_option("-w,--watch", own->watch, "again every SECONDS")
        ->expected(0, 1)
        ->default_str("2");
  }
  {
    auto own = fresh();
    auto app =
        add(c, "status", "one job: progress, loss, speed, layout, last events", own, run_status,
            "  stagecoach status my-job\n  stagecoach status my-job -w 2\n  stagecoach status "
            "j-000012 -o json");
    app->add_option("JOB", own->job, "name or id (none: all jobs)");
    app->add_option("-w,--watch", own->watch, "again every SECONDS")
        ->expected(0, 1)
        ->default_str("2");
  }
  {
    auto own = fresh();
    auto app = add(c, "why", "why a job is pending, slow or restarting, in words", own, run_why,
                   "  stagecoach why my-job");
    app->add_option("JOB", own->job, "name or id")->required();
  }
  {
    auto own = fresh();
    auto app = add(c, "logs", "a job's log lines; -f follows its progress", own, run_logs,
                   "  stagecoach logs my-job --tail 20\n  stagecoach logs -f my-job\n"
                   "  stagecoach logs my-job --worker w-03 --level warn");
    app->add_option("JOB", own->job, "name or id")->required();
    app->add_flag("-f,--follow", own->follow, "go on until the job ends");
    app->add_option("--since", own->since, "only lines of the last 10m, 2h, ...");
    app->add_option("--worker", own->worker, "only of this worker");
    app->add_option("--level", own->level, "least level: debug info warn error")
        ->check(CLI::IsMember({"debug", "info", "warn", "error"}));
    app->add_option("--tail", own->tail, "only the last N");
  }
  {
    auto own = fresh();
    CLI::App* app =
        c.app.add_subcommand("events", "what happened: placed, lost, recovered, saved, ...");
    app->footer("examples:\n  stagecoach events my-job\n  stagecoach events -f -o jsonl");
    app->add_option("JOB", own->job, "name or id (none: of all)");
    app->add_flag("-f,--follow", own->follow, "go on");
    app->add_option("--since", own->since, "only of the last 10m, 2h, ...");
    app->add_option("--tail", own->tail, "only the last N");
    app->callback([c, own] { c.run = [c, own] { return run_list(c.flags, *own, "events"); }; });
  }
  {
    auto own = fresh();
    auto app = add(c, "metrics", "a job's series: loss, norm, lr, speed per step", own, run_metrics,
                   "  stagecoach metrics my-job --from 100 --to 200\n  stagecoach metrics my-job "
                   "-o csv > loss.csv");
    app->add_option("JOB", own->job, "name or id")->required();
    app->add_option("--from", own->from, "first step");
    app->add_option("--to", own->to, "last step");
  }
  for (const auto& [verb, about] :
       {std::pair{"pause", "pause jobs: a checkpoint, then their workers are free"},
        {"resume", "let paused jobs go on"},
        {"cancel", "end jobs after a checkpoint (--now: without)"},
        {"save", "save a checkpoint after the next step"}}) {
    auto own = fresh();
    CLI::App* app = c.app.add_subcommand(verb, about);
    app->footer(fmt::format("examples:\n  stagecoach {} my-job", verb));
    app->add_option("JOB", own->jobs, "names or ids")->required();
    if (std::string(verb) == "cancel") app->add_flag("--now", own->now, "without a checkpoint");
    app->callback([c, own, name = std::string(verb)] {
      c.run = [c, own, name] { return run_verb(c.flags, *own, name); };
    });
  }
  {
    auto own = fresh();
    auto app = add(c, "priority", "change a job's priority, waiting or running; larger first", own,
                   run_priority, "  stagecoach priority my-job 5\n  stagecoach why my-job");
    app->add_option("JOB", own->job, "name or id")->required();
    app->add_option("N", own->priority, "-1000000 to 1000000")
        ->required()
        ->check(CLI::Range(-1000000, 1000000));
  }
  {
    auto own = fresh();
    own->until = "completed";
    auto app =
        add(c, "wait", "wait for a job", own, run_wait,
            "  stagecoach wait my-job --timeout 30m\n  stagecoach wait my-job --for step=1000\n"
            "exit code: 0 reached, 1 failed, 8 timed out, 10 cancelled");
    app->add_option("JOB", own->job, "name or id")->required();
    app->add_option("--for", own->until, "completed, running, paused or step=N");
    app->add_option("--timeout", own->timeout, "30m, 90s; 0 = none");
  }
}

}  // namespace stagecoach
