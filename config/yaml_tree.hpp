// YAML text to a plain tree in which every key and value knows its place. The only file that sees
// yaml-cpp.
//
// Built from yaml-cpp's events and not from YAML::Node: events show duplicate keys, aliases, tags
// and places, which Node hides or loses (a read through a missing key throws without a position),
// and the depth is checked while parsing, before a deep text can cost a deep stack. Throws nothing.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace stagecoach {

/// Zero-based line and byte column. source: 0 is the file, n is the n-th override.
struct yaml_place {
  int source = 0;
  int line = 0;
  int column = 0;
};

struct yaml_node {
  enum class shape { empty, text, list, map };
  shape is = shape::empty;
  yaml_place place;
  std::string text;                    // of a scalar, as written (after unquoting)
  std::vector<yaml_node> items;        // of a list; of a map: the values
  std::vector<std::string> keys;       // of a map, in file order, each once
  std::vector<yaml_place> key_places;  // of a map
};

struct yaml_problem {
  yaml_place place;
  std::string code;  // E001, E003, E008, E009
  std::string path;
  std::string message;
  std::string fix;
};

/// The one document in text. On a syntax error the root is empty and problems say why; duplicate
/// keys are problems too, but the tree keeps the first and goes on. Refused: more than
/// limits::spec_bytes_max bytes, deeper than limits::spec_depth_max, bytes that are not UTF-8 text,
/// control characters, anchors, aliases, tags, several documents.
yaml_node read_yaml_tree(std::string_view text, int source, std::vector<yaml_problem>& problems);

/// Value of a key of a map; nullptr if it isn't a map or has no such key.
const yaml_node* child(const yaml_node& map, std::string_view key);

/// Puts a value at a dotted path of keys and list indices, making the maps on the way; what was
/// there is replaced. Returns what is wrong with the path, empty on success.
std::string put(yaml_node& root, std::string_view path, yaml_node value, yaml_place place);

}  // namespace stagecoach
