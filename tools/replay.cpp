// stagecoach replay: computes a window of a job's steps again on this machine and compares it with
// the job's vote log and checkpoints.
#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <set>
#include <thread>

#include "coordinator/wire.hpp"
#include "tools/command.hpp"
#include "tools/follow.hpp"
#include "tools/sample.hpp"
#include "tools/state_api.hpp"
#include "tools/table.hpp"
#include "worker/device_probe.hpp"
#include "worker/window_run.hpp"

namespace stagecoach {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct replay_flags {
  std::string job, steps, state, schedule = "zb-h1";
  int workers = 0, stages = 0, replicas = 0, threads = 0;
};

/// Which layout computed which steps, and who held its stages.
struct held_span {
  layout_span span;
  std::vector<std::string> members;  // by rank
};

struct job_facts {
  job_spec spec;
  std::string name, device_class;
  std::uint64_t step = 0;
  std::vector<held_span> held;
};

std::uint64_t hex_of(const json& row, const char* key) {
  const std::string text = row.value(key, "");
  std::uint64_t bits = 0;
  std::from_chars(text.data(), text.data() + text.size(), bits, 16);
  return bits;
}

result<std::pair<std::uint64_t, std::uint64_t>> parse_steps(const std::string& text) {
  const auto colon = text.find(':');
  std::uint64_t first = 0, last = 0;
  const auto read = [](std::string_view digits, std::uint64_t& out) {
    const auto [end, code] = std::from_chars(digits.data(), digits.data() + digits.size(), out);
    return code == std::errc() && end == digits.data() + digits.size();
  };
  const bool is_range = colon != std::string::npos && read(text.substr(0, colon), first) &&
                        read(text.substr(colon + 1), last);
  if (!is_range || first == 0 || last < first)
    return make_error(errc::usage,
                      "--steps {}: expected FIRST:LAST, steps from 1. fix: --steps 101:200", text);
  return std::pair{first, last};
}

result<job_facts> facts_of(const api_client& api, const std::string& job) {
  const std::string path = "/jobs/" + percent_encode(job);
  auto view = api.get(path);
  if (!view) return view.err();
  auto spec = from_json_text<job_spec>((*view)["spec"].dump());
  if (!spec) return spec.err();
  auto generations = api.get(path + "/generations");
  if (!generations) return generations.err();
  job_facts facts;
  facts.spec = std::move(*spec);
  facts.name = view->value("name", job);
  facts.device_class = view->value("device_class", "");
  facts.step = view->value("step", std::uint64_t{0});
  for (const auto& g : (*generations)["generations"]) {
    held_span h;
    h.span.first_step = g.value("from_step", std::uint64_t{0}) + 1;
    h.span.shape.stage_count = g.value("stages", 1);
    h.span.shape.replica_count = g.value("replicas", 1);
    h.span.shape.unit_cuts = g.value("unit_cuts", std::vector<int>{});
    h.span.shape.leaf_cuts = g.value("leaf_cuts", std::vector<int>{});
    h.members = g.value("members", std::vector<std::string>{});
    // What it began with was computed before it, what an older one made later was done again.
    while (!facts.held.empty() && facts.held.back().span.first_step >= h.span.first_step)
      facts.held.pop_back();
    facts.held.push_back(std::move(h));
  }
  return facts;
}

/// The instruction set with which this machine is of the job's device class.
result<std::string> isa_for(const job_facts& facts, const std::string& job) {
  std::string here;
  for (const char* isa : {"", "avx512", "avx2"}) {
    const std::string found = device_class(1, isa);
    if (here.empty()) here = found;
    if (facts.device_class.empty() || found == facts.device_class) return std::string(isa);
  }
  return make_error(errc::conflict,
                    "job {} was computed on device class {}, this machine is {}: its bits would "
                    "differ without any fault. fix: replay on a machine of that class",
                    job, facts.device_class, here);
}

result<layout> layout_for(const job_spec& spec, const replay_flags& own) {
  if (own.stages > 0 || own.replicas > 0) {
    job_spec fixed = spec;
    fixed.parallelism.is_explicit = true;
    fixed.parallelism.stages = std::max(1, own.stages);
    fixed.parallelism.replicas = std::max(1, own.replicas);
    fixed.parallelism.schedule = own.schedule;
    return choose_layout(fixed, fixed.parallelism.stages * fixed.parallelism.replicas);
  }
  job_spec free = spec;
  free.parallelism.is_explicit = false;
  return choose_layout(free, std::max(1, own.workers));
}

result<std::map<std::uint64_t, step_report>> read_log(const api_client& api, const std::string& job,
                                                      std::uint64_t from, std::uint64_t to,
                                                      json& gaps) {
  std::map<std::uint64_t, step_report> rows;
  for (std::uint64_t next = from; next <= to;) {
    auto page = api.get(fmt::format("/jobs/{}/log?from={}&to={}", percent_encode(job), next, to));
    if (!page) return page.err();
    for (const auto& row : (*page)["steps"]) {
      step_report r;
      r.step = row.value("step", std::uint64_t{0});
      r.loss.bits = hex_of(row, "loss_bits");
      r.norm.bits = hex_of(row, "norm_bits");
      r.chain = hex_of(row, "chain");
      r.weights_hash = row.value("weights_hash", "");
      r.stage_hashes = row.value("stage_hashes", std::vector<std::string>{});
      rows[r.step] = std::move(r);
    }
    for (const auto& gap : (*page)["gaps"]) gaps.push_back(gap);
    if (!(*page)["next"].is_number()) break;
    next = (*page)["next"].get<std::uint64_t>();
  }
  return rows;
}

result<std::vector<part_record>> parts_of(const api_client& api, const std::string& job,
                                          std::uint64_t step) {
  auto m = api.get(fmt::format("/jobs/{}/checkpoints/{}", percent_encode(job), step));
  if (!m) return m.err();
  std::vector<part_record> parts;
  for (const auto& part : (*m)["parts"]) {
    part_record p;
    p.file = part.value("file", "");
    p.folder = part.value("folder", "");
    p.root_hash = part.value("root_hash", "");
    p.tensors = part.value("tensors", std::vector<std::string>{});
    std::error_code ignored;
    if (!fs::exists(fs::path(p.folder) / p.file, ignored))
      return make_error(errc::not_found,
                        "part {}/{} of the checkpoint of step {} is not on this host. fix: replay "
                        "on host {}, or give the job a checkpoint.store that all hosts see",
                        p.folder, p.file, step, part.value("host", ""));
    parts.push_back(std::move(p));
  }
  return parts;
}

/// The state to start from, the log, and the checkpoints to compare with.
result<window> gather(const api_client& api, const job_facts& facts, std::uint64_t first,
                      std::uint64_t last, json& gaps) {
  window w;
  w.spec = facts.spec;
  w.last = last;
  for (const held_span& h : facts.held) w.layouts.push_back(h.span);
  auto list = api.get("/jobs/" + percent_encode(facts.name) + "/checkpoints");
  if (!list) return list.err();
  // A few checkpoints before the window, should the newest turn out to be of steps that were done
  // again.
  std::set<std::uint64_t> before;
  for (const auto& c : (*list)["checkpoints"])
    if (const auto step = c.value("step", std::uint64_t{0}); step > 0 && step < first)
      before.insert(step);
  while (before.size() > 4) before.erase(before.begin());
  auto log = read_log(api, facts.name, before.empty() ? 1 : *before.begin(), last + 1, gaps);
  if (!log) return log.err();
  if (log->count(last) == 0)
    return make_error(
        errc::not_found,
        "the vote log of job {} has no step {}; it is at step {}. fix: --steps within "
        "1:{}",
        facts.name, last, facts.step, facts.step);
  for (const auto& c : (*list)["checkpoints"]) {
    const auto step = c.value("step", std::uint64_t{0});
    if (c.value("state", "") != "verified" || step > last || w.saved.count(step) != 0) continue;
    // One of steps that were rolled back and done again has another chain.
    const auto row = log->find(step);
    if (step > 0 && row != log->end() && row->second.chain != hex_of(c, "chain")) continue;
    auto parts = parts_of(api, facts.name, step);
    if (!parts) return parts.err();
    w.saved[step] = std::move(*parts);
  }
  for (const auto& [step, parts] : w.saved) {
    if (step >= first || (step > 0 && log->count(step) == 0)) continue;
    w.step = step;
    w.parts = parts;
    w.chain = step == 0 ? 0 : log->at(step).chain;
  }
  w.saved.erase(w.saved.begin(), w.saved.upper_bound(w.step));
  w.log = std::move(*log);
  return w;
}

/// "w2", or "one of w1, w3": who held the stages that differ when the step was computed.
std::vector<std::string> holders_of(const job_facts& facts, const window_verdict& v) {
  const held_span* held = nullptr;
  // Wrong weights after a step were kept by whoever computed the next one.
  const std::uint64_t step = v.what == "weights" ? v.step + 1 : v.step;
  for (const held_span& h : facts.held)
    if (h.span.first_step <= step) held = &h;
  std::vector<std::string> names;
  if (held == nullptr) return names;
  for (std::size_t rank = 0; rank < held->members.size(); ++rank) {
    const int stage = static_cast<int>(rank) % held->span.shape.stage_count;
    const bool is_meant =
        v.stages.empty() || std::find(v.stages.begin(), v.stages.end(), stage) != v.stages.end();
    if (is_meant) names.push_back(held->members[rank]);
  }
  return names;
}

exit_code report(const global_flags& flags, const job_facts& facts, const window& w,
                 std::uint64_t first, const window_verdict& v, const json& gaps, double seconds) {
  const auto names = v.is_identical ? std::vector<std::string>{} : holders_of(facts, v);
  if (!print_object(flags, {{"job", facts.name},
                            {"identical", v.is_identical},
                            {"first", first},
                            {"last", w.last},
                            {"from_checkpoint", w.step},
                            {"step", v.step},
                            {"what", v.what},
                            {"stages", v.stages},
                            {"checkpoint", v.tensors.empty() ? json(nullptr) : json(v.saved_step)},
                            {"tensors", v.tensors},
                            {"workers", names},
                            {"hashes", v.compared},
                            {"gaps", gaps},
                            {"seconds", seconds}})) {
    if (v.is_identical) {
      std::printf("identical: steps %llu to %llu, %llu hashes\n",
                  static_cast<unsigned long long>(first), static_cast<unsigned long long>(w.last),
                  static_cast<unsigned long long>(v.compared));
    } else {
      std::printf("not identical: %s\n", v.text.c_str());
      if (!names.empty()) {
        std::string list;
        for (const std::string& n : names) list += (list.empty() ? "" : ", ") + n;
        std::printf("held by %s%s\n", names.size() > 1 ? "one of " : "", list.c_str());
      }
      if (v.tensors.empty() && v.what != "checkpoint")
        std::printf(
            "no checkpoint lies between it and step %llu: a longer window, to one, names "
            "the tensors\n",
            static_cast<unsigned long long>(w.last));
    }
    for (const auto& gap : gaps)
      std::fprintf(stderr, "the log has no rows of steps %llu to %llu: they were not compared\n",
                   gap[0].get<unsigned long long>(), gap[1].get<unsigned long long>());
    if (flags.verbose)
      std::fprintf(stderr, "computed %llu steps from the %s of step %llu in %s\n",
                   static_cast<unsigned long long>(v.step - w.step),
                   w.parts.empty() ? "initial weights" : "checkpoint",
                   static_cast<unsigned long long>(w.step), format_duration(seconds).c_str());
  }
  return v.is_identical ? exit_code::success : exit_code::failed;
}

exit_code run_replay(const global_flags& flags, const replay_flags& own) {
  const auto steps = parse_steps(own.steps);
  if (!steps) return complain(flags, steps.err());
  const auto [first, last] = *steps;
  auto opened = state_api::open(flags, own.state);
  if (!opened) return complain(flags, opened.err());
  auto facts = facts_of(opened->api(), own.job);
  if (!facts) return complain(flags, facts.err());
  if (!facts->spec.optimizer.exact)
    return complain(flags,
                    make_error(errc::conflict,
                               "job {} has optimizer.exact: false: only the layout that it ran on "
                               "gives its bits, so a replay can't tell a fault",
                               facts->name));
  auto isa = isa_for(*facts, facts->name);
  if (!isa) return complain(flags, isa.err());
  auto shape = layout_for(facts->spec, own);
  if (!shape) return complain(flags, shape.err());
  json gaps = json::array();
  auto w = gather(opened->api(), *facts, first, last, gaps);
  if (!w) return complain(flags, w.err());
  w->shape = std::move(*shape);
  w->isa = std::move(*isa);
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  w->threads = own.threads > 0 ? own.threads : std::max(1, cores / w->shape.worker_count());

  watch_interrupts();
  std::atomic<bool> cancelled{false}, is_done{false};
  std::thread interrupts([&] {
    while (!is_done) {
      if (is_interrupted()) cancelled = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  });
  const bool draws = is_terminal(2) && !flags.quiet && !flags.is_json();
  const auto began = std::chrono::steady_clock::now();
  const auto elapsed = [began] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  };
  double drawn = 0;
  auto verdict = run_window(*w, cancelled, [&](std::uint64_t step) {
    if (!draws || elapsed() - drawn < 0.1) return;
    drawn = elapsed();
    const double done = static_cast<double>(step - w->step);
    const double left = drawn / done * static_cast<double>(w->last - step);
    std::fprintf(stderr, "\r\033[Kreplay step %llu/%llu  ETA %s",
                 static_cast<unsigned long long>(step), static_cast<unsigned long long>(w->last),
                 format_duration(left).c_str());
  });
  is_done = true;
  interrupts.join();
  if (draws) std::fprintf(stderr, "\r\033[K");
  if (!verdict) {
    if (verdict.err().code == errc::cancelled) return exit_code::interrupted;
    return complain(flags, verdict.err());
  }
  return report(flags, *facts, *w, first, *verdict, gaps, elapsed());
}

}  // namespace

