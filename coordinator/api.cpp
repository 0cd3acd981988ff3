#include "coordinator/api.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>

#include "coordinator/metrics_text.hpp"
#include "coordinator/wire_fields.hpp"
#include "storage/hash.hpp"
#include "storage/json_text.hpp"

namespace stagecoach {

using nlohmann::json;

namespace {

constexpr std::string_view prefix = "/api/v1/";
constexpr std::size_t rows_max = 10'000;  // events or lines in one answer
constexpr int priority_max = 1'000'000;   // as in a job file

std::string text_of(const json& j) {
  return j.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}
http_response json_answer(int status, const json& j) {
  http_response r;
  r.status = status;
  r.body = text_of(j);
  return r;
}

json number(double x) { return std::isfinite(x) ? json(x) : json(nullptr); }
json number(exact_double x) { return number(x.get()); }

std::optional<std::uint64_t> whole_number(const std::string& text) {
  std::uint64_t n = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (code != std::errc() || end != text.data() + text.size() || text.empty()) return std::nullopt;
  return n;
}

result<std::uint64_t> query_number(const http_request& r, const std::string& key,
                                   std::uint64_t otherwise) {
  const auto found = r.query.find(key);
  if (found == r.query.end() || found->second.empty()) return otherwise;
  const auto n = whole_number(found->second);
  if (!n)
    return make_error(errc::usage, "{}={}: expected a whole number. fix: {}=0", key, found->second,
                      key);
  return *n;
}

std::vector<std::string> segments_of(std::string_view path) {
  std::vector<std::string> parts;
  while (!path.empty()) {
    const auto slash = path.find('/');
    if (slash != 0) parts.emplace_back(path.substr(0, slash));
    if (slash == std::string_view::npos) break;
    path.remove_prefix(slash + 1);
  }
  return parts;
}

// ---- rows
// ------------------------------------------------------------------------------------------
/// What the machine knows of a job beside its view.
struct job_facts {
  job_view view;
  const job_machine& machine;
  const run_history::job_history* history;
  double tokens_per_step = 0, step_s = 0;
};

job_facts facts_of(const api_state& s, job_id id, job_view view) {
  const auto& machine = s.machine.jobs().at(id);
  const auto& batch = machine.record().spec.batch;
  job_facts facts{std::move(view), machine, s.history.of(id), 0, 0};
  facts.tokens_per_step = static_cast<double>(batch.global_sequences * batch.sequence_tokens);
  auto step_us = s.history.step_us(id);
  if (step_us == 0) step_us = facts.view.step_us;
  facts.step_s = static_cast<double>(step_us) * 1e-6;
  return facts;
}

bool is_moving(const job_view& v) { return v.state == "RUNNING"; }

json eta(const job_facts& f) {
  if (!is_moving(f.view) || f.step_s <= 0 || f.view.step >= f.view.stop_steps) return nullptr;
  return f.step_s * static_cast<double>(f.view.stop_steps - f.view.step);
}

json job_row(const job_facts& f) {
  const auto& v = f.view;
  const bool has_speed = is_moving(v) && f.step_s > 0;
  json j;
  j["id"] = to_string(v.id);
  j["name"] = v.name;
  j["state"] = v.state;
  j["step"] = v.step;
  j["steps"] = v.stop_steps;
  j["loss"] = v.step == 0 ? json(nullptr) : number(v.loss);
  j["valid_loss"] = v.evaluated_step ? number(v.evaluated_loss) : json(nullptr);
  j["valid_step"] = v.evaluated_step ? json(*v.evaluated_step) : json(nullptr);
  j["tokens_per_s"] = has_speed ? json(f.tokens_per_step / f.step_s) : json(nullptr);
  j["workers"] = v.workers;
  j["workers_min"] = v.workers_min;
  j["workers_max"] = v.workers_max;
  j["eta_s"] = eta(f);
  j["reason"] = v.reason;
  j["priority"] = v.priority;
  j["queue"] = v.queue == 0 ? json(nullptr) : json(v.queue);
  j["submitted_unix_ms"] = v.submitted_unix_ms;
  j["finished_unix_ms"] = v.ended_unix_ms == 0 ? json(nullptr) : json(v.ended_unix_ms);
  j["weights_hash"] = v.has_saved ? v.saved_hash : std::string();
  j["hash_step"] = v.has_saved ? json(v.saved_step) : json(nullptr);
  return j;
}

json plan_json(const job_facts& f) {
  const auto& v = f.view;
  if (v.stages == 0) return nullptr;
  json members = json::array(), joining = json::array();
  const auto& spec = f.machine.record().spec;
  for (const auto& m : v.members) {
    if (m.stage < 0) {
      joining.push_back(m.name);
      continue;
    }
    json member = wire::to_json_value(m);
    member["rank"] = m.replica * v.stages + m.stage;
    member["units"] = describe_units(spec.model, v.unit_cuts[m.stage], v.unit_cuts[m.stage + 1]);
    members.push_back(std::move(member));
  }
  return {{"stages", v.stages},           {"replicas", v.replicas},
          {"schedule", v.schedule},       {"unit_cuts", v.unit_cuts},
          {"leaf_cuts", v.leaf_cuts},     {"members", std::move(members)},
          {"joining", std::move(joining)}};
}

json checkpoint_json(const checkpoint_record& c) {
  return {{"step", c.step},         {"seq", c.seq},
          {"unix_ms", c.unix_ms},   {"bytes", c.bytes},
          {"parts", c.part_count},  {"weights_hash", c.weights_hash},
          {"loss", number(c.loss)}, {"stall_ms", static_cast<double>(c.stall_us) * 1e-3},
          {"state", "durable"}};
}

json job_json(const api_state& s, const job_facts& f) {
  const auto& v = f.view;
  const auto& record = f.machine.record();
  json j = job_row(f);
  j["spec"] = wire::to_json_value(record.spec);
  j["resolved_yaml"] = write_job_spec_yaml(record.spec);
  j["plan"] = plan_json(f);
  j["phase"] = v.phase;
  j["generation"] = v.generation;
  j["plan_hash"] = hex16(v.plan_hash);
  j["incarnation"] = s.machine.incarnation();
  const auto& checkpoints = f.machine.checkpoints();
  j["checkpoint"] =
      checkpoints.empty() ? json(nullptr) : checkpoint_json(checkpoints.rbegin()->second);
  j["recoveries"] = v.recovery_count;
  std::uint64_t failures = 0;
  if (f.history)
    for (const auto& [cause, count] : f.history->failures) failures += count;
  j["failures"] = failures;
  j["last_recovery_ms"] = v.last_recovery_ms;
  j["redone_steps"] = v.redone_steps;
  j["divergences"] = v.divergences;
  j["stale_messages"] = v.stale_messages;
  j["started_unix_ms"] = v.started_unix_ms == 0 ? json(nullptr) : json(v.started_unix_ms);
  j["step_ms"] = f.step_s > 0 ? json(f.step_s * 1e3) : json(nullptr);
  j["tokens_per_step"] = static_cast<std::uint64_t>(f.tokens_per_step);
  j["survives_losses"] = v.losses_survived;
  j["weakest"] = v.weakest;
  j["device_class"] = record.device_class;
  j["parameters"] = parameter_count(record.spec.model);
  // Time in steps that counted, of all time since the start.
  const auto end_ms = v.ended_unix_ms != 0 ? v.ended_unix_ms : s.unix_ms;
  const auto elapsed_us = static_cast<double>(end_ms - v.started_unix_ms) * 1e3;
  j["goodput"] =
      f.history && v.started_unix_ms != 0 && elapsed_us > 0
          ? json(std::min(1.0, static_cast<double>(f.history->step_us_total) / elapsed_us))
          : json(nullptr);
  return j;
}

json event_json(const event_record& e) {
  return {{"n", e.number},
          {"unix_ms", e.unix_ms},
          {"kind", e.kind},
          {"level", e.level},
          {"text", e.text},
          {"fields", e.fields},
          {"job", value(e.job) == 0 ? json(nullptr) : json(to_string(e.job))}};
}

// ---- answers
// ---------------------------------------------------------------------------------------
http_response list_jobs(const http_request& r, const api_state& s) {
  const bool is_all = r.query_or("all") == "1" || r.query_or("all") == "true";
  json rows = json::array();
  for (auto& view : s.machine.job_views()) {
    const auto state = s.machine.jobs().at(view.id).state();
    if (!is_all && is_end(state)) continue;
    rows.push_back(job_row(facts_of(s, view.id, std::move(view))));
  }
  return json_answer(200, {{"jobs", std::move(rows)}});
}

http_response events_of_job(const http_request& r, const api_state& s, job_id id) {
  auto since = query_number(r, "since", 0);
  if (!since) return error_answer(since.err());
  json rows = json::array();
  std::uint64_t next = *since;
  if (const auto* h = s.history.of(id))
    for (const auto& e : h->events) {
      if (e.number <= *since) continue;
      if (rows.size() >= rows_max) break;
      rows.push_back(event_json(e));
      next = e.number;
    }
  return json_answer(200, {{"events", std::move(rows)}, {"next", next}});
}

http_response events_of_all(const http_request& r, const api_state& s) {
  auto since = query_number(r, "since", 0);
  if (!since) return error_answer(since.err());
  json rows = json::array();
  std::uint64_t next = *since;
  for (const auto& [n, e] : s.history.all_events()) {
    if (n <= *since) continue;
    if (rows.size() >= rows_max) break;
    rows.push_back(event_json(e));
    rows.back()["n"] = n;
    next = n;
  }
  return json_answer(200, {{"events", std::move(rows)}, {"next", next}});
}

int rank_of_level(const std::string& level) {
  static const std::map<std::string, int> ranks{
      {"debug", 0}, {"info", 1}, {"warn", 2}, {"error", 3}};
  const auto found = ranks.find(level);
  return found == ranks.end() ? 1 : found->second;
}

http_response lines_of_job(const http_request& r, const api_state& s, job_id id) {
  auto since = query_number(r, "since", 0);
  if (!since) return error_answer(since.err());
  const auto least = r.query_or("level").empty() ? 0 : rank_of_level(r.query_or("level"));
  const auto worker = r.query_or("worker");
  json rows = json::array();
  std::uint64_t next = *since;
  if (const auto* h = s.history.of(id))
    for (const auto& line : h->lines) {
      if (line.n <= *since) continue;
      if (rows.size() >= rows_max) break;
      next = line.n;
      if (rank_of_level(line.level) < least) continue;
      if (!worker.empty() && line.worker != worker) continue;
      rows.push_back({{"n", line.n},
                      {"unix_ms", line.unix_ms},
                      {"level", line.level},
                      {"worker", line.worker},
                      {"text", line.text}});
    }
  return json_answer(200, {{"lines", std::move(rows)}, {"next", next}});
}

http_response series_of_job(const http_request& r, const api_state& s, job_id id) {
  auto from = query_number(r, "from", 0);
  auto to = query_number(r, "to", std::numeric_limits<std::uint64_t>::max());
  auto points = query_number(r, "points", 0);
  for (const auto* n : {&from, &to, &points})
    if (!*n) return error_answer(n->err());
  json steps = json::array(), valid = json::array();
  if (const auto* h = s.history.of(id)) {
    const auto& batch = s.machine.jobs().at(id).record().spec.batch;
    const auto tokens = static_cast<double>(batch.global_sequences * batch.sequence_tokens);
    std::vector<const step_report*> wanted;
    for (auto at = h->steps.lower_bound(*from); at != h->steps.end() && at->first <= *to; ++at)
      wanted.push_back(&at->second);
    const std::size_t count = wanted.size();
    const std::size_t shown = *points == 0 ? count : std::min<std::size_t>(count, *points);
    for (std::size_t i = 0; i < shown; ++i) {
      // Evenly spread, and the newest always last.
      const auto& x = *wanted[shown == 1 ? count - 1 : i * (count - 1) / (shown - 1)];
      const auto seconds = static_cast<double>(x.step_us) * 1e-6;
      steps.push_back({{"step", x.step},
                       {"loss", number(x.loss)},
                       {"norm", number(x.norm)},
                       {"lr", number(x.lr)},
                       {"step_ms", seconds * 1e3},
                       {"tokens_per_s", seconds > 0 ? json(tokens / seconds) : json(nullptr)},
                       {"skipped", x.skipped},
                       {"unix_ms", x.unix_ms}});
    }
    for (auto at = h->evaluations.lower_bound(*from);
         at != h->evaluations.end() && at->first <= *to; ++at)
      valid.push_back({{"step", at->first}, {"loss", number(at->second)}});
  }
  return json_answer(200, {{"steps", std::move(steps)}, {"valid", std::move(valid)}});
}

http_response list_workers(const api_state& s) {
  std::map<std::uint64_t, std::pair<const job_view*, const member_view*>> places;
  const auto jobs = s.machine.job_views();
  for (const auto& job : jobs)
    for (const auto& m : job.members) places[value(m.worker)] = {&job, &m};
  json rows = json::array();
  for (const auto& w : s.machine.workers()) {
    const auto place = places.find(value(w.id));
    const bool is_placed = place != places.end() && place->second.second->stage >= 0;
    const auto busy = s.machine.job(w.job);
    rows.push_back(
        {{"id", to_string(w.id)},
         {"name", w.name},
         {"state", w.state},
         {"job", busy ? json(busy->name) : json(nullptr)},
         {"stage", is_placed ? json(place->second.second->stage) : json(nullptr)},
         {"replica", is_placed ? json(place->second.second->replica) : json(nullptr)},
         {"device", w.device},
         {"device_class", w.device_class},
         {"threads", w.threads},
         {"memory_bytes", w.memory_bytes},
         {"step", w.step},
         {"heartbeat_ms", w.heard_ms_ago},
         {"address",
          w.link_host.empty() ? std::string() : fmt::format("{}:{}", w.link_host, w.link_port)},
         {"age_s", w.attached_unix_ms == 0
                       ? json(nullptr)
                       : json(static_cast<double>(s.unix_ms - w.attached_unix_ms) * 1e-3)},
         {"host", w.host},
         {"labels", w.labels},
         {"version", w.version},
         {"drain_reason", w.reason}});
  }
  return json_answer(200, {{"workers", std::move(rows)}});
}

// ---- bodies
// ----------------------------------------------------------------------------------------
result<json> body_of(const http_request& r) {
  if (r.body.empty()) return json(json::object());
  auto parsed = parse_json(r.body, "request body");
  if (!parsed) return parsed.err();
  if (!parsed->is_object())
    return make_error(errc::bad_input, "request body: expected a JSON object, found {}",
                      parsed->type_name());
  return parsed;
}

result<std::string> text_field(const json& body, const char* name, const std::string& otherwise) {
  const auto found = body.find(name);
  if (found == body.end() || found->is_null()) return otherwise;
  if (!found->is_string())
    return make_error(errc::bad_input, "\"{}\": expected text, found {}", name, found->type_name());
  return found->get<std::string>();
}

result<bool> flag_field(const json& body, const char* name, bool otherwise) {
  const auto found = body.find(name);
  if (found == body.end() || found->is_null()) return otherwise;
  if (!found->is_boolean())
    return make_error(errc::bad_input, "\"{}\": expected true or false, found {}", name,
                      found->type_name());
  return found->get<bool>();
}

result<int> priority_field(const json& body) {
  const auto found = body.find("priority");
  if (found == body.end() || !found->is_number_integer() || *found < -priority_max ||
      *found > priority_max)
    return make_error(errc::bad_input,
                      "\"priority\": expected a whole number from {} to {}, larger first. fix: "
                      "{{\"priority\": 5}}",
                      -priority_max, priority_max);
  return found->get<int>();
}

result<submission_request> submission_of(const json& body) {
  submission_request request;
  auto yaml = text_field(body, "yaml", {});
  auto file = text_field(body, "file", "job.yaml");
  auto folder = text_field(body, "folder", {});
  for (const auto* field : {&yaml, &file, &folder})
    if (!*field) return field->err();
  if (!body.contains("yaml"))
    return make_error(
        errc::bad_input,
        "\"yaml\" is missing. fix: {{\"yaml\": TEXT OF THE JOB FILE, \"file\": NAME}}");
  request.yaml = std::move(*yaml);
  request.file = std::move(*file);
  request.folder = std::move(*folder);
  const auto set = body.find("set");
  if (set != body.end() && !set->is_null()) {
    if (!set->is_array()) return make_error(errc::bad_input, "\"set\": expected a list of texts");
    for (const auto& one : *set) {
      if (!one.is_string()) return make_error(errc::bad_input, "\"set\": expected a list of texts");
      request.set.push_back(one.get<std::string>());
    }
  }
  return request;
}

http_response wrong_method(const http_request& r, const char* allowed) {
  auto answer =
      error_response(405, "usage", fmt::format("{} {}: this takes {}", r.method, r.path, allowed));
  answer.headers.emplace_back("Allow", allowed);
  return answer;
}
http_response no_such_path(const http_request& r) {
  return error_response(404, "not_found", fmt::format("no such path: {}; see docs/api.md", r.path));
}

/// {"first": 100, "last": 102}, or {"next": 3}: so many steps from the first that all can hear of.
api_outcome trace_of(const json& body, job_id id, const api_state& s) {
  const auto field = [&body](const char* name) -> result<std::uint64_t> {
    const auto found = body.find(name);
    if (found == body.end() || found->is_null()) return std::uint64_t{0};
    if (!found->is_number_unsigned())
      return make_error(errc::bad_input, "\"{}\": expected a whole number", name);
    return found->get<std::uint64_t>();
  };
  auto first = field("first"), last = field("last"), next = field("next");
  for (const auto* n : {&first, &last, &next})
    if (!*n) return error_answer(n->err());
  if ((*next == 0) == (*first == 0) || (*first == 0) != (*last == 0) ||
      *next > trace_desk::steps_max)
    return error_answer(
        make_error(errc::bad_input,
                   "expected {{\"first\": 100, \"last\": 102}} or {{\"next\": 3}}, {} "
                   "steps at most",
                   trace_desk::steps_max));
  if (*next == 0) return api_trace{id, *first, *last};
  const job_facts facts = facts_of(s, id, *s.machine.job(id));
  // Half a second for the order to reach everybody.
  const double margin = facts.step_s > 0 ? 0.5 / facts.step_s : 0;
  const std::uint64_t begin =
      facts.view.step + 2 + static_cast<std::uint64_t>(std::min(margin, 1e6));
  return api_trace{id, begin, begin + *next - 1};
}

api_outcome route_job(const http_request& r, const api_state& s, job_id id,
                      const std::vector<std::string>& path) {
  const bool is_get = r.method == "GET" || r.method == "HEAD";
  const auto job = [&] { return facts_of(s, id, *s.machine.job(id)); };
  if (path.size() == 2)
    return is_get ? json_answer(200, job_json(s, job())) : wrong_method(r, "GET");
  const auto& what = path[2];
  if (path.size() == 3 && what == "priority") {
    if (r.method != "POST") return wrong_method(r, "POST");
    auto body = body_of(r);
    if (!body) return error_answer(body.err());
    auto priority = priority_field(*body);
    if (!priority) return error_answer(priority.err());
    return api_event{events::set_priority{id, *priority, {}}};
  }
  if (path.size() == 3 &&
      (what == "pause" || what == "resume" || what == "cancel" || what == "save")) {
    if (r.method != "POST") return wrong_method(r, "POST");
    auto body = body_of(r);
    if (!body) return error_answer(body.err());
    if (what == "pause") return api_event{events::pause_job{id, {}}};
    if (what == "resume") return api_event{events::resume_job{id, {}}};
    if (what == "save") return api_event{events::save_now{id, {}}};
    auto now = flag_field(*body, "now", false);
    if (!now) return error_answer(now.err());
    return api_event{events::cancel_job{id, *now, {}}};
  }
  if (what == "trace" && path.size() == 3) {
    if (!is_get && r.method != "POST") return wrong_method(r, "GET, POST");
    if (is_get) {
      const trace* t = s.traces.find(id);
      if (t == nullptr)
        return error_response(404, "not_found",
                              "no trace of this job. next: POST {\"next\": 3} here, or stagecoach "
                              "trace JOB");
      return trace_answer(*t, r.query.count("brief") == 0);
    }
    auto body = body_of(r);
    if (!body) return error_answer(body.err());
    return trace_of(*body, id, s);
  }
  if (what == "checkpoints" && path.size() == 4 && path[3] == "verify") {
    if (r.method != "POST") return wrong_method(r, "POST");
    auto body = body_of(r);
    if (!body) return error_answer(body.err());
    auto deep = flag_field(*body, "deep", true);
    if (!deep) return error_answer(deep.err());
    api_checkpoints wanted{id, std::nullopt, *deep ? check_depth::deep : check_depth::quick};
    const auto step = body->find("step");
    if (step != body->end() && !step->is_null()) {
      if (!step->is_number_unsigned())
        return error_answer(make_error(errc::bad_input, "\"step\": expected a whole number"));
      wanted.step = step->get<std::uint64_t>();
    }
    return wanted;
  }
  if (!is_get) return path.size() <= 4 ? api_outcome(wrong_method(r, "GET")) : no_such_path(r);
  if (path.size() == 4 && what == "checkpoints") {
    const auto step = whole_number(path[3]);
    if (!step)
      return error_answer(make_error(errc::usage, "step {}: expected a whole number", path[3]));
    return api_manifest{id, *step};
  }
  if (path.size() != 3) return no_such_path(r);
  if (what == "why")
    return json_answer(200, {{"state", job().view.state}, {"text", s.machine.why(id)}});
  if (what == "events") return events_of_job(r, s, id);
  if (what == "logs") return lines_of_job(r, s, id);
  if (what == "series") return series_of_job(r, s, id);
  if (what == "generations") return api_generations{id};
  if (what == "log") {
    auto from = query_number(r, "from", 1);
    auto to = query_number(r, "to", std::numeric_limits<std::uint64_t>::max());
    for (const auto* n : {&from, &to})
      if (!*n) return error_answer(n->err());
    return api_log{id, *from, *to};
  }
  if (what == "checkpoints") return api_checkpoints{id, std::nullopt, check_depth::quick};
  return no_such_path(r);
}

api_outcome route_api(const http_request& r, const api_state& s) {
  const auto path = segments_of(std::string_view(r.path).substr(prefix.size()));
  if (path.empty()) return no_such_path(r);
  const bool is_get = r.method == "GET" || r.method == "HEAD";
  if (path[0] == "version" && path.size() == 1)
    return json_answer(200, {{"version", program_version},
                             {"protocol", protocol_version},
                             {"incarnation", s.machine.incarnation()},
                             {"pid", static_cast<std::int64_t>(::getpid())}});
  if (path[0] == "events" && path.size() == 1)
    return is_get ? events_of_all(r, s) : wrong_method(r, "GET");
  if ((path[0] == "plan" || path[0] == "jobs") && path.size() == 1 && !is_get) {
    if (r.method != "POST") return wrong_method(r, path[0] == "plan" ? "POST" : "GET, POST");
    auto body = body_of(r);
    if (!body) return error_answer(body.err());
    auto request = submission_of(*body);
    if (!request) return error_answer(request.err());
    if (path[0] == "plan") return api_plan{std::move(*request)};
    return api_submit{std::move(*request)};
  }
  if (path[0] == "plan" && path.size() == 1) return wrong_method(r, "POST");
  if (path[0] == "jobs") {
    if (path.size() == 1) return list_jobs(r, s);
    const auto id = s.machine.find_job(path[1]);
    if (!id)
      return error_response(
          404, "not_found",
          fmt::format("no job named \"{}\". next: list them with GET /api/v1/jobs?all=1", path[1]));
    return route_job(r, s, *id, path);
  }
  if (path[0] == "workers") {
    if (path.size() == 1) return is_get ? list_workers(s) : wrong_method(r, "GET");
    if (path.size() == 3 && (path[2] == "drain" || path[2] == "undrain")) {
      if (r.method != "POST") return wrong_method(r, "POST");
      if (path[2] == "undrain") return api_event{events::undrain_worker{path[1], {}}};
      auto body = body_of(r);
      if (!body) return error_answer(body.err());
      auto reason = text_field(*body, "reason", {});
      if (!reason) return error_answer(reason.err());
      return api_event{events::drain_worker{path[1], std::move(*reason), {}}};
    }
  }
  return no_such_path(r);
}

json entry_json(const checkpoint_entry& entry, check_depth depth) {
  const auto& m = entry.content;
  const auto extra = [&m](const char* name) {
    const auto found = m.extra.find(name);
    return found == m.extra.end() ? std::string() : found->second;
  };
  json j{{"step", m.step},
         {"seq", m.seq},
         {"unix_ms", m.created_unix_ms},
         {"bytes", m.bytes},
         {"parts", m.parts.size()},
         {"state", to_string(entry.state)},
         {"depth", depth == check_depth::deep ? "deep" : "quick"},
         {"reason", entry.reason},
         {"weights_hash", m.weights_hash},
         {"state_hash", m.state_hash},
         {"generation", m.generation},
         {"layout", m.layout},
         {"chain", extra("chain")},
         {"loss", nullptr}};
  const auto bits = extra("loss");
  std::uint64_t loss = 0;
  const auto [end, code] = std::from_chars(bits.data(), bits.data() + bits.size(), loss, 16);
  if (code == std::errc() && bits.size() == 16 && m.step > 0)
    j["loss"] = number(exact_double{loss});
  return j;
}

}  // namespace

int http_status(errc code) {
  switch (code) {
    case errc::usage:
    case errc::bad_spec:
    case errc::bad_input:
      return 400;
    case errc::unauthorised:
      return 403;
    case errc::not_found:
      return 404;
    case errc::conflict:
    case errc::cancelled:
      return 409;
    case errc::too_large:
      return 413;
    case errc::unplaceable:
      return 422;
    case errc::timed_out:
    case errc::unreachable:
    case errc::disk_full:
      return 503;
    case errc::corrupt:
    case errc::io:
    case errc::unexpected:
      return 500;
  }
  return 500;
}

http_response error_answer(const error& e) {
  return error_response(http_status(e.code), to_string(e.code), e.message);
}

http_response problems_answer(const std::vector<spec_problem>& problems) {
  json list = json::array();
  for (const auto& p : problems)
    list.push_back({{"file", p.file},
                    {"line", p.line},
                    {"column", p.column},
                    {"code", p.code},
                    {"path", p.path},
                    {"message", p.message},
                    {"fix", p.fix},
                    {"source_line", p.source_line}});
  return json_answer(
      400, {{"error",
             {{"code", "bad_spec"},
              {"message", fmt::format("{} problem{} in the job file; nothing was submitted",
                                      problems.size(), problems.size() == 1 ? "" : "s")}}},
            {"problems", std::move(list)}});
}

http_response submitted_answer(const actions::reply_value& value, const submission& checked) {
  return json_answer(201, {{"id", to_string(value.job)},
                           {"name", checked.spec ? checked.spec->name : std::string()},
                           {"warnings", checked.warnings}});
}

http_response accepted_answer(const actions::reply_value& value, const cluster_machine& machine) {
  json answer{{"text", value.text}};
  if (const auto view = machine.job(value.job)) {
    answer["id"] = to_string(value.job);
    answer["state"] = view->state;
  }
  return json_answer(202, answer);
}

http_response checkpoints_answer(const std::vector<checkpoint_entry>& entries, check_depth depth,
                                 const std::map<std::uint64_t, checkpoint_record>& index) {
  json list = json::array();
  for (const auto& entry : entries) {
    auto j = entry_json(entry, depth);
    const auto known = index.find(static_cast<std::uint64_t>(entry.content.step));
    const bool has_stall = known != index.end() && known->second.seq == entry.content.seq;
    j["stall_ms"] = has_stall ? json(static_cast<double>(known->second.stall_us) * 1e-3) : json();
    list.push_back(std::move(j));
  }
  return json_answer(200, {{"checkpoints", std::move(list)}});
}

http_response log_answer(const vote_log& log) {
  json steps = json::array(), gaps = json::array();
  for (const step_report& r : log.rows)
    steps.push_back({{"step", r.step},
                     {"loss", number(r.loss)},
                     {"norm", number(r.norm)},
                     {"loss_bits", hex16(r.loss.bits)},
                     {"norm_bits", hex16(r.norm.bits)},
                     {"skipped", r.skipped},
                     {"chain", hex16(r.chain)},
                     {"weights_hash", r.weights_hash},
                     {"stage_hashes", r.stage_hashes},
                     {"unix_ms", r.unix_ms}});
  for (const auto& [first, last] : log.gaps) gaps.push_back({first, last});
  json answer{{"steps", std::move(steps)}, {"gaps", std::move(gaps)}, {"next", nullptr}};
  if (log.is_cut) answer["next"] = log.rows.back().step + 1;
  return json_answer(200, answer);
}

http_response trace_answer(const trace& t, bool with_spans) {
  json workers = json::array();
  for (const auto& [id, m] : t.members) {
    json steps = json::array();
    for (const auto& [step, x] : m.steps) {
      steps.push_back({{"step", step},
                       {"generation", x.generation},
                       {"began_ns", x.began_ns},
                       {"is_cut", x.is_cut}});
      if (with_spans) steps.back()["spans"] = x.spans;
    }
    workers.push_back({{"name", m.name},
                       {"host", m.host},
                       {"rank", m.rank},
                       {"stage", m.stage},
                       {"replica", m.replica},
                       {"clock_offset_ns", m.offset_ns},
                       {"clock_error_ns", m.error_ns < 0 ? json(nullptr) : json(m.error_ns)},
                       {"steps", std::move(steps)}});
  }
  const auto missing = t.missing();
  return json_answer(200, {{"request", t.request},
                           {"first", t.first},
                           {"last", t.last},
                           {"is_whole", missing.empty()},
                           {"missing", missing},
                           {"workers", std::move(workers)}});
}

http_response generations_answer(const std::vector<generation_record>& list) {
  json rows = json::array();
  const char* sources[] = {"initial", "live", "checkpoint"};
  for (const generation_record& g : list) {
    json members = json::array();
    for (const plan_member& m : g.shape.members) members.push_back(m.name);
    rows.push_back({{"generation", g.shape.generation},
                    {"from_step", g.step},
                    {"source", sources[static_cast<int>(g.source)]},
                    {"stages", g.shape.shape.stage_count},
                    {"replicas", g.shape.shape.replica_count},
                    {"schedule", g.shape.shape.schedule},
                    {"unit_cuts", g.shape.shape.unit_cuts},
                    {"leaf_cuts", g.shape.shape.leaf_cuts},
                    {"members", std::move(members)},
                    {"reason", g.reason},
                    {"unix_ms", g.unix_ms}});
  }
  return json_answer(200, {{"generations", std::move(rows)}});
}

http_response manifest_answer(const checkpoint_keeper& keeper, const job_place& job,
                              const checkpoint_entry& entry) {
  auto j = entry_json(entry, check_depth::quick);
  j["job"] = to_string(job.id);
  j["name"] = job.spec.name;
  j["spec"] = wire::to_json_value(job.spec);
  auto& parts = j["parts"] = json::array();
  for (std::size_t i = 0; i < entry.content.parts.size(); ++i) {
    const auto& part = entry.content.parts[i];
    const auto host = entry.content.extra.find(fmt::format("host.{}", i));
    parts.push_back({{"file", part.file},
                     {"folder", keeper.folder_of(job, entry, i)},
                     {"host", host == entry.content.extra.end() ? std::string() : host->second},
                     {"bytes", part.bytes},
                     {"root_hash", part.root_hash},
                     {"tensors", part.tensors},
                     {"is_here", i < entry.parts.size() && !entry.parts[i].empty()}});
  }
  return json_answer(200, j);
}

api_outcome route(const http_request& request, const api_state& state) {
  if (request.path.starts_with(prefix)) return route_api(request, state);
  if (request.method != "GET" && request.method != "HEAD") return wrong_method(request, "GET");
  http_response answer;
  if (request.path == "/healthz") {
    answer.content_type = "text/plain; charset=utf-8";
    answer.status = state.store_problem.empty() ? 200 : 503;
    answer.body = state.store_problem.empty() ? "ok\n" : "store: " + state.store_problem + "\n";
    return answer;
  }
  if (request.path == "/metrics") {
    answer.content_type = "text/plain; version=0.0.4; charset=utf-8";
    answer.body = metrics_text(state);
    return answer;
  }
  if (const auto* file = find_page_file(request.path)) {
    answer.content_type = file->content_type;
    answer.body = file->content;
    answer.headers.emplace_back("Content-Security-Policy",
                                "default-src 'none'; script-src 'self'; style-src 'self'; "
                                "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'");
    answer.headers.emplace_back("X-Content-Type-Options", "nosniff");
    return answer;
  }
  return no_such_path(request);
}

}  // namespace stagecoach
