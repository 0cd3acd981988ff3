#include "config/job_spec_yaml.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "config/job_spec_sections.hpp"
#include "config/leaves.hpp"
#include "config/limits.hpp"
#include "config/units.hpp"
#include "config/yaml_tree.hpp"

namespace stagecoach {

namespace {

constexpr std::int64_t micro_tokens_max = 4096;  // of `auto`: fills the products, fits a cache

void apply_override(yaml_node& root, const std::string& text, int source,
                    std::vector<yaml_problem>& problems) {
  const yaml_place place{source, 0, 0};
  const auto refuse = [&problems, place](std::string message) {
    problems.push_back(
        {place, "E010", {}, std::move(message), "--set path=value, such as --set batch.micro=8"});
  };
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos) return refuse("an override without =");
  const std::string_view path = std::string_view(text).substr(0, equals);
  if (std::count(path.begin(), path.end(), '.') >= limits::spec_depth_max)
    return refuse("the path has too many parts");
  for (std::size_t i = 0; i < path.size(); ++i)
    if (path[i] <= ' ' || path[i] > '~') return refuse("the path holds a byte that no key has");
  const std::size_t problems_before = problems.size();
  yaml_node value = read_yaml_tree(std::string_view(text).substr(equals + 1), source, problems);
  if (problems.size() != problems_before) return;
  if (value.is == yaml_node::shape::empty) value.place = place;
  std::string wrong = put(root, path, std::move(value), place);
  if (!wrong.empty()) refuse(std::move(wrong));
}

std::vector<std::string_view> split_lines(std::string_view text) {
  if (text.substr(0, 3) == "\xEF\xBB\xBF") text.remove_prefix(3);
  std::vector<std::string_view> lines;
  while (true) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    lines.push_back(line);
    if (end == text.size()) return lines;
    text.remove_prefix(end + 1);
  }
}

/// One printable character per character of the source line, so that columns stay what they are.
std::string printable(std::string_view line) {
  std::string out;
  for (std::size_t i = 0; i < line.size();) {
    const std::size_t length = utf8_length(line, i);
    const auto first = static_cast<unsigned char>(line[i]);
    const bool is_c1 =
        first == 0xC2 && length == 2 && static_cast<unsigned char>(line[i + 1]) < 0xA0;
    if (length == 0 || first < 0x20 || first == 0x7F || is_c1)
      out += first == '\t' ? " " : "?";
    else
      out += line.substr(i, length);
    i += std::max<std::size_t>(length, 1);
  }
  return out;
}

int code_point_column(std::string_view line, int byte_column) {
  int column = 1;
  const std::size_t end = std::min(line.size(), static_cast<std::size_t>(byte_column));
  for (std::size_t i = 0; i < end; i += std::max<std::size_t>(utf8_length(line, i), 1)) ++column;
  return column;
}

std::string cut(std::string text, std::size_t bytes_max) {
  if (text.size() <= bytes_max) return text;
  std::size_t end = bytes_max;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  text.resize(end);
  return text + "...";
}

std::vector<spec_problem> with_places(std::vector<yaml_problem> found, std::string_view text,
                                      const std::string& file_name,
                                      const std::vector<std::string>& overrides) {
  std::stable_sort(found.begin(), found.end(), [](const yaml_problem& a, const yaml_problem& b) {
    return std::tie(a.place.source, a.place.line, a.place.column) <
           std::tie(b.place.source, b.place.line, b.place.column);
  });
  if (found.size() > spec_problem_count_max) found.resize(spec_problem_count_max);
  const std::vector<std::string_view> lines = split_lines(text);
  std::vector<spec_problem> out;
  for (yaml_problem& p : found) {
    spec_problem q;
    q.code = std::move(p.code);
    q.path = cut(std::move(p.path), 200);
    q.message = cut(std::move(p.message), 1000);
    q.fix = cut(std::move(p.fix), 1000);
    if (p.place.source > 0) {
      const std::string& set = overrides[static_cast<std::size_t>(p.place.source - 1)];
      q.file = "--set " + cut(printable(set), 200);
    } else {
      q.file = file_name;
      const auto line = static_cast<std::size_t>(p.place.line);
      const std::string_view source = line < lines.size() ? lines[line] : std::string_view{};
      q.line = p.place.line + 1;
      q.column = code_point_column(source, p.place.column);
      // A line that long is no help on a screen.
      constexpr std::size_t shown_bytes_max = 400;
      if (source.size() <= shown_bytes_max) q.source_line = printable(source);
    }
    out.push_back(std::move(q));
  }
  return out;
}

}  // namespace

std::int64_t resolve_micro_sequences(std::int64_t global_sequences, std::int64_t sequence_tokens,
                                     int workers_min, int workers_max) {
  const std::int64_t microbatches_min = std::max<std::int64_t>(4, std::int64_t{2} * workers_max);
  std::int64_t best = 1;
  for (std::int64_t micro = 2; micro <= global_sequences; micro *= 2) {
    if (global_sequences % micro != 0 || micro * sequence_tokens > micro_tokens_max ||
        global_sequences / micro < microbatches_min)
      break;  // none of the three gets better with a larger micro
    best = micro;
  }
  for (std::int64_t micro = best; micro >= 1; micro /= 2)
    if (are_leaves_balanced(global_sequences / micro, workers_min, workers_max)) return micro;
  return best;
}

spec_result parse_job_spec(std::string_view text, const std::string& file_name,
                           const std::vector<std::string>& overrides) {
  spec_result out;
  std::vector<yaml_problem> problems;
  yaml_node root = read_yaml_tree(text, 0, problems);
  const bool is_readable = std::all_of(problems.begin(), problems.end(),
                                       [](const yaml_problem& p) { return p.code == "E003"; });
  if (is_readable) {
    for (std::size_t i = 0; i < overrides.size(); ++i)
      apply_override(root, overrides[i], static_cast<int>(i) + 1, problems);
    spec_reader reader(root);
    job_spec spec = reader.read();
    for (yaml_problem& p : reader.take_problems()) problems.push_back(std::move(p));
    if (problems.empty()) out.spec = std::move(spec);
  }
  out.problems = with_places(std::move(problems), text, file_name, overrides);
  return out;
}

}  // namespace stagecoach
