// One rank's part of a training step: schedule, exact reduction, vote, apply. And evaluation.
//
// Runs on the trainer's thread over a link_set, whatever is behind it; knows no coordinator, no
// disk. A step is two calls: compute() ends with the vote's result and leaves the reduced gradient
// in place; apply() is never interrupted. Until the next compute() begins, the gradient is kept, so
// that a step whose vote was counted elsewhere can still be applied (roll forward).
//
// Copies: a rank that keeps other stages' state (model/copies.hpp) is given their reduced gradients
// before it votes, so its vote says that it could apply the step to them too.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "config/job_spec.hpp"
#include "config/result.hpp"
#include "coordinator/messages.hpp"
#include "kernels/backend.hpp"
#include "model/plan.hpp"
#include "model/schedule.hpp"
#include "model/shadow.hpp"
#include "model/stage.hpp"
#include "worker/link.hpp"
#include "worker/pulse_counter.hpp"
#include "worker/replica_reduction.hpp"
#include "worker/vote.hpp"

namespace stagecoach {

/// Where samples come from: `read(begin, count, out)` gives tokens of one long sequence.
struct token_reader {
  std::int64_t token_count = 0;
  std::function<void(std::int64_t begin, std::int64_t count, std::int32_t* out)> read;
};

/// Orders that rank 0 adds to the vote of a step: bits and the coordinator's ids.
using order_source =
    std::function<std::pair<std::uint64_t, std::vector<std::uint64_t>>(std::uint64_t step)>;

struct step_times {
  std::int64_t forward_us = 0, backward_input_us = 0, backward_weight_us = 0;
  std::int64_t layers_us = 0;  // of these three: all but embedding and head
  std::int64_t wait_us = 0, reduce_us = 0, copy_us = 0, vote_us = 0, apply_us = 0;
  std::int64_t hash_us = 0;  // of vote_us
};

/// One instruction as it was carried out; op::reduce includes the tied matrix, op::step is the
/// vote.
struct instruction_span {
  instruction what;
  std::int64_t begin_ns = 0, end_ns = 0;  // steady clock
  std::int64_t cpu_ns = 0;  // of the trainer's thread, which computes its share of every tile
};

class step_runner {
 public:
  /// stage must hold the units of the plan's stage for this rank, with slots() slots at least;
  /// copies what the rank keeps of others, null if nothing.
  step_runner(const job_spec& spec, const plan& shape, int rank, stage& model, link_set& links,
              backend& device, token_reader train, token_reader valid,
              shadow_state* copies = nullptr);
  ~step_runner();

  /// Slots that the schedule needs on this rank's stage.
  static result<int> slots(const job_spec& spec, const plan& shape, int rank);

  /// Forward, backward, reduction and vote of `step`; the state stands at step - 1 with this chain.
  /// Fails: cancelled (cancel() or the links'), unreachable (a link broke), conflict, corrupt.
  result<vote_result> compute(std::uint64_t step, std::uint64_t chain, const order_source& orders);
  /// Why compute() failed with corrupt, where the ranks' weights differ; rank 0 alone knows.
  const std::optional<weights_dispute>& dispute() const { return dispute_; }
  /// Rank 0: the weights that the newest compute() found all ranks to hold, by tensor index.
  const std::vector<tensor_hash>& voted_weights() const { return voted_weights_; }
  /// Applies the vote to the tensors whose moments are here. has_pending() must hold for vote.step.
  void apply(const vote_result& vote);
  /// After apply: with a sharded optimizer, owners give the updated parameters to the replicas that
  /// have no moments of them; else nothing. Where it fails (cancelled, unreachable) the parameters
  /// without moments here are of either step: they must come from their owners.
  result<void> share_weights(const vote_result& vote);
  /// Of the step applied last, until the next compute() begins; null where it is not held.
  const float* reduced_gradient(int tensor_index) const;
  /// True while the reduced gradient of `step` is complete and not yet applied.
  bool has_pending(std::uint64_t step) const { return pending_step_ == step && step != 0; }

