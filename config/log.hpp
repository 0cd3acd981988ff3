// One event, one line, key=value, units in keys; the same event name in code and in log.
//
//   log_event(level::info, "generation_started", {{"job", 7}, {"generation", 3}});
//   level=info event=generation_started job=7 generation=3
// Values with spaces or quotes are quoted. Safe from any thread.
#pragma once

#include <fmt/format.h>

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

namespace stagecoach {

enum class level { debug, info, warn, error };

struct log_field {
  template <class T>
  log_field(std::string_view key, const T& value) : key(key), text(fmt::format("{}", value)) {}
  std::string_view key;
  std::string text;
};

void log_event(level severity, std::string_view event,
               std::initializer_list<log_field> fields = {});

/// Lines below this severity are dropped; file empty = stderr. Call once from main.
void configure_log(level least, const std::string& file = {});

}  // namespace stagecoach
