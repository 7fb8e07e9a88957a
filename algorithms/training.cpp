#include "algorithms/worker_context.h"

#include <fmt/format.h>

namespace moraine::algorithms {

const std::vector<std::string>& optimizer_names() {
  static const std::vector<std::string> names = {"adamw", "adamw8bit", "sgd"};
  return names;
}

const core::Schema<TrainConfig>& train_schema() {
  using C = TrainConfig;
  static const core::Schema<C> schema = [] {
    core::Schema<C> s;
    s.field("steps", &C::steps).min(1).doc("Optimiser steps.");
    s.field("batch_size", &C::batch_size).min(1).unit("sequences").doc("Sequences per optimiser step.");
    s.field("micro_batch_size", &C::micro_batch_size)
        .min(0)
        .unit("sequences")
        .doc(
            "Sequences per forward pass; 0 = batch_size. Lower it when memory runs out: the result changes by rounding "
            "only.");
    s.field("optimizer", &C::optimizer)
        .choices(optimizer_names())
        .doc("Update rule, as in torch.optim; adamw8bit keeps its moments in 8 bits, by blocks of 256.");
    s.field("learning_rate", &C::learning_rate).above(0).doc("Peak learning rate.");
    s.field("beta1", &C::beta1).min(0).max(0.9999999).doc("AdamW: decay of the gradient's mean.");
    s.field("beta2", &C::beta2).min(0).max(0.9999999).doc("AdamW: decay of the gradient's square.");
    s.field("epsilon", &C::epsilon)
        .above(0)
        .doc("AdamW: added to the denominator; leave alone unless training in a tiny range.");
    s.field("momentum", &C::momentum).min(0).max(0.9999999).doc("SGD: momentum.");
    s.field("weight_decay", &C::weight_decay)
        .min(0)
        .doc("Decay of every trained tensor: decoupled (AdamW) or in the gradient (SGD).");
    s.field("schedule", &C::schedule).choices({"constant", "linear", "cosine"}).doc("Learning rate after warm-up.");
    s.field("final_lr_ratio", &C::final_lr_ratio).min(0).max(1).doc("The last step runs at learning_rate times this.");
    s.field("warmup_steps", &C::warmup_steps).min(0).unit("steps").doc("Linear rise to learning_rate.");
    s.field("clip_norm", &C::clip_norm).min(0).doc("Largest global gradient norm; 0 = no clipping.");
    s.field("dtype", &C::dtype)
        .choices({"float32", "bfloat16"})
        .doc("Compute type of the frozen model; trained tensors and optimiser state stay float32.");
    s.field("checkpoint_every", &C::checkpoint_every)
        .min(1)
        .unit("steps")
        .changes_nothing()
        .doc("Steps between checkpoints. Raising it costs more work after a crash.");
    s.field("log_every", &C::log_every).min(1).unit("steps").changes_nothing().doc("Steps between metric points.");
    s.check([](const C& c) -> std::optional<std::string> {
      if (c.micro_batch_size > c.batch_size)
        return fmt::format("micro_batch_size {} is larger than batch_size {}", c.micro_batch_size, c.batch_size);
      return std::nullopt;
    });
    s.check([](const C& c) -> std::optional<std::string> {
      if (c.warmup_steps > c.steps)
        return fmt::format("warmup_steps {} is larger than steps {}", c.warmup_steps, c.steps);
      return std::nullopt;
    });
    return s;
  }();
  return schema;
}

core::Json train_identity(const TrainConfig& config) { return train_schema().identity(train_schema().to_json(config)); }

TrainConfig train_config(const core::Json& identity, const TrainConfig& own) {
  core::Json json = identity;
  json["checkpoint_every"] = own.checkpoint_every;
  json["log_every"] = own.log_every;
  return train_schema().from_json(json, "unit specification: train");
}

}  // namespace moraine::algorithms
