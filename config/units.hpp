// Numbers as people write them: 512Ki, 32B, 1_000, 10m, "500 steps", 4..8.
//
// Reads every number itself, since YAML 1.1 readers take 010 for 8, `no` for false and refuse
// 1_000. Pure and independent of the locale. Error messages end with "fix: ...".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "config/result.hpp"

namespace stagecoach {

/// A whole number: digits (with _ between digits), an optional fraction or exponent as long as the
/// result is whole, and an optional suffix K M B (or G) T = powers of 1000, Ki Mi Gi Ti = powers of
/// 1024. Fails (bad_spec): not a number, a leading zero, not whole, beyond 64 bits.
result<std::int64_t> parse_count(std::string_view text);

/// A finite decimal number such as 6.0e-4. No suffixes, no inf, no nan, no hexadecimal, no leading
/// zero.
result<double> parse_real(std::string_view text);

/// Milliseconds from 500ms, 90s, 10m, 1h30m, 2d. A bare number has no unit and is refused.
result<std::int64_t> parse_duration_ms(std::string_view text);

/// The shortest of the same: 600000 -> "10m", 5400000 -> "90m".
std::string format_duration_ms(std::int64_t ms);

/// A count and the word after it: "512Ki tokens" -> {524288, "tokens"}, "500" -> {500, ""}.
/// "1 step" gives "steps".
struct quantity {
  std::int64_t count = 0;
  std::string unit;
  bool operator==(const quantity&) const = default;
};
result<quantity> parse_quantity(std::string_view text);

/// "4..8" -> {4, 8}, "4" -> {4, 4}. Says nothing about which is larger.
struct count_range {
  std::int64_t least = 0;
  std::int64_t most = 0;
  bool operator==(const count_range&) const = default;
};
result<count_range> parse_range(std::string_view text);

/// 61035 -> "61,035", for people.
std::string format_grouped(std::int64_t count);

/// The text in double quotes, fit for a message: control bytes and bad UTF-8 escaped, cut at 80
/// bytes.
std::string quoted(std::string_view text);

/// "a, b, c". Not fmt::join, for which GCC 12 warns about fmt's own memory at -O3.
template <class T>
std::string joined(const std::vector<T>& words) {
  std::string out;
  for (const T& word : words) {
    if (!out.empty()) out += ", ";
    out += fmt::format("{}", word);
  }
  return out;
}

/// The length of the UTF-8 character that starts at text[index]; 0 if there is none (overlong
/// forms, surrogates and values beyond U+10FFFF are none).
std::size_t utf8_length(std::string_view text, std::size_t index);

}  // namespace stagecoach
