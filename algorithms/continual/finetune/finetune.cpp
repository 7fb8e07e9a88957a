#include "algorithms/continual/finetune/finetune.h"

#include <utility>

#include "algorithms/continual/config.h"
#include "algorithms/continual/head.h"
#include "core/error.h"

namespace moraine::algorithms::continual {
namespace {

// The backbone after a unit, without its head.
models::Vit vit_of(const core::ArtefactPtr& artefact, const LearnerSite& site) {
  std::vector<core::TensorView> weights;
  for (const auto& view : artefact->file().tensors())
    if (!view.name.starts_with("head.")) weights.push_back(view);
  return models::Vit::from_tensors(site.base->config().to_json(), weights, artefact->file().origin(), std::nullopt,
                                   artefact)
      .on(site.context.device());
}

class WeightsClassifier final : public HeadClassifier {
 public:
  WeightsClassifier(models::Vit vit, Head head, uint64_t seed)
      : HeadClassifier(std::move(head), seed, vit.config().hidden_size, vit.device()), vit_(std::move(vit)) {}

 private:
  at::Tensor features(const at::Tensor& images) override { return vit_.features(images); }
  models::Vit vit_;
};

}  // namespace

std::string Finetune::title() const {
  return local_ ? "fine-tuning, logits of the task" : "fine-tuning, logits of all seen";
}

std::vector<UnitRequest> Finetune::units(const ContinualConfig& config, const StreamFacts& stream, int64_t task,
                                         int64_t seed, const std::vector<std::string>& before) const {
  return {{fmt::format("task{}", task), training_spec(config.train, stream, task, task, local_, seed), before,
           trained_images(config.train)}};
}

core::ArtefactPtr Finetune::execute(const Unit& unit, const LearnerSite& site) const {
  const bool fresh = unit.spec.at("fresh").get<bool>();
  Head head;
  models::Vit vit = site.base->share();
  if (!fresh) {
    const auto before = site.context.artefact(unit.inputs.at(0));
    vit = vit_of(before, site);
    head = Head::read(*before, site.context.device());
  }
  models::NamedTensors weights = vit.make_trainable();
  return train_head_and(kind(), unit, site, site.config.train, weights, std::move(head), vit,
                        [&] { return models::NamedTensors(vit.weights().begin(), vit.weights().end()); });
}

std::unique_ptr<Classifier> Finetune::classifier(const std::vector<core::ArtefactPtr>& state, uint64_t seed,
                                                 const LearnerSite& site) const {
  if (state.empty()) return std::make_unique<WeightsClassifier>(site.base->share(), Head{}, seed);
  return std::make_unique<WeightsClassifier>(vit_of(state.at(0), site), Head::read(*state.at(0), site.context.device()),
                                             seed);
}

int64_t Finetune::trained_parameters(const ContinualConfig&, const models::Vit& base) const {
  return base.config().backbone_parameters();
}

}  // namespace moraine::algorithms::continual
