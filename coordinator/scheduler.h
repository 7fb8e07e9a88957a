#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "algorithms/unit.h"

namespace moraine::coordinator {

/// A unit that is ready to run, with what the scheduler needs to rank it.
struct Candidate {
  std::string_view id;  // of someone who outlives the queue's entry
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

  /// Fastest first; equal ones by index.
  void sort(std::vector<int>& workers) const;

 private:
  std::map<std::string, double> kind_speed_;  // cost per second
  std::map<int, double> worker_speed_;
};

/// The units that are ready, in the scheduler's order. Within a kind the order is that of the costs whatever its speed,
/// so a measurement moves nothing: putting in and taking out cost the logarithm of the size. Not thread-safe.
class ReadyQueue {
 public:
  void insert(const Candidate& unit) { kinds_[unit.kind].insert({-unit.cost, unit.id}); }
  /// The same values as in insert().
  void erase(const Candidate& unit);
  bool empty() const { return size() == 0; }
  size_t size() const;
  /// Ids, longest predicted first, equal ones by id, until `visit` returns false. It must not change the queue.
  void visit(const Scheduler& scheduler, const std::function<bool(std::string_view)>& visit) const;

 private:
  std::map<std::string, std::set<std::pair<double, std::string_view>>> kinds_;  // (-cost, id)
};

/// When the last of `units` ends if workers that are busy for `busy` more seconds take them longest first. All in
/// seconds; `busy` has one entry per worker and at least one.
double seconds_to_finish(std::vector<double> busy, std::vector<double> units);

}  // namespace moraine::coordinator
