#pragma once

#include <filesystem>
#include <functional>
#include <vector>

#include "algorithms/method.h"
#include "algorithms/register.h"
#include "coordinator/run_record.h"
#include "core/config.h"
#include "core/json.h"

namespace moraine::cli {

/// Writes RUN/inputs.json: what the method found in its input files, and every recipe value with its origin.
void write_plan_file(const algorithms::ParsedRecipe& recipe, const std::filesystem::path& run_directory);

/// The method of a recorded run, out of RUN/recipe.json and RUN/inputs.json. Throws UserError if the run never got that
/// far.
std::unique_ptr<algorithms::Method> restore_method(const coordinator::RunRecord& run);

/// What `use` returns. recipe.json and inputs.json are read long after they were written, perhaps by another version or
/// after somebody edited them: what fails because they do not fit each other is a UserError naming them, not a bug.
core::Json from_stored(const coordinator::RunRecord& run, const std::function<core::Json()>& use);

/// summary.json of a run (docs/formats.md): the method's tables and pictures, the time line, recipe, versions, timing.
core::Json summarize(const algorithms::Method& method, const coordinator::RunRecord& run);

/// Writes RUN/summary.json and RUN/report.html.
void write_report(const core::Json& summary, const std::filesystem::path& run_directory);

/// Versions of Moraine and of what it was built with.
core::Json versions();

}  // namespace moraine::cli
