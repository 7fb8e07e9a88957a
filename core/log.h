#pragma once

#include <string>
#include <string_view>

#include <fmt/format.h>

/// One event per line, `key=value`, units in the key (`_ms`, `_bytes`). Prefix: time, level, origin.
/// Thread-safe. Goes to stderr; metrics and tables do not go through the log.
namespace moraine::core::log {

enum class Level { kDebug, kInfo, kWarn, kError };

/// `origin` is "host/coordinator", "host/worker3", ...; call once per process at start-up.
void configure(Level level, std::string origin);
void write(Level level, std::string_view line);
bool enabled(Level level);

template <typename... Args>
void debug(fmt::format_string<Args...> text, Args&&... args) {
  if (enabled(Level::kDebug)) write(Level::kDebug, fmt::format(text, std::forward<Args>(args)...));
}
template <typename... Args>
void info(fmt::format_string<Args...> text, Args&&... args) {
  if (enabled(Level::kInfo)) write(Level::kInfo, fmt::format(text, std::forward<Args>(args)...));
}
template <typename... Args>
void warn(fmt::format_string<Args...> text, Args&&... args) {
  write(Level::kWarn, fmt::format(text, std::forward<Args>(args)...));
}
template <typename... Args>
void error(fmt::format_string<Args...> text, Args&&... args) {
  write(Level::kError, fmt::format(text, std::forward<Args>(args)...));
}

}  // namespace moraine::core::log
