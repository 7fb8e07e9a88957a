#include "algorithms/continual/simplecil/simplecil.h"

#include <algorithm>
#include <map>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>

#include "algorithms/continual/config.h"
#include "core/error.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {
namespace {

constexpr size_t kBatch = 100;  // images per forward pass; fixed, because a prototype's last bits depend on it

at::Tensor unit_length(const at::Tensor& x) { return x / x.norm(2, {-1}, /*keepdim=*/true).clamp_min(1e-12); }

class CosineClassifier final : public Classifier {
 public:
  CosineClassifier(models::Vit vit, std::map<int64_t, at::Tensor> prototypes)
      : vit_(std::move(vit)), prototypes_(std::move(prototypes)) {}
  bool knows(int64_t label) const override { return prototypes_.count(label) > 0; }
  at::Tensor scores(const at::Tensor& images, std::span<const int64_t> labels) override {
    std::vector<at::Tensor> rows;
    for (const int64_t label : labels) rows.push_back(prototypes_.at(label));
    return at::linear(unit_length(vit_.features(images)), at::stack(rows));
  }

 private:
  models::Vit vit_;
  std::map<int64_t, at::Tensor> prototypes_;  // of unit length
};

}  // namespace

std::vector<UnitRequest> SimpleCil::units(const ContinualConfig& config, const StreamFacts& stream, int64_t task,
                                          int64_t, const std::vector<std::string>&) const {
  std::vector<UnitRequest> out;
  const auto& own = stream.tasks[static_cast<size_t>(task)];
  for (const int64_t label : own.classes)
    out.push_back({fmt::format("class{}", label),
                   {{"class", label},
                    {"images_seed", config.seed},
                    {"leave_out", config.stream.leave_out},
                    {"train_per_class", config.stream.train_per_class},
                    {"validation_per_class", config.stream.validation_per_class}},
                   {},
                   static_cast<double>(own.train) / static_cast<double>(own.classes.size()) / 3});
  return out;
}

core::ArtefactPtr SimpleCil::execute(const Unit& unit, const LearnerSite& site) const {
  const at::NoGradGuard no_grad;
  const auto label = unit.spec.at("class").get<int64_t>();
  std::vector<int64_t> rows;  // the same in the stream of every order
  for (const auto& task : site.stream->tasks) {
    const auto labels = site.images->labels("train", task.train);
    for (size_t i = 0; i < labels.size(); ++i)
      if (labels[i] == label) rows.push_back(task.train[i]);
  }
  MORAINE_CHECK(!rows.empty(), "class {} is in no task", label);
  models::Vit vit = site.base->share();
  at::Tensor sum;
  for (size_t first = 0; first < rows.size(); first += kBatch) {
    const auto part = std::span(rows).subspan(first, std::min(kBatch, rows.size() - first));
    const at::Tensor features = vit.features(site.images->batch("train", part)).to(at::kDouble).sum(0);
    sum = sum.defined() ? sum + features : features;
    site.context.progress(static_cast<double>(first + part.size()), static_cast<double>(rows.size()));
  }
  const models::NamedTensors tensors = {{"prototype", (sum / static_cast<double>(rows.size())).to(at::kFloat).cpu()}};
  std::vector<at::Tensor> keep;
  return core::Artefact::create(kind(), {{"class", label}, {"images", rows.size()}}, models::views_of(tensors, keep));
}

std::unique_ptr<Classifier> SimpleCil::classifier(const std::vector<core::ArtefactPtr>& state, uint64_t,
                                                  const LearnerSite& site) const {
  std::map<int64_t, at::Tensor> prototypes;
  for (const auto& artefact : state)
    prototypes[artefact->meta().at("class").get<int64_t>()] =
        unit_length(models::copy_of(*artefact->file().find("prototype")).to(site.context.device()));
  return std::make_unique<CosineClassifier>(site.base->share(), std::move(prototypes));
}

}  // namespace moraine::algorithms::continual
