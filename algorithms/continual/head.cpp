#include "algorithms/continual/head.h"

#include <algorithm>
#include <map>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include "algorithms/continual/config.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/permutation.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {

Head Head::read(const core::Artefact& artefact, at::Device device) {
  Head head;
  head.labels = artefact.meta().at("classes").get<std::vector<int64_t>>();
  head.weight = models::copy_of(*artefact.file().find("head.weight")).to(device);
  head.bias = models::copy_of(*artefact.file().find("head.bias")).to(device);
  return head;
}

std::pair<at::Tensor, at::Tensor> Head::rows(std::span<const int64_t> wanted, uint64_t seed, int64_t width,
                                             at::Device device) const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> weights, biases;
  for (const int64_t label : wanted) {
    const auto at = std::find(labels.begin(), labels.end(), label);
    if (at != labels.end()) {
      weights.push_back(weight.narrow(0, at - labels.begin(), 1));
      biases.push_back(bias.narrow(0, at - labels.begin(), 1));
    } else {
      auto generator = at::detail::createCPUGenerator(core::derive_seed(seed, fmt::format("class{}", label)));
      weights.push_back(at::empty({1, width}, at::kFloat).normal_(0, 0.02, generator).to(device));
      biases.push_back(at::zeros({1}, at::TensorOptions().dtype(at::kFloat).device(device)));
    }
  }
  return {at::cat(weights), at::cat(biases)};
}

void Head::set(std::span<const int64_t> trained, const at::Tensor& weight_rows, const at::Tensor& bias_rows) {
  const at::NoGradGuard no_grad;
  std::vector<int64_t> all = labels;
  for (const int64_t label : trained)
    if (std::find(all.begin(), all.end(), label) == all.end()) all.push_back(label);
  std::vector<at::Tensor> weights, biases;
  for (const int64_t label : all) {
    const auto fresh = std::find(trained.begin(), trained.end(), label);
    const auto old = std::find(labels.begin(), labels.end(), label);
    const bool is_fresh = fresh != trained.end();
    const int64_t row = is_fresh ? fresh - trained.begin() : old - labels.begin();
    weights.push_back((is_fresh ? weight_rows : weight).detach().narrow(0, row, 1));
    biases.push_back((is_fresh ? bias_rows : bias).detach().narrow(0, row, 1));
  }
  labels = std::move(all);
  weight = at::cat(weights);
  bias = at::cat(biases);
}

core::Json training_spec(const TrainConfig& train, const StreamFacts& stream, int64_t first_task, int64_t last_task,
                         bool local_logits, int64_t seed) {
  core::Json tasks = core::Json::array();
  for (int64_t task = first_task; task <= last_task; ++task) tasks.push_back(task);
  const auto& own = stream.tasks[static_cast<size_t>(last_task)].classes;
  return {{"stream", {{"order", stream.order}, {"hash", stream.hash}}},
          {"tasks", tasks},
          {"logits", local_logits ? own : stream.classes_until(last_task)},
          {"train", train_identity(train)},
          {"seed", core::derive_seed(static_cast<uint64_t>(seed), fmt::format("continual/task{}", last_task))},
          {"head_seed", head_seed(seed)}};
}

double trained_images(const TrainConfig& train) { return static_cast<double>(train.steps * train.batch_size); }

TrainConfig scaled_training(const TrainConfig& train, const core::Json& spec) {
  TrainConfig scaled = train;
  scaled.steps *= static_cast<int64_t>(spec.at("tasks").size());
  return scaled;
}

core::ArtefactPtr train_head_and(const std::string& kind, const Unit& unit, const LearnerSite& site,
                                 const TrainConfig& own, models::NamedTensors parameters, Head head, models::Vit& vit,
                                 const std::function<models::NamedTensors()>& state,
                                 std::vector<ParameterGroup> groups) {
  const TrainConfig train = scaled_training(train_config(unit.spec.at("train"), own), unit.spec);
  const auto logits = unit.spec.at("logits").get<std::vector<int64_t>>();
  const auto seed = unit.spec.at("seed").get<uint64_t>();
  std::map<int64_t, int64_t> target_of;
  for (size_t i = 0; i < logits.size(); ++i) target_of[logits[i]] = static_cast<int64_t>(i);
  std::vector<int64_t> rows;
  for (const int64_t task : unit.spec.at("tasks").get<std::vector<int64_t>>()) {
    const auto& of_task = site.stream->tasks[static_cast<size_t>(task)].train;
    rows.insert(rows.end(), of_task.begin(), of_task.end());
  }
  auto [weight, bias] = head.rows(logits, unit.spec.at("head_seed").get<uint64_t>(), site.base->config().hidden_size,
                                  site.images->device());
  weight.set_requires_grad(true);
  bias.set_requires_grad(true);
  parameters.emplace_back("head.bias", bias);
  parameters.emplace_back("head.weight", weight);
  std::sort(parameters.begin(), parameters.end(), [](const auto& a, const auto& b) { return a.first < b.first; });

  TrainJob job{train, std::move(parameters), nullptr, /*tokens_per_sequence=*/1, std::move(groups)};
  job.loss = [&, batch_size = train.batch_size](int64_t step, int64_t first, int64_t count) {
    const auto batch = data::batch_of(rows, seed, step * batch_size + first, count);
    std::vector<int64_t> targets = site.images->labels("train", batch);
    for (int64_t& label : targets) label = target_of.at(label);
    const at::Tensor expected = at::from_blob(targets.data(), {count}, at::kLong)
                                    .to(site.images->device(), /*non_blocking=*/false, /*copy=*/true);
    const models::PassScope scope(vit, {.training = true, .step = step, .first = first, .seed = seed});
    const at::Tensor scores = at::linear(vit.features(site.images->batch("train", batch)), weight, bias);
    return TrainJob::MicroLoss{at::cross_entropy_loss(scores, expected, {}, at::Reduction::Sum), count};
  };
  const TrainOutcome outcome = site.context.train(std::move(job));
  head.set(logits, weight, bias);
  models::NamedTensors tensors = state();
  tensors.emplace_back("head.bias", head.bias);
  tensors.emplace_back("head.weight", head.weight);
  for (auto& [name, tensor] : tensors) tensor = tensor.detach().cpu();
  std::vector<at::Tensor> keep;
  return core::Artefact::create(kind, {{"classes", head.labels}, {"curve", curve_json(outcome)}},
                                models::views_of(tensors, keep));
}

at::Tensor HeadClassifier::scores(const at::Tensor& images, std::span<const int64_t> labels) {
  const auto [weight, bias] = head_.rows(labels, seed_, width_, device_);
  return at::linear(features(images), weight, bias);
}

}  // namespace moraine::algorithms::continual
