// Errors as values, and the invariant that stays on in release.
//
// Exceptions do not cross a room. The world's and the user's errors are `error` values inside a
// `result<T>`; our own mistakes stop the process through `invariant`.
#pragma once

#include <fmt/format.h>

#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace stagecoach {

/// What a caller may act on. A new one is added only if some caller would act differently on it.
enum class errc {
  unexpected,    // a bug or a library's unexplained failure
  usage,         // unknown flag or argument
  bad_spec,      // job file or input file is wrong
  bad_input,     // bytes from outside (network, file) that break their format's rules
  not_found,     // no such job, worker, checkpoint, file
  corrupt,       // checksum, size or structure differs from what was written
  conflict,      // wrong state for this, name taken, stale generation
  unplaceable,   // valid, but can't be placed now
  timed_out,     //
  unreachable,   // the peer refused or did not answer
  unauthorised,  // certificate, role or token does not allow it
  disk_full,     // ENOSPC, EDQUOT
  io,            // any other failure of disk or socket
  cancelled,     // the caller asked for it
  too_large,     // over a limit of config/limits.hpp
};

/// Name for logs and JSON: "bad_spec".
const char* to_string(errc code);

/// A message says what was found, what was expected, and the fix ("... fix: ...").
struct error {
  errc code = errc::unexpected;
  std::string message;
};

template <class T>
class [[nodiscard]] result {
 public:
  result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  result(error e) : state_(std::in_place_index<1>, std::move(e)) {}
  explicit operator bool() const { return state_.index() == 0; }
  bool has_value() const { return state_.index() == 0; }
  T& operator*() & { return std::get<0>(state_); }
  const T& operator*() const& { return std::get<0>(state_); }
  T&& operator*() && { return std::get<0>(std::move(state_)); }
  T* operator->() { return &std::get<0>(state_); }
  const T* operator->() const { return &std::get<0>(state_); }
  const error& err() const { return std::get<1>(state_); }

 private:
  std::variant<T, error> state_;
};

template <>
class [[nodiscard]] result<void> {
 public:
  result() = default;
  result(error e) : error_(std::move(e)) {}
  explicit operator bool() const { return !error_; }
  bool has_value() const { return !error_; }
  const error& err() const { return *error_; }

 private:
  std::optional<error> error_;
};

inline result<void> ok() { return {}; }

template <class... A>
error make_error(errc code, fmt::format_string<A...> format, A&&... args) {
  return {code, fmt::format(format, std::forward<A>(args)...)};
}

/// Prints the broken promise with its place and aborts. Stays on in release builds.
[[noreturn]] void invariant_failed(const char* condition, const char* promise, const char* file,
                                   int line);

}  // namespace stagecoach

#define invariant(condition, promise) \
  ((condition) ? void(0) : ::stagecoach::invariant_failed(#condition, promise, __FILE__, __LINE__))
