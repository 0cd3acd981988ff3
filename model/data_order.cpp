#include "model/data_order.hpp"

#include "config/result.hpp"
#include "model/philox.hpp"

namespace stagecoach {

std::uint64_t permute(std::uint64_t index, std::uint64_t count, std::uint64_t seed,
                      std::uint64_t epoch) {
  invariant(index < count, "a permutation maps only indices of its range");
  int half_bits = 1;
  while (half_bits < 32 && (std::uint64_t{1} << (2 * half_bits)) < count) ++half_bits;
  const std::uint64_t mask = (std::uint64_t{1} << half_bits) - 1;
  // The network permutes the next power of four, at most 4 * count; walking on from what falls
  // outside stays a permutation of the range and takes fewer than 4 rounds on average.
  do {
    std::uint64_t left = index >> half_bits;
    std::uint64_t right = index & mask;
    for (std::uint32_t round = 0; round < 8; ++round) {
      const philox_counter random =
          philox({static_cast<std::uint32_t>(right), static_cast<std::uint32_t>(epoch),
                  static_cast<std::uint32_t>(epoch >> 32),
                  static_cast<std::uint32_t>(philox_site::data_order) << 8 | round},
                 seed);
      const std::uint64_t mixed = left ^ (random[0] & mask);
      left = right;
      right = mixed;
    }
    index = left << half_bits | right;
  } while (index >= count);
  return index;
}

std::int64_t sample_count(std::int64_t token_count, std::int64_t sequence_tokens) {
  invariant(sequence_tokens > 0, "a sample has tokens");
  return token_count <= 1 ? 0 : (token_count - 1) / sequence_tokens;
}

std::int64_t sample_begin(std::int64_t position, std::int64_t token_count,
                          std::int64_t sequence_tokens, std::uint64_t seed) {
  const std::int64_t count = sample_count(token_count, sequence_tokens);
  invariant(count > 0 && position >= 0, "a data set has at least one sample (checked at submit)");
  const std::uint64_t index =
      permute(static_cast<std::uint64_t>(position % count), static_cast<std::uint64_t>(count), seed,
              static_cast<std::uint64_t>(position / count));
  return static_cast<std::int64_t>(index) * sequence_tokens;
}

std::int64_t validation_begin(std::int64_t i, std::int64_t token_count,
                              std::int64_t sequence_tokens) {
  const std::int64_t count = sample_count(token_count, sequence_tokens);
  invariant(count > 0 && i >= 0, "a validation set has at least one sample (checked at submit)");
  return i % count * sequence_tokens;
}

}  // namespace stagecoach
