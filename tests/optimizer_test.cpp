#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "model/exact_math.hpp"
#include "model/stage.hpp"

using namespace stagecoach;

namespace {
job_spec cosine_job() {
  job_spec spec;
  spec.optimizer.lr = 6e-4;
  spec.schedule.type = "cosine";
  spec.schedule.warmup_steps = 10;
  spec.schedule.min_lr = 6e-5;
  spec.stop_steps = 1000;
  return spec;
}
}  // namespace

TEST_CASE("the learning rate rises on a line, falls on a cosine and stays at its floor") {
  const job_spec spec = cosine_job();
  CHECK(learning_rate(spec, 1) == doctest::Approx(6e-5).epsilon(1e-14));
  CHECK(learning_rate(spec, 5) == doctest::Approx(3e-4).epsilon(1e-14));
  CHECK(learning_rate(spec, 10) == 6e-4);
  for (std::int64_t step = 11; step < 1000; ++step) {
    const double expected =
        6e-5 + 0.5 * (1 + std::cos(M_PI * double(step - 10) / 990)) * (6e-4 - 6e-5);
    REQUIRE(std::abs(learning_rate(spec, step) - expected) < 1e-12 * expected);
    REQUIRE(learning_rate(spec, step) < learning_rate(spec, step - 1));
  }
  CHECK(learning_rate(spec, 1000) == 6e-5);
  CHECK(learning_rate(spec, 5000) == 6e-5);
}

TEST_CASE(
    "decay_steps ends the cosine early; constant keeps the rate; no warm-up starts at the top") {
  job_spec spec = cosine_job();
  spec.schedule.decay_steps = 110;
  CHECK(learning_rate(spec, 60) == doctest::Approx(3.3e-4).epsilon(1e-14));  // half way: the mean
  CHECK(learning_rate(spec, 110) == 6e-5);
  spec.schedule.type = "constant";
  CHECK(learning_rate(spec, 5) == doctest::Approx(3e-4).epsilon(1e-14));
  CHECK(learning_rate(spec, 900) == 6e-4);
  spec.schedule.warmup_steps = 0;
  CHECK(learning_rate(spec, 1) == 6e-4);
  spec = cosine_job();
  spec.schedule.warmup_steps = 2000;  // longer than the job
  CHECK(learning_rate(spec, 1000) == doctest::Approx(3e-4).epsilon(1e-14));
}

TEST_CASE("the cosine agrees with libm to 1e-12 over the half turn that it is used on") {
  for (int i = 0; i <= 100'000; ++i) {
    const double done = i / 100'000.0;
    REQUIRE(std::abs(exact::of_turns(0.5 * done).cosine - std::cos(M_PI * done)) < 1e-12);
  }
}

TEST_CASE("bias corrections are 1 - beta^t") {
  const job_spec spec = cosine_job();
  for (const std::int64_t t : {1, 2, 3, 10, 77, 1000, 123'456}) {
    const adamw_scalars s = step_scalars(spec, t, 0.5);
    CHECK(s.bias1 == doctest::Approx(1 - std::pow(0.9, double(t))).epsilon(1e-7));
    CHECK(s.bias2 == doctest::Approx(1 - std::pow(0.95, double(t))).epsilon(1e-7));
  }
  CHECK(exact::power(3.0, 0) == 1.0);
  CHECK(exact::power(3.0, 13) == 1594323.0);
  CHECK(step_scalars(spec, std::int64_t{1} << 40, 0.5).bias1 == 1.0F);
}

TEST_CASE(
    "the clip factor is PyTorch's: clip / (norm + 1e-6), at most 1, and none without a clip") {
  job_spec spec = cosine_job();
  spec.optimizer.grad_clip = 1.0;
  CHECK(step_scalars(spec, 1, 0.25).grad_scale == 1.0F);
  CHECK(step_scalars(spec, 1, 0.0).grad_scale == 1.0F);
  CHECK(step_scalars(spec, 1, 4.0).grad_scale == static_cast<float>(1.0 / 4.000001));
  CHECK(step_scalars(spec, 1, std::numeric_limits<double>::quiet_NaN()).grad_scale == 1.0F);
  spec.optimizer.grad_clip = 0;
  CHECK(step_scalars(spec, 1, 4.0).grad_scale == 1.0F);
}

TEST_CASE("the other scalars are the job's") {
  const job_spec spec = cosine_job();
  const adamw_scalars s = step_scalars(spec, 10, 0.5);
  CHECK(s.lr == 6e-4F);
  CHECK(s.beta1 == 0.9F);
  CHECK(s.beta2 == 0.95F);
  CHECK(s.eps == 1e-8F);
  CHECK(s.weight_decay == 0.1F);
}
