#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace moraine::models {

using Shape = std::vector<int64_t>;
/// Tensors a checkpoint must hold, by name.
using NamedShapes = std::vector<std::pair<std::string, Shape>>;

}  // namespace moraine::models
