#include "core/log.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <optional>

#include <unistd.h>

#include "core/error.h"
#include "core/terminal.h"

namespace moraine::core::log {

namespace {

std::optional<Level> level_named(std::string_view name) {
  if (name == "debug") return Level::kDebug;
  if (name == "info") return Level::kInfo;
  if (name == "warn") return Level::kWarn;
  if (name == "error") return Level::kError;
  return std::nullopt;
}

struct LevelStyle {
  std::string_view name;  // as wide as the longest
  std::string_view color;
};
constexpr LevelStyle kStyles[] = {
    {"debug", "\x1b[36m"}, {"info ", "\x1b[32m"}, {"warn ", "\x1b[33m\x1b[1m"}, {"error", "\x1b[31m\x1b[1m"}};

// "2026-11-24 00:29:17.042", local time.
std::string time_text() {
  const auto now = std::chrono::system_clock::now();
  const auto since_epoch = std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  std::tm local{};
  localtime_r(&seconds, &local);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &local);
  return fmt::format("{}.{:03}", text, since_epoch % 1000);
}

// The log and the status line below it, which share the terminal.
struct Terminal {
  Terminal() {
    const char* name = std::getenv("MORAINE_LOG");
    level = level_named(name ? name : "").value_or(Level::kInfo);
  }
  void erase_status() const {
    if (!status.empty()) std::fputs("\r\x1b[K", stderr);
  }
  void draw_status() const {
    if (!status.empty()) std::fputs(status.c_str(), stderr);
    std::fflush(stderr);
  }

  std::mutex mutex;
  std::atomic<Level> level;
  std::string origin;
  std::string status;
  const bool colored = color_wanted(STDERR_FILENO);
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
  out.level = level;
  out.origin = origin.empty() ? "" : std::move(origin) + " ";
}

void write(Level level, std::string_view line) {
  if (!enabled(level)) return;
  auto& out = terminal();
  const auto [name, color] = kStyles[static_cast<size_t>(level)];
  const std::lock_guard lock(out.mutex);
  out.erase_status();
  const std::string text = fmt::format("{} {}{}{} {}{}\n", time_text(), out.colored ? color : "", name,
                                       out.colored ? "\x1b[m" : "", out.origin, line);
  std::fwrite(text.data(), 1, text.size(), stderr);
  out.draw_status();
}

bool enabled(Level level) { return level >= terminal().level; }

void set_status(std::string line) {
  auto& out = terminal();
  const std::lock_guard lock(out.mutex);
  out.erase_status();
  out.status = std::move(line);
  out.draw_status();
}

}  // namespace moraine::core::log
