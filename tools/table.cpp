#include "tools/table.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>

namespace stagecoach {
namespace {

void print_yaml(const nlohmann::json& value, int depth) {
  const std::string pad(static_cast<std::size_t>(depth) * 2, ' ');
  if (value.is_object()) {
    for (const auto& [key, child] : value.items()) {
      if (child.is_structured() && !child.empty()) {
        std::printf("%s%s:\n", pad.c_str(), key.c_str());
        print_yaml(child, depth + 1);
      } else {
        std::printf("%s%s: %s\n", pad.c_str(), key.c_str(), child.dump().c_str());
      }
    }
    return;
  }
  for (const auto& child : value) {
    if (child.is_structured()) {
      std::printf("%s-\n", pad.c_str());
      print_yaml(child, depth + 1);
    } else {
      std::printf("%s- %s\n", pad.c_str(), child.dump().c_str());
    }
  }
}

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string out = "\"";
  for (char c : text) out += c == '"' ? "\"\"" : std::string(1, c);
  return out + "\"";
}

// Hangul and other East Asian letters take two cells of a terminal.
int width_of(const std::string& text) {
  int width = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (byte < 0x80)
      ++width;
    else if (byte >= 0xE0)
      width += 2;
    else if (byte >= 0xC0)
      ++width;
  }
  return width;
}

}  // namespace

std::string plain(const nlohmann::json& row, const std::string& key) {
  const auto at = row.find(key);
  if (at == row.end() || at->is_null()) return "-";
  if (at->is_string()) return at->get<std::string>().empty() ? "-" : at->get<std::string>();
  return at->dump();
}

std::string age_since(std::int64_t unix_ms) {
  if (unix_ms <= 0) return "-";
  const auto now = std::chrono::duration_cast<std::chrono::seconds>(
                       std::chrono::system_clock::now().time_since_epoch())
                       .count();
  const std::int64_t s = std::max<std::int64_t>(0, now - unix_ms / 1000);
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m", s / 60);
  if (s < 86400) return fmt::format("{}h{:02}m", s / 3600, s % 3600 / 60);
  return fmt::format("{}d", s / 86400);
}

bool print_object(const global_flags& flags, const nlohmann::json& object) {
  if (flags.output == "json") {
    std::printf("%s\n", object.dump(2).c_str());
  } else if (flags.output == "jsonl") {
    std::printf("%s\n", object.dump().c_str());
  } else if (flags.output == "yaml") {
    print_yaml(object, 0);
  } else {
    return false;
  }
  return true;
}

void print_table(
    const global_flags& flags, const std::vector<column>& columns, const nlohmann::json& rows,
    const std::function<std::string(const nlohmann::json&, const std::string&)>& cell) {
  if (flags.output == "jsonl") {
    for (const auto& row : rows) std::printf("%s\n", row.dump().c_str());
    return;
  }
  if (print_object(flags, rows)) return;
  const bool is_csv = flags.output == "csv";
  const bool wide = flags.output == "wide" || is_csv;
  if (flags.output == "name" || flags.quiet) {
    for (const auto& row : rows) std::printf("%s\n", plain(row, columns.front().key).c_str());
    return;
  }
  std::vector<std::vector<std::string>> lines;
  if (!flags.no_headers) {
    std::vector<std::string> heads;
    for (const column& c : columns)
      if (wide || !c.is_wide) heads.push_back(is_csv ? c.key : c.head);
    lines.push_back(std::move(heads));
  }
  for (const auto& row : rows) {
    std::vector<std::string> line;
    for (const column& c : columns)
      if (wide || !c.is_wide) line.push_back(is_csv ? plain(row, c.key) : cell(row, c.key));
    lines.push_back(std::move(line));
  }
  std::vector<int> widths;
  for (const auto& line : lines) {
    widths.resize(std::max(widths.size(), line.size()));
    for (std::size_t i = 0; i < line.size(); ++i)
      widths[i] = std::max(widths[i], width_of(line[i]));
  }
  for (const auto& line : lines) {
    std::string out;
    for (std::size_t i = 0; i < line.size(); ++i) {
      if (is_csv) {
        out += (i > 0 ? "," : "") + csv_field(line[i]);
        continue;
      }
      out += line[i];
      if (i + 1 < line.size())
        out.append(static_cast<std::size_t>(widths[i] - width_of(line[i]) + 2), ' ');
    }
    std::printf("%s\n", out.c_str());
  }
}

}  // namespace stagecoach
