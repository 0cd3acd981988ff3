// Which sample stands at which position: a pure function of (seed, epoch, position), no loader
// state.
#pragma once

#include <cstdint>

namespace stagecoach {

/// A keyed permutation of [0, count): a Feistel network over the next power of four with cycle
/// walking, keyed by (seed, epoch) through Philox.
std::uint64_t permute(std::uint64_t index, std::uint64_t count, std::uint64_t seed,
                      std::uint64_t epoch);

/// Samples of a token file: windows of sequence_tokens + 1 tokens, stride sequence_tokens.
std::int64_t sample_count(std::int64_t token_count, std::int64_t sequence_tokens);

/// First token of the sample at a global position (step * global_sequences + i). Epoch = position /
/// count.
std::int64_t sample_begin(std::int64_t position, std::int64_t token_count,
                          std::int64_t sequence_tokens, std::uint64_t seed);

/// Validation order is plain: sample i begins at i * sequence_tokens, wrapping around.
std::int64_t validation_begin(std::int64_t i, std::int64_t token_count,
                              std::int64_t sequence_tokens);

}  // namespace stagecoach
