// stagecoach trace: what every worker did in some steps, as a file for Perfetto (ui.perfetto.dev).
//
// The format is Chrome's trace events as JSON: a process for each rank, in it a track with the
// steps and their instructions, arrows from each send to its receive. Times are the coordinator's
// clock, in microseconds from the first instruction on.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <thread>
#include <tuple>

#include "coordinator/messages.hpp"
#include "model/schedule.hpp"
#include "tools/command.hpp"

namespace stagecoach {
namespace {

using nlohmann::json;

struct trace_flags {
  std::string job, steps, file = "trace.json";
  int next = 3;
  double patience_s = 60;
};

struct kind {
  const char *name, *category, *color;  // color: of Chrome's palette; Perfetto chooses its own
};

kind kind_of(int what) {
  if (what == traced_op_apply) return {"apply", "apply", "olive"};
  switch (static_cast<op>(what)) {
    case op::receive_activation:
      return {"wait for activation", "wait", "grey"};
    case op::forward:
      return {"F", "compute", "good"};
    case op::send_activation:
      return {"send activation", "send", "yellow"};
    case op::receive_gradient:
      return {"wait for gradient", "wait", "grey"};
    case op::backward_input:
      return {"B", "compute", "bad"};
    case op::send_gradient:
      return {"send gradient", "send", "yellow"};
    case op::backward_weight:
      return {"W", "compute", "terrible"};
    case op::reduce:
      return {"reduce", "reduce", "black"};
    case op::step:
      return {"vote", "vote", "olive"};
  }
  return {"?", "?", "grey"};
}

bool has_microbatch(int what) { return what < static_cast<int>(op::reduce); }

/// A span on the coordinator's clock.
struct placed_span {
  int what = 0;
  std::int64_t microbatch = 0, begin_ns = 0, end_ns = 0;
};

class trace_writer {
 public:
  explicit trace_writer(const json& trace) : trace_(trace) {}

  json write() {
    find_origin();
    for (const json& w : trace_["workers"]) write(w);
    write_arrows();
    json out{{"displayTimeUnit", "ms"}, {"traceEvents", std::move(events_)}};
    double error_us = 0;
    for (const json& w : trace_["workers"])
      if (w["clock_error_ns"].is_number())
        error_us = std::max(error_us, w["clock_error_ns"].get<double>() * 1e-3);
    out["otherData"] = {{"first_step", trace_["first"]},
                        {"last_step", trace_["last"]},
                        {"missing", trace_["missing"]},
                        {"clocks_differ_by_us_at_most", error_us}};
    return out;
  }

 private:
  static std::vector<placed_span> spans_of(const json& worker, const json& step) {
    const auto base =
        step["began_ns"].get<std::int64_t>() - worker["clock_offset_ns"].get<std::int64_t>();
    std::vector<placed_span> spans;
    const json& flat = step["spans"];
    for (std::size_t i = 0; i + 3 < flat.size(); i += 4)
      spans.push_back({flat[i].get<int>(), flat[i + 1].get<std::int64_t>(),
                       base + flat[i + 2].get<std::int64_t>(),
                       base + flat[i + 3].get<std::int64_t>()});
    return spans;
  }

  void find_origin() {
    for (const json& w : trace_["workers"])
      for (const json& s : w["steps"])
        for (const placed_span& span : spans_of(w, s))
          origin_ns_ = std::min(origin_ns_, span.begin_ns);
  }
  double us(std::int64_t ns) const { return static_cast<double>(ns - origin_ns_) * 1e-3; }

