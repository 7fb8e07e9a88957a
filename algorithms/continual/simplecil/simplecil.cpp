#include "algorithms/continual/simplecil/simplecil.h"

#include <map>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>

#include "algorithms/continual/class_units.h"
#include "core/error.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {
namespace {

/// The mean feature of a class.
struct PrototypeSpec : ClassSpec {
  static constexpr const char* kKind = "prototype";
  static constexpr int64_t kVersion = 1;
  static const core::Schema<PrototypeSpec>& schema() {
    static const auto schema = [] {
      core::Schema<PrototypeSpec> s;
      add_class_fields(s);
      return s;
    }();
    return schema;
  }
};

at::Tensor unit_length(const at::Tensor& x) { return x / x.norm(2, {-1}, /*keepdim=*/true).clamp_min(1e-12); }

class CosineClassifier final : public Classifier {
 public:
  CosineClassifier(std::unique_ptr<models::Backbone> model, std::map<int64_t, at::Tensor> prototypes)
      : model_(std::move(model)), prototypes_(std::move(prototypes)) {}
  bool knows(int64_t label) const override { return prototypes_.contains(label); }
  at::Tensor scores(const models::Input& batch, std::span<const int64_t> labels, std::optional<int64_t>) override {
    std::vector<at::Tensor> rows;
    for (const int64_t label : labels) rows.push_back(prototypes_.at(label));
    return at::linear(unit_length(model_->features(batch)), at::stack(rows));
  }

 private:
  std::unique_ptr<models::Backbone> model_;
  std::map<int64_t, at::Tensor> prototypes_;  // of unit length
};

core::ArtefactPtr make_prototype(const Unit& unit, const LearnerSite& site) {
  const at::NoGradGuard no_grad;
  const auto spec = core::from_spec(PrototypeSpec::schema(), unit.spec);
  const std::vector<int64_t> rows = class_rows(spec, site);
  at::Tensor sum;
  each_feature_batch(
      rows, site, [&](const at::Tensor& features) { sum = sum.defined() ? sum + features.sum(0) : features.sum(0); });
  const models::NamedTensors tensors = {{"prototype", (sum / static_cast<double>(rows.size())).to(at::kFloat).cpu()}};
  std::vector<at::Tensor> keep;
  return core::Artefact::create(unit.kind, {{"class", spec.label}, {"images", rows.size()}},
                                models::views_of(tensors, keep));
}

std::optional<std::string> problem_of_prototype(const Unit&, const core::Artefact& artefact, int64_t width) {
  const auto* prototype = artefact.file().find("prototype");
  if (prototype != nullptr && prototype->shape == std::vector<int64_t>{width}) return std::nullopt;
  return fmt::format("has no prototype of {} numbers", width);
}

}  // namespace

State SimpleCil::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  State after = before;
  for (const int64_t label : plan.stream.tasks[static_cast<size_t>(task)].classes) {
    PrototypeSpec spec;
    plan_class(spec, plan, label);
    const auto id = plan.need(std::move(spec), class_request(plan, task, label));
    if (!id) after.reset();
    if (after) after->push_back(*id);
  }
  return after;
}

std::vector<UnitKind> SimpleCil::unit_kinds() const {
  return {{PrototypeSpec::kKind, make_prototype, problem_of_prototype}};
}

std::unique_ptr<Classifier> SimpleCil::classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec&,
                                                  const LearnerSite& site) const {
  std::map<int64_t, at::Tensor> prototypes;
  for (const auto& artefact : state)
    prototypes[artefact->meta().at("class").get<int64_t>()] =
        unit_length(models::copy_of(*artefact->file().find("prototype")).to(site.context.device()));
  return std::make_unique<CosineClassifier>(site.base->shared_on(site.context.device()), std::move(prototypes));
}

}  // namespace moraine::algorithms::continual
