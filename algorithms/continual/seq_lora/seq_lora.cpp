#include "algorithms/continual/seq_lora/seq_lora.h"

#include <utility>

#include <ATen/core/grad_mode.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/continual/config.h"
#include "algorithms/continual/head.h"
#include "core/error.h"
#include "core/hash.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {
namespace {

constexpr const char* kPrefix = "lora.";

adapters::Adapter fresh_adapter(const LearnerSite& site, uint64_t seed) {
  return adapters::Adapter::create(adapters::adapter_schema().from_json(site.spec.at("lora")), *site.base, seed,
                                   site.context.device());
}

// What is trained and what is kept, as in the artefact.
models::NamedTensors everything(const adapters::Adapter& adapter) {
  models::NamedTensors all;
  for (const auto& part : {adapter.parameters(), adapter.state()})
    for (const auto& [name, tensor] : part) all.emplace_back(kPrefix + name, tensor);
  return all;
}

void load(const core::Artefact& artefact, const adapters::Adapter& adapter) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : everything(adapter)) {
    const auto* stored = artefact.file().find(name);
    MORAINE_CHECK(stored != nullptr, "an adapter's artefact has no '{}'", name);
    at::Tensor(tensor).copy_(models::copy_of(*stored));
  }
}

class LoraClassifier final : public HeadClassifier {
 public:
  LoraClassifier(models::Vit vit, const adapters::Adapter& adapter, Head head, uint64_t seed)
      : HeadClassifier(std::move(head), seed, vit.config().hidden_size, vit.device()), vit_(std::move(vit)) {
    adapter.attach(vit_);
  }

 private:
  at::Tensor features(const at::Tensor& images) override { return vit_.features(images); }
  models::Vit vit_;
};

}  // namespace

std::string SeqLora::title() const { return local_ ? "one LoRA, logits of the task" : "one LoRA, logits of all seen"; }

std::vector<UnitRequest> SeqLora::units(const ContinualConfig& config, const StreamFacts& stream, int64_t task,
                                        int64_t seed, const std::vector<std::string>& before) const {
  core::Json spec = training_spec(config.lora_training(), stream, task, task, local_, seed);
  spec["lora"] = adapters::adapter_schema().to_json(config.lora);
  spec["lora_seed"] = core::derive_seed(static_cast<uint64_t>(seed), "continual/lora");
  return {{fmt::format("task{}", task), std::move(spec), before, trained_images(config.lora_training())}};
}

core::ArtefactPtr SeqLora::execute(const Unit& unit, const LearnerSite& site) const {
  models::Vit vit = site.base->share();
  const adapters::Adapter adapter = fresh_adapter(site, unit.spec.at("lora_seed").get<uint64_t>());
  Head head;
  if (!unit.spec.at("fresh").get<bool>()) {
    const auto before = site.context.artefact(unit.inputs.at(0));
    load(*before, adapter);
    head = Head::read(*before, site.context.device());
  }
  adapter.attach(vit);
  models::NamedTensors factors;
  for (const auto& [name, tensor] : adapter.parameters()) factors.emplace_back(kPrefix + name, tensor);
  auto groups = adapter.groups();
  for (auto& group : groups)
    for (auto& name : group.names) name.insert(0, kPrefix);
  return train_head_and(
      kind(), unit, site, site.config.lora_training(), factors, std::move(head), vit,
      [&] { return everything(adapter); }, std::move(groups));
}

std::unique_ptr<Classifier> SeqLora::classifier(const std::vector<core::ArtefactPtr>& state, uint64_t seed,
                                                const LearnerSite& site) const {
  MORAINE_CHECK(state.size() == 1, "a LoRA's state is one artefact, not {}", state.size());
  const adapters::Adapter adapter = fresh_adapter(site, 0);
  load(*state[0], adapter);
  return std::make_unique<LoraClassifier>(site.base->share(), adapter, Head::read(*state[0], site.context.device()),
                                          seed);
}

int64_t SeqLora::trained_parameters(const ContinualConfig& config, const models::Vit& base) const {
  return adapters::parametrisation(config.lora.type)
      .count(adapters::targets_of(config.lora, base.slots()), config.lora)
      .trained;
}

}  // namespace moraine::algorithms::continual
