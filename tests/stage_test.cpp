#include "model/stage.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>

#include "model/plan.hpp"
#include "tests/model_test_support.hpp"

using namespace stagecoach;
using test::make_tokens;
using test::small_batch;
using test::small_model;

namespace {

using floats = std::vector<float>;

std::vector<std::pair<std::string, std::function<std::unique_ptr<backend>()>>> backends() {
  return {{"reference", [] { return make_reference_backend(); }},
          {"cpu, 1 thread", [] { return make_cpu_backend(1); }},
          {"cpu, 3 threads", [] { return make_cpu_backend(3); }}};
}

floats gradient_of(const stage& s, const floats& flat, const std::string& slot) {
  for (const gradient_slot& g : s.gradient_layout()) {
    if (g.name == slot) return floats(flat.begin() + g.offset, flat.begin() + g.offset + g.count);
  }
  return {};
}

bool same_bits(const floats& a, const floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// A pipeline of stages in one thread: what trainers do, without links, leaves or votes.
struct pipeline {
  pipeline(const model_spec& m, const batch_spec& b, std::vector<int> cuts, backend& device,
           int slots = 1)
      : model(m), batch(b) {
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
      stages.push_back(std::make_unique<stage>(m, b, cuts[i], cuts[i + 1], slots, device));
      gradients.emplace_back(static_cast<std::size_t>(stages.back()->gradient_count()), 0.0F);
    }
  }

  double forward(int microbatch, int slot = 0) {
    const test::token_batch t = make_tokens(model, batch, microbatch);
    boundaries.clear();
    double loss = 0;
    for (auto& s : stages) {
      floats out(static_cast<std::size_t>(s->boundary_count()));
      loss += s->forward(slot, boundaries.empty() ? nullptr : boundaries.back().data(),
                         s->has_embedding() ? t.tokens.data() : nullptr,
                         s->has_head() ? t.targets.data() : nullptr,
                         s->has_head() ? nullptr : out.data());
      boundaries.push_back(out);
    }
    return loss;
  }

  void backward_input(int slot, float scale) {
    floats dy;
    boundary_gradients.clear();
    for (std::size_t i = stages.size(); i-- > 0;) {
      floats dx(static_cast<std::size_t>(stages[i]->boundary_count()));
      stages[i]->backward_input(slot, dy.empty() ? nullptr : dy.data(),
                                stages[i]->has_embedding() ? nullptr : dx.data(), scale);
      dy = dx;
      boundary_gradients.push_back(dx);
    }
  }

  void backward_weight(int slot, bool accumulate) {
    for (std::size_t i = stages.size(); i-- > 0;) {
      stages[i]->backward_weight(slot, gradients[i].data(), accumulate);
    }
  }

  floats gradient(const std::string& slot) const {
    for (std::size_t i = 0; i < stages.size(); ++i) {
      floats g = gradient_of(*stages[i], gradients[i], slot);
      if (!g.empty()) return g;
    }
    return {};
  }

  // head + embed into every wte slot, then AdamW: as the trainer does.
  void apply(const adamw_scalars& scalars) {
    floats tied = gradient("wte.weight@head");
    const floats embed = gradient("wte.weight@embed");
    for (std::size_t i = 0; i < tied.size(); ++i) tied[i] += embed[i];
    for (std::size_t i = 0; i < stages.size(); ++i) {
      for (const gradient_slot& g : stages[i]->gradient_layout()) {
        if (g.tensor_index == 0)
          std::copy(tied.begin(), tied.end(), gradients[i].begin() + g.offset);
      }
      stages[i]->apply(gradients[i].data(), scalars);
    }
  }

  void step(int number, int microbatches) {
    for (int i = 0; i < microbatches; ++i) {
      losses.push_back(forward(number * 100 + i));
      backward_input(0, 1.0F / 48);
      backward_weight(0, i > 0);
    }
    adamw_scalars s;
    s.lr = 1e-2F;
    s.beta1 = 0.9F;
    s.beta2 = 0.95F;
    s.eps = 1e-8F;
    s.weight_decay = 0.1F;
    s.bias1 = static_cast<float>(1 - std::pow(0.9, number + 1));
    s.bias2 = static_cast<float>(1 - std::pow(0.95, number + 1));
    apply(s);
  }

  tensor_hash state() const {
    tensor_hash sum;
    for (const auto& s : stages) sum += s->state_hash(false);
    return sum;
  }

  model_spec model;
  batch_spec batch;
  std::vector<std::unique_ptr<stage>> stages;
  std::vector<floats> gradients, boundaries, boundary_gradients;
  std::vector<double> losses;
};

std::vector<std::vector<int>> all_cuts(int units) {
  std::vector<std::vector<int>> list;
  for (int a = 1; a < units; ++a) {
    list.push_back({0, a, units});
    for (int b = a + 1; b < units; ++b) list.push_back({0, a, b, units});
  }
  list.push_back({});
  for (int unit = 0; unit <= units; ++unit) list.back().push_back(unit);
  return list;
}

}  // namespace

