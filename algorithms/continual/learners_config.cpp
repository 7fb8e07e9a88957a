#include "algorithms/continual/learners_config.h"

namespace moraine::algorithms::continual {

// Every learner's options joined later than some run: absent ones stand in no recorded recipe.
const core::Schema<LearnersConfig>& learners_schema() {
  using C = LearnersConfig;
  static const auto schema = core::Schema<C>()
                                 .optional_object("seq_lora", &C::seq_lora, seq_lora_schema())
                                 .joined_later()
                                 .doc("seq_lora and seq_lora_local")
                                 .optional_object("o_lora", &C::o_lora, o_lora_schema())
                                 .joined_later()
                                 .doc("One LoRA per task")
                                 .optional_object("linear_probe", &C::linear_probe, linear_probe_schema())
                                 .joined_later()
                                 .doc("The head alone")
                                 .optional_object("ewc", &C::ewc, ewc_schema())
                                 .joined_later()
                                 .doc("Elastic weight consolidation")
                                 .optional_object("lwf", &C::lwf, lwf_schema())
                                 .joined_later()
                                 .doc("Learning without forgetting")
                                 .optional_object("er", &C::er, er_schema())
                                 .joined_later()
                                 .doc("Experience replay")
                                 .optional_object("ranpac", &C::ranpac, ranpac_schema())
                                 .joined_later()
                                 .doc("Random projection and ridge regression");
  return schema;
}

std::vector<const TrainConfig*> all_training(const LearnersConfig& learners) {
  std::vector<const TrainConfig*> all;
  const auto add = [&](const auto& options) {
    if (options && options->train) all.push_back(&*options->train);
  };
  add(learners.seq_lora);
  add(learners.o_lora);
  add(learners.linear_probe);
  add(learners.ewc);
  add(learners.lwf);
  add(learners.er);
  return all;
}

}  // namespace moraine::algorithms::continual
