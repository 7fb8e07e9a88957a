#include "algorithms/continual/er/er.h"

#include <algorithm>
#include <map>

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include "algorithms/continual/config.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/permutation.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {
namespace {

constexpr const char* kRows = "buffer.rows";

/// One task beside the buffer that the input holds.
struct TrainErSpec : TrainSpec {
  static constexpr const char* kKind = "train_er";
  static constexpr int64_t kVersion = 1;
  int64_t buffer_size = 0;
  uint64_t buffer_seed = 0;
  static const core::Schema<TrainErSpec>& schema() {
    static const auto schema = [] {
      core::Schema<TrainErSpec> s;
      add_train_fields(s);
      s.field("buffer_size", &TrainErSpec::buffer_size).field("buffer_seed", &TrainErSpec::buffer_seed);
      return s;
    }();
    return schema;
  }
};

std::vector<int64_t> buffer_in(const core::Artefact& artefact) {
  const at::Tensor rows = models::copy_of(*artefact.file().find(kRows));
  return {rows.const_data_ptr<int64_t>(), rows.const_data_ptr<int64_t>() + rows.numel()};
}

core::ArtefactPtr train_er(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(TrainErSpec::schema(), unit.spec);
  Trainee trainee = Trainee::of(unit, spec, site);
  const std::vector<int64_t> buffer = trainee.before ? buffer_in(*trainee.before) : std::vector<int64_t>();
  TrainingHooks hooks;
  const TrainConfig& own = training_in(site.config.learners.er, site.config.train);
  if (!buffer.empty())
    hooks.replayed = [&buffer, batch_size = train_config(spec.train, own).batch_size,
                      seed = core::derive_seed(spec.seed, "er/replayed")](int64_t step, int64_t first, int64_t count) {
      return data::batch_of(buffer, seed, step * batch_size + first, count);
    };
  std::vector<int64_t> known = rows_of(spec, *site.stream);
  known.insert(known.end(), buffer.begin(), buffer.end());
  std::vector<int64_t> kept = balanced_buffer(known, site.examples->set().train, spec.buffer_size, spec.buffer_seed);
  const auto size = static_cast<int64_t>(kept.size());
  const Extra extra = {{{"buffer", {{"examples", size}, {"bytes", site.examples->stored_bytes(kept)}}}},
                       {{kRows, at::from_blob(kept.data(), {size}, at::kLong).clone()}}};
  return train_tasks(unit.kind, spec, trainee, site, own, hooks, extra);
}

std::optional<std::string> problem_of_er(const Unit& unit, const core::Artefact& artefact, int64_t width) {
  if (auto problem = problem_of_trained(unit, artefact, width)) return problem;
  const auto* rows = artefact.file().find(kRows);
  if (rows == nullptr || rows->dtype != core::DType::kI64 || rows->shape.size() != 1 ||
      rows->shape[0] > unit.spec.at("buffer_size").get<int64_t>())
    return "has no buffer of the size that was asked for";
  return std::nullopt;
}

}  // namespace

const core::Schema<ErOptions>& er_schema() {
  using C = ErOptions;
  static const auto schema = [] {
    core::Schema<C> s;
    add_training_options(s)
        .field("buffer_size", &C::buffer_size)
        .min(1)
        .unit("examples")
        .doc("Examples that are kept, of all classes seen together");
    return s;
  }();
  return schema;
}

std::vector<int64_t> balanced_buffer(const std::vector<int64_t>& rows, const std::vector<int64_t>& label_of,
                                     int64_t size, uint64_t seed) {
  std::map<int64_t, std::vector<std::pair<uint64_t, int64_t>>> by_class;
  for (const int64_t row : rows)
    by_class[label_of.at(static_cast<size_t>(row))].emplace_back(core::derive_seed(seed, fmt::format("row{}", row)),
                                                                 row);
  const auto classes = static_cast<int64_t>(by_class.size());
  std::vector<int64_t> kept;
  int64_t place = 0;
  for (auto& [label, drawn] : by_class) {
    std::ranges::sort(drawn);
    const auto share = static_cast<size_t>(size / classes + (place++ < size % classes ? 1 : 0));
    for (size_t i = 0; i < std::min(share, drawn.size()); ++i) kept.push_back(drawn[i].second);
  }
  std::ranges::sort(kept);
  return kept;
}

State Er::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  TrainErSpec spec;
  spec.buffer_size = plan.config.learners.er.value_or(ErOptions{}).buffer_size;
  spec.buffer_seed = core::derive_seed(static_cast<uint64_t>(plan.seed), "continual/buffer");
  return after_training(plan, task, before, std::move(spec), /*local_logits=*/false, task > 0 ? 2 : 1);
}

std::vector<UnitKind> Er::unit_kinds() const { return {{TrainErSpec::kKind, train_er, problem_of_er}}; }

TrainingOptions Er::options(const ContinualConfig& config) const { return config.learners.er.value_or(ErOptions{}); }

}  // namespace moraine::algorithms::continual
