// What a training step spends where: each operation of the backend at the shapes of one step.
//
// Caches are as an operation leaves them for itself, so the sum is a little below a step.
#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "tools/bench_support.hpp"

namespace stagecoach {
namespace {

class timer {
 public:
  timer(std::vector<kernel_time>& out, int repetitions) : out_(out), repetitions_(repetitions) {}

  /// Adds `times` calls to `name`.
  void add(const std::string& name, double times, double flops,
           const std::function<void()>& operation) {
    operation();
    double best = 1e300;
    for (int i = 0; i < repetitions_; ++i) {
      const auto began = std::chrono::steady_clock::now();
      operation();
      best = std::min(
          best, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began)
                    .count());
    }
    for (kernel_time& k : out_)
      if (k.name == name) {
        k.best_ms += times * best;
        k.flops += times * flops;
        return;
      }
    out_.push_back({name, times * best, times * flops});
  }

 private:
  std::vector<kernel_time>& out_;
  int repetitions_;
};

}  // namespace

std::vector<kernel_time> time_kernels(const step_shape& shape, precision p, int threads,
                                      int repetitions) {
  const auto device = make_cpu_backend(threads);
  const std::int64_t c = shape.channels, f = 4 * c, v = 50304, batch = 4;
  const std::int64_t m = batch * shape.tokens, layers = shape.layers;
  std::vector<float*> owned;
  const auto array = [&](std::int64_t count) {
    owned.push_back(device->allocate(count));
    std::uint32_t state = 1;
    for (std::int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      owned.back()[i] = static_cast<float>(state >> 8) * 0x1p-24f - 0.5f;
    }
    return owned.back();
  };
  std::vector<kernel_time> times;
  timer time(times, repetitions);

  float *x = array(m * f), *y = array(m * f), *z = array(m * f), *w = array(c * f),
        *dw = array(c * f), *bias = array(f), *row = array(2 * m);
  for (const auto& [k, n] : {std::pair{c, 3 * c}, {c, c}, {c, f}, {f, c}}) {
    const double flops = 2.0 * static_cast<double>(m * k * n);
    time.add("linear_forward", layers, flops,
             [&] { device->linear_forward(y, x, w, bias, m, k, n, p); });
    time.add("linear_input", layers, flops,
             [&] { device->linear_backward_input(z, y, w, m, k, n, p); });
    time.add("linear_weight", layers, flops,
             [&] { device->linear_backward_weight(dw, bias, x, y, m, k, n, false, p); });
  }
  const attention_shape a{batch, shape.tokens, shape.heads, c};
  float* lse = array(m * shape.heads);
  time.add("attention_forward", layers, 0, [&] { device->attention_forward(y, lse, x, a, p); });
  time.add("attention_backward", layers, 0,
           [&] { device->attention_backward(z, x, x, y, lse, a, p); });
  time.add("gelu", layers, 0, [&] { device->gelu_forward(y, x, m * f); });
  time.add("gelu", layers, 0, [&] { device->gelu_backward(z, x, x, m * f); });
  const double norms = static_cast<double>(2 * layers + 1);
  time.add("layernorm", norms, 0,
           [&] { device->layernorm_forward(y, row, row + m, x, bias, bias, m, c); });
  time.add("layernorm", norms, 0,
           [&] { device->layernorm_backward_input(z, y, y, x, bias, row, row + m, m, c); });
  time.add("layernorm", norms, 0,
           [&] { device->layernorm_backward_weight(dw, dw + c, y, x, row, row + m, m, c, false); });
  time.add("residual", static_cast<double>(2 * layers), 0, [&] { device->add(z, x, y, m * c); });

  const head_shape h{m, c, v};
  float *wte = array(v * c), *dwte = array(v * c), *store = array(device->head_floats(h, p));
  std::vector<std::int32_t> targets(static_cast<std::size_t>(m));
  for (std::int64_t i = 0; i < m; ++i)
    targets[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i * 7919 % v);
  const double flops = 2.0 * static_cast<double>(m * c * v);
  time.add("head_forward", 1, flops,
           [&] { device->head_forward(store, row, x, wte, targets.data(), h, p); });
  time.add("head_input", 1, flops,
           [&] { device->head_backward_input(z, store, row, wte, targets.data(), 1e-3f, h, p); });
  time.add("head_weight", 1, flops,
           [&] { device->head_backward_weight(dwte, store, x, h, false, p); });
  // Once per optimizer step: what the first products after it take longer.
  if (p == precision::bf16) {
    const head_shape one{1, c, v};
    time.add("pack_weights", 1, 0, [&] {
      device->weights_changed();
      device->head_logits(store, x, wte, one, p);
    });
    for (const auto& [k, n] : {std::pair{c, 3 * c}, {c, c}, {c, f}, {f, c}})
      time.add("pack_weights", layers, 0, [&] {
        device->weights_changed();
        device->linear_forward(y, x, w, bias, 1, k, n, p);
        device->linear_backward_input(z, y, w, 1, k, n, p);
      });
  }
  const std::int64_t count = 12 * layers * c * c + v * c;
  float *parameters = array(count), *first = array(count), *second = array(count);
  const adamw_scalars s{1e-4f, 0.9f, 0.95f, 1e-8f, 0, 0.1f, 0.05f, 1};
  for (std::int64_t i = 0; i < count; ++i) second[i] *= second[i];
  time.add("adamw", 1, 0, [&] { device->adamw(parameters, first, second, dwte, v * c, s); });
  time.add("adamw", 1, 0, [&] {
    const std::int64_t rest = count - v * c, part = std::min(rest, v * c);
    for (std::int64_t at = 0; at < rest; at += part)
      device->adamw(parameters + v * c + at, first + v * c + at, second + v * c + at, dwte,
                    std::min(part, rest - at), s);
  });
  time.add("norm", static_cast<double>(count) / static_cast<double>(v * c), 0,
           [&] { (void)device->sum_of_squares(dwte, v * c); });
  for (float* p_owned : owned) device->release(p_owned);
  return times;
}

std::vector<kernel_time> time_products(std::int64_t m, std::int64_t k, std::int64_t n, precision p,
                                       int threads, int repetitions) {
  const auto device = make_cpu_backend(threads);
  std::vector<float*> owned;
  const auto array = [&](std::int64_t count) {
    owned.push_back(device->allocate(count));
    for (std::int64_t i = 0; i < count; ++i)
      owned.back()[i] = static_cast<float>(i * 2654435761 % 1024) * 0x1p-10f - 0.5f;
    return owned.back();
  };
  float *x = array(m * k), *w = array(k * n), *y = array(m * n);
  std::vector<kernel_time> times;
  timer time(times, repetitions);
  const double flops =
      2.0 * static_cast<double>(m) * static_cast<double>(k) * static_cast<double>(n);
  time.add("forward", 1, flops, [&] { device->linear_forward(y, x, w, nullptr, m, k, n, p); });
  time.add("input_gradient", 1, flops, [&] { device->linear_backward_input(x, y, w, m, k, n, p); });
  time.add("weight_gradient", 1, flops,
           [&] { device->linear_backward_weight(w, nullptr, x, y, m, k, n, false, p); });
  for (float* one : owned) device->release(one);
  return times;
}

}  // namespace stagecoach
