// Field lists to JSON and back: the templates behind coordinator/wire.hpp.
//
// Heavy (nlohmann-json); include it only where a struct that wire.cpp does not know must be read or
// written.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "config/limits.hpp"
#include "config/result.hpp"
#include "coordinator/messages.hpp"
#include "coordinator/records.hpp"

namespace stagecoach::wire {

// A list in a message: 12,291 tensors is the largest model's; parts, members and steps are fewer.
inline constexpr std::size_t list_count_max = 1 << 17;
inline constexpr std::size_t map_count_max = 1 << 12;

/// Values of an enum that a message may carry: [0, count). Ids are enums without a bound.
template <class E>
inline constexpr std::uint64_t enum_count = std::numeric_limits<std::uint64_t>::max();
template <>
inline constexpr std::uint64_t enum_count<source_kind> = 3;
template <>
inline constexpr std::uint64_t enum_count<job_state> = job_state_count;

// ---- writing ----
// ---------------------------------------------------------------------------------------- All
// declared first: the writer below must see every one, whatever namespace a field's type is from.
template <class T>
nlohmann::json to_json_value(const T& x);
template <class T>
nlohmann::json to_json_value(const std::vector<T>& list);
template <class T>
nlohmann::json to_json_value(const std::map<std::string, T>& map);
template <class T>
nlohmann::json to_json_value(const std::optional<T>& x);
inline nlohmann::json to_json_value(const exact_double& x);

struct object_writer {
  nlohmann::json& to;
  template <class T>
  void operator()(const char* name, const T& field) {
    to[name] = to_json_value(field);
  }
};

template <class T>
nlohmann::json to_json_value(const std::vector<T>& list) {
  nlohmann::json to = nlohmann::json::array();
  for (const T& x : list) to.push_back(to_json_value(x));
  return to;
}
template <class T>
nlohmann::json to_json_value(const std::map<std::string, T>& map) {
  nlohmann::json to = nlohmann::json::object();
  for (const auto& [key, x] : map) to[key] = to_json_value(x);
  return to;
}
template <class T>
nlohmann::json to_json_value(const std::optional<T>& x) {
  return x ? to_json_value(*x) : nlohmann::json(nullptr);
}
inline nlohmann::json to_json_value(const exact_double& x) {
  return fmt::format("{:016x}", x.bits);
}

template <class T>
nlohmann::json to_json_value(const T& x) {
  if constexpr (std::is_enum_v<T>) {
    return static_cast<std::underlying_type_t<T>>(x);
  } else if constexpr (std::is_arithmetic_v<T> || std::is_same_v<T, std::string>) {
    return x;
  } else {
    nlohmann::json to = nlohmann::json::object();
    visit_fields(object_writer{to}, x);
    return to;
  }
}

// ---- reading ----
/// Reads fields; keeps the first problem and where it was.
struct object_reader {
  const nlohmann::json& from;
  std::string where;
  std::string& problem;

  template <class T>
  void operator()(const char* name, T& field) {
    if (!problem.empty()) return;
    const auto found = from.find(name);
    if (found == from.end() || found->is_discarded()) return;
    read(*found, field, where.empty() ? name : where + "." + name);
  }

  void refuse(const std::string& place, const std::string& expected, const nlohmann::json& found) {
    problem = fmt::format("{}: expected {}, found {}", place, expected, found.type_name());
  }

