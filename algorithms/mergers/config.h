#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/config.h"

namespace moraine::algorithms::mergers {

/// How many changes become one: a type of merger.h and its options. A type refuses those it has no use for.
struct MergeConfig {
  std::string type = "svd";
  std::optional<int64_t> rank = {};                      // of the result, where it is cut; not given: as the type says
  std::optional<double> density = {};                    // share of every tensor's numbers that is kept, in (0, 1]
  std::optional<std::string> majority_sign_method = {};  // total (the default) | frequency
  std::optional<int64_t> seed = {};                      // of random masks; not given: 0
};

/// Its check names every option that the type needs and lacks, or has and does not know.
const core::Schema<MergeConfig>& merge_schema();

}  // namespace moraine::algorithms::mergers
