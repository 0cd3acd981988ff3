// Windows that are computed again: on any layout identical, and what was changed is found and
// named.
#include "worker/window_run.hpp"

#include <doctest/doctest.h>

#include <fstream>

#include "storage/dataset.hpp"
#include "storage/part.hpp"
#include "tests/storage_folder.hpp"
#include "tests/training_run.hpp"
#include "worker/fault_injection.hpp"
#include "worker/step_runner.hpp"

using namespace stagecoach;
using namespace stagecoach::testing;

namespace {

/// A run of one worker that logs and saves as a job does, with an optional flip.
struct logged_run {
  job_spec spec = small_job();
  std::map<std::uint64_t, step_report> log;
  std::map<std::uint64_t, std::vector<part_record>> saved;
  std::map<std::uint64_t, std::uint64_t> chains;
};

std::vector<part_record> save(const std::filesystem::path& folder, std::uint64_t step,
                              stage& model) {
  std::vector<tensor_view> views;
  part_record part;
  for (const tensor_info& t : model.tensors()) {
    views.push_back({t.name, t.shape, model.parameter(t.name)});
    views.push_back({"opt.m." + t.name, t.shape, model.moment1(t.name)});
    views.push_back({"opt.v." + t.name, t.shape, model.moment2(t.name)});
    part.tensors.push_back(t.name);
  }
  auto written = write_part(folder, part_file_name({1, step, 0, 0}), {}, views);
  REQUIRE(written.has_value());
  part.file = written->file;
  part.folder = folder.string();
  part.root_hash = written->root_hash;
  return {part};
}

logged_run run_and_log(const std::filesystem::path& folder, std::vector<injected_fault> faults,
                       std::uint64_t steps = 12) {
  logged_run run;
  std::string text;
  for (int i = 0; i < 2000; ++i) text += fmt::format("the wheel {} turns on\n", i * i % 97);
  std::ofstream(folder / "text.txt") << text;
  run.spec.data.train = {{(folder / "text.txt").string(), "text", 0, ""}};
  REQUIRE(resolve_data_files(run.spec.data).has_value());
  auto data = open_dataset(run.spec.data, run.spec.model.vocab_size);
  REQUIRE(data.has_value());
  const layout shape = make_layout(run.spec, 1, 1, "1f1b");
  plan p;
  p.generation = 1;
  p.shape = shape;
  p.members.push_back({static_cast<worker_id>(1), "p", "w", "", 0});
  auto device = make_cpu_backend(1);
  stage model(run.spec.model, run.spec.batch, 0, shape.unit_cuts.back(),
              *step_runner::slots(run.spec, p, 0), *device);
  model.initialise_parameters();
  auto links = make_memory_links(1);
  token_reader train{data->train->count(),
                     [&](std::int64_t begin, std::int64_t n, std::int32_t* to) {
                       REQUIRE(data->train->read(begin, n, to).has_value());
                     }};
  step_runner runner(run.spec, p, 0, model, *links[0], *device, train, {});
  fault_injection injection(std::move(faults));
  std::uint64_t chain = 0;
  for (std::uint64_t step = 1; step <= steps; ++step) {
    auto vote = runner.compute(step, chain, {});
    REQUIRE(vote.has_value());
    step_report r;
    r.step = step;
    r.loss = vote->loss;
    r.norm = vote->norm;
    r.chain = chain = vote->chain;
    r.weights_hash = vote->weights_hash;
    run.log[step] = r;
    runner.apply(*vote);
    injection.after_apply(step, model);
    run.chains[step] = chain;
    if (step % 4 == 0) run.saved[step] = save(folder, step, model);
  }
  return run;
}

window window_of(const logged_run& run, std::uint64_t from, std::uint64_t to, int stages,
                 int replicas) {
  window w;
  w.spec = run.spec;
  w.shape = make_layout(run.spec, stages, replicas, "1f1b");
  w.step = from;
  w.last = to;
  if (from > 0) {
    w.chain = run.chains.at(from);
    w.parts = run.saved.at(from);
  }
  w.log = run.log;
  for (const auto& [step, parts] : run.saved)
    if (step > from && step <= to) w.saved[step] = parts;
  w.layouts = {{1, make_layout(run.spec, 1, 1, "1f1b")}};
  return w;
}

}  // namespace

