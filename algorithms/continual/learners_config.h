#pragma once

#include <optional>
#include <vector>

#include "algorithms/continual/seq_lora/seq_lora.h"
#include "core/config.h"

namespace moraine::algorithms::continual {

/// Options of learners, each by its own field table. Absent = its defaults.
struct LearnersConfig {
  std::optional<SeqLoraOptions> seq_lora = {};
};
const core::Schema<LearnersConfig>& learners_schema();
/// Every training among them.
std::vector<const TrainConfig*> all_training(const LearnersConfig& learners);

}  // namespace moraine::algorithms::continual
