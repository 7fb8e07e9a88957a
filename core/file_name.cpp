#include "core/file_name.h"

#include <algorithm>

#include "core/error.h"
#include "core/json.h"

namespace moraine::core {

const std::string& check_file_name(const std::string& name, const std::string& what, const std::string& origin) {
  constexpr size_t kLongest = 200;  // file systems allow 255 bytes; an ending comes on top
  const auto forbidden = [](char c) {
    return c == '/' || c == '\\' || static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  };
  if (!name.empty() && name.size() <= kLongest && name != "." && name != ".." &&
      std::none_of(name.begin(), name.end(), forbidden))
    return name;
  const std::string shown = Json(name.substr(0, 80)).dump(-1, ' ', true, Json::error_handler_t::replace);
  throw UserError(fmt::format("{}: the name of {} cannot be a file name: {}", origin, what, shown),
                  fmt::format("a name has 1 to {} bytes, no slashes and no control characters", kLongest));
}

}  // namespace moraine::core
