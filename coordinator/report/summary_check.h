#pragma once

#include <string>

#include "core/json.h"

namespace moraine::report {

/// Checks a summary.json document against format 1 (docs/formats.md), so that whatever draws it afterwards may take
/// every key and type for granted. Throws InternalError naming the JSON path ("curves[0].series[2].points[7]") on a
/// missing or unknown key, a wrong type, a matrix that does not fit its names or another format number.
void check_summary(const core::Json& summary);
/// The same for one element of "tables"; `path` is what error messages call it.
void check_table(const core::Json& table, const std::string& path = "table");

/// JSON has no NaN: a value that is not there or not finite is null. NaN for both, also while the document is in
/// memory.
double number_or_nan(const core::Json& value);

}  // namespace moraine::report