TEST_CASE("loss and every tensor's gradient equal those of a plain GPT-2 in double") {
  // Oracle: central differences of an independent double-precision loss, eps 1e-5: truncation
  // ~1e-10, rounding ~1e-9. What is left is fp32 rounding: 2e-5 of the tensor's largest gradient
  // was measured, 1e-4 is allowed.
  const model_spec m = small_model();
  const batch_spec b = small_batch();
  for (const auto& [name, make] : backends()) {
    CAPTURE(name);
    const auto device = make();
    pipeline p(m, b, {0, unit_count(m)}, *device);
    stage& whole = *p.stages[0];
    test::fill_parameters(whole);
    test::plain_gpt2 plain(m, whole);
    const test::token_batch t = make_tokens(m, b, 5);
    const float scale = 0.25F;
    const double loss = p.forward(5);
    const double expected = plain.loss(t, b.micro_sequences, b.sequence_tokens);
    CHECK(std::abs(loss - expected) < 3e-7 * expected);
    p.backward_input(0, scale);
    p.backward_weight(0, false);

    for (const gradient_slot& slot : whole.gradient_layout()) {
      CAPTURE(slot.name);
      const floats actual = gradient_of(whole, p.gradients[0], slot.name);
      const std::string tensor = slot.tensor_index == 0 ? "wte.weight" : slot.name;
      const bool is_head = slot.name == "wte.weight@head";
      const std::vector<double> tied = plain.parameters.at("wte.weight");
      std::vector<double> head_copy = tied;
      // One use of the tied matrix at a time: the other keeps the unmoved copy.
      std::vector<double>& moved = is_head ? head_copy : plain.parameters.at(tensor);
      const bool is_tied = slot.tensor_index == 0;
      double largest = 0;
      for (const float g : actual) largest = std::max(largest, std::abs(double(g)));
      CHECK(largest > 0);
      const std::int64_t samples = std::min<std::int64_t>(slot.count, 24);
      for (std::int64_t n = 0; n < samples; ++n) {
        const std::size_t i = static_cast<std::size_t>(n * 7919 % slot.count);
        const double kept = moved[i], eps = 1e-5;
        const auto at = [&](double value) {
          moved[i] = value;
          return plain.loss(t, b.micro_sequences, b.sequence_tokens,
                            is_tied ? &head_copy : nullptr);
        };
        const double slope = (at(kept + eps) - at(kept - eps)) / (2 * eps) * scale;
        moved[i] = kept;
        CHECK_MESSAGE(std::abs(actual[i] - slope) <= 5e-6 * largest, "element ", i, ": ", actual[i],
                      " expected ", slope);
      }
    }
  }
}

