// Problems of a job file as text for a person; config/job_spec_yaml.hpp has the contract.
#include <fmt/format.h>

#include <algorithm>

#include "config/job_spec_yaml.hpp"
#include "config/units.hpp"

namespace stagecoach {

namespace {

/// Cells of a character on a terminal: Hangul, Han and kana take two.
int cell_count(std::string_view character) {
  std::uint32_t code = static_cast<unsigned char>(character[0]);
  if (character.size() == 3) code &= 0x0F;
  if (character.size() == 4) code &= 0x07;
  for (std::size_t i = 1; i < character.size(); ++i)
    code = code << 6 | (static_cast<unsigned char>(character[i]) & 0x3F);
  if (character.size() < 3) return 1;
  const bool is_wide = (code >= 0x1100 && code <= 0x115F) || (code >= 0x2E80 && code <= 0xA4CF) ||
                       (code >= 0xAC00 && code <= 0xD7A3) || (code >= 0xF900 && code <= 0xFAFF) ||
                       (code >= 0xFF00 && code <= 0xFF60) || (code >= 0x1F300 && code <= 0x1FAFF) ||
                       (code >= 0x20000 && code <= 0x3FFFD);
  return is_wide ? 2 : 1;
}

/// Spaces up to the column, then one ^ per cell of the word that stands there.
std::string mark_under(std::string_view line, int column) {
  std::string out;
  std::size_t i = 0;
  for (int c = 1; c < column && i < line.size(); ++c) {
    const std::size_t length = std::max<std::size_t>(utf8_length(line, i), 1);
    out.append(static_cast<std::size_t>(cell_count(line.substr(i, length))), ' ');
    i += length;
  }
  const std::size_t begin = i;
  const char quote = i < line.size() && (line[i] == '"' || line[i] == '\'') ? line[i] : '\0';
  while (i < line.size()) {
    const char c = line[i];
    if (quote ? (c == quote && i > begin) : (c == ' ' || c == ',' || c == ']' || c == '}')) break;
    // A colon ends a key, but not the prefix of hf:DIR.
    if (!quote && c == ':' && (i + 1 == line.size() || line[i + 1] == ' ')) break;
    const std::size_t length = std::max<std::size_t>(utf8_length(line, i), 1);
    out.append(static_cast<std::size_t>(cell_count(line.substr(i, length))), '^');
    i += length;
    if (!quote && i - begin == 1 && (c == '[' || c == '{')) break;
  }
  if (quote && i < line.size()) out += '^';
  if (i == begin) out += '^';
  return out;
}

}  // namespace

std::string format_problems(const std::vector<spec_problem>& problems) {
  if (problems.empty()) return {};
  std::string out;
  for (const spec_problem& p : problems) {
    const std::string place =
        p.line > 0 ? fmt::format("{}:{}:{}", p.file, p.line, p.column) : p.file;
    out += fmt::format("{}: error[{}]: {}\n", place, p.code, p.message);
    if (p.line > 0 && !p.source_line.empty()) {
      out += fmt::format("{:>5} | {}\n", p.line, p.source_line);
      out += fmt::format("      | {}\n", mark_under(p.source_line, p.column));
    }
    if (!p.fix.empty()) out += fmt::format("  fix: {}\n", p.fix);
  }
  out += fmt::format("{} error{}; nothing was submitted\n", problems.size(),
                     problems.size() == 1 ? "" : "s");
  return out;
}

}  // namespace stagecoach
