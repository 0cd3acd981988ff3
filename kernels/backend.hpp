// What a device can compute. One interface, layer-sized operations, so the virtual call costs
// nothing.
//
// Promises, for every operation of every backend (DESIGN 4):
//  - The order of each sum is fixed by shape and dtype alone: not by thread count, alignment, time
//  or
//    earlier calls. Same inputs, same bits, always, on one device class.
//  - No libm: exp and tanh are polynomials of our own.
//  - Row-major, contiguous, on this backend's device. Outputs are overwritten unless `accumulate`.
// Shapes: B batch, T tokens, C channels, H heads, D per head, V vocabulary, M = B*T rows.
// Not thread-safe: one backend belongs to one trainer thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace stagecoach {

/// What the operands of matrix products are rounded to (linear layers, attention, head). Sums,
/// storage and everything between products are fp32 in both; weights stay fp32 masters.
enum class precision : std::uint8_t { fp32, bf16 };

/// Of a job file's word; it has been checked by then.
precision precision_of(const std::string& word);

/// Sizes of an attention call.  C = n_head * D.
struct attention_shape {
  std::int64_t batch, tokens, n_head, channels;
};

/// Sizes of a head call. The vocabulary is cut into head_block_count(V) blocks, see below.
struct head_shape {
  std::int64_t rows, channels, vocab;
};

/// Number of vocabulary blocks of the head: a power of two fixed by V alone (DESIGN 4 "Head").
///   1 below 2,048; else 8.  Block b is [V*b/n, V*(b+1)/n).
std::int64_t head_block_count(std::int64_t vocab);

/// One step's AdamW scalars, computed once by rank 0 in double and carried as exact bits.
struct adamw_scalars {
  float lr = 0;  // of this step
  float beta1 = 0, beta2 = 0;
  float eps = 0;
  float weight_decay = 0;      // already 0 for tensors that do not decay
  float bias1 = 0, bias2 = 0;  // 1 - beta^t
  float grad_scale = 1;        // clip factor
};

class backend {
 public:
  virtual ~backend() = default;

  /// "reference", "cpu:avx512", "cpu:avx2".  What is computed may differ in the last bits between
  /// names.
  virtual std::string name() const = 0;

  // ---- packed weights
  // ----------------------------------------------------------------------------------
  // A backend may keep copies of weights in the shape that its products want, by address.
  /// Says that values of weights may have changed since the last call of any product.
  virtual void weights_changed() {}
  /// Bytes of the copies that products with w [K, N] of a linear layer keep.
  virtual std::int64_t packed_linear_bytes(std::int64_t /*k*/, std::int64_t /*n*/,
                                           precision /*p*/) const {
    return 0;
  }
  virtual std::int64_t packed_head_bytes(head_shape /*s*/, precision /*p*/) const { return 0; }

  // ---- linear layers: w [K, N] as in GPT-2's Conv1D (in x out)
  // -------------------------------------
  /// y [M,N] = x [M,K] * w + bias [N]   (bias may be null)
  virtual void linear_forward(float* y, const float* x, const float* w, const float* bias,
                              std::int64_t m, std::int64_t k, std::int64_t n,
                              precision p = precision::fp32) = 0;
  /// dx [M,K] = dy [M,N] * w^T
  virtual void linear_backward_input(float* dx, const float* dy, const float* w, std::int64_t m,
                                     std::int64_t k, std::int64_t n,
                                     precision p = precision::fp32) = 0;
  /// dw [K,N] = or += x^T * dy ;  dbias [N] = or += column sums of dy, never rounded   (dbias may
  /// be null)
  virtual void linear_backward_weight(float* dw, float* dbias, const float* x, const float* dy,
                                      std::int64_t m, std::int64_t k, std::int64_t n,
                                      bool accumulate, precision p = precision::fp32) = 0;

  // ---- layer normalisation (Ba, Kiros, Hinton 2016), eps 1e-5, biased variance
  // -----------------------
  ///   x, y [M, C]   gain, bias [C]   mean, rstd [M]
  virtual void layernorm_forward(float* y, float* mean, float* rstd, const float* x,
                                 const float* gain, const float* bias, std::int64_t m,
                                 std::int64_t c) = 0;
  /// dx [M,C] = residual [M,C] + gradient through the norm   (residual may be null; dx may be
  /// residual)
  virtual void layernorm_backward_input(float* dx, const float* residual, const float* dy,
                                        const float* x, const float* gain, const float* mean,
                                        const float* rstd, std::int64_t m, std::int64_t c) = 0;
  virtual void layernorm_backward_weight(float* dgain, float* dbias, const float* dy,
                                         const float* x, const float* mean, const float* rstd,
                                         std::int64_t m, std::int64_t c, bool accumulate) = 0;

  // ---- GELU, tanh form ("gelu_new") -------------------------------------------------------------
  virtual void gelu_forward(float* y, const float* x, std::int64_t count) = 0;
  /// dx = dy * gelu'(x)   (dx may be dy)
  virtual void gelu_backward(float* dx, const float* dy, const float* x, std::int64_t count) = 0;

