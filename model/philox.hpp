// Philox4x32-10: random numbers that are a pure function of (key, counter).
//
// No state, so that who draws and in which order can't matter (DESIGN 4 "Random").
// Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <array>
#include <cstdint>

namespace stagecoach {

using philox_counter = std::array<std::uint32_t, 4>;

/// The last word of the counter, so that no two uses of one seed share numbers. Never reuse a
/// value.
enum class philox_site : std::uint32_t { initial_values = 1, data_order = 2, sampling = 3 };

inline philox_counter philox(philox_counter counter, std::uint64_t key) {
  std::uint32_t key0 = static_cast<std::uint32_t>(key);
  std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key0,
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key1,
               static_cast<std::uint32_t>(product0)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

/// A double in (0, 1): 52 random bits and a half, so that neither end is ever reached.
inline double unit_interval(std::uint32_t high, std::uint32_t low) {
  const std::uint64_t bits = ((std::uint64_t{high} << 32) | low) >> 12;
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

}  // namespace stagecoach
