// The promise of DESIGN 4 for the CPU: the bits depend on shape and values alone.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "tests/kernels_oracle.hpp"

using namespace stagecoach;
using oracle::normal;
using oracle::random_tokens;
using oracle::tensor;

namespace {

struct model_shape {
  std::int64_t batch, tokens, n_head, channels, wide, vocab;
};

/// Every operation once, and the accumulating ones twice, on inputs that the seed fixes; what they
/// wrote.
std::vector<tensor> run_everything(backend& b, const model_shape& s, std::int64_t shift,
                                   precision p = precision::fp32) {
  std::mt19937 g(7);
  b.weights_changed();  // earlier ones may have stood at the same addresses
  const std::int64_t m = s.batch * s.tokens, c = s.channels, n = s.wide;
  std::vector<tensor> out;
  const auto make = [&](std::int64_t count) -> float* {
    return out.emplace_back(count, shift).data();
  };
  out.reserve(64);

  const tensor x = normal(g, m * c, 1, shift), w = normal(g, c * n, 0.1, shift),
               bias = normal(g, n, 1, shift);
  const tensor dy = normal(g, m * n, 1, shift), gain = normal(g, c, 1, shift),
               shift_c = normal(g, c, 1, shift);
  float* y = make(m * n);
  b.linear_forward(y, x, w, bias, m, c, n, p);
  b.linear_backward_input(make(m * c), dy, w, m, c, n, p);
  float *dw = make(c * n), *db = make(n);
  b.linear_backward_weight(dw, db, x, dy, m, c, n, false, p);
  b.linear_backward_weight(dw, db, x, y, m, c, n, true, p);

  float *norm = make(m * c), *mean = make(m), *rstd = make(m);
  b.layernorm_forward(norm, mean, rstd, x, gain, shift_c, m, c);
  b.layernorm_backward_input(make(m * c), x, norm, x, gain, mean, rstd, m, c);
  float *dgain = make(c), *dshift = make(c);
  b.layernorm_backward_weight(dgain, dshift, norm, x, mean, rstd, m, c, false);
  b.layernorm_backward_weight(dgain, dshift, x, x, mean, rstd, m, c, true);

  b.gelu_forward(make(m * n), y, m * n);
  b.gelu_backward(make(m * n), dy, y, m * n);
  b.add(make(m * n), dy, y, m * n);

  const attention_shape a{s.batch, s.tokens, s.n_head, c};
  const tensor qkv = normal(g, m * 3 * c, 1, shift);
  float *mixed = make(m * c), *lse = make(m * s.n_head);
  b.attention_forward(mixed, lse, qkv, a, p);
  b.attention_backward(make(m * 3 * c), x, qkv, mixed, lse, a, p);

  const tensor wte = normal(g, s.vocab * c, 0.2, shift), wpe = normal(g, s.tokens * c, 0.2, shift);
  const auto tokens = random_tokens(g, m, s.vocab), targets = random_tokens(g, m, s.vocab);
  b.embedding_forward(make(m * c), tokens.data(), wte, wpe, s.batch, s.tokens, c);
  float *dwte = make(s.vocab * c), *dwpe = make(s.tokens * c);
  b.embedding_backward(dwte, dwpe, x, tokens.data(), s.batch, s.tokens, c, s.vocab, s.tokens,
                       false);
  b.embedding_backward(dwte, dwpe, norm, tokens.data(), s.batch, s.tokens, c, s.vocab, s.tokens,
                       true);

  const head_shape h{m, c, s.vocab};
  float *logits = make(b.head_floats(h, p)), *stats = make(2 * m);
  const double loss = b.head_forward(logits, stats, x, wte, targets.data(), h, p);
  const double squares = b.sum_of_squares(x, m * c);
  b.head_logits(make(m * s.vocab), x, wte, h, p);
  b.head_backward_input(make(m * c), logits, stats, wte, targets.data(), 1.0f / 1024, h, p);
  float* head_dwte = make(s.vocab * c);
  b.head_backward_weight(head_dwte, logits, x, h, false, p);
  b.head_backward_weight(head_dwte, logits, norm, h, true, p);

  float *weights = make(s.vocab * c), *first = make(s.vocab * c), *second = make(s.vocab * c);
  b.copy(weights, wte, s.vocab * c);
  b.copy(first, head_dwte, s.vocab * c);
  for (std::int64_t i = 0; i < s.vocab * c; ++i) second[i] = head_dwte[i] * head_dwte[i];
  b.adamw(weights, first, second, dwte, s.vocab * c,
          {0.01f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.1f, 0.05f, 0.7f});

  float* scalars = make(4);
  std::memcpy(scalars, &loss, sizeof loss);
  std::memcpy(scalars + 2, &squares, sizeof squares);
  return out;
}

void check_same(const std::vector<tensor>& got, const std::vector<tensor>& want) {
  REQUIRE(got.size() == want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    CAPTURE(i);  // the i-th make() of run_everything
    CHECK(got[i].same_bits(want[i]));
    CHECK(got[i].has_intact_guards());
  }
}

constexpr model_shape shapes[] = {
    {1, 1, 1, 16, 16, 5},         // least
    {2, 33, 2, 48, 144, 257},     // odd sizes
    {1, 257, 1, 128, 384, 2049},  // one head; the smallest head with 8 blocks, less one
    {2, 130, 4, 64, 256, 5000},   // blocks of the vocabulary of unequal width
    {4, 256, 6, 192, 768, 300},   // the usual microbatch
    {8, 512, 2, 64, 64, 300},     // 4,096 rows at few channels: long sums, few tiles
    {1, 4096, 1, 32, 48, 64},     // one long sequence
    {1, 513, 1, 16, 32, 12500},   // rows and pieces enough for weights that are turned over first
};

}  // namespace

