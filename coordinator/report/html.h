#pragma once

#include <string>

#include "core/json.h"

namespace moraine::report {

/// The whole report.html of a summary (docs/formats.md, "summary.json"): one file without scripts or outside
/// references, pictures as inline SVG, light and dark by the reader's preference, prints on paper. Sections without
/// content are left out. Throws InternalError naming the JSON path if the summary is malformed.
std::string render_html(const core::Json& summary);

}  // namespace moraine::report
