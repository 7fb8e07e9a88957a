#pragma once

#include <functional>
#include <string>

#include "core/config.h"

namespace moraine::core {

/// Reads one YAML document into a tree. `origin_of` names a place by line and column, counted from 1. Duplicate keys,
/// merge keys, aliases, tags, keys that are no text and further documents go to `problems`. An empty text is null.
/// Throws UserError "origin: not YAML: reason" on a syntax error, and on bytes that are no UTF-8.
ConfigNode parse_yaml(const std::string& text, const std::function<Origin(int line, int column)>& origin_of,
                      Problems& problems);

}  // namespace moraine::core
