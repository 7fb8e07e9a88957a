#pragma once

#include <string>
#include <string_view>
#include <utility>

#include <fmt/format.h>

/// One event per line, `key=value`, units in the key (`_ms`, `_bytes`). Prefix: time, level, origin.
/// Thread-safe. Goes to stderr; metrics and tables do not go through the log.
///
///   log::info("round finished: round={} workers={} bytes={}", round, workers, bytes);
namespace moraine::core::log {

enum class Level { kDebug, kInfo, kWarn, kError };

/// The level named by MORAINE_LOG (debug | info | warn | error), or `fallback` when it is unset.
/// Throws UserError when it names no level.
Level level_from_environment(Level fallback = Level::kInfo);

/// `origin` is "host/coordinator", "host/worker3", ...; call once per process at start-up. Until then MORAINE_LOG
/// decides the level (info when unset or unknown) and lines carry no origin.
void configure(Level level, std::string origin);
void write(Level level, std::string_view line);
bool enabled(Level level);

/// Keeps one line at the bottom of the terminal, below the log lines; an empty line removes it. Used by Progress.
void set_status(std::string line);

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
  if (enabled(Level::kWarn)) write(Level::kWarn, fmt::format(text, std::forward<Args>(args)...));
}
template <typename... Args>
void error(fmt::format_string<Args...> text, Args&&... args) {
  write(Level::kError, fmt::format(text, std::forward<Args>(args)...));
}

}  // namespace moraine::core::log
