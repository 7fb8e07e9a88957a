#pragma once

#include "core/json.h"

namespace moraine::report {

/// The fixture (invented numbers, every part of format 1), written by make_sample_summary.py.
inline core::Json sample_summary() {
  return core::read_json(std::filesystem::path(MORAINE_SOURCE_DIR) / "tests/coordinator_report/sample_summary.json");
}

}  // namespace moraine::report