TEST_CASE("a window is identical on every layout, from the start and from a checkpoint") {
  test::temp_folder folder;
  const logged_run run = run_and_log(folder.path(), {});
  const std::atomic<bool> cancelled{false};
  for (auto [stages, replicas] : {std::pair{1, 1}, {2, 1}, {1, 3}, {2, 2}}) {
    CAPTURE(stages);
    CAPTURE(replicas);
    for (const std::uint64_t from : {0, 4}) {
      const auto verdict = run_window(window_of(run, from, 12, stages, replicas), cancelled);
      REQUIRE(verdict.has_value());
      CHECK(verdict->is_identical);
      CHECK(verdict->step == 12);
      CHECK(verdict->text.find("identical: steps ") == 0);
    }
  }
}

TEST_CASE("a flipped bit: the first step, the stage, and the tensors at the next checkpoint") {
  test::temp_folder folder;
  const std::atomic<bool> cancelled{false};
  SUBCASE("right before a checkpoint the one tensor is named") {
    const logged_run run =
        run_and_log(folder.path(), {{injected_fault::kind::flip, 8, "h.1.mlp.c_fc.weight"}});
    const auto verdict = run_window(window_of(run, 4, 12, 2, 1), cancelled);
    REQUIRE(verdict.has_value());
    CHECK(!verdict->is_identical);
    CHECK(verdict->step == 8);
    CHECK(verdict->what == "weights");
    CHECK(verdict->stages == std::vector<int>{0});
    CHECK(verdict->saved_step == 8);
    CHECK(verdict->tensors == std::vector<std::string>{"h.1.mlp.c_fc.weight"});
  }
  SUBCASE("in between, all that it has reached by then") {
    const logged_run run =
        run_and_log(folder.path(), {{injected_fault::kind::flip, 6, "h.1.mlp.c_fc.weight"}});
    const auto verdict = run_window(window_of(run, 4, 12, 1, 1), cancelled);
    REQUIRE(verdict.has_value());
    CHECK(!verdict->is_identical);
    CHECK(verdict->step == 6);
    CHECK(verdict->saved_step == 8);
    CHECK(verdict->tensors.size() > 10);
    // Nothing before it is accused.
    CHECK(run_window(window_of(run, 0, 4, 1, 1), cancelled)->is_identical);
  }
  SUBCASE("after the last step, where only the checkpoint shows it") {
    const logged_run run = run_and_log(folder.path(), {{injected_fault::kind::flip, 12, ""}});
    const auto verdict = run_window(window_of(run, 8, 12, 1, 1), cancelled);
    REQUIRE(verdict.has_value());
    CHECK(!verdict->is_identical);
    CHECK(verdict->what == "checkpoint");
    CHECK(verdict->step == 12);
    CHECK(verdict->tensors == std::vector<std::string>{"wte.weight"});
  }
  SUBCASE("the row after the window tells of the state at its end") {
    const logged_run run = run_and_log(folder.path(), {{injected_fault::kind::flip, 6, ""}});
    const auto verdict = run_window(window_of(run, 4, 6, 1, 1), cancelled);
    REQUIRE(verdict.has_value());
    CHECK(!verdict->is_identical);
    CHECK(verdict->step == 6);
  }
}

TEST_CASE("a log without hashes still tells by its chain, and a cancelled window says so") {
  test::temp_folder folder;
  logged_run run = run_and_log(folder.path(), {});
  for (auto& [step, row] : run.log) row.weights_hash.clear();
  run.log[7].chain ^= 1;
  std::atomic<bool> cancelled{false};
  const auto verdict = run_window(window_of(run, 4, 12, 2, 1), cancelled);
  REQUIRE(verdict.has_value());
  CHECK(!verdict->is_identical);
  CHECK(verdict->step == 7);
  CHECK(verdict->what == "loss");
  CHECK(verdict->tensors.empty());  // the checkpoint after it agrees
  cancelled = true;
  const auto none = run_window(window_of(run, 4, 12, 2, 1), cancelled);
  REQUIRE(!none.has_value());
  CHECK(none.err().code == errc::cancelled);
}
