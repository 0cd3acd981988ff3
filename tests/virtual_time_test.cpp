#include "model/virtual_time.hpp"

#include <doctest/doctest.h>

using namespace stagecoach;

namespace {

job_spec job(int layers, std::int64_t microbatches, int least, int most) {
  job_spec s;
  s.model = {"", layers, 64, 4, 256, 256, 64, "random"};
  s.batch = {microbatches, 1, 64, 1};
  s.batch.leaf_count = resolve_leaf_count(microbatches, least, most);
  s.elasticity.workers_min = least;
  s.elasticity.workers_max = most;
  return s;
}

unit_times compute_only() {
  unit_times t;
  t.block = {1, 1, 1};
  return t;
}

}  // namespace

TEST_CASE("virtual time: one worker takes the sum of its pieces") {
  const job_spec s = job(2, 8, 1, 1);
  unit_times t = compute_only();
  t.embedding = {0.5, 0, 0.25};
  t.head = {2, 1, 1};
  t.vote_seconds = 7;
  t.optimizer_seconds_per_parameter = 1e-3;
  auto shape = choose_layout(s, 1);
  REQUIRE(shape);
  // By hand: a microbatch is 0.75 + 2 * 3 + 4; the tied matrix is updated where it is held twice.
  const double update = 1e-3 * static_cast<double>(parameter_count(s.model) + 256 * 64);
  auto seconds = predicted_step_seconds(s, *shape, t);
  REQUIRE(seconds);
  CHECK(*seconds == doctest::Approx(8 * 10.75 + 7 + update));
}

TEST_CASE("virtual time: a pipeline pays its bubble, replicas their busiest share") {
  job_spec s = job(2, 8, 1, 1);
  s.batch.leaf_count = 8;
  // Units embed, two blocks, head: stages {embed, h.0} and {h.1, head}, each 3 s a microbatch.
  layout two{2, 1, "gpipe", {0, 2, 4}, {0, 8}};
  auto seconds = predicted_step_seconds(s, two, compute_only());
  REQUIRE(seconds);
  // GPipe, by hand: 8 forwards and 8 backwards a stage, the second stage starts one forward later
  // and the first waits for the last input gradient's way back.
  CHECK(*seconds >= 8 * 3 + 1);
  CHECK(*seconds <= 8 * 3 + 3);
  layout three{1, 3, "1f1b", {0, 4}, {0, 2, 5, 8}};
  CHECK(*predicted_step_seconds(s, three, compute_only()) == doctest::Approx(3 * 6));
}

TEST_CASE("virtual time: links cost what the reduction sends") {
  job_spec s = job(2, 8, 1, 1);
  s.batch.leaf_count = 8;
  unit_times t;
  t.link_seconds_per_byte = 1;
  layout two{1, 2, "1f1b", {0, 4}, {0, 4, 8}};
  std::int64_t floats = 0;
  for (int u = 0; u < 4; ++u) floats += unit_parameter_count(s.model, u);
  // One block of half the gradient each way, then the other half back: 4 B a parameter in all.
  CHECK(*predicted_step_seconds(s, two, t) == doctest::Approx(4.0 * static_cast<double>(floats)));
}

TEST_CASE("virtual time: a layout that is not the job's is refused") {
  const job_spec s = job(2, 8, 1, 1);
  CHECK_FALSE(predicted_step_seconds(s, layout{2, 1, "1f1b", {0, 4, 4}, {0, 1}}, compute_only()));
  CHECK_FALSE(predicted_throughput(s, 4, 2, stretch::replicas, compute_only()));
}

TEST_CASE("throughput at N of N0 workers keeps 0.90 of N/N0 down to half, with leaves: auto") {
  for (const int most : {4, 8}) {
    CAPTURE(most);
    // Embedding and head cheap, as in a compute-bound job; 24 blocks.
    const job_spec s = job(24, 128, most / 2, most);
    unit_times t = compute_only();
    t.embedding = {0.05, 0, 0.05};
    t.head = {0.5, 0.5, 0.5};
    for (const stretch along : {stretch::replicas, stretch::pipeline, stretch::chosen}) {
      auto points = predicted_throughput(s, most, most / 2, along, t);
      REQUIRE(points);
      CHECK(points->size() == static_cast<std::size_t>(most - most / 2 + 1));
      CHECK(points->front().share_kept == doctest::Approx(1));
      for (const throughput_point& p : *points) {
        CAPTURE(p.workers);
        CAPTURE(static_cast<int>(along));
        CHECK(p.share_kept >= 0.90);
      }
    }
  }
}
