// The coordinator as a process: real port, real store, a job over HTTP, restarts and lost stores.
#include "coordinator/coordinator.hpp"

#include <doctest/doctest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "config/job_spec_yaml.hpp"
#include "coordinator/checkpoint_keeper.hpp"
#include "coordinator/state_folder.hpp"
#include "coordinator/submission.hpp"
#include "coordinator/wire.hpp"
#include "storage/file.hpp"
#include "storage/part.hpp"
#include "tools/http_client.hpp"

namespace stagecoach {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using namespace std::chrono_literals;

struct temporary_folder {
  fs::path path;
  temporary_folder() {
    auto pattern = (fs::temp_directory_path() / "stagecoach-coordinator-XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path = pattern;
  }
  ~temporary_folder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
};

std::string write_text(const fs::path& path) {
  std::ofstream file(path);
  for (int i = 0; i < 500; ++i) file << "a line of text number " << i << "\n";
  return path.string();
}

std::string job_yaml(const std::string& name, const std::string& data) {
  return "version: 1\nname: " + name +
         "\nmodel:\n  n_layer: 2\n  d_model: 32\n  n_head: 2\n  vocab_size: 256\n  context: 64\n"
         "data:\n  tokenizer: bytes\n  train: [{path: " +
         data +
         ", format: text}]\n"
         "batch:\n  global: 8 sequences\n  micro: 1\n  sequence: 32\n"
         "stop: {steps: 20}\n"
         "elasticity: {workers: 2}\n"
         "checkpoint: {every: 5 steps}\n"
         "resources: {device: cpu}\n";
}

struct client {
  http_server server;
  json call(const std::string& method, const std::string& path, const json& body, int expected) {
    auto reply = http_call(server, method, path, body.is_null() ? std::string() : body.dump(), 10s);
    REQUIRE_MESSAGE(reply, (reply ? "" : reply.err().message));
    REQUIRE_MESSAGE(reply->status == expected, path << ": " << reply->body);
    auto parsed = json::parse(reply->body, nullptr, false);
    return parsed;
  }
  json get(const std::string& path, int expected = 200) {
    return call("GET", "/api/v1" + path, nullptr, expected);
  }
  json post(const std::string& path, const json& body, int expected) {
    return call("POST", "/api/v1" + path, body, expected);
  }
};

std::unique_ptr<coordinator> start(const fs::path& state) {
  coordinator::options o;
  o.state = state;
  o.fsync = false;
  auto started = coordinator::start(o);
  REQUIRE_MESSAGE(started, (started ? "" : started.err().message));
  return std::move(*started);
}
client client_of(const coordinator& c) { return {{"127.0.0.1", c.port(), {}, {}}}; }

TEST_CASE("a job comes in over HTTP, is PENDING with a reason, and is there after a restart") {
  temporary_folder folder;
  const auto data = write_text(folder.path / "data.txt");
  const auto state = folder.path / "state";
  {
    auto c = start(state);
    CHECK(c->incarnation() == 1);
    CHECK(c->store_notes().empty());
    auto http = client_of(*c);
    CHECK(http.get("/version")["incarnation"] == 1);
    const auto made =
        http.post("/jobs", {{"yaml", job_yaml("first", data)}, {"file", "a.yaml"}}, 201);
    CHECK(made["id"] == "j-000001");
    CHECK(made["name"] == "first");
    const auto job = http.get("/jobs/first");
    CHECK(job["state"] == "PENDING");
    CHECK(job["spec"]["data"]["train"][0]["bytes"] == fs::file_size(data));
    CHECK(http.get("/jobs/first/why")["text"].get<std::string>().find("2") != std::string::npos);
    CHECK(http.get("/jobs/first/checkpoints")["checkpoints"].empty());
    CHECK(!http.get("/jobs/first/events")["events"].empty());
    http.post("/jobs", {{"yaml", job_yaml("first", data)}}, 409);
    CHECK(fs::exists(state / "jobs" / "j-000001.json"));
  }
  {
    auto c = start(state);
    CHECK(c->incarnation() == 2);
    auto http = client_of(*c);
    CHECK(http.get("/jobs/first")["state"] == "PENDING");
    CHECK(!http.get("/jobs/first/events")["events"].empty());
    CHECK(http.post("/jobs/first/cancel", {{"now", true}}, 202)["id"] == "j-000001");
    CHECK(http.get("/jobs/first")["state"] == "CANCELLED");
    CHECK(http.get("/jobs")["jobs"].empty());
    CHECK(http.get("/jobs?all=1")["jobs"].size() == 1);
  }
}

TEST_CASE("a lost index is filled again from the copies beside it") {
  temporary_folder folder;
  const auto data = write_text(folder.path / "data.txt");
  const auto state = folder.path / "state";
  {
    auto c = start(state);
    client_of(*c).post("/jobs", {{"yaml", job_yaml("first", data)}}, 201);
  }
  SUBCASE("the folder is gone") { fs::remove_all(state / "index"); }
  SUBCASE("every file in it is garbage") {
    for (const auto& entry : fs::directory_iterator(state / "index"))
      if (entry.is_regular_file()) std::ofstream(entry.path()) << "not a store";
  }
  auto c = start(state);
  CHECK(!c->store_notes().empty());
  CHECK(c->incarnation() ==
        2);  // the count goes on: workers must not take this for the first start
  auto http = client_of(*c);
  CHECK(http.get("/jobs/first")["state"] == "PENDING");
  CHECK(http.post("/jobs", {{"yaml", job_yaml("second", data)}}, 201)["id"] == "j-000002");
}

TEST_CASE("a state folder that another coordinator holds is refused with words") {
  temporary_folder folder;
  auto first = start(folder.path / "state");
  coordinator::options o;
  o.state = folder.path / "state";
  auto second = coordinator::start(o);
  REQUIRE_FALSE(second);
  CHECK(second.err().code == errc::conflict);
  CHECK(client_of(*first).get("/version")["incarnation"] == 1);
}

TEST_CASE("a port that is taken is an error, and the store is free again after it") {
  temporary_folder folder;
  auto first = start(folder.path / "one");
  coordinator::options o;
  o.state = folder.path / "two";
  o.port = first->port();
  auto second = coordinator::start(o);
  REQUIRE_FALSE(second);
  CHECK(second.err().code == errc::conflict);
  o.port = 0;
  auto third = coordinator::start(o);
  CHECK(third);
}

TEST_CASE("all problems of a job file come back at once, and a missing data file names its line") {
  temporary_folder folder;
  auto c = start(folder.path / "state");
  auto http = client_of(*c);
  const auto bad =
      http.post("/jobs", {{"yaml", "version: 1\nname: x\nmodell: 3\nbatch: 5\n"}}, 400);
  CHECK(bad["error"]["code"] == "bad_spec");
  CHECK(bad["problems"].size() >= 2);
  const auto missing =
      http.post("/jobs", {{"yaml", job_yaml("x", (folder.path / "none.txt").string())}}, 400);
  REQUIRE(missing["problems"].size() == 1);
  const auto& p = missing["problems"][0];
  CHECK(p["code"] == "E301");
  CHECK(p["path"] == "data.train.0.path");
  CHECK(p["line"].get<int>() > 1);
  CHECK(p["message"].get<std::string>().find("none.txt") != std::string::npos);
  CHECK(http.get("/jobs?all=1")["jobs"].empty());
}

TEST_CASE("a plan shows a layout for every worker count and what is missing to place it") {
  temporary_folder folder;
  auto c = start(folder.path / "state");
  auto yaml = job_yaml("x", write_text(folder.path / "data.txt"));
  const auto plan = client_of(*c).post(
      "/plan", {{"yaml", yaml}, {"set", json::array({"elasticity.workers=1..4"})}}, 200);
  REQUIRE(plan["layouts"].size() == 4);
  for (const auto& l : plan["layouts"]) {
    CHECK(l["workers_used"].get<int>() <= l["workers"].get<int>());
    CHECK(l["worst_memory_bytes"].get<std::int64_t>() > 0);
    CHECK(!l["stage_list"][0]["units"].get<std::string>().empty());
  }
  CHECK(plan["fits_now"] == false);
  CHECK(plan["placement"].get<std::string>().find("needs 1 more") != std::string::npos);
}

TEST_CASE("relative paths of a job file start at the folder that its sender names") {
  temporary_folder folder;
  write_text(folder.path / "data.txt");
  submission_request request{job_yaml("x", "data.txt"), "job.yaml", folder.path.string(), {}};
  const auto done = prepare_submission(request, state_paths(folder.path, std::string(32, '0')));
  REQUIRE(done.spec);
  CHECK(done.spec->data.train[0].path == (folder.path / "data.txt").string());
  CHECK(done.spec->data.train[0].hash.size() == 32);
}

TEST_CASE("units of a stage read as people say them") {
  model_spec m;
  m.n_layer = 12;
  CHECK(describe_units(m, 0, 4) == "embed, h.0-2");
  CHECK(describe_units(m, 4, 7) == "h.3-5");
  CHECK(describe_units(m, 4, 5) == "h.3");
  CHECK(describe_units(m, 10, 14) == "h.9-11, head");
  CHECK(describe_units(m, 0, 14) == "embed, h.0-11, head");
}

// ---- checkpoints on disk
// ----------------------------------------------------------------------------
struct saved_steps {
  temporary_folder folder;
  state_paths paths{folder.path, std::string(32, 'a')};
  checkpoint_keeper keeper;
  job_place job;
  std::vector<float> values = std::vector<float>(1000, 0.5f);

