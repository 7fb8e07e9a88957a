#pragma once

#include <map>
#include <string>
#include <vector>

#include "algorithms/unit.h"

namespace moraine::coordinator {

/// A unit that is ready to run, with what the scheduler needs to rank it.
struct Candidate {
  std::string id;
  std::string kind;
  double cost = 1;  // its own and what follows it
};

/// Orders units: the one on the longest predicted way to the run's end first, so that no chain waits for what nobody
/// waits for and no long unit starts when the others are done. Pure bookkeeping
/// without a clock; the order never changes what a unit computes. Not thread-safe.
class Scheduler {
 public:
  /// Corrects the speeds by a finished unit: exponential averages (weight 0.3 for the newest) of cost per second of its
  /// kind and of its worker relative to the kind. Non-positive cost or seconds are ignored.
  void measured(const std::string& kind, int worker, double cost, double seconds);
  /// cost / speed of the kind; an unmeasured kind has the mean speed of the measured ones, without any 1e9 FLOP/s.
  double predicted_seconds(const std::string& kind, double cost) const;
  /// Whether anything was measured: before that predicted seconds rank units but are no times.
  bool has_measured() const { return !kind_speed_.empty(); }
  /// Speed of a worker relative to the others; 1 until it was measured.
  double relative_speed(int worker) const;

  /// Longest predicted first; equal ones by id.
  void sort(std::vector<Candidate>& candidates) const;
  /// Fastest first; equal ones by index.
  void sort(std::vector<int>& workers) const;

 private:
  std::map<std::string, double> kind_speed_;  // cost per second
  std::map<int, double> worker_speed_;
};

/// When the last of `units` ends if workers that are busy for `busy` more seconds take them longest first. All in
/// seconds; `busy` has one entry per worker and at least one.
double seconds_to_finish(std::vector<double> busy, std::vector<double> units);

}  // namespace moraine::coordinator
