// The API's shapes, with the real cluster machine; no port, no thread, no disk.
#include "coordinator/api.hpp"

#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include "config/job_spec_yaml.hpp"
#include "coordinator/metrics_text.hpp"

namespace stagecoach {
namespace {

using nlohmann::json;

job_spec small_spec(const std::string& name) {
  // Known good by construction: every field that the planner reads.
  job_spec spec;
  spec.name = name;
  spec.model.n_layer = 4;
  spec.model.d_model = 32;
  spec.model.n_head = 2;
  spec.model.d_ff = 128;
  spec.model.vocab_size = 256;
  spec.model.context = 64;
  spec.model.init = "random";
  spec.data.tokenizer = "bytes";
  spec.batch = {8, 1, 32, 4};
  spec.stop_steps = 100;
  spec.elasticity.workers_min = 2;
  spec.elasticity.workers_max = 4;
  return spec;
}

struct fixture {
  cluster_machine machine{restored_records{}};
  run_history history;
  trace_desk traces;
  std::vector<actions::reply> replies;

  fixture() {
    take(machine.start());
    take(machine.step(events::tick{1'000, 1'700'000'000'000}));
  }
  void take(std::vector<action> list) {
    for (auto& a : list) {
      if (auto* reply = std::get_if<actions::reply>(&a)) replies.push_back(*reply);
      if (auto* note = std::get_if<actions::note>(&a)) history.add(note->record);
    }
  }
  void tell(const event& e) { take(machine.step(e)); }
  job_id submit(const std::string& name) {
    tell(events::submit_job{small_spec(name), "yaml", reply_id{1}});
    REQUIRE(!replies.empty());
    REQUIRE(replies.back().outcome);
    return replies.back().outcome->job;
  }
  void attach(std::uint64_t connection, const std::string& name) {
    hello h;
    h.name = name;
    h.process = std::string(31, '0') + std::to_string(connection);
    h.host = "node";
    h.device = "cpu";
    h.device_class = "class";
    h.threads = 2;
    h.memory_bytes = 8'000'000'000;
    h.link_host = "127.0.0.1";
    h.link_port = static_cast<std::uint16_t>(5000 + connection);
    tell(events::worker_attached{connection_id{connection}, h});
  }
  api_state state() { return {machine, history, traces, 1'700'000'001'000, {}, 0, 0, 0}; }
  api_outcome ask(const std::string& method, const std::string& path, const std::string& body = {},
                  std::map<std::string, std::string> query = {}) {
    http_request r;
    r.method = method;
    r.path = path;
    r.query = std::move(query);
    r.content_type = "application/json";
    r.body = body;
    return route(r, state());
  }
  json get(const std::string& path, std::map<std::string, std::string> query = {}) {
    auto outcome = ask("GET", path, {}, std::move(query));
    auto* answer = std::get_if<http_response>(&outcome);
    REQUIRE(answer != nullptr);
    REQUIRE_MESSAGE(answer->status == 200, answer->body);
    return json::parse(answer->body);
  }
  int status(const std::string& method, const std::string& path, const std::string& body = {}) {
    auto outcome = ask(method, path, body);
    auto* answer = std::get_if<http_response>(&outcome);
    return answer ? answer->status : 0;
  }
};

TEST_CASE("a submitted job is listed as PENDING, by id and by name, and says why") {
  fixture f;
  f.submit("one");
  const auto list = f.get("/api/v1/jobs");
  REQUIRE(list["jobs"].size() == 1);
  const auto& row = list["jobs"][0];
  CHECK(row["id"] == "j-000001");
  CHECK(row["name"] == "one");
  CHECK(row["state"] == "PENDING");
  CHECK(row["step"] == 0);
  CHECK(row["steps"] == 100);
  CHECK(row["loss"].is_null());
  CHECK(row["workers_min"] == 2);
  CHECK(row["weights_hash"] == "");
  for (const char* key : {"tokens_per_s", "workers", "workers_max", "eta_s", "reason", "priority",
                          "submitted_unix_ms", "finished_unix_ms", "hash_step", "valid_loss"})
    CHECK_MESSAGE(row.contains(key), key);
  CHECK(f.get("/api/v1/jobs/one")["id"] == "j-000001");
  CHECK(f.get("/api/v1/jobs/j-000001")["spec"]["model"]["n_layer"] == 4);
  const auto why = f.get("/api/v1/jobs/one/why");
  CHECK(why["state"] == "PENDING");
  CHECK(why["text"].get<std::string>().find('2') != std::string::npos);  // how many it needs
}

TEST_CASE("unknown jobs, paths and methods are answered with a code and a message") {
  fixture f;
  f.submit("one");
  CHECK(f.status("GET", "/api/v1/jobs/nobody") == 404);
  CHECK(f.status("GET", "/api/v1/nothing") == 404);
  CHECK(f.status("GET", "/elsewhere") == 404);
  CHECK(f.status("GET", "/api/v1/jobs/one/pause") == 405);
  CHECK(f.status("DELETE", "/api/v1/jobs") == 405);
  CHECK(f.status("POST", "/api/v1/jobs/one/events") == 405);
  CHECK(f.status("GET", "/api/v1/jobs/one/events/3/4") == 404);
  auto outcome = f.ask("GET", "/api/v1/jobs/nobody");
  const auto body = json::parse(std::get<http_response>(outcome).body);
  CHECK(body["error"]["code"] == "not_found");
  CHECK(body["error"]["message"].get<std::string>().find("nobody") != std::string::npos);
}

TEST_CASE("bodies that are no JSON object or have fields of a wrong kind are refused with 400") {
  fixture f;
  f.submit("one");
  for (const char* body : {"[]", "{", "{\"yaml\": 3}", "{}", "{\"yaml\": \"a\", \"set\": 1}",
                           "{\"yaml\": \"a\", \"set\": [1]}"})
    CHECK_MESSAGE(f.status("POST", "/api/v1/jobs", body) == 400, body);
  CHECK(f.status("POST", "/api/v1/jobs/one/cancel", "{\"now\": \"yes\"}") == 400);
  CHECK(f.status("POST", "/api/v1/jobs/one/checkpoints/verify", "{\"step\": -1}") == 400);
  for (const char* body : {"{}", "{\"priority\": \"5\"}", "{\"priority\": 1.5}",
                           "{\"priority\": 1000001}", "{\"priority\": 99999999999999999999}"})
    CHECK_MESSAGE(f.status("POST", "/api/v1/jobs/one/priority", body) == 400, body);
  std::string deep(100'000, '[');
  CHECK(f.status("POST", "/api/v1/jobs", deep) == 400);
}

TEST_CASE("what changes something becomes an event, what needs the disk a task") {
  fixture f;
  const auto id = f.submit("one");
  auto pause = f.ask("POST", "/api/v1/jobs/one/pause");
  REQUIRE(std::holds_alternative<api_event>(pause));
  CHECK(std::get<events::pause_job>(std::get<api_event>(pause).what).job == id);
  auto cancel = f.ask("POST", "/api/v1/jobs/j-000001/cancel", "{\"now\": true}");
  REQUIRE(std::holds_alternative<api_event>(cancel));
  CHECK(std::get<events::cancel_job>(std::get<api_event>(cancel).what).now);
  auto priority = f.ask("POST", "/api/v1/jobs/one/priority", "{\"priority\": -7}");
  REQUIRE(std::holds_alternative<api_event>(priority));
  CHECK(std::get<events::set_priority>(std::get<api_event>(priority).what).priority == -7);
  auto drain = f.ask("POST", "/api/v1/workers/w-1/drain", "{\"reason\": \"fan\"}");
  REQUIRE(std::holds_alternative<api_event>(drain));
  CHECK(std::get<events::drain_worker>(std::get<api_event>(drain).what).reason == "fan");
  auto submit = f.ask("POST", "/api/v1/jobs", R"({"yaml": "x", "file": "f", "set": ["a=b"]})");
  REQUIRE(std::holds_alternative<api_submit>(submit));
  CHECK(std::get<api_submit>(submit).request.set == std::vector<std::string>{"a=b"});
  auto list = f.ask("GET", "/api/v1/jobs/one/checkpoints");
  REQUIRE(std::holds_alternative<api_checkpoints>(list));
  CHECK(std::get<api_checkpoints>(list).depth == check_depth::quick);
  auto verify = f.ask("POST", "/api/v1/jobs/one/checkpoints/verify", "{\"step\": 5}");
  REQUIRE(std::holds_alternative<api_checkpoints>(verify));
  CHECK(std::get<api_checkpoints>(verify).step == 5);
  CHECK(std::get<api_checkpoints>(verify).depth == check_depth::deep);
  auto one = f.ask("GET", "/api/v1/jobs/one/checkpoints/7");
  REQUIRE(std::holds_alternative<api_manifest>(one));
  CHECK(std::get<api_manifest>(one).step == 7);
}

TEST_CASE("workers are listed with their state, and events go on from where one stopped") {
  fixture f;
  f.attach(1, "w-a");
  const auto workers = f.get("/api/v1/workers")["workers"];
  REQUIRE(workers.size() == 1);
  CHECK(workers[0]["name"] == "w-a");
  CHECK(workers[0]["state"] == "IDLE");
  CHECK(workers[0]["address"] == "127.0.0.1:5001");
  for (const char* key :
       {"id", "job", "stage", "replica", "device", "device_class", "threads", "memory_bytes",
        "heartbeat_ms", "age_s", "host", "labels", "drain_reason"})
    CHECK_MESSAGE(workers[0].contains(key), key);

  f.submit("one");
  const auto events = f.get("/api/v1/jobs/one/events");
  REQUIRE(!events["events"].empty());
  const auto next = events["next"].get<std::uint64_t>();
  CHECK(events["events"].back()["n"] == next);
  const auto more = f.get("/api/v1/jobs/one/events", {{"since", std::to_string(next)}});
  CHECK(more["events"].empty());
  CHECK(more["next"] == next);
  CHECK(f.get("/api/v1/events")["events"].size() >= 2);
}

TEST_CASE(
    "a series is cut to the asked points and keeps its ends; a loss that is no number is null") {
  fixture f;
  const auto id = f.submit("one");
  for (std::uint64_t step = 1; step <= 100; ++step) {
    step_report r;
    r.step = step;
    r.loss = exact_double::of(step == 100 ? std::numeric_limits<double>::quiet_NaN() : 4.0);
    r.step_us = 2'000;
    f.history.add_step(id, r);
  }
  f.history.add_evaluation(id, 50, exact_double::of(3.5));
  CHECK(f.get("/api/v1/jobs/one/series")["steps"].size() == 100);
  const auto cut = f.get("/api/v1/jobs/one/series", {{"points", "5"}});
  REQUIRE(cut["steps"].size() == 5);
  CHECK(cut["steps"][0]["step"] == 1);
  CHECK(cut["steps"][4]["step"] == 100);
  CHECK(cut["steps"][4]["loss"].is_null());
  CHECK(cut["steps"][0]["step_ms"] == 2.0);
  CHECK(cut["steps"][0]["tokens_per_s"] == 128'000.0);  // 8 sequences of 32 tokens in 2 ms
  CHECK(cut["valid"][0]["loss"] == 3.5);
  CHECK(f.get("/api/v1/jobs/one/series", {{"from", "99"}})["steps"].size() == 2);
}

TEST_CASE("metrics are Prometheus text with one row per name and label set") {
  fixture f;
  f.attach(1, "w-a");
  const auto id = f.submit("one");
  step_report r;
  r.step = 1;
  r.loss = exact_double::of(2.5);
  r.step_us = 30'000;
  f.history.add_step(id, r);
  const auto text = metrics_text(f.state());
  CHECK(text.find("# TYPE stagecoach_workers gauge") != std::string::npos);
  CHECK(text.find("stagecoach_workers{state=\"IDLE\"} 1") != std::string::npos);
  CHECK(text.find("stagecoach_job_state{job=\"one\",state=\"PENDING\"} 1") != std::string::npos);
  CHECK(text.find("stagecoach_job_loss{job=\"one\",split=\"train\"} 2.5") != std::string::npos);
  CHECK(text.find("stagecoach_job_step_duration_seconds_bucket{job=\"one\",le=\"0.05\"} 1") !=
        std::string::npos);
  CHECK(text.find("stagecoach_job_step_duration_seconds_count{job=\"one\"} 1") !=
        std::string::npos);
  std::map<std::string, int> rows;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);)
    if (!line.empty() && line[0] != '#') ++rows[line.substr(0, line.rfind(' '))];
  for (const auto& [row, count] : rows) CHECK_MESSAGE(count == 1, row);
}

TEST_CASE("health says what is wrong with the store") {
  fixture f;
  http_request r;
  r.method = "GET";
  r.path = "/healthz";
  auto healthy = route(r, f.state());
  CHECK(std::get<http_response>(healthy).body == "ok\n");
  auto state = f.state();
  state.store_problem = "disk full";
  auto ill = route(r, state);
  CHECK(std::get<http_response>(ill).status == 503);
}

TEST_CASE("the page loads nothing from elsewhere and forbids it") {
  fixture f;
  auto outcome = f.ask("GET", "/");
  const auto& page = std::get<http_response>(outcome);
  CHECK(page.status == 200);
  CHECK(page.body.find("http") == std::string::npos);
  const bool has_policy =
      std::any_of(page.headers.begin(), page.headers.end(), [](const auto& header) {
        return header.first == "Content-Security-Policy" &&
               header.second.find("default-src 'none'") != std::string::npos;
      });
  CHECK(has_policy);
}

TEST_CASE("history stays within its bounds: old steps thin out, the newest stay exact") {
  run_history history({.events_per_job = 3, .steps_per_job = 100, .lines_per_job = 5});
  const job_id id{1};
  for (std::uint64_t step = 1; step <= 1'000; ++step) {
    step_report r;
    r.step = step;
    r.step_us = 10;
    history.add_step(id, r);
  }
  const auto& steps = history.of(id)->steps;
  CHECK(steps.size() <= 100);
  CHECK(steps.begin()->first == 1);
  CHECK(steps.rbegin()->first == 1'000);
  CHECK(steps.contains(999));
  CHECK(history.of(id)->step_count == 1'000);
  for (int i = 0; i < 9; ++i) history.add_line(id, {0, 0, "info", "w", std::to_string(i)});
  CHECK(history.of(id)->lines.size() == 5);
  CHECK(history.of(id)->lines.back().n == 9);
  CHECK(history.add_line(id, {0, 0, "info", "w", std::string(10'000, 'x')}).text.size() == 4'096);
}

TEST_CASE("a trace: asked for by steps, and told with its instructions or without") {
  fixture f;
  const job_id job = f.submit("one");
  CHECK(f.status("GET", "/api/v1/jobs/one/trace") == 404);
  CHECK(f.status("PUT", "/api/v1/jobs/one/trace") == 405);
  for (const char* wrong :
       {"{}", R"({"first": 3})", R"({"next": 65})", R"({"next": -1})",
        R"({"next": 2, "first": 3, "last": 4})", R"({"first": "3", "last": 4})"}) {
    CAPTURE(wrong);
    CHECK(f.status("POST", "/api/v1/jobs/one/trace", wrong) == 400);
  }
  auto outcome = f.ask("POST", "/api/v1/jobs/one/trace", R"({"first": 3, "last": 4})");
  const auto* wanted = std::get_if<api_trace>(&outcome);
  REQUIRE(wanted != nullptr);
  CHECK(wanted->first == 3);
  CHECK(wanted->last == 4);

  const member_view member{worker_id{1}, "w1", "node", 0, 0, "running", 1};
  REQUIRE(f.traces.begin(job, 3, 4, {member}, 1, 1));
  traced part;
  part.job = value(job);
  part.request = 1;
  part.step = 3;
  part.spans = {1, 0, 0, 100};
  f.traces.take(worker_id{1}, part);
  const json whole = f.get("/api/v1/jobs/one/trace");
  CHECK(whole["is_whole"] == false);
  CHECK(whole["missing"] == json::array({"w1: steps 4"}));
  CHECK(whole["workers"][0]["steps"][0]["spans"] == json::array({1, 0, 0, 100}));
  const json brief = f.get("/api/v1/jobs/one/trace", {{"brief", "1"}});
  CHECK(brief["workers"][0]["steps"][0]["step"] == 3);
  CHECK_FALSE(brief["workers"][0]["steps"][0].contains("spans"));
}

TEST_CASE("rows of the series come back from the store as they were") {
  run_history history;
  const job_id id{3};
  auto line = history.add_line(id, {0, 5, "warn", "w-a", "text with \"quotes\" and 글"});
  run_history again;
  CHECK(restore_row(again, keys::line(id, line.n), format_line_row(line)));
  REQUIRE(again.of(id) != nullptr);
  CHECK(again.of(id)->lines.back().text == line.text);
  CHECK(again.of(id)->next_line == 2);
  CHECK(restore_row(again, keys::evaluation(id, 7), format_evaluation_row(exact_double::of(1.25))));
  CHECK(again.of(id)->evaluations.at(7).get() == 1.25);
  CHECK_FALSE(restore_row(again, keys::evaluation(id, 8), "zz"));
  CHECK_FALSE(restore_row(again, "log/short", "{}"));
}

}  // namespace
}  // namespace stagecoach
