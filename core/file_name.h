#pragma once

#include <string>

namespace moraine::core {

/// Returns `name`, which came out of a file or from a peer, if it may become one component of a path: not empty, at
/// most 200 bytes, neither "." nor "..", without '/', backslashes and control characters. Else throws UserError naming
/// `origin` and `what` it names ("an expert"). Every name that somebody else wrote passes here before it becomes a
/// path.
const std::string& check_file_name(const std::string& name, const std::string& what, const std::string& origin);

}  // namespace moraine::core
