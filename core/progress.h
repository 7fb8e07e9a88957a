#pragma once

#include <functional>
#include <optional>
#include <string>

namespace moraine::core {

/// Progress of a run. On a terminal: one redrawn line with bar, share, ETA and what runs now; elsewhere a log line
/// every 10 s. Not thread-safe; used by the coordinator alone.
class Progress {
 public:
  /// `terminal` = stderr is a terminal. `now_s` is injectable for tests (seconds, monotonic).
  Progress(bool terminal, std::function<double()> now_s);
  ~Progress();
  /// `share` in [0, 1] is what is done, `eta_s` what is left in seconds, not finite when nobody knows. A plan may grow
  /// while it is carried out: the share shown waits then instead of falling back.
  void update(double share, double eta_s, const std::string& running);
  /// Clears the bar so that other output starts on a fresh line.
  void clear();

 private:
  bool terminal_;
  std::function<double()> now_s_;
  std::optional<double> drawn_at_;
  double share_ = 0;  // the largest so far
};

}  // namespace moraine::core
