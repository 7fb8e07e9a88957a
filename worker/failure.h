#pragma once

#include <string>

namespace moraine::worker {

/// What went wrong in a unit, as kFailed carries it: kind is user | io | numeric | memory | internal.
struct FailureReport {
  std::string kind, text, hint;
};

/// Call inside a catch block.
FailureReport describe_current_exception();

}  // namespace moraine::worker