  saved_steps() {
    job.id = job_id{1};
    job.spec.name = "x";
    job.folder = paths.checkpoint_folder(job.id, job.spec);
    job.copies = paths.manifests_folder(job.id);
    job.incarnation = 1;
    job.unix_ms = 1'000;
  }
  manifest_written save(std::uint64_t step, std::uint64_t seq) {
    const auto place = paths.checkpoint_folder(job.id, job.spec);
    const auto file = part_file_name({1, seq, 0, 0});
    auto info = write_part(place, file, {{"job", "1"}}, {{"wte", {10, 100}, values.data()}});
    REQUIRE(info);
    part_record part;
    part.file = info->file;
    part.folder = place.string();
    part.bytes = info->bytes;
    part.root_hash = info->root_hash;
    part.tensors = info->tensors;
    part.host = "node";
    part.weights_hash = std::string(32, '1');
    actions::write_manifest wanted;
    wanted.job = job.id;
    wanted.step = step;
    wanted.seq = seq;
    wanted.chain = 77 + step;
    wanted.generation = 1;
    wanted.loss = exact_double::of(2.5);
    wanted.weights_hash = std::string(32, '2');
    wanted.parts = {part};
    return keeper.write(job, wanted);
  }
  checkpoint_found find(std::uint64_t step_max = ~0ull) {
    return keeper.find(job, {job.id, {}, 9, step_max});
  }
  fs::path part_of(std::uint64_t seq) {
    return paths.checkpoint_folder(job.id, job.spec) / part_file_name({1, seq, 0, 0});
  }
};

TEST_CASE("the newest checkpoint is found with all that loading it needs") {
  saved_steps s;
  CHECK_FALSE(s.find().newest);
  REQUIRE(s.save(0, 1).is_ok);
  REQUIRE(s.save(5, 2).is_ok);
  const auto found = s.find();
  CHECK(found.request == 9);
  REQUIRE(found.newest);
  CHECK(found.newest->step == 5);
  CHECK(found.newest->chain == 82);
  CHECK(found.newest->loss.get() == 2.5);
  REQUIRE(found.newest->parts.size() == 1);
  CHECK(found.newest->parts[0].folder == s.part_of(2).parent_path().string());
  CHECK(found.newest->parts[0].weights_hash == std::string(32, '1'));
  CHECK(s.find(4).newest->step == 0);
}

TEST_CASE("what a generation below the fence saved after its step is neither found nor kept") {
  saved_steps s;
  for (std::uint64_t i = 0; i < 4; ++i) REQUIRE(s.save(5 * i, i + 1).is_ok);
  distrust spoilt;
  spoilt.fence = 2;
  spoilt.step = 5;
  CHECK(s.keeper.find(s.job, {s.job.id, {}, 9, ~0ull, spoilt}).newest->step == 5);
  spoilt.bad_saves = {2};
  CHECK(s.keeper.find(s.job, {s.job.id, {}, 9, ~0ull, spoilt}).newest->step == 0);
  spoilt.bad_saves.clear();
  spoilt.fence = 1;  // these are of generation 1
  CHECK(s.keeper.find(s.job, {s.job.id, {}, 9, ~0ull, spoilt}).newest->step == 15);
  // One that is distrusted does not count among those to keep.
  spoilt.fence = 2;
  std::vector<std::string> problems;
  (void)s.keeper.retire(s.job, {s.job.id, {}, 1, 0, spoilt}, problems);
  CHECK(s.keeper.find(s.job, {s.job.id, {}, 9, ~0ull, spoilt}).newest->step == 5);
}

TEST_CASE("a checkpoint of another job that had the same id and name is not taken") {
  saved_steps s;
  s.job.submitted_unix_ms = 1'000;
  REQUIRE(s.save(5, 2).is_ok);
  s.job.spec.optimizer.lr = 0.5;  // as a newer program might write it: the same job all the same
  CHECK(s.find().newest);
  s.job.submitted_unix_ms = 2'000;
  CHECK_FALSE(s.find().newest);
}

TEST_CASE("a flipped byte in a part is found before anyone loads it, and the search walks back") {
  saved_steps s;
  REQUIRE(s.save(0, 1).is_ok);
  REQUIRE(s.save(5, 2).is_ok);
  {
    std::fstream file(s.part_of(2), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-10, std::ios::end);
    file.put('\x7f');
  }
  const auto found = s.find();
  REQUIRE(found.newest);
  CHECK(found.newest->step == 0);
  REQUIRE(found.notes.size() == 1);
  CHECK(found.notes[0].find("step 5") != std::string::npos);
}

TEST_CASE("without the manifests in the checkpoint folder, the copies in the state folder serve") {
  saved_steps s;
  REQUIRE(s.save(5, 2).is_ok);
  const auto place = s.paths.checkpoint_folder(s.job.id, s.job.spec);
  for (const auto& entry : fs::directory_iterator(place))
    if (entry.path().extension() == ".json") fs::remove(entry.path());
  REQUIRE(s.find().newest);
  CHECK(s.find().newest->step == 5);
}

TEST_CASE("the same manifest written again after a restart is a success and changes nothing") {
  saved_steps s;
  REQUIRE(s.save(5, 2).is_ok);
  s.job.incarnation = 2;
  s.job.unix_ms = 9'000;
  CHECK(s.save(5, 2).is_ok);
  CHECK(s.keeper.list(s.job, check_depth::quick)->front().content.incarnation == 1);
}

TEST_CASE("retention keeps the newest ones and says which steps are gone") {
  saved_steps s;
  for (std::uint64_t i = 0; i < 5; ++i) REQUIRE(s.save(5 * i, i + 1).is_ok);
  std::vector<std::string> problems;
  const auto gone = s.keeper.retire(s.job, {s.job.id, {}, 2, 0}, problems);
  CHECK(problems.empty());
  CHECK(gone.steps == std::vector<std::uint64_t>{0, 5, 10});
  CHECK(s.find().newest->step == 20);
  CHECK_FALSE(fs::exists(s.part_of(1)));
  CHECK(fs::exists(s.part_of(4)));
}

TEST_CASE("an index is filled with the checkpoints that the manifests name") {
  saved_steps s;
  REQUIRE(s.save(5, 2).is_ok);
  job_record record;
  record.id = s.job.id;
  record.spec = s.job.spec;
  record.state = job_state::running;
  record.generation = 1;
  generation_record generation;
  generation.shape.job = s.job.id;
  generation.shape.generation = 1;
  const meta_record meta{7, 4, 2};
  record_copies copies(s.paths, {});
  REQUIRE(copies.apply({kv_write::put(keys::meta(), to_json_text(meta)),
                        kv_write::put(keys::job(s.job.id), to_json_text(record)),
                        kv_write::put(keys::generation(s.job.id, 1), to_json_text(generation))}));
  std::vector<std::string> notes;
  const auto restored = restore_records(rows_from_copies(s.paths, notes));
  CHECK(notes.empty());
  CHECK(restored.meta.incarnation == 7);
  CHECK(restored.meta.next_worker == 4);
  REQUIRE(restored.jobs.contains(s.job.id));
  const auto& job = restored.jobs.at(s.job.id);
  CHECK(job.record.step == 5);
  CHECK(job.generation);
  REQUIRE(job.checkpoints.contains(5));
  CHECK(job.checkpoints.at(5).chain == 82);
  CHECK(job.checkpoints.at(5).seq == 2);
  CHECK(job.checkpoints.at(5).part_count == 1);
}

}  // namespace
}  // namespace stagecoach
