#include "config/job_spec_values.hpp"

#include <fmt/format.h>

#include "config/limits.hpp"
#include "config/suggest.hpp"

namespace stagecoach {

using shape = yaml_node::shape;

namespace {

/// Words that other trainers use for ours; edit distance can't know them.
const char* our_word_for(std::string_view key) {
  static constexpr std::pair<std::string_view, const char*> table[] = {
      {"num_layers", "n_layer"},
      {"layers", "n_layer"},
      {"hidden_size", "d_model"},
      {"n_embd", "d_model"},
      {"num_attention_heads", "n_head"},
      {"heads", "n_head"},
      {"ffn_hidden_size", "d_ff"},
      {"n_inner", "d_ff"},
      {"seq_length", "context"},
      {"n_positions", "context"},
      {"n_ctx", "context"},
      {"block_size", "context"},
      {"micro_batch_size", "micro"},
      {"global_batch_size", "global"},
      {"learning_rate", "lr"},
      {"min_learning_rate", "min_lr"},
      {"clip_grad", "grad_clip"},
      {"warmup_steps", "warmup"},
      {"decay_steps", "decay"},
      {"seed", "shuffle_seed"},
      {"max_steps", "steps"},
      {"pipeline", "stages"},
      {"data_parallel", "replicas"},
      {"on_failure", "on_loss"},
      {"type", "format"},
      {"file", "path"},
      {"validation", "valid"},
      {"resume", "init"},
  };
  for (const auto& [theirs, ours] : table)
    if (theirs == key) return ours;
  return nullptr;
}

}  // namespace

const char* shape_name(yaml_node::shape s) {
  switch (s) {
    case shape::empty:
      return "nothing";
    case shape::text:
      return "a single value";
    case shape::list:
      return "a list";
    case shape::map:
      return "a map";
  }
  return "";
}

std::string dotted(const std::string& path, std::string_view key) {
  return path.empty() ? std::string(key) : fmt::format("{}.{}", path, key);
}

std::string any_of(const std::vector<std::string>& words) {
  std::string out;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (i > 0) out += i + 1 == words.size() ? " or " : ", ";
    out += words[i];
  }
  return out;
}

const yaml_node* value_reader::at(std::string_view path) const {
  const yaml_node* n = &root_;
  while (n && !path.empty()) {
    const std::size_t dot = std::min(path.find('.'), path.size());
    n = child(*n, path.substr(0, dot));
    path.remove_prefix(std::min(dot + 1, path.size()));
  }
  return n;
}

yaml_place value_reader::place_of(std::initializer_list<const char*> paths) const {
  yaml_place longest = root_.place;
  bool is_first = true;
  for (std::string_view path : paths) {
    const yaml_node* at = &root_;
    yaml_place place = root_.place;
    while (at && !path.empty()) {
      const std::size_t dot = std::min(path.find('.'), path.size());
      const std::string_view key = path.substr(0, dot);
      path.remove_prefix(std::min(dot + 1, path.size()));
      const yaml_node* parent = at;
      at = child(*parent, key);
      if (!at) break;
      // A map's own place is its first key; the reader looks for the name of the section.
      for (std::size_t i = 0; i < parent->keys.size(); ++i)
        if (parent->keys[i] == key)
          place = at->is == shape::text ? at->place : parent->key_places[i];
    }
    if (at) return place;
    if (is_first) longest = place;
    is_first = false;
  }
  return longest;
}

section value_reader::open(section& parent, const char* key) {
  const yaml_node* n = parent.find(key);
  // `resources:` with everything under it commented out is an empty section.
  if (!n || n->is == shape::empty) return {nullptr, parent.path_of(key), parent.place()};
  const yaml_place place = parent.key_place(key);
  if (n->is != shape::map) {
    report(n->place, "E006", parent.path_of(key),
           fmt::format("{} is {}; expected a map of keys", parent.path_of(key), shape_name(n->is)),
           fmt::format("write  {}:  and its keys indented below", key));
    return {nullptr, parent.path_of(key), place};
  }
  return {n, parent.path_of(key), place};
}

section value_reader::open_node(const yaml_node& n, const std::string& path) {
  return {&n, path, n.place};
}

void value_reader::finish(const section& s) {
  if (!s.is_present()) return;
  const std::vector<std::string> known(s.known().begin(), s.known().end());
  for (std::size_t i = 0; i < s.node()->keys.size(); ++i) {
    const std::string& key = s.node()->keys[i];
    if (s.knows(key)) continue;
    if (problems_.size() > spec_problem_count_max) return;
    std::optional<std::string> meant;
    if (const char* ours = our_word_for(key); ours && s.known().count(ours)) meant = ours;
    if (!meant) meant = nearest(key, known);
    const std::string where = s.path().empty() ? "" : fmt::format(" in {}", s.path());
    if (meant)
      report(s.node()->key_places[i], "E002", s.path_of(key),
             fmt::format("unknown key {}{}; did you mean \"{}\"?", quoted(key), where, *meant), "");
    else
      report(s.node()->key_places[i], "E002", s.path_of(key),
             fmt::format("unknown key {}{}", quoted(key), where),
             fmt::format("keys here: {}", joined(known)));
  }
}

