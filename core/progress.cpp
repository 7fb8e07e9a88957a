#include "core/progress.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <sys/ioctl.h>
#include <unistd.h>

#include <fmt/format.h>

#include "core/log.h"

namespace moraine::core {

namespace {

constexpr double kRedrawEvery = 0.1;  // seconds, on a terminal
constexpr double kLineEvery = 10.0;   // seconds, elsewhere
constexpr int kBarWidth = 24;

size_t terminal_width() {
  winsize size{};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

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

struct Progress::State {
  bool terminal;
  std::function<double()> now_s;
  bool started = false;
  double drawn_at = -std::numeric_limits<double>::infinity();
};

Progress::Progress(bool terminal, std::function<double()> now_s)
    : state_(std::make_unique<State>(State{.terminal = terminal, .now_s = std::move(now_s)})) {}

Progress::~Progress() { clear(); }

void Progress::update(double share, double eta_s, const std::string& running) {
  auto& state = *state_;
  const double now = state.now_s();
  if (!state.started) {
    state.started = true;
    if (!state.terminal) state.drawn_at = now;  // the first line comes after kLineEvery: short runs stay quiet
  }
  if (now - state.drawn_at < (state.terminal ? kRedrawEvery : kLineEvery)) return;
  state.drawn_at = now;
  share = std::clamp(share, 0.0, 1.0);
  const std::string eta = duration(eta_s);
  if (state.terminal) {
    log::set_status(bar_line(share, eta, running, terminal_width()));
  } else {
    log::info("progress: done_percent={:.0f} eta={} running={}", 100 * share, eta, running);
  }
}

void Progress::clear() {
  if (state_->terminal) log::set_status("");
  state_->drawn_at = state_->terminal ? -std::numeric_limits<double>::infinity() : state_->drawn_at;
}

}  // namespace moraine::core