  /// Mean loss over spec.eval_batches microbatches of validation data, by replica 0; only its last
  /// stage gets a value. Every rank of replica 0 must call it after the same step.
  result<double> evaluate(std::uint64_t step);
  bool takes_part_in_evaluation() const;
  bool reports_evaluation() const;

  /// Counts each instruction that is done; must outlive this.
  void count_into(pulse_counter& pulse) { pulse_ = &pulse; }
  /// Every compute() from now on appends what it does to `spans` (which must outlive that); null:
  /// no more. Some 0.5 us an instruction.
  void record_into(std::vector<instruction_span>* spans) { spans_ = spans; }
  /// From any thread: makes compute() and evaluate() return `cancelled` soon.
  void cancel() { cancelled_.store(true); }
  /// Called by every compute() half way through its instructions, on its thread; for tests.
  void watch_middle(std::function<void(std::uint64_t step)> middle) { middle_ = std::move(middle); }
  const step_times& times() const { return times_; }
  std::int64_t allocated_bytes() const;

 private:
  float* take_buffer();
  bool keeps(int tensor_index, int replica) const;
  void make_reduction(std::vector<std::vector<gradient_stretch>> shares);
  result<void> carry_out(const instruction& what, std::uint64_t step);
  result<void> forward(const instruction& what);
  result<void> backward_input(const instruction& what);
  void backward_weight(const instruction& what);
  result<void> reduce(std::uint64_t step);
  result<void> reduce_replicas(std::uint64_t step);
  result<void> tie_gradients(std::uint64_t step);
  void find_copies();
  result<void> send_to_copies(std::uint64_t step);
  result<void> receive_for_copies(std::uint64_t step);
  result<vote_result> vote(std::uint64_t step, std::uint64_t chain, const order_source& orders);
  std::string describe(const weights_dispute& d) const;
  void load_samples(std::uint64_t step, int microbatch);

  const job_spec& spec_;
  const plan& plan_;
  int rank_, stage_index_, replica_;
  stage& stage_;
  link_set& links_;
  backend& device_;
  token_reader train_, valid_;
  shadow_state* copies_;
  /// The part of an owner's gradient buffer that travels to one holder in one frame.
  struct copy_stretch {
    int peer = 0;
    std::int64_t begin = 0, count = 0;  // floats of the owner's buffer
  };
  struct copy_tensor {
    tensor_info tensor;
    std::int64_t offset = 0;  // into copy_gradients_
  };
  std::vector<copy_stretch> copies_out_, copies_in_;
  std::vector<copy_tensor> copy_tensors_;
  std::vector<float> copy_gradients_;  // the stretches of copies_in_, one after another
  std::vector<instruction> table_;
  // Sharded optimizer: by global tensor index of this stage, the replica that owns its moments.
  std::map<int, int> owner_of_;
  std::optional<replica_reduction> reduction_;  // several replicas
  std::int64_t leaf_first_ = 0, leaf_last_ = 0, per_leaf_ = 1;
  int microbatches_ = 0, slot_count_ = 1;

  std::vector<float*> free_, stack_, owned_;
  float* accumulating_ = nullptr;
  std::vector<float> input_, output_, gradient_in_, gradient_out_;
  std::vector<std::int32_t> tokens_, targets_, samples_;
  std::vector<double> losses_;
  std::uint64_t step_ = 0, pending_step_ = 0;
  step_times times_;
  std::optional<weights_dispute> dispute_;
  std::vector<tensor_hash> voted_weights_;
  std::function<void(std::uint64_t)> middle_;
  pulse_counter* pulse_ = nullptr;
  std::vector<instruction_span>* spans_ = nullptr;
  std::atomic<bool> cancelled_{false};
};

}  // namespace stagecoach