TEST_CASE("no cut of the units moves a bit of outputs, gradients, weights or moments") {
  model_spec m = small_model();
  batch_spec b = small_batch();
  SUBCASE("odd sizes") {}
  SUBCASE("sizes of the tiny preset, vocabulary in eight blocks") {
    m.d_model = 64;
    m.n_head = 4;
    m.d_ff = 256;
    m.vocab_size = 2050;
    m.context = 32;
    b.sequence_tokens = 24;
  }
  for (const auto& [name, make] : backends()) {
    CAPTURE(name);
    if (name == "reference" && m.vocab_size > 1000) continue;  // minutes, and no other code path
    const auto device = make();
    const int units = unit_count(m);
    pipeline one(m, b, {0, units}, *device);
    one.stages[0]->initialise_parameters();
    for (int s = 0; s < 2; ++s) one.step(s, 3);
    const floats one_head = one.gradient("wte.weight@head");
    // One more, kept: boundary values and gradients of every unit.
    std::vector<int> every;
    for (int unit = 0; unit <= units; ++unit) every.push_back(unit);
    for (const std::vector<int>& cuts : all_cuts(units)) {
      std::string shown;
      for (const int cut : cuts) shown += std::to_string(cut) + " ";
      CAPTURE(shown);
      pipeline cut(m, b, cuts, *device);
      for (auto& s : cut.stages) s->initialise_parameters();
      for (int s = 0; s < 2; ++s) cut.step(s, 3);
      CHECK(cut.losses == one.losses);
      for (const gradient_slot& g : one.stages[0]->gradient_layout()) {
        CAPTURE(g.name);
        CHECK(same_bits(cut.gradient(g.name), one.gradient(g.name)));
      }
      CHECK(cut.state() == one.state());
      // Both holders of the tied matrix end with the same bits.
      const float* a = cut.stages.front()->parameter("wte.weight");
      const float* z = cut.stages.back()->parameter("wte.weight");
      CHECK(std::memcmp(a, z, static_cast<std::size_t>(m.vocab_size * m.d_model) * 4) == 0);
    }
  }
}

TEST_CASE("slots are independent, and weight gradients may come later than input gradients") {
  const model_spec m = small_model();
  const batch_spec b = small_batch();
  for (const auto& [name, make] : backends()) {
    CAPTURE(name);
    const auto device = make();
    pipeline plain(m, b, {0, 2, 4}, *device), delayed(m, b, {0, 2, 4}, *device, 3);
    for (pipeline* p : {&plain, &delayed}) {
      for (auto& s : p->stages) test::fill_parameters(*s);
    }
    for (int i = 0; i < 3; ++i) {
      plain.forward(i);
      plain.backward_input(0, 0.5F);
      plain.backward_weight(0, i > 0);
    }
    for (int i = 0; i < 3; ++i) delayed.forward(i, 2 - i);
    for (int i = 2; i >= 0; --i) delayed.backward_input(2 - i, 0.5F);
    for (int i = 0; i < 3; ++i) delayed.backward_weight(2 - i, i > 0);
    CHECK(same_bits(plain.gradients[0], delayed.gradients[0]));
    CHECK(same_bits(plain.gradients[1], delayed.gradients[1]));
  }
}

TEST_CASE(
    "assigning overwrites what a buffer held; accumulating adds in fp32, microbatch by "
    "microbatch") {
  const model_spec m = small_model();
  const batch_spec b = small_batch();
  const auto device = make_reference_backend();
  pipeline p(m, b, {0, 4}, *device);
  test::fill_parameters(*p.stages[0]);
  const auto run = [&](int microbatch, bool accumulate) {
    p.forward(microbatch);
    p.backward_input(0, 0.5F);
    p.backward_weight(0, accumulate);
  };
  run(1, false);
  const floats first = p.gradients[0];
  run(2, false);
  const floats second = p.gradients[0];
  CHECK_FALSE(same_bits(first, second));
  run(1, false);
  CHECK(same_bits(p.gradients[0], first));
  run(2, true);
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < first.size(); ++i) {
    worst = std::max(worst, std::abs(double(p.gradients[0][i]) - (double(first[i]) + second[i])));
    largest = std::max(largest, std::abs(double(first[i])));
  }
  CHECK(worst <= 1e-6 * largest);
}

