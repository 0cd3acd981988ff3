// Tables as kubectl's users know them: one row per object, no spaces inside values, upper-case
// heads, or JSON, YAML, CSV, names.
#pragma once

#include <nlohmann/json.hpp>

#include <functional>

#include <string>
#include <vector>

#include "tools/command.hpp"

namespace stagecoach {

struct column {
  std::string head;
  std::string key;       // of the row's JSON object; for csv too
  bool is_wide = false;  // only with -o wide and csv
};

/// rows: array of objects. cells: text per row and column where JSON's own form is not for people
/// (empty: take it).
void print_table(
    const global_flags& flags, const std::vector<column>& columns, const nlohmann::json& rows,
    const std::function<std::string(const nlohmann::json& row, const std::string& key)>& cell);

/// One object: JSON or YAML as asked. False: the caller prints its own words.
bool print_object(const global_flags& flags, const nlohmann::json& object);

/// A JSON value in a table: "-" for null and missing.
std::string plain(const nlohmann::json& row, const std::string& key);

/// "4s", "12m", "2h31m", "3d" since a Unix time in ms.
std::string age_since(std::int64_t unix_ms);

}  // namespace stagecoach