  /// y = a + b   (y may be a or b)
  virtual void add(float* y, const float* a, const float* b, std::int64_t count) = 0;

  // ---- causal self-attention
  // ------------------------------------------------------------------------
  /// qkv [B,T,3C] (q, k, v side by side), out [B,T,C], lse [B,H,T]: log-sum-exp of each row of
  /// scaled scores, kept for the backward pass (which recomputes the probabilities). Scale
  /// 1/sqrt(D).
  virtual void attention_forward(float* out, float* lse, const float* qkv, attention_shape s,
                                 precision p = precision::fp32) = 0;
  /// dqkv [B,T,3C]
  virtual void attention_backward(float* dqkv, const float* dout, const float* qkv,
                                  const float* out, const float* lse, attention_shape s,
                                  precision p = precision::fp32) = 0;

  // ---- embedding
  // ------------------------------------------------------------------------------------
  /// y [B*T,C] = wte[token] + wpe[position];  tokens [B*T], each below V (checked by the caller)
  virtual void embedding_forward(float* y, const std::int32_t* tokens, const float* wte,
                                 const float* wpe, std::int64_t batch, std::int64_t t,
                                 std::int64_t c) = 0;
  /// dwte [V,C], dwpe [context,C]: sums in row order b, t. Not accumulate: both are zeroed first
  /// (dwpe rows at and beyond T too; context_rows is their count).
  virtual void embedding_backward(float* dwte, float* dwpe, const float* dy,
                                  const std::int32_t* tokens, std::int64_t batch, std::int64_t t,
                                  std::int64_t c, std::int64_t vocab, std::int64_t context_rows,
                                  bool accumulate) = 0;

  // ---- tied head: logits = x * wte^T, softmax cross-entropy, never stored probabilities
  // ---------- The vocabulary is walked in head_block_count(V) blocks. Per block and row: maximum,
  // sum of exponentials against that maximum; merged over blocks by the full binary tree with one
  // formula.
  /// Floats of the scratch that the three take as `logits`.
  virtual std::int64_t head_floats(head_shape s, precision /*p*/) const { return s.rows * s.vocab; }
  /// Computes logits (caller's scratch, then holds what backward needs: opaque) and
  /// loss_sum = sum over rows of -log softmax(target), each row in fp32, rows summed in fp64 in
  /// fixed blocks of 64 rows by tree.  stats [2*M]: opaque, for backward.
  virtual double head_forward(float* logits, float* stats, const float* x, const float* wte,
                              const std::int32_t* targets, head_shape s,
                              precision p = precision::fp32) = 0;
  /// dx [M,C] of scale * loss_sum. Per vocabulary block partial input gradients, merged by the
  /// tree. Turns logits into dlogits (scaled) in place, for head_backward_weight.
  virtual void head_backward_input(float* dx, float* logits, const float* stats, const float* wte,
                                   const std::int32_t* targets, float scale, head_shape s,
                                   precision p = precision::fp32) = 0;
  /// dwte [V,C] = or += dlogits^T * x
  virtual void head_backward_weight(float* dwte, const float* logits, const float* x, head_shape s,
                                    bool accumulate, precision p = precision::fp32) = 0;
  /// Plain logits [M,V] for sampling.
  virtual void head_logits(float* logits, const float* x, const float* wte, head_shape s,
                           precision p = precision::fp32) = 0;

  // ---- reductions and optimizer
  // ---------------------------------------------------------------------
  /// Sum of squares in fp64: fixed blocks of 4,096 elements, merged by the full binary tree over
  /// block index. NaN or infinity in, NaN or infinity out.
  virtual double sum_of_squares(const float* x, std::int64_t count) = 0;
  /// AdamW, decoupled decay, elementwise, exact division and square root (Loshchilov & Hutter
  /// 2019):
  ///   g = grad*grad_scale; m = b1*m + (1-b1)*g; v = b2*v + (1-b2)*g*g;
  ///   p = p - lr * ( (m/bias1) / (sqrt(v/bias2) + eps) + weight_decay*p )
  virtual void adamw(float* param, float* m, float* v, const float* grad, std::int64_t count,
                     const adamw_scalars& s) = 0;

  // ---- memory
  // ---------------------------------------------------------------------------------------
  /// Zeroed, 64-byte aligned.
  virtual float* allocate(std::int64_t count) = 0;
  virtual void release(float* p) = 0;
  virtual void copy(float* to, const float* from, std::int64_t count) = 0;
};

/// Plain loops, one thread: the definition. Slow.
std::unique_ptr<backend> make_reference_backend();

/// oneDNN for fp32 matrix products on tiles that shape alone fixes, own kernels for bf16 ones (the
/// same bits on every instruction set) and for the rest, own pool of `threads` threads (1 = the
/// caller's alone). isa: "" = best of this CPU, or "avx2", "avx512".
/// STAGECOACH_MAX_ISA in the environment caps it too (for tests).
std::unique_ptr<backend> make_cpu_backend(int threads, const std::string& isa = {});

}  // namespace stagecoach
