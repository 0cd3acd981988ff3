// Small models for the tests of model/, and GPT-2's loss a second time: plain loops in double,
// written from the paper's formulas and sharing no code with kernels/ or model/stage.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "model/parameters.hpp"
#include "model/stage.hpp"

namespace stagecoach::test {

inline model_spec small_model() {
  model_spec m;
  m.n_layer = 2;
  m.d_model = 16;
  m.n_head = 2;
  m.d_ff = 64;
  m.vocab_size = 37;  // odd, so that no tile fits
  m.context = 11;     // longer than the samples, so that unused positions are seen
  m.init = "random";
  m.init_seed = 7;
  return m;
}

inline batch_spec small_batch() {
  batch_spec b;
  b.global_sequences = 8;
  b.micro_sequences = 2;
  b.sequence_tokens = 8;
  b.leaf_count = 4;
  return b;
}

/// Numbers that are neither zero nor near the initial values, so that every term of a gradient
/// counts.
inline float pattern(std::int64_t i, int tensor) {
  const std::uint64_t x = static_cast<std::uint64_t>(i + 1) * 0x9E3779B97F4A7C15ull +
                          static_cast<std::uint64_t>(tensor + 1) * 0xD1B54A32D192ED03ull;
  const std::uint64_t mixed = (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9ull;
  return static_cast<float>(static_cast<double>(mixed >> 40) / double(1 << 24) - 0.5);
}

inline void fill_parameters(stage& s) {
  for (const tensor_info& t : s.tensors()) {
    float* p = s.parameter(t.name);
    const bool is_gain = t.name.ends_with(".weight") && !t.decays();
    for (std::int64_t i = 0; i < t.count(); ++i) {
      p[i] = (is_gain ? 1.0F : 0.0F) + 0.6F * pattern(i, t.index);
    }
  }
}

struct token_batch {
  std::vector<std::int32_t> tokens, targets;
};

inline token_batch make_tokens(const model_spec& m, const batch_spec& b, int microbatch) {
  token_batch batch;
  const std::int64_t rows = b.micro_sequences * b.sequence_tokens;
  for (std::int64_t i = 0; i < rows; ++i) {
    const auto draw = [&](int site) {
      return static_cast<std::int32_t>((pattern(i + microbatch * 1000, site) + 0.5F) *
                                       static_cast<float>(m.vocab_size));
    };
    batch.tokens.push_back(draw(101));
    batch.targets.push_back(draw(102));
  }
  return batch;
}

/// GPT-2 in double: Radford et al. 2019 with pre-normalisation, gelu's tanh form (Hendrycks &
/// Gimpel 2016), eps 1e-5, tied head.
class plain_gpt2 {
 public:
  using array = std::vector<double>;
  plain_gpt2(const model_spec& m, stage& whole) : m_(m) {
    for (const tensor_info& t : whole.tensors()) {
      const float* p = whole.parameter(t.name);
      parameters[t.name] = array(p, p + t.count());
    }
  }

  std::map<std::string, array> parameters;

  /// Sum of -log p(target) over all tokens; the head sees head_matrix in place of wte if given.
  double loss(const token_batch& batch, std::int64_t sequences, std::int64_t t_count,
              const array* head_matrix = nullptr) const {
    const std::int64_t c = m_.d_model;
    const array& wte = parameters.at("wte.weight");
    const array& wpe = parameters.at("wpe.weight");
    double sum = 0;
    for (std::int64_t b = 0; b < sequences; ++b) {
      std::vector<array> x;
      for (std::int64_t t = 0; t < t_count; ++t) {
        array row(size(c));
        const std::int64_t token = batch.tokens[size(b * t_count + t)];
        for (std::int64_t i = 0; i < c; ++i)
          row[size(i)] = wte[size(token * c + i)] + wpe[size(t * c + i)];
        x.push_back(row);
      }
      for (int l = 0; l < m_.n_layer; ++l) block(x, "h." + std::to_string(l) + ".");
      for (std::int64_t t = 0; t < t_count; ++t) {
        const array y = norm(x[size(t)], "ln_f");
        const array& head = head_matrix != nullptr ? *head_matrix : wte;
        array z(size(m_.vocab_size));
        double total = 0;
        for (std::int64_t v = 0; v < m_.vocab_size; ++v) {
          for (std::int64_t i = 0; i < c; ++i) z[size(v)] += y[size(i)] * head[size(v * c + i)];
          total += std::exp(z[size(v)]);
        }
        sum += std::log(total) - z[size(batch.targets[size(b * t_count + t)])];
      }
    }
    return sum;
  }

 private:
  static std::size_t size(std::int64_t i) { return static_cast<std::size_t>(i); }

  array norm(const array& x, const std::string& name) const {
    const array &gain = parameters.at(name + ".weight"), &bias = parameters.at(name + ".bias");
    double mean = 0, variance = 0;
    for (const double v : x) mean += v / double(x.size());
    for (const double v : x) variance += (v - mean) * (v - mean) / double(x.size());
    array y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      y[i] = (x[i] - mean) / std::sqrt(variance + 1e-5) * gain[i] + bias[i];
    }
    return y;
  }

  array linear(const array& x, const std::string& name) const {
    const array& w = parameters.at(name + ".weight");
    array y = parameters.at(name + ".bias");
    for (std::size_t k = 0; k < x.size(); ++k) {
      for (std::size_t n = 0; n < y.size(); ++n) y[n] += x[k] * w[k * y.size() + n];
    }
    return y;
  }

  void block(std::vector<array>& x, const std::string& h) const {
    const std::size_t c = size(m_.d_model), d = c / size(m_.n_head);
    std::vector<array> qkv;
    for (const array& row : x) qkv.push_back(linear(norm(row, h + "ln_1"), h + "attn.c_attn"));
    for (std::size_t t = 0; t < x.size(); ++t) {
      array out(c);
      for (std::size_t head = 0; head < size(m_.n_head); ++head) {
        array weight;
        double total = 0;
        for (std::size_t past = 0; past <= t; ++past) {
          double score = 0;
          for (std::size_t i = 0; i < d; ++i) {
            score += qkv[t][head * d + i] * qkv[past][c + head * d + i];
          }
          weight.push_back(std::exp(score / std::sqrt(double(d))));
          total += weight.back();
        }
        for (std::size_t past = 0; past <= t; ++past) {
          for (std::size_t i = 0; i < d; ++i) {
            out[head * d + i] += weight[past] / total * qkv[past][2 * c + head * d + i];
          }
        }
      }
      const array projected = linear(out, h + "attn.c_proj");
      for (std::size_t i = 0; i < c; ++i) x[t][i] += projected[i];
    }
    for (array& row : x) {
      array wide = linear(norm(row, h + "ln_2"), h + "mlp.c_fc");
      for (double& v : wide) {
        v = 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
      }
      const array projected = linear(wide, h + "mlp.c_proj");
      for (std::size_t i = 0; i < c; ++i) row[i] += projected[i];
    }
  }

  model_spec m_;
};

}  // namespace stagecoach::test
