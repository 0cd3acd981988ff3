#include "model/generate.hpp"

#include <algorithm>
#include <numeric>

#include "config/result.hpp"
#include "model/exact_math.hpp"
#include "model/philox.hpp"

namespace stagecoach {

namespace {

std::int32_t sample_token(const std::vector<float>& logits, const sampling& how, std::uint64_t draw,
                          std::vector<std::int32_t>& order, std::vector<double>& weight) {
  // Larger logits first, equal ones by token id: a total order, so every machine draws the same.
  const auto is_before = [&logits](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  };
  std::iota(order.begin(), order.end(), 0);
  std::size_t kept = order.size();
  if (how.temperature <= 0) {
    kept = 1;
  } else if (how.top_k > 0) {
    kept = std::min(kept, static_cast<std::size_t>(how.top_k));
  }
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
                    is_before);
  if (kept == 1) return order[0];
  const double top = logits[static_cast<std::size_t>(order[0])];
  double sum = 0;
  for (std::size_t i = 0; i < kept; ++i) {
    const double logit = logits[static_cast<std::size_t>(order[i])];
    weight[i] = exact::exp((logit - top) / how.temperature);
    sum += weight[i];
  }
  const philox_counter random =
      philox({static_cast<std::uint32_t>(draw), static_cast<std::uint32_t>(draw >> 32), 0,
              static_cast<std::uint32_t>(philox_site::sampling)},
             how.seed);
  double left = unit_interval(random[0], random[1]) * sum;
  for (std::size_t i = 0; i < kept; ++i) {
    left -= weight[i];
    if (left < 0) return order[i];
  }
  return order[kept - 1];  // only rounding of the running difference leads here
}

}  // namespace

void generate(stage& whole_model, const model_spec& m, backend& device,
              std::vector<std::int32_t> prompt, const sampling& how,
              const std::function<bool(std::int32_t)>& on_token) {
  static_cast<void>(device);  // the stage computes on its own; kept for a cached decoder
  invariant(!prompt.empty(), "a prompt has at least one token");
  invariant(whole_model.has_embedding() && whole_model.has_head(), "the whole model is one stage");
  const std::size_t window = static_cast<std::size_t>(whole_model.batch().sequence_tokens);
  const std::size_t vocab = static_cast<std::size_t>(m.vocab_size);
  std::vector<std::int32_t> text = std::move(prompt);
  std::vector<std::int32_t> rows(
      window * static_cast<std::size_t>(whole_model.batch().micro_sequences), 0);
  std::vector<float> logits(vocab);
  std::vector<std::int32_t> order(vocab);
  std::vector<double> weight(vocab);
  for (int draw = 0; draw < how.max_new_tokens; ++draw) {
    const std::size_t seen = std::min(window, text.size());
    // What stands behind the last token can't be seen from it (causal), so padding needs no mask.
    std::fill(rows.begin(), rows.end(), 0);
    std::copy(text.end() - static_cast<std::ptrdiff_t>(seen), text.end(), rows.begin());
    whole_model.logits(rows.data(), static_cast<std::int64_t>(seen) - 1, logits.data());
    const std::int32_t token =
        sample_token(logits, how, static_cast<std::uint64_t>(draw), order, weight);
    text.push_back(token);
    if (!on_token(token)) return;
  }
}

}  // namespace stagecoach
