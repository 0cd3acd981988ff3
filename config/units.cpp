#include "config/units.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>

namespace stagecoach {

namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

/// The parts of a decimal number, without underscores; rest is what follows it.
struct decimal {
  bool negative = false;
  std::string whole;
  std::string fraction;
  int exponent = 0;
  std::string_view rest;
};

// Longer than any number of ours; keeps every loop below short whatever the input is.
constexpr std::size_t number_bytes_max = 64;

result<decimal> split_decimal(std::string_view text, std::string_view original) {
  decimal d;
  std::size_t i = 0;
  if (text.size() > number_bytes_max)
    return make_error(errc::bad_spec, "{} is too long for a number. fix: write a number",
                      quoted(original));
  if (i < text.size() && (text[i] == '-' || text[i] == '+')) d.negative = text[i++] == '-';
  // An underscore stands between two digits: 1_000, not 1__0 or _1.
  const auto take_digits = [&text, &i](std::string& digits) {
    while (i < text.size()) {
      const bool is_joint = text[i] == '_' && i > 0 && is_digit(text[i - 1]) &&
                            i + 1 < text.size() && is_digit(text[i + 1]);
      if (!is_digit(text[i]) && !is_joint) break;
      if (is_digit(text[i])) digits += text[i];
      ++i;
    }
  };
  take_digits(d.whole);
  if (i < text.size() && text[i] == '.' && i + 1 < text.size() && is_digit(text[i + 1])) {
    ++i;
    take_digits(d.fraction);
  } else if (i < text.size() && text[i] == '.' && !d.whole.empty() &&
             (i + 1 == text.size() || text[i + 1] == 'e')) {
    ++i;  // "1." and "1.e-3"
  }
  if (d.whole.empty() && d.fraction.empty())
    return make_error(errc::bad_spec,
                      "{} is not a number. fix: write digits, such as 512, 1_000, 512Ki or 32B",
                      quoted(original));
  if (d.whole.size() > 1 && d.whole[0] == '0')
    return make_error(errc::bad_spec,
                      "{} starts with 0, which YAML readers take for octal. fix: write {}",
                      quoted(original),
                      std::string_view(d.whole).substr(
                          std::min(d.whole.find_first_not_of('0'), d.whole.size() - 1)));
  if (i < text.size() && (text[i] == 'e' || text[i] == 'E')) {
    std::size_t j = i + 1;
    bool is_negative = false;
    if (j < text.size() && (text[j] == '-' || text[j] == '+')) is_negative = text[j++] == '-';
    if (j < text.size() && is_digit(text[j])) {
      while (j < text.size() && is_digit(text[j])) {
        if (d.exponent < 100'000) d.exponent = d.exponent * 10 + (text[j] - '0');
        ++j;
      }
      if (is_negative) d.exponent = -d.exponent;
      i = j;
    }
  }
  d.rest = text.substr(i);
  return d;
}

error not_whole(std::string_view original) {
  return make_error(errc::bad_spec, "{} is not a whole number. fix: write a whole number",
                    quoted(original));
}

error too_big(std::string_view original) {
  return make_error(errc::bad_spec, "{} does not fit in 64 bits. fix: write a number below 9.2e18",
                    quoted(original));
}

/// 0 if the suffix is unknown.
std::int64_t suffix_factor(std::string_view suffix) {
  struct named_factor {
    std::string_view suffix;
    std::int64_t factor;
  };
  static constexpr std::array<named_factor, 11> table{{{"", 1},
                                                       {"K", 1'000},
                                                       {"k", 1'000},
                                                       {"M", 1'000'000},
                                                       {"B", 1'000'000'000},
                                                       {"G", 1'000'000'000},
                                                       {"T", 1'000'000'000'000},
                                                       {"Ki", std::int64_t{1} << 10},
                                                       {"Mi", std::int64_t{1} << 20},
                                                       {"Gi", std::int64_t{1} << 30},
                                                       {"Ti", std::int64_t{1} << 40}}};
  for (const named_factor& row : table)
    if (row.suffix == suffix) return row.factor;
  return 0;
}

}  // namespace

std::size_t utf8_length(std::string_view text, std::size_t index) {
  const auto byte = [&text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  if (index >= text.size()) return 0;
  const unsigned first = byte(index);
  if (first < 0x80) return 1;
  const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() - index < length) return 0;
  for (std::size_t i = 1; i < length; ++i)
    if ((byte(index + i) & 0xC0) != 0x80) return 0;
  const unsigned second = byte(index + 1);
  if ((first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F)) return 0;
  if ((first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F)) return 0;
  return length;
}

std::string quoted(std::string_view text) {
  constexpr std::size_t shown_bytes_max = 80;
  std::string out = "\"";
  std::size_t i = 0;
  while (i < text.size() && i < shown_bytes_max) {
    const std::size_t length = utf8_length(text, i);
    const auto first = static_cast<unsigned char>(text[i]);
    const bool is_c1 =
        first == 0xC2 && length == 2 && static_cast<unsigned char>(text[i + 1]) < 0xA0;
    if (length == 0 || first < 0x20 || first == 0x7F || is_c1) {
      out += fmt::format("\\x{:02x}", first);
      ++i;
      if (is_c1) out += fmt::format("\\x{:02x}", static_cast<unsigned char>(text[i++]));
      continue;
    }
    out += text.substr(i, length);
    i += length;
  }
  out += i < text.size() ? "...\"" : "\"";
  return out;
}

result<std::int64_t> parse_count(std::string_view text) {
  const std::string_view original = text;
  auto split = split_decimal(trimmed(text), original);
  if (!split) return split.err();
  const decimal& d = *split;
  const std::int64_t factor = suffix_factor(d.rest);
  if (factor == 0)
    return make_error(
        errc::bad_spec,
        "{} has the unknown suffix {}. fix: use K, M, B or T (thousands) or Ki, Mi, Gi (1024s)",
        quoted(original), quoted(d.rest));
  // In integers, since 0.1B has no exact double. 10^38 is the most that 128 bits hold.
  std::string digits = d.whole + d.fraction;
  digits.erase(0, std::min(digits.find_first_not_of('0'), digits.size()));
  if (digits.empty()) return std::int64_t{0};
  int shift = d.exponent - static_cast<int>(d.fraction.size());
  while (digits.size() > 1 && digits.back() == '0') {
    digits.pop_back();
    ++shift;
  }
  if (digits.size() > 19) return shift < 0 ? not_whole(original) : too_big(original);
  __extension__ using wide = __int128;
  wide value = 0;
  for (const char c : digits) value = value * 10 + (c - '0');
  if (__builtin_mul_overflow(value, static_cast<wide>(factor), &value)) return too_big(original);
  constexpr wide most = std::numeric_limits<std::int64_t>::max();
  for (; shift > 0; --shift) {
    if (value > most) return too_big(original);
    value *= 10;
  }
  for (; shift < 0; ++shift) {
    if (value % 10 != 0) return not_whole(original);
    value /= 10;
  }
  if (value > most) return too_big(original);
  return static_cast<std::int64_t>(d.negative ? -value : value);
}

result<double> parse_real(std::string_view text) {
  auto split = split_decimal(trimmed(text), text);
  if (!split) return split.err();
  const decimal& d = *split;
  if (!d.rest.empty())
    return make_error(errc::bad_spec, "{} is not a number. fix: write it like 0.1 or 6.0e-4",
                      quoted(text));
  const std::string plain =
      fmt::format("{}{}.{}e{}", d.negative ? "-" : "", d.whole.empty() ? "0" : d.whole,
                  d.fraction.empty() ? "0" : d.fraction, d.exponent);
  double value = 0;
  const auto [end, failure] = std::from_chars(plain.data(), plain.data() + plain.size(), value);
  if (failure != std::errc{} || end != plain.data() + plain.size() || !std::isfinite(value))
    return make_error(errc::bad_spec, "{} is beyond double precision. fix: write it like 6.0e-4",
                      quoted(text));
  return value;
}

result<std::int64_t> parse_duration_ms(std::string_view text) {
  const std::string_view original = text;
  const auto bad = [original] {
    return make_error(errc::bad_spec,
                      "{} is not a duration. fix: write a number with ms, s, m, h or d, such as "
                      "10m or 1h30m",
                      quoted(original));
  };
  text = trimmed(text);
  if (text.empty() || text.size() > number_bytes_max) return bad();
  std::int64_t total = 0;
  while (!text.empty()) {
    std::size_t digits = 0;
    while (digits < text.size() &&
           (is_digit(text[digits]) || text[digits] == '.' || text[digits] == '_'))
      ++digits;
    std::size_t letters = 0;
    while (digits + letters < text.size() && is_letter(text[digits + letters])) ++letters;
    const std::string_view unit = text.substr(digits, letters);
    const std::int64_t unit_ms = unit == "ms"  ? 1
                                 : unit == "s" ? 1'000
                                 : unit == "m" ? 60'000
                                 : unit == "h" ? 3'600'000
                                 : unit == "d" ? 86'400'000
                                               : 0;
    if (digits == 0 || unit_ms == 0) return bad();
    const auto count = parse_real(text.substr(0, digits));
    if (!count) return count.err();
    const double part = *count * static_cast<double>(unit_ms);
    // A hundred thousand years; below it doubles hold every millisecond.
    if (part + static_cast<double>(total) > 3e15) return too_big(original);
    total += std::llround(part);
    text.remove_prefix(digits + letters);
  }
  return total;
}

std::string format_duration_ms(std::int64_t ms) {
  if (ms == 0) return "0s";
  if (ms % 86'400'000 == 0) return fmt::format("{}d", ms / 86'400'000);
  if (ms % 3'600'000 == 0) return fmt::format("{}h", ms / 3'600'000);
  if (ms % 60'000 == 0) return fmt::format("{}m", ms / 60'000);
  if (ms % 1'000 == 0) return fmt::format("{}s", ms / 1'000);
  return fmt::format("{}ms", ms);
}

result<quantity> parse_quantity(std::string_view text) {
  const std::string_view whole = trimmed(text);
  const std::size_t gap = whole.find(' ');
  auto count = parse_count(whole.substr(0, gap));
  if (!count) return count.err();
  quantity q{*count, {}};
  if (gap != std::string_view::npos) q.unit = std::string(trimmed(whole.substr(gap)));
  for (const char* plural : {"steps", "tokens", "sequences"})
    if (std::string_view(plural).substr(0, std::string_view(plural).size() - 1) == q.unit)
      q.unit = plural;
  return q;
}

result<count_range> parse_range(std::string_view text) {
  const std::string_view whole = trimmed(text);
  const std::size_t dots = whole.find("..");
  auto least = parse_count(whole.substr(0, dots));
  if (!least) return least.err();
  if (dots == std::string_view::npos) return count_range{*least, *least};
  auto most = parse_count(whole.substr(dots + 2));
  if (!most) return most.err();
  return count_range{*least, *most};
}

std::string format_grouped(std::int64_t count) {
  std::string text = fmt::format("{}", count);
  const std::size_t first_digit = count < 0 ? 1 : 0;
  for (std::size_t i = text.size(); i > first_digit + 3; i -= 3) text.insert(i - 3, ",");
  return text;
}

}  // namespace stagecoach
