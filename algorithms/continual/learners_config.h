#pragma once

#include <optional>
#include <vector>

#include "algorithms/continual/er/er.h"
#include "algorithms/continual/ewc/ewc.h"
#include "algorithms/continual/linear_probe/linear_probe.h"
#include "algorithms/continual/lwf/lwf.h"
#include "algorithms/continual/o_lora/o_lora.h"
#include "algorithms/continual/ranpac/ranpac.h"
#include "algorithms/continual/seq_lora/seq_lora.h"
#include "core/config.h"

namespace moraine::algorithms::continual {

/// Options of learners, each by its own field table. Absent = its defaults.
struct LearnersConfig {
  std::optional<SeqLoraOptions> seq_lora = {};
  std::optional<OLoraOptions> o_lora = {};
  std::optional<LinearProbeOptions> linear_probe = {};
  std::optional<EwcOptions> ewc = {};
  std::optional<LwfOptions> lwf = {};
  std::optional<ErOptions> er = {};
  std::optional<RanPacOptions> ranpac = {};
};
const core::Schema<LearnersConfig>& learners_schema();
/// Every training among them.
std::vector<const TrainConfig*> all_training(const LearnersConfig& learners);

}  // namespace moraine::algorithms::continual
