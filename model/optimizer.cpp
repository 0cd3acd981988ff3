// The step's scalars: learning rate, bias corrections, clip factor. In double, without libm; rank 0
// computes them and everybody uses its bits.
#include <algorithm>

#include "config/result.hpp"
#include "model/exact_math.hpp"
#include "model/stage.hpp"

namespace stagecoach {

double learning_rate(const job_spec& spec, std::int64_t step) {
  invariant(step >= 1, "steps count from 1");
  const double lr = spec.optimizer.lr;
  const double min_lr = spec.schedule.min_lr;
  const std::int64_t warmup = spec.schedule.warmup_steps;
  if (step <= warmup) return lr * (static_cast<double>(step) / static_cast<double>(warmup));
  if (spec.schedule.type == "constant") return lr;
  // Counted from step 0 and not from the end of the warm-up, as nanoGPT's lr_decay_iters.
  const std::int64_t end =
      spec.schedule.decay_steps > 0 ? spec.schedule.decay_steps : spec.stop_steps;
  if (step >= end) return min_lr;
  const double done = static_cast<double>(step - warmup) / static_cast<double>(end - warmup);
  // Half a turn over the whole decay.
  return min_lr + 0.5 * (1.0 + exact::of_turns(0.5 * done).cosine) * (lr - min_lr);
}

adamw_scalars step_scalars(const job_spec& spec, std::int64_t step, double gradient_norm) {
  const optimizer_spec& o = spec.optimizer;
  const std::uint64_t t = static_cast<std::uint64_t>(step);
  adamw_scalars s;
  s.lr = static_cast<float>(learning_rate(spec, step));
  s.beta1 = static_cast<float>(o.beta1);
  s.beta2 = static_cast<float>(o.beta2);
  s.eps = static_cast<float>(o.eps);
  s.weight_decay = static_cast<float>(o.weight_decay);
  // By squaring: t multiplications would be a fifth of a second per step at step 10^8.
  s.bias1 = static_cast<float>(1.0 - exact::power(o.beta1, t));
  s.bias2 = static_cast<float>(1.0 - exact::power(o.beta2, t));
  if (o.grad_clip > 0) {
    // PyTorch's clip_grad_norm_: clip / (norm + 1e-6), never above 1. A norm that is not finite has
    // no scale; the vote skips such a step, so its scalars are never used.
    const double scale = o.grad_clip / (gradient_norm + 1e-6);
    if (scale < 1.0) s.grad_scale = static_cast<float>(scale);
  }
  return s;
}

}  // namespace stagecoach
