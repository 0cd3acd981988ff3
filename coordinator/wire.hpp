// Messages and records as JSON text, over the field lists of coordinator/messages.hpp.
//
// Text from outside is bounded before it is parsed (size, depth) and checked while it is read
// (ranges of enums, lengths of lists). Unknown fields are ignored, missing ones keep their default.
// u64 and ids are JSON numbers; a double that must keep its bits is the hex text of its pattern
// ("3ff0000000000000"). nlohmann's text parser does not recurse; its binary ones do, so they are
// not used (DESIGN 3).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "config/limits.hpp"
#include "config/result.hpp"
#include "coordinator/messages.hpp"
#include "coordinator/records.hpp"

namespace stagecoach {

/// {"type": "commit", ...fields}
std::string encode(const to_worker& message);
std::string encode(const to_coordinator& message);

/// Fails: too_large (over limits::control_message_bytes_max), bad_input (says what and where).
result<to_worker> decode_to_worker(std::string_view text);
result<to_coordinator> decode_to_coordinator(std::string_view text);

/// "commit"; the name a message has on the wire, for logs.
const char* type_name(const to_worker& message);
const char* type_name(const to_coordinator& message);

/// Any struct of the lists below; no "type" field. Instantiated in wire.cpp for: job_spec, plan,
/// layout, part_record, step_report, vote_result, hello, and every record of records.hpp. For
/// another struct with a visit_fields include coordinator/wire_fields.hpp, which is heavy
/// (nlohmann).
template <class T>
std::string to_json_text(const T& from);
/// Fails: too_large (over bytes_max), bad_input.
template <class T>
result<T> from_json_text(std::string_view text,
                         std::size_t bytes_max = limits::control_message_bytes_max);

}  // namespace stagecoach
