#include "config/log.hpp"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>

namespace stagecoach {
namespace {

std::shared_ptr<spdlog::logger>& logger() {
  static auto instance = [] {
    auto made = std::make_shared<spdlog::logger>("stagecoach",
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%eZ %v", spdlog::pattern_time_type::utc);
    made->flush_on(spdlog::level::info);
    return made;
  }();
  return instance;
}

spdlog::level::level_enum translate(level severity) {
  switch (severity) {
    case level::debug:
      return spdlog::level::debug;
    case level::info:
      return spdlog::level::info;
    case level::warn:
      return spdlog::level::warn;
    case level::error:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

constexpr const char* names[] = {"debug", "info", "warn", "error"};

void append_value(std::string& line, std::string_view text) {
  const bool plain = !text.empty() && text.find_first_of(" \"=\n\r\t") == std::string_view::npos;
  if (plain) {
    line.append(text);
    return;
  }
  line.push_back('"');
  for (char c : text) {
    if (c == '"' || c == '\\') line.push_back('\\');
    if (c == '\n') {
      line.append("\\n");
    } else if (static_cast<unsigned char>(c) >= 0x20) {
      line.push_back(c);
    }
  }
  line.push_back('"');
}

}  // namespace

void log_event(level severity, std::string_view event, std::initializer_list<log_field> fields) {
  if (!logger()->should_log(translate(severity))) return;
  std::string line = fmt::format("level={} event={}", names[static_cast<int>(severity)], event);
  for (const log_field& field : fields) {
    line.push_back(' ');
    line.append(field.key);
    line.push_back('=');
    append_value(line, field.text);
  }
  logger()->log(translate(severity), "{}", line);
}

void configure_log(level least, const std::string& file) {
  if (!file.empty()) {
    auto made = std::make_shared<spdlog::logger>(
        "stagecoach", std::make_shared<spdlog::sinks::basic_file_sink_mt>(file));
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%eZ %v", spdlog::pattern_time_type::utc);
    made->flush_on(spdlog::level::info);
    logger() = made;
  }
  logger()->set_level(translate(least));
}

}  // namespace stagecoach
