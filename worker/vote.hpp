// The step's vote: what each rank says, how rank 0 combines it, and the bytes that carry both.
//
// Pure. The combined result is a function of (job spec, step, the ranks' numbers) alone: sums walk
// tensor index and microbatch index by the full binary tree, never rank (DESIGN 4 "Norms and
// loss").
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "config/job_spec.hpp"
#include "config/result.hpp"
#include "coordinator/messages.hpp"
#include "kernels/backend.hpp"
#include "model/parameters.hpp"

namespace stagecoach {

struct ballot {
  std::uint64_t step = 0;
  std::uint64_t plan_hash = 0;
  std::uint64_t chain = 0;  // of the state before this step
  int rank = 0;
  std::vector<std::pair<std::uint32_t, double>> squares;       // tensor index, sum of squares
  std::vector<std::pair<std::uint32_t, double>> losses;        // microbatch of the step, loss sum
  std::vector<std::pair<std::uint32_t, tensor_hash>> weights;  // of every tensor held, before step
};

/// Ranks that hold the same tensor with other bits: one of them computed or kept it wrong.
struct weights_dispute {
  std::uint64_t step = 0;  // the state that is disputed
  std::vector<std::uint32_t> tensors;
  bool is_certain = false;  // more ranks agree with each other than with each suspect
  struct suspect {
    int rank = 0;
    std::string weights_hash;  // of the whole model, were this rank's tensors the right ones
  };
  std::vector<suspect> suspects;
};

std::vector<std::byte> encode_ballot(const ballot& b);
result<ballot> decode_ballot(std::span<const std::byte> bytes);
std::vector<std::byte> encode_vote(const vote_result& v);
result<vote_result> decode_vote(std::span<const std::byte> bytes);

/// All ranks' ballots, by rank, to the step's result. orders are filled in by the caller. The
/// weights of ballots in which find_dispute found nothing give the result's weights_hash.
/// Fails: conflict (a rank stands at another step, plan or chain: names it), corrupt (replicas
/// disagree on a tensor's norm: names both ranks, a silent corruption on one of them), bad_input
/// (something missing).
result<vote_result> count_votes(const job_spec& spec, const std::vector<ballot>& ballots,
                                std::size_t tensor_count);

/// Compares what the ranks hold before anyone applies the step. Replicas hold the same tensors, the
/// tied matrix is also held by two stages. None: all agree.
std::optional<weights_dispute> find_dispute(const std::vector<ballot>& ballots);

/// Each stage's part of the weights, by stage. weights: by tensor index.
std::vector<std::string> stage_hashes(const model_spec& model, const layout& shape,
                                      const std::vector<tensor_hash>& weights);

/// What the vote says of the optimizer's update.
adamw_scalars scalars_of(const vote_result& vote, const job_spec& spec);

std::uint64_t next_chain(std::uint64_t chain, std::uint64_t step, double loss, double norm);

}  // namespace stagecoach
