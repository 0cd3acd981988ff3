// The word somebody probably meant: for unknown keys of a job file, commands and flags.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace stagecoach {

/// Edits (insert, delete, replace, swap of neighbours) that turn a into b. Case and '-' against '_'
/// cost nothing. Both are cut at 64 bytes, so that a hostile word costs no more than a long one.
int edit_distance(std::string_view a, std::string_view b);

/// The nearest candidate, the first of equals; none if more than a third of the word would change.
std::optional<std::string> nearest(std::string_view word,
                                   const std::vector<std::string>& candidates);

}  // namespace stagecoach
