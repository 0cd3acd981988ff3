#include "config/yaml_tree.hpp"

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <istream>
#include <map>
#include <optional>
#include <streambuf>

#include "config/limits.hpp"
#include "config/units.hpp"

namespace stagecoach {

namespace {
// The parser quotes the character that it does not know, which may be none that a terminal shows.
std::string printable(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20) c = '?';
  }
  return text;
}

// A real job file has 60 nodes, one with a list of ten thousand data files 50,000.
constexpr int node_count_max = 200'000;
constexpr std::size_t problem_count_max = 200;

// Thrown through yaml-cpp to leave its recursion; caught in read_yaml_tree, never seen outside.
struct stop_reading {};

class memory_buffer : public std::streambuf {
 public:
  explicit memory_buffer(std::string_view text) {
    char* begin = const_cast<char*>(text.data());  // only read from
    setg(begin, begin, begin + text.size());
  }
};

class tree_builder : public YAML::EventHandler {
 public:
  tree_builder(int source, std::vector<yaml_problem>& problems)
      : source_(source), problems_(problems) {}

  yaml_node take_root() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++document_count_ > 1)
      stop(place_of(mark), "E001", "a second YAML document starts here; a job file holds one",
           "remove the ---, or indent the line like the ones above it");
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    refuse_anchor(mark, anchor);
    yaml_node n;
    // yaml-cpp gives the place of the next token; a reader looks for the key that has no value.
    n.place = !open_.empty() && open_.back().has_key ? open_.back().key_place : place_of(mark);
    add(std::move(n));
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    stop(place_of(mark), "E009", "YAML aliases are not allowed in a job file",
         "write the value out where it is used");
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    refuse_anchor(mark, anchor);
    refuse_tag(mark, tag);
    yaml_node n;
    n.is = yaml_node::shape::text;
    n.place = place_of(mark);
    n.text = value;
    if (!is_clean(value))
      stop(n.place, "E001", fmt::format("the text {} holds control characters", quoted(value)),
           "remove them");
    add(std::move(n));
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, yaml_node::shape::list);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, yaml_node::shape::map);
  }
  void OnMapEnd() override { close(); }

 private:
  struct open_node {
    yaml_node node;
    bool has_key = false;  // of a map: the next node is this key's value
    std::string key;
    yaml_place key_place;
    std::map<std::string, int> first_lines;
  };

  yaml_place place_of(const YAML::Mark& mark) const {
    return {source_, std::max(mark.line, 0), std::max(mark.column, 0)};
  }

  [[noreturn]] void stop(yaml_place place, const char* code, std::string message, std::string fix) {
    problems_.push_back({place, code, {}, std::move(message), std::move(fix)});
    throw stop_reading{};
  }

  void refuse_anchor(const YAML::Mark& mark, YAML::anchor_t anchor) {
    if (anchor != YAML::NullAnchor)
      stop(place_of(mark), "E009", "YAML anchors are not allowed in a job file",
           "remove the &name and write the value out where it is used");
  }

  void refuse_tag(const YAML::Mark& mark, const std::string& tag) {
    if (!tag.empty() && tag != "?" && tag != "!")
      stop(place_of(mark), "E009", fmt::format("YAML tags are not allowed: {}", quoted(tag)),
           "remove the !tag");
  }

  static bool is_clean(std::string_view value) {
    for (std::size_t i = 0; i < value.size();) {
      const std::size_t length = utf8_length(value, i);
      const auto first = static_cast<unsigned char>(value[i]);
      if (length == 0 || first < 0x20 || first == 0x7F) return false;
      if (first == 0xC2 && static_cast<unsigned char>(value[i + 1]) < 0xA0) return false;
      i += length;
    }
    return true;
  }

  void count_node(yaml_place place) {
    if (++node_count_ > node_count_max)
      stop(place, "E008",
           fmt::format("more than {} values in one file", format_grouped(node_count_max)),
           "list fewer data files; join small ones");
  }

  void open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
            yaml_node::shape shape) {
    refuse_anchor(mark, anchor);
    refuse_tag(mark, tag);
    const yaml_place place = place_of(mark);
    count_node(place);
    if (static_cast<int>(open_.size()) >= limits::spec_depth_max)
      stop(place, "E008",
           fmt::format("nested more than {} levels deep; a job file needs 4",
                       limits::spec_depth_max),
           "check the brackets and the indentation");
    open_node o;
    o.node.is = shape;
    o.node.place = place;
    open_.push_back(std::move(o));
  }

  void close() {
    yaml_node done = std::move(open_.back().node);
    open_.pop_back();
    add(std::move(done));
  }

  void add(yaml_node n) {
    count_node(n.place);
    if (open_.empty()) {
      root_ = std::move(n);
      return;
    }
    open_node& parent = open_.back();
    if (parent.node.is == yaml_node::shape::list) {
      parent.node.items.push_back(std::move(n));
      return;
    }
    if (!parent.has_key) {
      if (n.is != yaml_node::shape::text)
        stop(n.place, "E001", "a key must be a word", "write  key: value");
      parent.has_key = true;
      parent.key = std::move(n.text);
      parent.key_place = n.place;
      return;
    }
    parent.has_key = false;
    const auto [first, is_new] = parent.first_lines.try_emplace(parent.key, parent.key_place.line);
    if (!is_new) {
      if (problems_.size() < problem_count_max)
        problems_.push_back({parent.key_place, "E003", parent.key,
                             fmt::format("duplicate key {} (first set on line {})",
                                         quoted(parent.key), first->second + 1),
                             "keep one of them"});
      return;
    }
    parent.node.keys.push_back(std::move(parent.key));
    parent.node.key_places.push_back(parent.key_place);
    parent.node.items.push_back(std::move(n));
  }

  int source_;
  std::vector<yaml_problem>& problems_;
  yaml_node root_;
  std::vector<open_node> open_;
  int node_count_ = 0;
  int document_count_ = 0;
};

