#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moraine::worker {

/// Failures injected on purpose, so that tests can watch retries and restarts of the real program. Read from the
/// environment variable MORAINE_FAULT: a comma-separated list of `kind@label:n`, label as in "train/german".
///
///   throw@label:n    attempts 1..n of the unit fail with an IoError before they do anything
///   memory@label:n   attempts 1..n fail with std::bad_alloc
///   nan@label:n      attempts 1..n see a loss of NaN in their first training step
///   exit@label:n     the process dies (SIGKILL) right after training step n of the unit, after its checkpoint if one
///   is due
///   member@label:n   the same, in the processes of a group that do not lead it
class Faults {
 public:
  Faults() = default;
  /// Throws UserError on a malformed list.
  static Faults parse(std::string_view text);
  /// From MORAINE_FAULT; warns when it is set.
  static Faults from_environment();

  /// Called when an attempt starts; throws what was asked for.
  void at_start(const std::string& label, int64_t attempt) const;
  bool nan_loss(const std::string& label, int64_t attempt) const;
  /// Called after `step` steps; does not return if the process is to die.
  void after_step(const std::string& label, int64_t step, bool leads = true) const;

 private:
  struct Fault {
    std::string kind, label;
    int64_t number;
  };
  std::vector<Fault> faults_;
};

}  // namespace moraine::worker
