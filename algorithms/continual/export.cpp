// States of learners as PEFT and Hugging Face directories.
#include <algorithm>
#include <numeric>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor.h>

#include "algorithms/classifier_files.h"
#include "algorithms/continual/continual.h"
#include "algorithms/continual/training.h"
#include "core/error.h"
#include "core/registry.h"

namespace moraine::algorithms::continual {
namespace {

// What learners ask of a worker to put a state together, where nothing is trained.
class ReadingContext final : public WorkerContext {
 public:
  explicit ReadingContext(const RunState& state) : state_(state) {}
  core::ArtefactPtr artefact(const std::string& id) override { return state_.artefact(id); }
  TrainOutcome train(TrainJob) override { throw core::InternalError("training while a state is exported"); }
  void metric(const std::string&, int64_t, double) override {}
  void progress(double, double) override {}
  at::Device device() const override { return at::kCPU; }
  std::shared_ptr<void> cached(const std::string&, const std::function<std::shared_ptr<void>()>& make) override {
    return make();
  }

 private:
  const RunState& state_;
};

// Rows in the order of labels: transformers numbers classes from 0.
objectives::Head by_label(const Head& head, std::vector<int64_t>& labels) {
  std::vector<int64_t> order(head.labels.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, {}, [&](int64_t row) { return head.labels[static_cast<size_t>(row)]; });
  for (const int64_t row : order) labels.push_back(head.labels[static_cast<size_t>(row)]);
  const at::Tensor rows = at::tensor(order, at::kLong);
  objectives::Head out;
  out.weight = at::index_select(head.weight.cpu(), 0, rows);
  out.bias = at::index_select(head.bias.cpu(), 0, rows);
  return out;
}

}  // namespace

struct Continual::Exported {
  const Track* track = nullptr;
  std::vector<std::string> state = {};
  std::string name = {};
};

Continual::Exported Continual::find_exported(const Stages& stages, const std::string& what) const {
  std::vector<std::string> known;
  for (const Track& track : stages.tracks) {
    const bool alone = streams_.size() * config_.all_seeds().size() == 1;
    for (size_t task = track.states.size(); task-- > 0;) {
      const std::string name = fmt::format("{}/task{}", track.name(), task);
      const bool last = task + 1 == track.states.size();
      if (what != name && !(last && (what == track.name() || (alone && what == track.learner->name())))) continue;
      if (!track.states[task])
        throw core::UserError(fmt::format("algorithms/continual: {} is not trained yet", name),
                              "finish the run, then export");
      return {&track, *track.states[task], name};
    }
    known.push_back(track.name());
  }
  throw core::UserError(what.empty() ? "algorithms/continual: the run has several results"
                                     : fmt::format("algorithms/continual: the run has no result '{}'", what),
                        "name one with --what, a task with /task<i> behind it: " +
                            (what.empty() ? fmt::format("{}, ...", known.front()) : core::name_hint(what, known)));
}

void Continual::export_as(const RunState& state, const ExportRequest& request) const {
  const at::NoGradGuard no_grad;
  if (request.format != "peft" && request.format != "hf")
    throw core::UserError(fmt::format("algorithms/continual: a result has no form '{}'", request.format),
                          "--to peft: adapter and head; --to hf: the model");
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  const Exported found = find_exported(stages, request.what);
  ReadingContext context(state);
  LearnerSite site{config_, context, load_backbone(site_spec(stages, nullptr), context), nullptr, nullptr};
  EvaluateSpec spec;
  spec.head_seed = head_seed(found.track->seed);
  found.track->learner->describe(config_, found.track->seed, spec);
  std::vector<core::ArtefactPtr> parts;
  for (const auto& id : found.state) parts.push_back(state.artefact(id));
  const Exportable result = found.track->learner->exportable(parts, spec, site);

  std::vector<int64_t> labels;
  const objectives::Head head = by_label(result.head, labels);
  HeadOnModel with_head{model_, head, {}, "continual: " + found.name};
  for (const int64_t label : labels) with_head.classes.push_back(class_names_.at(static_cast<size_t>(label)));
  if (request.format == "hf")
    return write_fitted_model(
        result.adapter ? *result.model->changed_by(result.adapter->deltas(*result.model)) : *result.model, with_head,
        config_.model.path, request.directory);
  if (!result.adapter || !result.on_backbone)
    throw core::UserError(fmt::format("algorithms/continual: {} is more than one adapter on the backbone", found.name),
                          "--to hf writes the model");
  result.adapter->save(request.directory, request.base_model.empty() ? config_.model.path : request.base_model,
                       peft_classifier(with_head));
}

}  // namespace moraine::algorithms::continual
