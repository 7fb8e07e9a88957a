#include "algorithms/continual/ranpac/ranpac.h"

#include <algorithm>
#include <cmath>
#include <span>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/zeros.h>

#include "algorithms/continual/class_units.h"
#include "algorithms/continual/config.h"
#include "core/error.h"
#include "core/hash.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {
namespace {

/// The sums of one class.
struct RanPacClassSpec : ClassSpec {
  static constexpr const char* kKind = "ranpac_class";
  static constexpr int64_t kVersion = 1;
  int64_t features = 1;
  uint64_t projection_seed = 0;
  static const core::Schema<RanPacClassSpec>& schema() {
    static const auto schema = [] {
      core::Schema<RanPacClassSpec> s;
      add_class_fields(s);
      s.field("features", &RanPacClassSpec::features)
          .min(1)
          .field("projection_seed", &RanPacClassSpec::projection_seed);
      return s;
    }();
    return schema;
  }
};

/// Adds what its inputs hold, in their order.
struct RanPacSumsSpec : SiteSpec {
  static constexpr const char* kKind = "ranpac_sums";
  static constexpr int64_t kVersion = 1;
  static const core::Schema<RanPacSumsSpec>& schema() {
    static const auto schema = [] {
      core::Schema<RanPacSumsSpec> s;
      add_site_fields(s);
      return s;
    }();
    return schema;
  }
};

// [d, M] float64, of normal numbers drawn in float32.
at::Tensor projection(int64_t width, int64_t features, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  return at::empty({width, features}, at::kFloat).normal_(0, 1, generator).to(at::kDouble);
}

RanPacSums read_sums(const core::Artefact& artefact) {
  const auto tensor = [&](const char* name) { return models::copy_of(*artefact.file().find(name)); };
  return {artefact.meta().at("classes").get<std::vector<int64_t>>(), tensor("gram"), tensor("sums"),
          tensor("held_gram"), tensor("held_sums")};
}

core::ArtefactPtr to_artefact(const std::string& kind, const RanPacSums& sums, const core::Json& random) {
  models::NamedTensors tensors = {
      {"gram", sums.gram}, {"held_gram", sums.held_gram}, {"held_sums", sums.held_sums}, {"sums", sums.sums}};
  for (auto& [name, tensor] : tensors) tensor = tensor.cpu();
  std::vector<at::Tensor> keep;
  return core::Artefact::create(kind, {{"classes", sums.classes}, {"random", random}}, models::views_of(tensors, keep));
}

core::ArtefactPtr sum_class(const Unit& unit, const LearnerSite& site) {
  const at::NoGradGuard no_grad;
  const auto spec = core::from_spec(RanPacClassSpec::schema(), unit.spec);
  const std::vector<int64_t> rows = class_rows(spec, site);
  const at::Device device = site.context.device();
  const at::Tensor random = projection(site.base->width(), spec.features, spec.projection_seed).to(device);
  const auto summed = [&](const std::vector<int64_t>& part) {
    const auto options = at::TensorOptions().dtype(at::kDouble).device(device);
    std::pair sums{at::zeros({spec.features, spec.features}, options), at::zeros({1, spec.features}, options)};
    each_feature_batch(part, site, [&](const at::Tensor& features) {
      const at::Tensor h = at::relu(at::matmul(features, random));
      sums.first.add_(at::matmul(h.t(), h));
      sums.second.add_(h.sum(0, /*keepdim=*/true));
    });
    return sums;
  };
  const auto held = static_cast<std::ptrdiff_t>(rows.size() < 2 ? 0 : std::max<size_t>(1, rows.size() / 5));
  const auto [gram, sum] = summed({rows.begin(), rows.end() - held});
  const auto [held_gram, held_sum] = summed({rows.end() - held, rows.end()});
  return to_artefact(unit.kind, {{spec.label}, gram, sum, held_gram, held_sum},
                     {{"seed", spec.projection_seed}, {"features", spec.features}});
}

core::ArtefactPtr add_sums(const Unit& unit, const LearnerSite& site) {
  const at::NoGradGuard no_grad;
  RanPacSums total;
  core::Json random;
  for (const auto& id : unit.inputs) {
    const auto artefact = site.context.artefact(id);
    const RanPacSums part = read_sums(*artefact);
    random = artefact->meta().at("random");
    if (total.classes.empty()) {
      total = part;
      continue;
    }
    total.classes.insert(total.classes.end(), part.classes.begin(), part.classes.end());
    total.gram.add_(part.gram);
    total.held_gram.add_(part.held_gram);
    total.sums = at::cat({total.sums, part.sums});
    total.held_sums = at::cat({total.held_sums, part.held_sums});
  }
  return to_artefact(unit.kind, total, random);
}

std::optional<std::string> problem_of_sums(const Unit&, const core::Artefact& artefact, int64_t) {
  const auto classes = static_cast<int64_t>(artefact.meta().at("classes").size());
  const auto features = artefact.meta().at("random").at("features").get<int64_t>();
  for (const char* name : {"gram", "held_gram", "sums", "held_sums"}) {
    const auto* tensor = artefact.file().find(name);
    const int64_t rows = std::string(name).ends_with("gram") ? features : classes;
    if (tensor == nullptr || tensor->dtype != core::DType::kF64 ||
        tensor->shape != std::vector<int64_t>{rows, features})
      return fmt::format("has no '{}' of {} x {} float64 numbers", name, rows, features);
  }
  return std::nullopt;
}

std::optional<std::string> problem_of_class_sums(const Unit& unit, const core::Artefact& artefact, int64_t width) {
  const core::Json& meta = artefact.meta();
  const auto spec = core::from_spec(RanPacClassSpec::schema(), unit.spec);
  if (meta.at("classes") != core::Json::array({spec.label}) || meta.at("random").at("features") != spec.features ||
      meta.at("random").at("seed") != spec.projection_seed)
    return "is not of the class and projection that were asked for";
  return problem_of_sums(unit, artefact, width);
}

class RidgeClassifier final : public Classifier {
 public:
  RidgeClassifier(std::unique_ptr<models::Backbone> model, std::vector<int64_t> classes, at::Tensor random,
                  at::Tensor readout)
      : model_(std::move(model)),
        classes_(std::move(classes)),
        random_(std::move(random)),
        readout_(std::move(readout)) {}
  bool knows(int64_t label) const override { return std::ranges::find(classes_, label) != classes_.end(); }
  at::Tensor scores(const models::Input& batch, std::span<const int64_t> labels, std::optional<int64_t>) override {
    std::vector<at::Tensor> rows;
    for (const int64_t label : labels)
      rows.push_back(readout_.narrow(0, std::ranges::find(classes_, label) - classes_.begin(), 1));
    const at::Tensor h = at::relu(at::matmul(model_->features(batch).to(at::kDouble), random_));
    return at::matmul(h, at::cat(rows).t());
  }

