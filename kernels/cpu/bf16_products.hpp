// The CPU backend's operations with bf16 operands: linear layers, attention, head.
//
// Operands are rounded to bf16 and packed just before use, weights once until they change; sums,
// everything between two products, and all that leaves here stays fp32. What a sum is, is said in
// bf16_kernels.hpp and fixed by shape alone; tasks only cut rows and columns of results.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/cpu/bf16_kernels.hpp"
#include "kernels/cpu/row_kernels.hpp"
#include "kernels/cpu/scratch_buffer.hpp"
#include "kernels/cpu/thread_pool.hpp"

namespace stagecoach {

class bf16_products {
 public:
  bf16_products(thread_pool& pool, const bf16_kernels& kernels, const row_kernels& rows);

  // As in kernels/backend.hpp; without bias gradients, which no product gives.
  void linear_forward(float* y, const float* x, const float* w, const float* bias, std::int64_t m,
                      std::int64_t k, std::int64_t n);
  void linear_backward_input(float* dx, const float* dy, const float* w, std::int64_t m,
                             std::int64_t k, std::int64_t n);
  void linear_backward_weight(float* dw, const float* x, const float* dy, std::int64_t m,
                              std::int64_t k, std::int64_t n, bool accumulate);
  void attention_forward(float* out, float* lse, const float* qkv, attention_shape s);
  void attention_backward(float* dqkv, const float* dout, const float* qkv, const float* out,
                          const float* lse, attention_shape s);
  /// losses [rows]. logits [head_floats(s)] holds exponentials and no logit.
  static std::int64_t head_floats(head_shape s);
  void head_forward(float* logits, float* stats, float* losses, const float* x, const float* wte,
                    const std::int32_t* targets, head_shape s);
  void head_backward_input(float* dx, float* logits, const float* stats, const float* wte,
                           const std::int32_t* targets, float scale, head_shape s);
  void head_backward_weight(float* dwte, const float* logits, const float* x, head_shape s,
                            bool accumulate);
  void head_logits(float* logits, const float* x, const float* wte, head_shape s);

  /// Packed weights are packed again at their next use.
  void weights_changed() { ++epoch_; }
  /// Frees them.
  void forget_weights() { packs_.clear(); }
  /// What the packed copies of wte [V, C] take; of a linear layer's w see bf16_sizes.hpp.
  static std::int64_t packed_head_bytes(std::int64_t channels, std::int64_t vocab);

 private:
  using word = std::uint32_t;
  enum class pack_kind : std::uint8_t { forward, backward, head_forward, head_backward };
  struct pack {
    scratch_buffer memory;
    std::int64_t words = 0;
    std::uint64_t epoch = 0;
  };
  template <class Fill>
  const word* packed(const float* w, pack_kind kind, std::int64_t words, const Fill& fill);
  const word* packed_head_forward(const float* wte, head_shape s);
  const word* packed_head_backward(const float* wte, head_shape s);
  word* words_of(scratch_buffer& buffer, std::int64_t count) {
    return reinterpret_cast<word*>(buffer.of(count));
  }
  word* pack_rows(scratch_buffer& to, const float* from, std::int64_t rows, std::int64_t columns);
  void product_of_rows(float* c, std::int64_t ldc, const word* a, const word* panels,
                       std::int64_t rows, std::int64_t columns, std::int64_t pairs,
                       const float* bias);
  void reserve_lanes(std::int64_t count);

  thread_pool& pool_;
  const bf16_kernels& kernels_;
  const row_kernels& rows_;
  std::map<std::pair<const float*, pack_kind>, pack> packs_;
  std::uint64_t epoch_ = 1;
  std::vector<scratch_buffer> lanes_;
  scratch_buffer left_, right_, head_;
};

}  // namespace stagecoach