/// What yaml-cpp must never see: it costs time or stack there, or it reports it badly.
std::optional<yaml_problem> refuse_before_parsing(std::string_view text, int source) {
  const auto problem = [source](int line, std::size_t column, const char* code, std::string message,
                                std::string fix) {
    return yaml_problem{
        {source, line, static_cast<int>(column)}, code, {}, std::move(message), std::move(fix)};
  };
  if (static_cast<std::int64_t>(text.size()) > limits::spec_bytes_max)
    return problem(0, 0, "E008",
                   fmt::format("the file has {} bytes; the limit is {}",
                               format_grouped(static_cast<std::int64_t>(text.size())),
                               format_grouped(limits::spec_bytes_max)),
                   "is this a job file? Data files are named in data.train");
  int line = 0;
  std::size_t line_start = 0;
  int depth = 0;
  bool in_indent = true;
  bool in_comment = false;
  for (std::size_t i = 0; i < text.size();) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const std::size_t column = i - line_start;
    const std::size_t length = utf8_length(text, i);
    if (length == 0)
      return problem(line, column, "E001",
                     fmt::format("byte 0x{:02x} is not part of a UTF-8 character", byte),
                     "save the file as UTF-8");
    const bool is_crlf = byte == '\r' && i + 1 < text.size() && text[i + 1] == '\n';
    const bool is_allowed_control = byte == '\n' || byte == '\t' || is_crlf;
    if ((byte < 0x20 && !is_allowed_control) || byte == 0x7F)
      return problem(line, column, "E001", fmt::format("control character 0x{:02x}", byte),
                     byte == '\r' ? "end lines with a line feed" : "remove it");
    if (byte == '\n') {
      ++line;
      line_start = i + 1;
      in_indent = true;
      in_comment = false;
      ++i;
      continue;
    }
    if (in_indent && byte == '\t') {
      const std::size_t word = text.find_first_not_of(" \t\r", i);
      const bool is_blank =
          word == std::string_view::npos || text[word] == '\n' || text[word] == '#';
      if (!is_blank)
        return problem(line, column, "E001", "a tab in the indentation", "indent with spaces");
    }
    if (byte == '#' && (in_indent || text[i - 1] == ' ' || text[i - 1] == '\t')) in_comment = true;
    if (byte != ' ' && byte != '\t' && byte != '\r') in_indent = false;
    // Counts brackets in quotes too: sixteen open ones are no path and no name of ours.
    if (!in_comment && (byte == '[' || byte == '{') && ++depth > limits::spec_depth_max)
      return problem(line, column, "E008",
                     fmt::format("nested more than {} levels deep; a job file needs 4",
                                 limits::spec_depth_max),
                     "check the brackets");
    if (!in_comment && (byte == ']' || byte == '}')) depth = std::max(depth - 1, 0);
    i += length;
  }
  return std::nullopt;
}

}  // namespace