void add_replay(command_line c) {
  auto own = std::make_shared<replay_flags>();
  CLI::App* app = c.app.add_subcommand(
      "replay", "compute steps of a job again on this machine and compare every bit");
  app->footer(
      "examples:\n"
      "  stagecoach replay my-job --steps 101:200\n"
      "  stagecoach replay my-job --steps 1:50 --stages 2 --replicas 2     any layout, same bits\n"
      "  stagecoach replay my-job --steps 1:50 --state stagecoach-state    no coordinator needed\n"
      "starts from the newest checkpoint before the first step. exit code: 0 identical, 1 not");
  app->add_option("JOB", own->job, "name or id")->required();
  app->add_option("--steps", own->steps, "FIRST:LAST, both included")->required();
  app->add_option("--workers", own->workers, "threads that play workers (default 1)")
      ->check(CLI::Range(1, 64));
  app->add_option("--stages", own->stages, "pipeline stages among them")->check(CLI::Range(1, 64));
  app->add_option("--replicas", own->replicas, "pipelines among them")->check(CLI::Range(1, 64));
  app->add_option("--schedule", own->schedule, "zb-h1, 1f1b or gpipe")
      ->check(CLI::IsMember({"zb-h1", "1f1b", "gpipe"}));
  app->add_option("--threads", own->threads, "compute threads of each (default: cores / workers)")
      ->check(CLI::Range(1, 1024));
  add_state_option(app, own->state);
  app->callback([c, own] { c.run = [c, own] { return run_replay(c.flags, *own); }; });
}

}  // namespace stagecoach
