// A contiguous slice of a GPT-2 model: forward, input gradient and weight gradient of one
// microbatch.
//
// Holds parameters, AdamW moments and the activations of the microbatches in flight. Knows no link,
// no schedule, no leaf: the trainer (worker/) calls it in the order of an instruction table and
// owns the gradient buffers. Activations at each unit boundary are float32 [B*T, C], cut or not
// (DESIGN 4).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "config/job_spec.hpp"
#include "kernels/backend.hpp"
#include "model/parameters.hpp"

namespace stagecoach {

/// Which gradient arrays a stage produces: one per tensor it holds, except that the tied matrix
/// gives two kinds that stay apart until the leaf tree is done: "wte.weight@embed" (embedding unit)
/// and "wte.weight@head" (head unit).  Offsets are into one flat float array (the gradient buffer).
struct gradient_slot {
  std::string name;         // tensor name, or wte.weight@embed / wte.weight@head
  int tensor_index = 0;     // global
  std::int64_t offset = 0;  // into the flat buffer, multiple of 16
  std::int64_t count = 0;
};

/// Of a stage of units [begin, end).
std::vector<gradient_slot> stage_gradient_layout(const model_spec& model, int unit_begin,
                                                 int unit_end);

class stage {
 public:
  /// slots: how many microbatches may be in flight at once (activation sets allocated up front).
  /// moments_of: global indices of the tensors that have moments here and that apply() updates;
  /// none given: all (a sharded optimizer keeps a share, model/tensor_names.hpp).
  /// products: what the operands of matrix products are rounded to; parameters stay fp32.
  stage(const model_spec& model, const batch_spec& batch, int unit_begin, int unit_end, int slots,
        backend& device, const std::optional<std::vector<int>>& moments_of = std::nullopt,
        precision products = precision::fp32);
  ~stage();
  stage(const stage&) = delete;
  stage& operator=(const stage&) = delete;

  bool has_embedding() const;
  bool has_head() const;
  std::int64_t boundary_count() const;  // B*T*C floats of a boundary activation
  int layer_count() const;              // without embedding and head

  // ---- state, by tensor name; pointers live as long as the stage. What is written through them
  // counts from the next forget_microbatches() on, or the next call here.
  // -------------------------------------
  const std::vector<tensor_info>& tensors() const;  // in global order
  float* parameter(const std::string& name);        // null if not held
  float* moment1(const std::string& name);          // null, too, where its moments are not here
  float* moment2(const std::string& name);
  void initialise_parameters();  // init: random; moments zero

  // ---- gradients
  // --------------------------------------------------------------------------------------
  const std::vector<gradient_slot>& gradient_layout() const;
  std::int64_t gradient_count() const;  // floats of the flat buffer

  // ---- one microbatch in a slot
  // ----------------------------------------------------------------------
  /// input: boundary activation from the previous stage (null for the embedding stage);
  /// tokens, targets [B*T] (used where the stage has the embedding / the head; may be null
  /// elsewhere). output: boundary activation for the next stage (null for the head stage). Returns
  /// the loss sum over the microbatch's tokens (head stage; else 0).
  double forward(int slot, const float* input, const std::int32_t* tokens,
                 const std::int32_t* targets, float* output);
  /// output_gradient: from the next stage (null for the head stage, which starts from its loss
  /// times loss_scale = 1 / tokens of the whole step). input_gradient: for the previous stage (null
  /// for stage 0). Keeps what backward_weight needs in the slot.
  void backward_input(int slot, const float* output_gradient, float* input_gradient,
                      float loss_scale);
  /// Adds (or assigns, accumulate = false: first microbatch of a leaf) this microbatch's weight
  /// gradients to the flat buffer. Frees the slot.
  void backward_weight(int slot, float* gradients, bool accumulate);

  /// Before a step: forgets the microbatches in flight, which a dropped step leaves between forward
  /// and weight gradient, and what was derived from weights.
  void forget_microbatches();
  /// Time in the layers, without embedding and head, of all microbatches since then: what a worker
  /// takes for a layer says how many it should have.
  std::int64_t layers_us() const;

  /// Forward without keeping activations, for evaluation; same arguments and result as forward.
  double evaluate(const float* input, const std::int32_t* tokens, const std::int32_t* targets,
                  float* output);

  /// Whole model only: logits [V] that row `row` of tokens [B*T] predicts for the token after it.
  /// evaluate and logits borrow the buffers of a free slot; one must be free.
  void logits(const std::int32_t* tokens, std::int64_t row, float* to);
  const batch_spec& batch() const;

  // ---- optimizer
  // -------------------------------------------------------------------------------------
  /// AdamW on every tensor whose moments are here. gradients: the flat buffer, fully reduced, in
  /// which the caller has put the final tied gradient (head + embed, in this order) into every wte
  /// slot that the stage has.
  void apply(const float* gradients, const adamw_scalars& scalars);

  tensor_hash weights_hash(
      bool owns_tied_matrix) const;  // without wte where !owns_tied_matrix and no embedding
  tensor_hash state_hash(bool owns_tied_matrix) const;    // parameters and moments
  tensor_hash moments_hash(bool owns_tied_matrix) const;  // of the moments that are here
  /// Of each tensor held, by its global index; the tied matrix wherever it is held.
  std::vector<std::pair<std::uint32_t, tensor_hash>> tensor_hashes() const;
  std::int64_t allocated_bytes() const;

 private:
  struct implementation;
  std::unique_ptr<implementation> self_;
};

/// Learning rate of a step (1-based) in double: warm-up, cosine to min_lr, then min_lr. Own cosine
/// (polynomial), since libm's changes bits with the instruction set.
double learning_rate(const job_spec& spec, std::int64_t step);
/// The step's scalars: lr, bias corrections (powers by squaring, in double), grad_scale from the
/// global norm.
adamw_scalars step_scalars(const job_spec& spec, std::int64_t step, double gradient_norm);

}  // namespace stagecoach
