#include "algorithms/finetune/units.h"

namespace moraine::algorithms::finetune {

const core::Schema<TrainSpec>& TrainSpec::schema() {
  using C = TrainSpec;
  static const auto schema = core::Schema<C>()
                                 .field("version", &C::version)
                                 .min(C::kVersion)
                                 .max(C::kVersion)
                                 .field("type_version", &C::type_version)
                                 .field("compute", &C::compute)
                                 .field("base", &C::base)
                                 .optional_object("adapter", &C::adapter, adapters::adapter_schema())
                                 .optional_object("galore", &C::galore, galore::galore_schema())
                                 .joined_later()
                                 .field("start", &C::start)
                                 .field("head_only", &C::head_only)
                                 .object("data", &C::data, objectives::data_schema())
                                 .optional_object("early_stopping", &C::early_stopping, early_stopping_schema())
                                 .joined_later()
                                 .optional_object("validation", &C::validation, objectives::data_schema())
                                 .joined_later()
                                 .field("adapter_seed", &C::adapter_seed)
                                 .field("data_seed", &C::data_seed)
                                 .field("train", &C::train);
  return schema;
}

const core::Schema<EvaluateSpec>& EvaluateSpec::schema() {
  using C = EvaluateSpec;
  static const auto schema = core::Schema<C>()
                                 .field("version", &C::version)
                                 .min(C::kVersion)
                                 .max(C::kVersion)
                                 .field("compute", &C::compute)
                                 .field("base", &C::base)
                                 .field("dtype", &C::dtype)
                                 .choices({"float32", "bfloat16"})
                                 .object("data", &C::data, objectives::data_schema())
                                 .field("sequences", &C::sequences)
                                 .min(0)
                                 .field("batch_size", &C::batch_size)
                                 .min(1)
                                 .field("rank", &C::rank)
                                 .min(0);
  return schema;
}

}  // namespace moraine::algorithms::finetune