  void write(const json& worker) {
    const int rank = worker["rank"], pid = rank + 1;
    const auto meta = [&](const char* name, json args) {
      events_.push_back({{"ph", "M"}, {"pid", pid}, {"tid", 1}, {"name", name}, {"args", args}});
    };
    meta("process_name",
         {{"name", fmt::format("rank {} ({}): stage {}, replica {}", rank,
                               worker["name"].get<std::string>(), worker["stage"].get<int>(),
                               worker["replica"].get<int>())}});
    meta("process_sort_index", {{"sort_index", rank}});
    meta("thread_name", {{"name", "trainer"}});
    for (const json& step : worker["steps"]) {
      const auto spans = spans_of(worker, step);
      if (spans.empty()) continue;
      events_.push_back(
          {{"ph", "X"},
           {"pid", pid},
           {"tid", 1},
           {"ts", us(spans.front().begin_ns)},
           {"dur", static_cast<double>(spans.back().end_ns - spans.front().begin_ns) * 1e-3},
           {"name", fmt::format("step {}", step["step"].get<std::uint64_t>())},
           {"cat", "step"},
           {"args", {{"generation", step["generation"]}}}});
      for (const placed_span& s : spans) {
        const kind k = kind_of(s.what);
        json e{{"ph", "X"},
               {"pid", pid},
               {"tid", 1},
               {"ts", us(s.begin_ns)},
               {"dur", static_cast<double>(s.end_ns - s.begin_ns) * 1e-3},
               {"name", has_microbatch(s.what) ? fmt::format("{} {}", k.name, s.microbatch)
                                               : std::string(k.name)},
               {"cat", k.category},
               {"cname", k.color},
               {"args", {{"step", step["step"]}}}};
        if (has_microbatch(s.what)) e["args"]["microbatch"] = s.microbatch;
        events_.push_back(std::move(e));
        remember_end(worker, step["step"], s);
      }
    }
  }

  /// Ends of arrows, by (step, replica, stage that receives, is it a gradient, microbatch).
  void remember_end(const json& worker, std::uint64_t step, const placed_span& s) {
    const int stage = worker["stage"], replica = worker["replica"];
    const auto what = static_cast<op>(s.what);
    const bool is_gradient = what == op::send_gradient || what == op::receive_gradient;
    const bool is_send = what == op::send_activation || what == op::send_gradient;
    const bool is_receive = what == op::receive_activation || what == op::receive_gradient;
    if (!is_send && !is_receive) return;
    const int receiver = is_receive ? stage : is_gradient ? stage - 1 : stage + 1;
    auto& arrow = arrows_[{step, replica, receiver, is_gradient, s.microbatch}];
    (is_send ? arrow.first : arrow.second) = {worker["rank"].get<int>() + 1, s};
  }

  void write_arrows() {
    int id = 0;
    for (const auto& [key, arrow] : arrows_) {
      const auto& [from, to] = arrow;
      if (from.first == 0 || to.first == 0) continue;  // one of them was not traced
      ++id;
      const char* name = std::get<3>(key) ? "gradient" : "activation";
      events_.push_back({{"ph", "s"},
                         {"id", id},
                         {"pid", from.first},
                         {"tid", 1},
                         {"ts", us(from.second.begin_ns)},
                         {"name", name},
                         {"cat", "link"}});
      // Bound to the slice that encloses its end: the receive.
      events_.push_back({{"ph", "f"},
                         {"bp", "e"},
                         {"id", id},
                         {"pid", to.first},
                         {"tid", 1},
                         {"ts", us(to.second.end_ns)},
                         {"name", name},
                         {"cat", "link"}});
    }
  }

  using arrow_end = std::pair<int, placed_span>;  // process; 0: none
  const json& trace_;
  json events_ = json::array();
  std::map<std::tuple<std::uint64_t, int, int, bool, std::int64_t>, std::pair<arrow_end, arrow_end>>
      arrows_;
  std::int64_t origin_ns_ = std::numeric_limits<std::int64_t>::max();
};

exit_code run_trace(const global_flags& flags, const trace_flags& own) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  json wanted{{"next", own.next}};
  if (!own.steps.empty()) {
    unsigned long long first = 0, last = 0;
    int used = 0;
    if (std::sscanf(own.steps.c_str(), "%llu:%llu%n", &first, &last, &used) != 2 ||
        used != static_cast<int>(own.steps.size()))
      return complain(
          flags, make_error(errc::usage, "--steps {}: expected FIRST:LAST, as 100:102", own.steps));
    wanted = {{"first", first}, {"last", last}};
  }
  const std::string path = "/jobs/" + own.job + "/trace";
  auto begun = api->post(path, wanted);
  if (!begun) return complain(flags, begun.err());
  if (!flags.quiet)
    std::fprintf(stderr, "steps %llu to %llu of %zu workers ...\n",
                 (*begun)["first"].get<unsigned long long>(),
                 (*begun)["last"].get<unsigned long long>(), (*begun)["workers"].size());