const yaml_node* child(const yaml_node& map, std::string_view key) {
  for (std::size_t i = 0; i < map.keys.size(); ++i)
    if (map.keys[i] == key) return &map.items[i];
  return nullptr;
}

yaml_node read_yaml_tree(std::string_view text, int source, std::vector<yaml_problem>& problems) {
  if (text.substr(0, 3) == "\xEF\xBB\xBF") text.remove_prefix(3);
  if (auto refused = refuse_before_parsing(text, source)) {
    problems.push_back(std::move(*refused));
    return {};
  }
  tree_builder builder(source, problems);
  try {
    memory_buffer buffer(text);
    std::istream stream(&buffer);
    YAML::Parser parser(stream);
    // Twice and no more: the second call is how a second document shows itself, and on some texts
    // ("{},") yaml-cpp 0.7 returns documents for ever.
    if (parser.HandleNextDocument(builder)) parser.HandleNextDocument(builder);
    return builder.take_root();
  } catch (const stop_reading&) {
  } catch (const YAML::Exception& e) {
    problems.push_back(
        {{source, std::max(e.mark.line, 0), std::max(e.mark.column, 0)},
         "E001",
         {},
         fmt::format("not YAML: {}", printable(e.msg)),
         "check the colon, quotes, brackets and indentation here and in the line above"});
  } catch (const std::exception& e) {
    problems.push_back({{source, 0, 0}, "E001", {}, fmt::format("not YAML: {}", e.what()), ""});
  }
  return {};
}

std::string put(yaml_node& root, std::string_view path, yaml_node value, yaml_place place) {
  yaml_node* n = &root;
  std::string walked;
  while (true) {
    const std::size_t dot = std::min(path.find('.'), path.size());
    const std::string key(path.substr(0, dot));
    const bool is_last = dot == path.size();
    if (key.empty()) return "the path has an empty part";
    yaml_node* next = nullptr;
    if (n->is == yaml_node::shape::empty) {
      n->is = yaml_node::shape::map;
      n->place = place;
    }
    if (n->is == yaml_node::shape::list) {
      const auto index = parse_count(key);
      if (!index || *index < 0 || *index >= static_cast<std::int64_t>(n->items.size()))
        return fmt::format("{} is a list of {}; {} is not an index of it", walked, n->items.size(),
                           quoted(key));
      next = &n->items[static_cast<std::size_t>(*index)];
    } else if (n->is == yaml_node::shape::map) {
      for (std::size_t i = 0; i < n->keys.size(); ++i)
        if (n->keys[i] == key) {
          next = &n->items[i];
          if (is_last) n->key_places[i] = place;
        }
      if (!next) {
        n->keys.push_back(key);
        n->key_places.push_back(place);
        n->items.emplace_back();
        n->items.back().place = place;
        next = &n->items.back();
      }
    } else {
      return fmt::format("{} is a single value and has no key {}", quoted(walked), quoted(key));
    }
    if (is_last) {
      *next = std::move(value);
      return {};
    }
    n = next;
    walked += walked.empty() ? key : "." + key;
    path.remove_prefix(dot + 1);
  }
}

}  // namespace stagecoach