 private:
  std::unique_ptr<models::Backbone> model_;
  std::vector<int64_t> classes_;
  at::Tensor random_, readout_;  // [d, M], [classes, M]
};

}  // namespace

const core::Schema<RanPacOptions>& ranpac_schema() {
  static const auto schema =
      core::Schema<RanPacOptions>()
          .field("features", &RanPacOptions::features)
          .min(1)
          .doc("M of the random projection; sums take 16 M^2 bytes, solving time grows with M^3");
  return schema;
}

double best_ridge(const RanPacSums& sums) {
  const auto [values, vectors] = at::linalg_eigh(sums.gram);
  const at::Tensor s = values.clamp_min(0);                                                           // [M]
  const at::Tensor q = at::matmul(sums.sums, vectors), held_q = at::matmul(sums.held_sums, vectors);  // [C, M]
  const at::Tensor held_g = at::matmul(at::matmul(vectors.t(), sums.held_gram), vectors);
  double best = 0, least = 0;
  for (int power = 8; power >= -8; --power) {
    const double ridge = std::pow(10.0, power);
    const at::Tensor w = q / (s + ridge);
    const double error = ((at::matmul(w, held_g) * w).sum() - 2 * (w * held_q).sum()).item<double>();
    if (power == 8 || error < least) best = ridge, least = error;
  }
  return best;
}

at::Tensor ridge_readout(const RanPacSums& sums, double ridge) {
  const at::Tensor gram = sums.gram + sums.held_gram, q = sums.sums + sums.held_sums;
  return at::linalg_solve(gram + ridge * at::eye(gram.size(0), gram.options()), q.t()).t();
}

State RanPac::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  State parts = before;
  for (const int64_t label : plan.stream.tasks[static_cast<size_t>(task)].classes) {
    RanPacClassSpec spec;
    plan_class(spec, plan, label);
    spec.features = plan.config.learners.ranpac.value_or(RanPacOptions{}).features;
    spec.projection_seed = core::derive_seed(static_cast<uint64_t>(plan.config.seed), "continual/ranpac");
    const auto id = plan.need(std::move(spec), class_request(plan, task, label));
    if (!id) parts.reset();
    if (parts) parts->push_back(*id);
  }
  if (!parts) return std::nullopt;
  // Runs of one order share the sums: nothing in them depends on the seed.
  const auto id =
      plan.need(RanPacSumsSpec{},
                {.label = fmt::format("order{}/sums{}", plan.stream.order, task), .inputs = *parts, .of_run = false});
  return id ? State({*id}) : std::nullopt;
}

std::vector<UnitKind> RanPac::unit_kinds() const {
  return {{RanPacClassSpec::kKind, sum_class, problem_of_class_sums},
          {RanPacSumsSpec::kKind, add_sums, problem_of_sums, /*merges=*/true}};
}

std::unique_ptr<Classifier> RanPac::classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec&,
                                               const LearnerSite& site) const {
  const RanPacSums sums = read_sums(*state.at(0));
  const core::Json& random = state.at(0)->meta().at("random");
  const at::Device device = site.context.device();
  return std::make_unique<RidgeClassifier>(
      site.base->shared_on(device), sums.classes,
      projection(site.base->width(), random.at("features").get<int64_t>(), random.at("seed").get<uint64_t>())
          .to(device),
      ridge_readout(sums, best_ridge(sums)).to(device));
}

int64_t RanPac::numbers_per_class(const ContinualConfig& config, const models::ModelFacts&) const {
  const int64_t m = config.learners.ranpac.value_or(RanPacOptions{}).features;
  return 2 * m * (m + 1);  // gram and sums, of training and of held-out examples
}

}  // namespace moraine::algorithms::continual
