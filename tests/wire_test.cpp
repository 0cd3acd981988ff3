#include "coordinator/wire.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "coordinator/cluster_machine.hpp"
#include "coordinator/wire_fields.hpp"
#include "model/tensor_names.hpp"

using namespace stagecoach;

namespace {

commit sample_commit() {
  commit c;
  c.spec.name = "shakes \"quoted\" \xc3\xa9";
  c.spec.model = {"", 2, 8, 2, 32, 16, 8, "random", 18446744073709551615ull, 0.02};
  c.spec.optimizer.lr = 0.1;  // not a short binary fraction
  c.spec.labels["zone"] = "a";
  c.spec.data.train.push_back({"/data/text", "text", 12, "00ff"});
  c.shape.job = static_cast<job_id>(7);
  c.shape.generation = 3;
  c.shape.shape = {2, 1, "gpipe", {0, 2, 4}, {0, 8}};
  c.shape.members = {{static_cast<worker_id>(1), "aa", "w-1", "127.0.0.1", 4000},
                     {static_cast<worker_id>(2), "bb", "w-2", "127.0.0.1", 65535}};
  c.source = source_kind::live;
  c.step = 41;
  c.transfers.push_back({"wte.weight", 0, 1});
  vote_result vote;
  vote.loss = exact_double::of(std::nan(""));
  vote.norm = exact_double::of(1.0 / 3.0);
  vote.order_ids = {4, 5};
  c.roll_forward = vote;
  return c;
}

std::string nested(int depth) {
  std::string text = R"({"type":"goodbye","x":)";
  text.append(static_cast<std::size_t>(depth), '[');
  text.append(static_cast<std::size_t>(depth), ']');
  return text + "}";
}

}  // namespace

TEST_CASE("a commit survives the wire with every bit") {
  const commit sent = sample_commit();
  const std::string text = encode(to_worker(sent));
  const auto read = decode_to_worker(text);
  REQUIRE(read);
  const commit& c = std::get<commit>(*read);
  CHECK(c.shape == sent.shape);
  CHECK(c.spec == sent.spec);
  CHECK(c.source == source_kind::live);
  CHECK(c.transfers == sent.transfers);
  REQUIRE(c.roll_forward);
  CHECK(*c.roll_forward == *sent.roll_forward);  // a NaN's bits too
  CHECK(encode(*read) == text);
}

TEST_CASE("all messages to the coordinator come back as what they were") {
  prepared p;
  p.tensors = {"wte.weight"};
  p.last_vote = vote_result{};
  const std::vector<to_coordinator> all = {
      hello{},       beat{},       p,      ready{},    failed{},      progress{1, 2, 3, {{}, {}}},
      evaluated{},   part_saved{}, held{}, finished{}, peer_report{}, log_line{},
      goodbye{"end"}};
  for (const to_coordinator& m : all) {
    const auto read = decode_to_coordinator(encode(m));
    REQUIRE(read);
    CHECK(read->index() == m.index());
    CHECK(encode(*read) == encode(m));
  }
}

TEST_CASE("fields that are not known are ignored, fields that are missing keep their default") {
  const auto read = decode_to_coordinator(R"({"type":"hello","name":"w","new_field":{"a":[1]}})");
  REQUIRE(read);
  const hello& h = std::get<hello>(*read);
  CHECK(h.name == "w");
  CHECK(h.threads == 1);
  CHECK(h.protocol == protocol_version);
}

TEST_CASE("a message that breaks the rules is refused with its place") {
  const auto refusal = [](const std::string& text) {
    const auto read = decode_to_coordinator(text);
    REQUIRE_FALSE(read);
    return read.err().message;
  };
  CHECK(refusal("").find("not JSON") == 0);
  CHECK(refusal("[1]") == "expected a JSON object, found array");
  CHECK(refusal("{}") == R"(a message without a text field "type")");
  CHECK(refusal(R"({"type":"commit"})") == R"(message of unknown type "commit")");  // other way
  CHECK(refusal(R"({"type":"beat","step":-1})") ==
        "beat: step: -1 is out of range [0, 18446744073709551615]");
  CHECK(refusal(R"({"type":"beat","step":1.5})") ==
        "beat: step: expected a whole number, found number");
  CHECK(refusal(R"({"type":"hello","link_port":65536})") ==
        "hello: link_port: 65536 is out of range [0, 65535]");
  CHECK(refusal(R"({"type":"hello","phase":7})") ==
        "hello: phase: 7 is not one of the 7 known values");
  CHECK(refusal(R"({"type":"hello","labels":{"a":1}})") ==
        "hello: labels.a: expected a text, found number");
  CHECK(refusal(R"({"type":"part_saved","part_count":0})") ==
        "part_saved: part_count: 0 is not in [1, 4096]");
  CHECK(refusal(R"({"type":"evaluated","loss":"3ff"})") ==
        "evaluated: loss: expected 16 hex digits of a double, found string");
  CHECK(refusal(nested(100)) == "JSON nested deeper than 64");
  CHECK(decode_to_coordinator(nested(50)));
  CHECK(decode_to_coordinator(std::string(limits::control_message_bytes_max + 1, ' ')).err().code ==
        errc::too_large);
}