  // Patience counts from the newest step that came: the steps themselves may be far off.
  const auto request = (*begun)["request"];
  json trace = *begun;
  std::size_t parts = 0;
  auto moved = std::chrono::steady_clock::now();
  while (!trace["is_whole"].get<bool>()) {
    if (is_interrupted()) return exit_code::interrupted;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    auto now = api->get(path + "?brief=1");
    if (!now) return complain(flags, now.err());
    if ((*now)["request"] != request)
      return complain(flags, make_error(errc::conflict, "another trace of {} was begun", own.job));
    trace = std::move(*now);
    std::size_t arrived = 0;
    for (const json& w : trace["workers"]) arrived += w["steps"].size();
    if (arrived != parts) moved = std::chrono::steady_clock::now();
    parts = arrived;
    const auto job = api->get("/jobs/" + own.job);
    const bool is_still_to_come =
        job && job->value("state", "") == "RUNNING" &&
        job->value("step", 0ull) < trace["last"].get<unsigned long long>();
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - moved;
    if (!is_still_to_come && waited.count() > 3) break;
    if (waited.count() > own.patience_s) break;
  }
  if (parts == 0)
    return complain(flags, make_error(errc::timed_out,
                                      "nothing came. next: stagecoach why {}; a job that ends or "
                                      "stands before these steps does not do them",
                                      own.job));
  auto whole = api->get(path);
  if (!whole) return complain(flags, whole.err());
  if ((*whole)["request"] != request)
    return complain(flags, make_error(errc::conflict, "another trace of {} was begun", own.job));
  trace = std::move(*whole);
  for (const json& m : trace["missing"])
    std::fprintf(stderr, "missing: %s (left, joined or started anew meanwhile)\n",
                 m.get<std::string>().c_str());

  const json out = trace_writer(trace).write();
  if (own.file == "-") {
    std::printf("%s\n", out.dump().c_str());
    return exit_code::success;
  }
  std::ofstream file(own.file, std::ios::trunc);
  file << out.dump() << '\n';
  file.close();
  if (!file)
    return complain(flags, make_error(errc::io,
                                      "{}: can't be written. fix: --file in a folder with "
                                      "space",
                                      own.file));
  if (!flags.quiet)
    std::fprintf(stderr, "%s: %zu events, clocks within %.0f us; open it at ui.perfetto.dev\n",
                 own.file.c_str(), out["traceEvents"].size(),
                 out["otherData"]["clocks_differ_by_us_at_most"].get<double>());
  return exit_code::success;
}

}  // namespace

void add_trace(command_line c) {
  auto own = std::make_shared<trace_flags>();
  CLI::App* app = c.app.add_subcommand(
      "trace", "every instruction of every worker in a few steps, as a file for Perfetto");
  app->footer(
      "examples:\n"
      "  stagecoach trace my-job                          the next 3 steps, into trace.json\n"
      "  stagecoach trace my-job --steps 1000:1004 --file run.json\n"
      "  stagecoach trace my-job --next 1 --file - | jq '.traceEvents | length'\n"
      "F forward, B input gradient, W weight gradient, each with its microbatch. Recording costs "
      "about\n0.5 us an instruction, and only in these steps.");
  app->add_option("JOB", own->job, "name or id")->required();
  auto* steps = app->add_option("--steps", own->steps, "FIRST:LAST, both included, still to come");
  app->add_option("--next", own->next, "so many steps from now on (default 3)")
      ->check(CLI::Range(1, 64))
      ->excludes(steps);
  app->add_option("--file", own->file, "where to (default trace.json; - is stdout)");
  app->add_option("--patience", own->patience_s, "seconds to wait for the next part (default 60)")
      ->check(CLI::Range(1.0, 86400.0));
  app->callback([c, own] {
    c.run = [c, own] {
      watch_interrupts();
      return run_trace(c.flags, *own);
    };
  });
}

}  // namespace stagecoach