TEST_CASE("the same bits with 1, 2, 3 and 8 threads, at any alignment, and when repeated") {
  const auto one = make_cpu_backend(1);
  const auto two = make_cpu_backend(2), three = make_cpu_backend(3), eight = make_cpu_backend(8);
  for (const precision p : {precision::fp32, precision::bf16})
    for (const model_shape& s : shapes) {
      CAPTURE(s.tokens);
      CAPTURE(s.channels);
      CAPTURE(p == precision::bf16);
      const auto want = run_everything(*one, s, 0, p);
      for (const tensor& t : want)
        // bf16's store between forward and backward holds no floats.
        for (std::int64_t i = 0; p == precision::fp32 && i < t.count() && &t != &want.back(); ++i)
          if (!std::isfinite(t[i])) FAIL("not finite");
      check_same(run_everything(*one, s, 0, p), want);
      check_same(run_everything(*two, s, 0, p), want);
      check_same(run_everything(*three, s, 1, p), want);
      check_same(run_everything(*eight, s, 5, p), want);
    }
}

TEST_CASE("earlier calls of other shapes change nothing") {
  const auto b = make_cpu_backend(2);
  const auto want = run_everything(*b, shapes[1], 0);
  run_everything(*b, shapes[3], 0);
  check_same(run_everything(*b, shapes[1], 3), want);
}

TEST_CASE("a backend of n threads adds n - 1 to the process, and oneDNN adds none") {
  const auto count = [] {
    std::int64_t n = 0;
    for ([[maybe_unused]] const auto& entry :
         std::filesystem::directory_iterator("/proc/self/task"))
      ++n;
    return n;
  };
  const std::int64_t before = count();
  {
    const auto b = make_cpu_backend(3);
    run_everything(*b, shapes[4], 0);
    CHECK(count() == before + 2);
  }
  CHECK(count() == before);
}

TEST_CASE("the name tells the instruction set, and the cap is kept") {
  const auto b = make_cpu_backend(1);
  const char* cap = std::getenv("STAGECOACH_MAX_ISA");
  if (cap != nullptr && std::string(cap) == "avx2") CHECK(b->name() == "cpu:avx2");
  CHECK((b->name() == "cpu:avx2" || b->name() == "cpu:avx512"));
}
