#include "core/progress.h"

#include <algorithm>
#include <cmath>

#include <unistd.h>

#include <fmt/format.h>

#include "core/log.h"
#include "core/terminal.h"

namespace moraine::core {

namespace {

constexpr double kRedrawEvery = 0.1;  // seconds, on a terminal
constexpr double kLineEvery = 10.0;   // seconds, elsewhere
constexpr int kBarWidth = 24;

std::string duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  const auto total = static_cast<int64_t>(std::llround(seconds));
  if (total < 60) return fmt::format("{}s", total);
  if (total < 3600) return fmt::format("{}m{:02}s", total / 60, total % 60);
  return fmt::format("{}h{:02}m", total / 3600, total / 60 % 60);
}

std::string bar_line(double share, const std::string& eta, const std::string& running, size_t width) {
  const int filled = static_cast<int>(share * kBarWidth);
  std::string line = fmt::format("[{}{}] {:3.0f}%  ETA {}  {}", std::string(static_cast<size_t>(filled), '#'),
                                 std::string(static_cast<size_t>(kBarWidth - filled), '.'), 100 * share, eta, running);
  if (line.size() >= width) line.resize(width - 1);  // a wrapped line could not be redrawn in place
  return line;
}

}  // namespace

Progress::Progress(bool terminal, std::function<double()> now_s) : terminal_(terminal), now_s_(std::move(now_s)) {}

Progress::~Progress() { clear(); }

void Progress::update(double share, double eta_s, const std::string& running) {
  const double now = now_s_();
  if (!terminal_ && !drawn_at_) drawn_at_ = now;  // the first line comes after kLineEvery: short runs stay quiet
  if (drawn_at_ && now - *drawn_at_ < (terminal_ ? kRedrawEvery : kLineEvery)) return;
  drawn_at_ = now;
  share = share_ = std::clamp(share, share_, 1.0);
  const std::string eta = duration(eta_s);
  if (terminal_) {
    log::set_status(bar_line(share, eta, running, terminal_width(STDERR_FILENO, 80)));
  } else {
    log::info("progress: done_percent={:.0f} eta={} running={}", 100 * share, eta, running);
  }
}

void Progress::clear() {
  if (terminal_) log::set_status("");
}

}  // namespace moraine::core