bool value_reader::is_text(const yaml_node& n, const std::string& path) {
  if (n.is == shape::text) return true;
  if (n.is == shape::empty)
    report(n.place, "E006", path, fmt::format("{} has no value", path),
           "give it one, or remove it");
  else
    report(n.place, "E006", path,
           fmt::format("{} is {}; expected a single value", path, shape_name(n.is)), "");
  return false;
}

const yaml_node* value_reader::find_text(section& s, const char* key) {
  const yaml_node* n = s.find(key);
  return n && is_text(*n, s.path_of(key)) ? n : nullptr;
}

void value_reader::require(const section& s, const char* key, const char* example) {
  if (s.is_present() && child(*s.node(), key)) return;
  if (has_problem_at(s.path()) && !s.path().empty()) return;  // the section itself is wrong
  report(s.place(), "E005", s.path_of(key), fmt::format("{} is missing", s.path_of(key)),
         fmt::format("add  {}", example));
}

void value_reader::read_integer(section& s, const char* key, std::int64_t& out, std::int64_t least,
                                std::int64_t most) {
  const yaml_node* n = find_text(s, key);
  if (!n) return;
  const auto count = parse_count(n->text);
  if (!count) return report(n->place, "E007", s.path_of(key), count.err());
  if (*count < least || *count > most)
    return report(n->place, "E102", s.path_of(key),
                  fmt::format("{} {} is out of range", s.path_of(key), *count),
                  fmt::format("{} to {}", least, most));
  out = *count;
}

void value_reader::read_seed(section& s, const char* key, std::uint64_t& out) {
  const yaml_node* n = find_text(s, key);
  if (!n) return;
  // Any 64 bits are a seed; parse_count stops at 63.
  std::uint64_t seed = 0;
  bool is_plain = !n->text.empty() && (n->text == "0" || n->text[0] != '0');
  for (const char c : n->text) {
    is_plain = is_plain && c >= '0' && c <= '9' && !__builtin_mul_overflow(seed, 10u, &seed) &&
               !__builtin_add_overflow(seed, static_cast<unsigned>(c - '0'), &seed);
    if (!is_plain) break;
  }
  if (!is_plain)
    return report(n->place, "E007", s.path_of(key),
                  fmt::format("{} {} is not a seed", s.path_of(key), quoted(n->text)),
                  "write a whole number from 0 to 18446744073709551615, digits only");
  out = seed;
}

std::optional<double> value_reader::real_of(const yaml_node& n, const std::string& path,
                                            double least, double most, bool is_least_allowed) {
  const auto value = parse_real(n.text);
  if (!value) {
    report(n.place, "E007", path, value.err());
    return std::nullopt;
  }
  if (*value < least || (*value == least && !is_least_allowed) || *value > most) {
    report(
        n.place, "E102", path, fmt::format("{} {} is out of range", path, *value),
        fmt::format("{} {}, at most {}", is_least_allowed ? "at least" : "more than", least, most));
    return std::nullopt;
  }
  return *value + 0.0;  // -0 is 0
}

void value_reader::read_real(section& s, const char* key, double& out, double least, double most,
                             bool is_least_allowed) {
  const yaml_node* n = find_text(s, key);
  if (!n) return;
  if (const auto value = real_of(*n, s.path_of(key), least, most, is_least_allowed)) out = *value;
}

void value_reader::read_choice(section& s, const char* key, std::string& out,
                               const std::vector<std::string>& choices,
                               const std::vector<std::string>& later) {
  const yaml_node* n = find_text(s, key);
  if (!n) return;
  if (std::find(choices.begin(), choices.end(), n->text) != choices.end()) {
    out = n->text;
    return;
  }
  const std::string path = s.path_of(key);
  if (std::find(later.begin(), later.end(), n->text) != later.end())
    return report(n->place, "E004", path, fmt::format("{} {} {}", path, n->text, not_now),
                  fmt::format("use {}: {}", key, any_of(choices)));
  const auto meant = nearest(n->text, choices);
  report(n->place, "E007", path,
         fmt::format("{} {} is unknown{}", path, quoted(n->text),
                     meant ? fmt::format("; did you mean \"{}\"?", *meant) : ""),
         fmt::format("use {}: {}", key, any_of(choices)));
}

