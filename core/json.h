#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace moraine::core {

/// Keys are kept sorted (nlohmann's default map), so dump() is canonical: equal values give equal text.
using Json = nlohmann::json;

/// Parses text. Throws UserError naming `origin`, line and column, also when an object holds a key twice,
/// a number fits no double, or values stand more than 128 levels inside each other.
Json parse_json(std::string_view text, const std::string& origin);
/// Reads and parses a file. Throws UserError if it is missing or malformed.
Json read_json(const std::filesystem::path& path);

}  // namespace moraine::core