TEST_CASE("evaluation gives the loss of forward and disturbs no microbatch in flight") {
  const model_spec m = small_model();
  const batch_spec b = small_batch();
  const auto device = make_reference_backend();
  pipeline p(m, b, {0, 4}, *device, 2), other(m, b, {0, 4}, *device, 2);
  test::fill_parameters(*p.stages[0]);
  test::fill_parameters(*other.stages[0]);
  const test::token_batch t = make_tokens(m, b, 9);
  const double loss = other.forward(9);
  p.forward(1);
  CHECK(p.stages[0]->evaluate(nullptr, t.tokens.data(), t.targets.data(), nullptr) == loss);
  p.backward_input(0, 1);
  CHECK(p.stages[0]->evaluate(nullptr, t.tokens.data(), t.targets.data(), nullptr) == loss);
  p.backward_weight(0, false);
  other.backward_input(0, 1);
  other.backward_weight(0, false);
  other.forward(1);
  other.backward_input(0, 1);
  other.backward_weight(0, false);
  CHECK(same_bits(p.gradients[0], other.gradients[0]));
}

TEST_CASE("weights decay only where they are matrices") {
  const model_spec m = small_model();
  const auto device = make_reference_backend();
  stage s(m, small_batch(), 0, 4, 1, *device);
  test::fill_parameters(s);
  std::map<std::string, float> before;
  for (const tensor_info& t : s.tensors()) before[t.name] = s.parameter(t.name)[1];
  const floats zero(static_cast<std::size_t>(s.gradient_count()), 0.0F);
  adamw_scalars k;
  k.lr = 0.5F;
  k.beta1 = 0.9F;
  k.beta2 = 0.95F;
  k.eps = 1e-8F;
  k.weight_decay = 0.5F;
  k.bias1 = k.bias2 = 1;
  s.apply(zero.data(), k);
  for (const tensor_info& t : s.tensors()) {
    CAPTURE(t.name);
    const float expected = t.decays() ? before[t.name] * 0.75F : before[t.name];
    CHECK(s.parameter(t.name)[1] == doctest::Approx(expected).epsilon(1e-6));
  }
}

TEST_CASE(
    "the state hash changes with any bit of weights or moments, the weights hash with weights") {
  const model_spec m = small_model();
  const auto device = make_reference_backend();
  stage s(m, small_batch(), 0, 4, 1, *device);
  s.initialise_parameters();
  const tensor_hash weights = s.weights_hash(true), state = s.state_hash(true);
  const auto flip = [](float* at) {
    *at = std::bit_cast<float>(std::bit_cast<std::uint32_t>(*at) ^ 1u);
  };
  for (const tensor_info& t : s.tensors()) {
    CAPTURE(t.name);
    const std::int64_t last = t.count() - 1;
    flip(s.parameter(t.name) + last);
    CHECK_FALSE(s.weights_hash(true) == weights);
    CHECK_FALSE(s.state_hash(true) == state);
    flip(s.parameter(t.name) + last);
    for (float* moment : {s.moment1(t.name), s.moment2(t.name)}) {
      flip(moment + last);
      CHECK(s.weights_hash(true) == weights);
      CHECK_FALSE(s.state_hash(true) == state);
      flip(moment + last);
    }
    // The same change in the other moment is another state.
    flip(s.moment1(t.name));
    const tensor_hash first = s.state_hash(true);
    flip(s.moment1(t.name));
    flip(s.moment2(t.name));
    CHECK_FALSE(s.state_hash(true) == first);
    flip(s.moment2(t.name));
  }
  CHECK(s.state_hash(true) == state);
}

TEST_CASE("hashes of a cut model's stages add up to the whole's, the tied matrix counted once") {
  const model_spec m = small_model();
  const auto device = make_reference_backend();
  stage whole(m, small_batch(), 0, 4, 1, *device);
  stage bottom(m, small_batch(), 0, 1, 1, *device), top(m, small_batch(), 1, 4, 1, *device);
  for (stage* s : {&whole, &bottom, &top}) s->initialise_parameters();
  tensor_hash sum = bottom.weights_hash(false);
  sum += top.weights_hash(false);
  CHECK(sum == whole.weights_hash(false));
  CHECK(whole.weights_hash(false) == whole.weights_hash(true));
  CHECK_FALSE(top.weights_hash(true) == top.weights_hash(false));
}

