// Reading typed values out of a YAML tree, with a problem for each that is wrong. Inside of
// config/job_spec_yaml.hpp; other rooms have no use for it.
//
// Knows numbers, units, choices and paths, and no section of the job file; those are in
// config/job_spec_sections.hpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/result.hpp"
#include "config/units.hpp"
#include "config/yaml_tree.hpp"

namespace stagecoach {

inline constexpr std::size_t spec_problem_count_max = 100;
inline constexpr std::size_t spec_path_bytes_max = 4096;  // PATH_MAX
inline constexpr const char* not_now = "is not supported in this version";

/// "a list", "a map", for messages.
const char* shape_name(yaml_node::shape s);

/// path.key; the key alone at the root.
std::string dotted(const std::string& path, std::string_view key);

/// "a, b or c"
std::string any_of(const std::vector<std::string>& words);

/// Reads one map and keeps the list of keys it was asked for, so that what is left is unknown and
/// the known ones are the candidates for a suggestion.
class section {
 public:
  section(const yaml_node* node, std::string path, yaml_place place)
      : node_(node), path_(std::move(path)), place_(place) {}

  /// The value, or nullptr where the key is absent.
  const yaml_node* find(const char* key) {
    known_.insert(key);
    return node_ ? child(*node_, key) : nullptr;
  }
  /// A key that is read but not suggested.
  const yaml_node* find_quietly(const char* key) {
    const yaml_node* value = node_ ? child(*node_, key) : nullptr;
    if (value) quiet_.insert(key);
    return value;
  }
  bool is_present() const { return node_ != nullptr; }
  const yaml_node* node() const { return node_; }
  const std::string& path() const { return path_; }
  yaml_place place() const { return place_; }
  std::string path_of(std::string_view key) const { return dotted(path_, key); }
  /// Where the key stands; the section's own place where it is absent.
  yaml_place key_place(std::string_view key) const {
    for (std::size_t i = 0; node_ && i < node_->keys.size(); ++i)
      if (node_->keys[i] == key) return node_->key_places[i];
    return place_;
  }
  const std::set<std::string>& known() const { return known_; }
  bool knows(const std::string& key) const { return known_.count(key) + quiet_.count(key) > 0; }

 private:
  const yaml_node* node_;
  std::string path_;
  yaml_place place_;
  std::set<std::string> known_;
  std::set<std::string> quiet_;
};

class value_reader {
 public:
  /// The tree must outlive the reader.
  explicit value_reader(const yaml_node& root) : root_(root) {}

  std::vector<yaml_problem> take_problems() { return std::move(problems_); }

 protected:
  // --- problems ---
  void report(yaml_place place, const char* code, std::string path, std::string message,
              std::string fix) {
    problems_.push_back({place, code, std::move(path), std::move(message), std::move(fix)});
  }
  /// A message of config/units.hpp, "what was found. fix: what to do", under a path.
  void report(yaml_place place, const char* code, std::string path, const error& e) {
    const std::size_t cut = e.message.find(". fix: ");
    std::string found = e.message.substr(0, cut);
    std::string fix = cut == std::string::npos ? "" : e.message.substr(cut + 7);
    std::string message = fmt::format("{}: {}", path, found);
    report(place, code, std::move(path), std::move(message), std::move(fix));
  }
  bool has_problem_at(const std::string& path) const {
    return std::any_of(problems_.begin(), problems_.end(),
                       [&path](const yaml_problem& p) { return p.path == path; });
  }
  /// The value at a dotted path of keys; nullptr if there is none.
  const yaml_node* at(std::string_view path) const;
  /// The place of the first of the paths that stands in the file; else of the longest part of the
  /// first that does.
  yaml_place place_of(std::initializer_list<const char*> paths) const;

  // --- one value ---
  section open(section& parent, const char* key);
  section open_node(const yaml_node& n, const std::string& path);
  void finish(const section& s);
  const yaml_node* find_text(section& s, const char* key);
  bool is_text(const yaml_node& n, const std::string& path);
  void require(const section& s, const char* key, const char* example);
  void read_integer(section& s, const char* key, std::int64_t& out, std::int64_t least,
                    std::int64_t most);
  void read_seed(section& s, const char* key, std::uint64_t& out);
  template <class T>
  void read_small(section& s, const char* key, T& out, std::int64_t least, std::int64_t most) {
    std::int64_t wide = out;
    read_integer(s, key, wide, least, most);
    out = static_cast<T>(wide);
  }
  void read_real(section& s, const char* key, double& out, double least, double most,
                 bool is_least_allowed);
  std::optional<double> real_of(const yaml_node& n, const std::string& path, double least,
                                double most, bool is_least_allowed);
  void read_choice(section& s, const char* key, std::string& out,
                   const std::vector<std::string>& choices,
                   const std::vector<std::string>& later = {});
  std::optional<bool> read_bool(section& s, const char* key);
  bool is_path(const yaml_node& n, const std::string& path);
  void read_path(section& s, const char* key, std::string& out);
  void read_hash(section& s, const char* key, std::string& out);
  std::optional<quantity> read_quantity(section& s, const char* key, const char* bare_unit,
                                        const std::vector<std::string>& units);
  std::optional<quantity> quantity_of(const yaml_node& n, const std::string& path,
                                      const char* bare_unit, const std::vector<std::string>& units);
  /// Steps or tokens, as steps; waits for the batch to be known.
  void read_steps(section& s, const char* key, std::int64_t& out, std::int64_t least);
  std::optional<std::int64_t> steps_of(const yaml_node& n, const std::string& path,
                                       std::int64_t least);
  /// A key that a later version reads; `neutral` values say that it is off and are accepted.
  void refuse(section& s, const char* key, const std::vector<std::string>& neutral,
              const std::string& fix);

  const yaml_node& root_;
  std::vector<yaml_problem> problems_;
  std::int64_t step_tokens_ = 0;  // tokens per step; 0 while unknown, because the batch is wrong
};

}  // namespace stagecoach