std::optional<bool> value_reader::read_bool(section& s, const char* key) {
  const yaml_node* n = find_text(s, key);
  if (!n) return std::nullopt;
  if (n->text == "true") return true;
  if (n->text == "false") return false;
  report(n->place, "E007", s.path_of(key),
         fmt::format("{} {} is neither true nor false", s.path_of(key), quoted(n->text)),
         "write true or false");
  return std::nullopt;
}

bool value_reader::is_path(const yaml_node& n, const std::string& path) {
  if (n.text.empty() || n.text.size() > spec_path_bytes_max) {
    report(n.place, "E007", path, fmt::format("{} has {} bytes", path, n.text.size()),
           fmt::format("1 to {} bytes", spec_path_bytes_max));
    return false;
  }
  if (n.text.find('*') != std::string::npos || n.text.find("${") != std::string::npos) {
    report(n.place, "E004", path,
           fmt::format("{}: a pattern or variable in a path {}: {}", path, not_now, quoted(n.text)),
           "write out the name of each file");
    return false;
  }
  return true;
}

void value_reader::read_path(section& s, const char* key, std::string& out) {
  const yaml_node* n = find_text(s, key);
  if (n && is_path(*n, s.path_of(key))) out = n->text;
}

void value_reader::read_hash(section& s, const char* key, std::string& out) {
  const yaml_node* n = find_text(s, key);
  if (!n) return;
  const bool is_hash =
      n->text.size() == 32 && n->text.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!is_hash)
    return report(n->place, "E007", s.path_of(key),
                  fmt::format("{} {} is not a hash", s.path_of(key), quoted(n->text)),
                  "XXH3-128 as 32 lower-case hex digits; or leave it out, submit fills it in");
  out = n->text;
}

std::optional<quantity> value_reader::quantity_of(const yaml_node& n, const std::string& path,
                                                  const char* bare_unit,
                                                  const std::vector<std::string>& units) {
  auto q = parse_quantity(n.text);
  if (!q) {
    report(n.place, "E007", path, q.err());
    return std::nullopt;
  }
  if (q->unit.empty()) q->unit = bare_unit;
  if (std::find(units.begin(), units.end(), q->unit) == units.end()) {
    report(n.place, "E007", path, fmt::format("{} has the unit {}", path, quoted(q->unit)),
           fmt::format("a number of {}", any_of(units)));
    return std::nullopt;
  }
  if (q->count < 0) {
    report(n.place, "E102", path, fmt::format("{} {} is out of range", path, q->count),
           "0 or more");
    return std::nullopt;
  }
  return *q;
}

std::optional<quantity> value_reader::read_quantity(section& s, const char* key,
                                                    const char* bare_unit,
                                                    const std::vector<std::string>& units) {
  const yaml_node* n = find_text(s, key);
  if (!n) return std::nullopt;
  return quantity_of(*n, s.path_of(key), bare_unit, units);
}

std::optional<std::int64_t> value_reader::steps_of(const yaml_node& n, const std::string& path,
                                                   std::int64_t least) {
  const auto q = quantity_of(n, path, "steps", {"steps", "tokens"});
  if (!q) return std::nullopt;
  std::int64_t steps = q->count;
  if (q->unit == "tokens") {
    if (step_tokens_ == 0) return std::nullopt;  // the batch is wrong, which is said there
    steps = q->count / step_tokens_;
  }
  if (steps < least || steps > limits::step_count_max) {
    report(n.place, "E102", path,
           q->unit == "tokens" ? fmt::format("{} {} tokens is {} steps of {} tokens, out of range",
                                             path, format_grouped(q->count), format_grouped(steps),
                                             format_grouped(step_tokens_))
                               : fmt::format("{} {} is out of range", path, q->count),
           fmt::format("{} to {} steps", least, limits::step_count_max));
    return std::nullopt;
  }
  return steps;
}

void value_reader::read_steps(section& s, const char* key, std::int64_t& out, std::int64_t least) {
  const yaml_node* n = find_text(s, key);
  if (!n) return;
  if (const auto steps = steps_of(*n, s.path_of(key), least)) out = *steps;
}

void value_reader::refuse(section& s, const char* key, const std::vector<std::string>& neutral,
                          const std::string& fix) {
  const yaml_node* n = s.find_quietly(key);
  if (!n) return;
  if (n->is == shape::text && std::find(neutral.begin(), neutral.end(), n->text) != neutral.end())
    return;
  const std::string path = s.path_of(key);
  const std::string value = n->is == shape::text ? " " + quoted(n->text) : "";
  report(n->is == shape::text ? n->place : s.key_place(key), "E004", path,
         fmt::format("{}{} {}", path, value, not_now), fix);
}

}  // namespace stagecoach
