#include "config/presets.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <set>

#include "config/job_spec_yaml.hpp"
#include "config/limits.hpp"

using namespace stagecoach;

namespace {

/// The published GPT-2 formula, written apart from the code under test.
std::int64_t published_count(const model_spec& m) {
  const std::int64_t d = m.d_model;
  return 12 * m.n_layer * d * d + 13 * m.n_layer * d + 2 * d + m.vocab_size * d + m.context * d;
}

std::int64_t count_of(const char* name) {
  const preset* p = find_preset(name);
  INFO(name);
  REQUIRE(p);
  return published_count(p->model);
}

}  // namespace

TEST_CASE("parameter counts equal the published ones to the last digit where those are exact") {
  CHECK(count_of("gpt2") == 124'439'808);
  CHECK(count_of("gpt2-medium") == 354'823'168);
  CHECK(count_of("gpt2-large") == 774'030'080);
  CHECK(count_of("gpt2-xl") == 1'557'611'200);
  CHECK(count_of("kogpt2") == 125'164'032);
}

TEST_CASE("parameter counts round to the published ones elsewhere") {
  const std::pair<const char*, double> table[] = {{"gpt3-125m", 125.2e6},
                                                  {"gpt3-350m", 355.9e6},
                                                  {"gpt3-760m", 760.3e6},
                                                  {"gpt3-1.3b", 1.316e9},
                                                  {"gpt3-2.7b", 2.652e9},
                                                  {"gpt3-6.7b", 6.658e9},
                                                  {"gpt3-13b", 12.85e9},
                                                  {"gpt3-175b", 174.6e9},
                                                  {"ko-gpt-trinity", 1.163e9},
                                                  {"hyperclova-6.9b-like", 6.66e9},
                                                  {"hyperclova-13b-like", 12.86e9},
                                                  {"hyperclova-39b-like", 39.10e9},
                                                  {"hyperclova-82b-like", 81.08e9},
                                                  {"megatron-1.7b", 1.65e9},
                                                  {"megatron-39b", 39.1e9},
                                                  {"megatron-76b", 76.1e9},
                                                  {"megatron-145b", 145.6e9},
                                                  {"megatron-1t", 1008.0e9}};
  for (const auto& [name, published] : table) {
    const auto count = static_cast<double>(count_of(name));
    INFO(name, " ", count);
    CHECK(std::abs(count - published) / published < 6e-4 + 0.5 / 165);
  }
}

TEST_CASE("every preset is a shape that can be built") {
  std::set<std::string> names;
  for (const preset& p : presets()) {
    INFO(p.name);
    CHECK(names.insert(p.name).second);
    CHECK(p.model.preset == p.name);
    CHECK(p.model.d_model % p.model.n_head == 0);
    CHECK(p.model.d_ff == 4 * p.model.d_model);
    CHECK(p.model.n_layer <= limits::layer_count_max);
    CHECK(p.model.d_model <= limits::d_model_max);
    CHECK(p.model.vocab_size >= 256);
    CHECK(find_preset(p.name) == &p);
  }
  CHECK(find_preset("gpt5") == nullptr);
  CHECK(preset_names().size() == presets().size());
}

TEST_CASE("every preset's starter file parses without a problem") {
  for (const preset& p : presets()) {
    const std::string text = starter_job_yaml(p);
    const spec_result r = parse_job_spec(text, "job.yaml");
    INFO(text, format_problems(r.problems));
    REQUIRE(r.spec);
    CHECK(r.spec->model == p.model);
  }
}
