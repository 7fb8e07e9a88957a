#include "core/log.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include "core/error.h"

namespace moraine::core::log {

namespace {

std::optional<Level> level_named(std::string_view name) {
  if (name == "debug") return Level::kDebug;
  if (name == "info") return Level::kInfo;
  if (name == "warn") return Level::kWarn;
  if (name == "error") return Level::kError;
  return std::nullopt;
}

spdlog::level::level_enum to_spdlog(Level level) {
  switch (level) {
    case Level::kDebug:
      return spdlog::level::debug;
    case Level::kInfo:
      return spdlog::level::info;
    case Level::kWarn:
      return spdlog::level::warn;
    case Level::kError:
      break;
  }
  return spdlog::level::err;
}

std::string pattern(const std::string& origin) {
  std::string escaped;  // '%' starts a pattern flag
  for (char c : origin) escaped += c == '%' ? std::string("%%") : std::string(1, c);
  return "%Y-%m-%d %H:%M:%S.%e %^%-5!l%$ " + (escaped.empty() ? "" : escaped + " ") + "%v";
}

// The logger and the status line below it, which share the terminal.
struct Terminal {
  Terminal() : logger("moraine", std::make_shared<spdlog::sinks::stderr_color_sink_mt>()) {
    const char* name = std::getenv("MORAINE_LOG");
    logger.set_pattern(pattern(""));
    logger.set_level(to_spdlog(level_named(name ? name : "").value_or(Level::kInfo)));
  }
  void erase_status() const {
    if (!status.empty()) std::fputs("\r\x1b[K", stderr);
  }
  void draw_status() const {
    if (!status.empty()) std::fputs(status.c_str(), stderr);
    std::fflush(stderr);
  }

  std::mutex mutex;
  spdlog::logger logger;
  std::string status;
};

Terminal& terminal() {
  static auto* instance = new Terminal;  // never destroyed: destructors of statics may still log
  return *instance;
}

}  // namespace

Level level_from_environment(Level fallback) {
  const char* name = std::getenv("MORAINE_LOG");
  if (name == nullptr || *name == '\0') return fallback;
  if (const auto level = level_named(name)) return *level;
  throw UserError(fmt::format("environment MORAINE_LOG: no such log level: {}", name),
                  "valid: debug, error, info, warn");
}

void configure(Level level, std::string origin) {
  auto& out = terminal();
  const std::lock_guard lock(out.mutex);
  out.logger.set_pattern(pattern(origin));
  out.logger.set_level(to_spdlog(level));
}

void write(Level level, std::string_view line) {
  auto& out = terminal();
  const std::lock_guard lock(out.mutex);
  out.erase_status();
  out.logger.log(to_spdlog(level), spdlog::string_view_t(line.data(), line.size()));
  out.draw_status();
}

bool enabled(Level level) { return terminal().logger.should_log(to_spdlog(level)); }

void set_status(std::string line) {
  auto& out = terminal();
  const std::lock_guard lock(out.mutex);
  out.erase_status();
  out.status = std::move(line);
  out.draw_status();
}

}  // namespace moraine::core::log