TEST_CASE("a stage holds its units' tensors only, and its gradient slots are aligned and apart") {
  const model_spec m = small_model();
  const auto device = make_reference_backend();
  stage middle(m, small_batch(), 1, 3, 1, *device), whole(m, small_batch(), 0, 4, 1, *device);
  CHECK(middle.parameter("wte.weight") == nullptr);
  CHECK(middle.parameter("ln_f.weight") == nullptr);
  CHECK(middle.moment1("h.1.ln_2.bias") != nullptr);
  CHECK(middle.tensors().size() == 24);
  CHECK(whole.gradient_layout().size() == whole.tensors().size() + 1);
  CHECK(whole.gradient_layout().front().name == "wte.weight@embed");
  CHECK(whole.gradient_layout().back().name == "wte.weight@head");
  std::int64_t end = 0;
  for (const gradient_slot& g : whole.gradient_layout()) {
    CHECK(g.offset % 16 == 0);
    CHECK(g.offset >= end);
    end = g.offset + g.count;
  }
  CHECK(end <= whole.gradient_count());
  CHECK(whole.allocated_bytes() > middle.allocated_bytes());
}

TEST_CASE("a narrow inner layer does not squeeze the arrays that backward puts there") {
  model_spec m = small_model();
  m.d_ff = 24;  // below 4 * d_model: fc is too small for what takes its place
  const batch_spec b = small_batch();
  const auto device = make_reference_backend();
  pipeline p(m, b, {0, 4}, *device);
  test::fill_parameters(*p.stages[0]);
  test::plain_gpt2 plain(m, *p.stages[0]);
  p.forward(3);
  p.backward_input(0, 1);
  p.backward_weight(0, false);
  const test::token_batch t = make_tokens(m, b, 3);
  for (const char* name : {"h.0.mlp.c_fc.weight", "h.0.attn.c_attn.weight", "h.0.ln_1.weight"}) {
    const floats g = p.gradient(name);
    double largest = 0;
    for (const float v : g) largest = std::max(largest, std::abs(double(v)));
    double& moved = plain.parameters.at(name)[5];
    const double kept = moved;
    moved = kept + 1e-5;
    const double up = plain.loss(t, b.micro_sequences, b.sequence_tokens);
    moved = kept - 1e-5;
    const double down = plain.loss(t, b.micro_sequences, b.sequence_tokens);
    moved = kept;
    CHECK(std::abs(g[5] - (up - down) / 2e-5) <= 5e-6 * largest);
  }
}

TEST_CASE("a stage tells the time in its layers from that in embedding and head") {
  const auto device = make_reference_backend();
  pipeline p(small_model(), small_batch(), {0, 1, 3, 4}, *device);
  const auto began = std::chrono::steady_clock::now();
  for (int microbatch = 0; microbatch < 10; ++microbatch) {
    p.forward(microbatch);
    p.backward_input(0, 1.0F);
    p.backward_weight(0, microbatch > 0);
  }
  const auto all = std::chrono::steady_clock::now() - began;
  CHECK(p.stages[0]->layer_count() == 0);
  CHECK(p.stages[0]->layers_us() == 0);
  CHECK(p.stages[1]->layer_count() == 2);
  CHECK(p.stages[1]->layers_us() > 0);
  CHECK(p.stages[1]->layers_us() <=
        std::chrono::duration_cast<std::chrono::microseconds>(all).count());
  CHECK(p.stages[2]->layer_count() == 0);
  CHECK(p.stages[2]->layers_us() == 0);
  p.stages[1]->forget_microbatches();
  CHECK(p.stages[1]->layers_us() == 0);
}
