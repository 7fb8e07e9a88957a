#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "core/json.h"

namespace moraine::core {

/// JSON whose objects keep the order of the file: for formats of other tools in which the order of keys has a meaning.
using OrderedJson = nlohmann::ordered_json;

/// Errors as parse_json() and read_json().
OrderedJson parse_ordered_json(std::string_view text, const std::string& origin);
OrderedJson read_ordered_json(const std::filesystem::path& path);

}  // namespace moraine::core