  template <class T>
  void read(const nlohmann::json& j, std::vector<T>& list, const std::string& place) {
    if (!j.is_array()) return refuse(place, "a list", j);
    if (j.size() > list_count_max) {
      problem = fmt::format("{}: {} entries; the limit is {}", place, j.size(), list_count_max);
      return;
    }
    list.clear();
    list.reserve(j.size());
    for (const nlohmann::json& entry : j) {
      T x{};
      read(entry, x, place + "[]");
      if (!problem.empty()) return;
      list.push_back(std::move(x));
    }
  }
  template <class T>
  void read(const nlohmann::json& j, std::map<std::string, T>& map, const std::string& place) {
    if (!j.is_object()) return refuse(place, "an object", j);
    if (j.size() > map_count_max) {
      problem = fmt::format("{}: {} entries; the limit is {}", place, j.size(), map_count_max);
      return;
    }
    map.clear();
    for (const auto& entry : j.items()) {
      read(entry.value(), map[entry.key()], place + "." + entry.key());
      if (!problem.empty()) return;
    }
  }
  template <class T>
  void read(const nlohmann::json& j, std::optional<T>& x, const std::string& place) {
    if (j.is_null()) {
      x.reset();
      return;
    }
    T inner{};
    read(j, inner, place);
    if (problem.empty()) x = std::move(inner);
  }
  void read(const nlohmann::json& j, exact_double& x, const std::string& place) {
    if (!j.is_string()) return refuse(place, "16 hex digits of a double", j);
    const std::string& text = j.get_ref<const std::string&>();
    std::uint64_t bits = 0;
    for (const char c : text) {
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
      if (digit < 0 || text.size() != 16) return refuse(place, "16 hex digits of a double", j);
      bits = bits << 4 | static_cast<std::uint64_t>(digit);
    }
    if (text.size() != 16) return refuse(place, "16 hex digits of a double", j);
    x.bits = bits;
  }
  template <class T>
  void read(const nlohmann::json& j, T& x, const std::string& place) {
    if constexpr (std::is_same_v<T, bool>) {
      if (!j.is_boolean()) return refuse(place, "true or false", j);
      x = j.get<bool>();
    } else if constexpr (std::is_same_v<T, std::string>) {
      if (!j.is_string()) return refuse(place, "a text", j);
      x = j.get_ref<const std::string&>();
    } else if constexpr (std::is_floating_point_v<T>) {
      if (!j.is_number()) return refuse(place, "a number", j);
      x = j.get<T>();
    } else if constexpr (std::is_enum_v<T>) {
      std::underlying_type_t<T> number{};
      read(j, number, place);
      if (!problem.empty()) return;
      if (static_cast<std::uint64_t>(number) >= enum_count<T>) {
        problem =
            fmt::format("{}: {} is not one of the {} known values", place, number, enum_count<T>);
        return;
      }
      x = static_cast<T>(number);
    } else if constexpr (std::is_integral_v<T>) {
      if (!j.is_number_integer()) return refuse(place, "a whole number", j);
      // Unsigned and signed texts are kept apart by the parser; both are checked against T's range.
      const bool fits = j.is_number_unsigned() ? std::in_range<T>(j.get<std::uint64_t>())
                                               : std::in_range<T>(j.get<std::int64_t>());
      if (!fits) {
        problem = fmt::format("{}: {} is out of range [{}, {}]", place, j.dump(),
                              std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
        return;
      }
      x = j.get<T>();
    } else {
      if (!j.is_object()) return refuse(place, "an object", j);
      visit_fields(object_reader{j, place, problem}, x);
    }
  }
};

/// Size and depth are checked before and while parsing.
inline result<nlohmann::json> parse_bounded(std::string_view text, std::size_t bytes_max) {
  if (text.size() > bytes_max) {
    return make_error(errc::too_large, "message of {} bytes; the limit is {}", text.size(),
                      bytes_max);
  }
  bool is_too_deep = false;
  const auto watch = [&is_too_deep](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    is_too_deep = is_too_deep || depth > limits::json_depth_max;
    return !is_too_deep;  // discards; the parser goes on without keeping anything
  };
  try {
    nlohmann::json j = nlohmann::json::parse(text.begin(), text.end(), watch);
    if (is_too_deep) {
      return make_error(errc::bad_input, "JSON nested deeper than {}", limits::json_depth_max);
    }
    if (!j.is_object()) {
      return make_error(errc::bad_input, "expected a JSON object, found {}", j.type_name());
    }
    return j;
  } catch (const nlohmann::json::exception& e) {
    return make_error(errc::bad_input, "not JSON: {}", e.what());
  }
}

template <class T>
result<T> from_json_value(const nlohmann::json& j) {
  T x{};
  std::string problem;
  visit_fields(object_reader{j, "", problem}, x);
  if (!problem.empty()) return make_error(errc::bad_input, "{}", problem);
  return x;
}

/// Text that is not UTF-8 (a worker's message about a file name) is mended, not thrown.
inline std::string dump(const nlohmann::json& j) {
  return j.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace stagecoach::wire
