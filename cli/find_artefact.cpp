#include "cli/find_artefact.h"

#include <set>

#include <fmt/ranges.h>

#include "cli/run_summary.h"
#include "core/error.h"
#include "core/registry.h"

namespace moraine::cli {

std::string find_artefact(const coordinator::RunRecord& run, const std::string& what) {
  constexpr size_t kShortest = 4;
  std::set<std::string> matching;
  std::vector<std::string> labels;
  for (auto unit = run.units.rbegin(); unit != run.units.rend();
       ++unit) {  // of units that ran again with other settings, the last
    if (unit->label == what) return unit->artefact;
    if (what.size() >= kShortest && unit->artefact.starts_with(what)) matching.insert(unit->artefact);
    labels.push_back(unit->label);
  }
  if (matching.size() == 1) return *matching.begin();
  if (matching.size() > 1)
    throw core::UserError(fmt::format("cli: {}: several artefacts begin with '{}': {}", run.layout.root.string(), what,
                                      fmt::join(matching, ", ")),
                          "give more digits");
  if (what == "mixture") {  // what RUN/mixture was written from
    const core::Json summary = from_stored(run, [&] { return restore_method(run)->summary(*run.state); });
    const std::string id = summary.value("hash", "");
    if (!id.empty() && run.state->artefact(id)->kind() == what) return id;
  }
  const std::string near = core::nearest_name(what, labels);
  throw core::UserError(fmt::format("cli: {}: no unit and no artefact '{}'", run.layout.root.string(), what),
                        fmt::format("{}`moraine ls {}` lists them", near.empty() ? "" : "did you mean '" + near + "'? ",
                                    run.layout.root.string()));
}

}  // namespace moraine::cli
