#include "core/ordered_json.h"

#include "core/file.h"

namespace moraine::core {

OrderedJson parse_ordered_json(std::string_view text, const std::string& origin) {
  parse_json(text, origin);  // complains with line and column, also about keys that stand twice
  return OrderedJson::parse(text);
}

OrderedJson read_ordered_json(const std::filesystem::path& path) {
  require_file(path);
  return parse_ordered_json(read_text(path), path.string());
}

}  // namespace moraine::core