TEST_CASE("a depth bomb of the largest message size is refused and not recursed into") {
  std::string bomb = R"({"type":)";
  bomb.append(static_cast<std::size_t>(limits::control_message_bytes_max) - bomb.size(), '[');
  CHECK_FALSE(decode_to_coordinator(bomb));
}

TEST_CASE("a commit whose numbers do not fit each other is refused") {
  const auto refusal = [](auto change) {
    commit c = sample_commit();
    change(c);
    const auto read = decode_to_worker(encode(to_worker(c)));
    REQUIRE_FALSE(read);
    return read.err().message;
  };
  CHECK(refusal([](commit& c) { c.shape.members.pop_back(); }).find("plan.members: 1") !=
        std::string::npos);
  CHECK(refusal([](commit& c) { c.shape.shape.stage_count = 0; }).find("stages") !=
        std::string::npos);
  CHECK(refusal([](commit& c) {
          c.shape.shape.unit_cuts = {0, 5, 4};
        }).find("unit_cuts") != std::string::npos);
  CHECK(refusal([](commit& c) {
          c.shape.shape.unit_cuts = {0, 2, 9};
        }).find("4 units") != std::string::npos);
  CHECK(refusal([](commit& c) { c.transfers[0].to_rank = 2; }).find("rank") != std::string::npos);
  CHECK(refusal([](commit& c) { c.source = static_cast<source_kind>(9); }).find("source") !=
        std::string::npos);
  CHECK(refusal([](commit& c) { c.spec.model.d_model = 1 << 30; }).find("d_model") !=
        std::string::npos);
}

TEST_CASE("text that is not UTF-8 is mended and not thrown") {
  const auto read = decode_to_coordinator(encode(to_coordinator(goodbye{"bad \xff byte"})));
  REQUIRE(read);
  CHECK(std::get<goodbye>(*read).reason == "bad \xef\xbf\xbd byte");
}

TEST_CASE("records come back from their rows, and a broken row is named and skipped") {
  job_record job;
  job.id = static_cast<job_id>(3);
  job.spec = sample_commit().spec;
  job.state = job_state::running;
  job.number = 9;
  generation_record first, second;
  first.shape = sample_commit().shape;
  first.shape.job = job.id;
  second = first;
  second.shape.generation = 4;
  checkpoint_record checkpoint;
  checkpoint.job = job.id;
  checkpoint.step = 40;
  worker_record worker{static_cast<worker_id>(5), "w", "p", "h", true, "fan"};
  const restored_records all = restore_records({
      {keys::meta(), to_json_text(meta_record{2, 3, 1})},
      {keys::job(job.id), to_json_text(job)},
      {keys::generation(job.id, 4), to_json_text(second)},
      {keys::generation(job.id, 3), to_json_text(first)},
      {keys::checkpoint(job.id, 40), to_json_text(checkpoint)},
      {keys::event(job.id, 17), "{}"},
      {keys::event(job_id{}, 5), "{}"},
      {keys::worker(worker.id), to_json_text(worker)},
      {keys::job(static_cast<job_id>(4)), "{\"id\": \"x\"}"},
      {"unknown/key", "?"},
  });
  REQUIRE(all.jobs.size() == 1);
  const restored_job& r = all.jobs.at(job.id);
  CHECK(r.record.spec == job.spec);
  CHECK(r.record.number == 9);
  REQUIRE(r.generation);
  CHECK(r.generation->shape.generation == 4);
  CHECK(r.checkpoints.at(40).job == job.id);
  CHECK(r.next_event == 18);
  CHECK(all.next_cluster_event == 6);
  CHECK(all.meta.incarnation == 2);
  CHECK(all.meta.next_worker == 6);  // never below what was given
  CHECK(all.meta.next_job == 4);
  REQUIRE(all.problems.size() == 1);
  CHECK(all.problems[0].find("job/0000000000000004/record") != std::string::npos);
}

TEST_CASE("rows of a store sort by number") {
  CHECK(keys::event(static_cast<job_id>(1), 9) < keys::event(static_cast<job_id>(1), 10));
  CHECK(keys::checkpoint(static_cast<job_id>(2), 255) <
        keys::checkpoint(static_cast<job_id>(2), 256));
}

TEST_CASE("tensor hashes add up in halves of 64 bits without a carry between them") {
  CHECK(
      add_tensor_hashes({"0000000000000001ffffffffffffffff", "00000000000000020000000000000002"}) ==
      "00000000000000030000000000000001");
  CHECK(add_tensor_hashes({"short"}).empty());
}

TEST_CASE("the head's stage holds a copy of the embedding matrix") {
  model_spec m = sample_commit().spec.model;
  CHECK(stage_tensor_names(m, 3, 4) ==
        std::vector<std::string>{"wte.weight", "ln_f.weight", "ln_f.bias"});
  CHECK(stage_tensor_names(m, 0, 1) == std::vector<std::string>{"wte.weight", "wpe.weight"});
  CHECK(stage_tensor_names(m, 0, 4).size() == 2 + 2 * 12 + 2);
}
