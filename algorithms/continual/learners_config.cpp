#include "algorithms/continual/learners_config.h"

namespace moraine::algorithms::continual {

// Every learner's options joined later than some run: absent ones stand in no recorded recipe.
const core::Schema<LearnersConfig>& learners_schema() {
  using C = LearnersConfig;
  static const auto schema = core::Schema<C>()
                                 .optional_object("seq_lora", &C::seq_lora, seq_lora_schema())
                                 .joined_later()
                                 .doc("seq_lora and seq_lora_local");
  return schema;
}

std::vector<const TrainConfig*> all_training(const LearnersConfig& learners) {
  std::vector<const TrainConfig*> all;
  const auto add = [&](const auto& options) {
    if (options && options->train) all.push_back(&*options->train);
  };
  add(learners.seq_lora);
  return all;
}

}  // namespace moraine::algorithms::continual
