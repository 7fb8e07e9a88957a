#include "algorithms/continual/lwf/lwf.h"

#include <algorithm>
#include <memory>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>

#include "algorithms/continual/config.h"
#include "core/error.h"

namespace moraine::algorithms::continual {
namespace {

/// One task, held to what the input says of its old classes.
struct TrainLwfSpec : TrainSpec {
  static constexpr const char* kKind = "train_lwf";
  static constexpr int64_t kVersion = 1;
  double strength = 0, temperature = 1;
  static const core::Schema<TrainLwfSpec>& schema() {
    static const auto schema = [] {
      core::Schema<TrainLwfSpec> s;
      add_train_fields(s);
      s.field("strength", &TrainLwfSpec::strength).field("temperature", &TrainLwfSpec::temperature);
      return s;
    }();
    return schema;
  }
};

core::ArtefactPtr train_lwf(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(TrainLwfSpec::schema(), unit.spec);
  Trainee trainee = Trainee::of(unit, spec, site);
  TrainingHooks hooks;
  if (trainee.before) {
    const std::shared_ptr<models::Backbone> teacher =
        fitted(trainee.before, spec.lora, spec.lora_seed.value_or(0), site).model;
    const Head head = trainee.head;
    const auto old = static_cast<int64_t>(head.labels.size());
    MORAINE_CHECK(std::equal(head.labels.begin(), head.labels.end(), spec.logits.begin()),
                  "classes seen come first among the logits");
    hooks.extra_loss = [=](const StepBatch& batch) {
      at::Tensor kept;
      {
        const at::NoGradGuard no_grad;
        kept = at::linear(teacher->features(batch.input), head.weight, head.bias);
      }
      return spec.strength * distillation(batch.logits.narrow(1, 0, old), kept, spec.temperature);
    };
  }
  return train_tasks(unit.kind, spec, trainee, site, training_in(site.config.learners.lwf, site.config.train), hooks);
}

}  // namespace

const core::Schema<LwfOptions>& lwf_schema() {
  using C = LwfOptions;
  static const auto schema = [] {
    core::Schema<C> s;
    add_training_options(s)
        .field("strength", &C::strength)
        .min(0)
        .doc("Weight of the distillation loss; higher keeps more of the old classes and learns less")
        .field("temperature", &C::temperature)
        .above(0)
        .doc("Scores are divided by it before the softmaxes");
    return s;
  }();
  return schema;
}

at::Tensor distillation(const at::Tensor& scores, const at::Tensor& old_scores, double temperature) {
  return -(at::softmax(old_scores / temperature, -1) * at::log_softmax(scores / temperature, -1)).sum();
}

State Lwf::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  const LwfOptions own = plan.config.learners.lwf.value_or(LwfOptions{});
  TrainLwfSpec spec;
  spec.strength = own.strength;
  spec.temperature = own.temperature;
  // The teacher's forward pass beside three.
  return after_training(plan, task, before, std::move(spec), /*local_logits=*/false, task > 0 ? 4.0 / 3 : 1);
}

std::vector<UnitKind> Lwf::unit_kinds() const { return {{TrainLwfSpec::kKind, train_lwf, problem_of_trained}}; }

TrainingOptions Lwf::options(const ContinualConfig& config) const { return config.learners.lwf.value_or(LwfOptions{}); }

}  // namespace moraine::algorithms::continual
