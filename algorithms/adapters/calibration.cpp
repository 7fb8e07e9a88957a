#include "algorithms/adapters/calibration.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>

#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

constexpr int64_t kNumbersAtOnce = int64_t{1} << 28;  // of gradients: 1 GiB

using Loss = std::function<TrainJob::MicroLoss(int64_t step, int64_t first, int64_t count)>;

/// A slot's own function over a copy of its weight that takes gradients.
class WeightLeaf final : public models::SlotFunction {
 public:
  explicit WeightLeaf(const at::Tensor& weight)
      : weight_(weight.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).set_requires_grad(true)) {}
  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass&) override {
    return models::apply_linear(x, weight_, base.bias);
  }
  models::NamedTensors parameters() const override { return {{"weight", weight_}}; }
  const at::Tensor& weight() const { return weight_; }

 private:
  at::Tensor weight_;
};

/// WeightLeaf on some slots until the end of the scope.
class WeightLeaves {
 public:
  WeightLeaves(models::Backbone& model, std::span<const Target> targets) : model_(model), targets_(targets) {
    for (const Target& target : targets) {
      leaves_.push_back(std::make_shared<WeightLeaf>(model.base(target.slot.path).weight));
      model.attach(target.slot.path, leaves_.back());
    }
  }
  ~WeightLeaves() {
    for (const Target& target : targets_) model_.detach(target.slot.path);
  }
  WeightLeaves(const WeightLeaves&) = delete;
  WeightLeaves& operator=(const WeightLeaves&) = delete;

  std::vector<at::Tensor> weights() const {
    std::vector<at::Tensor> all;
    for (const auto& leaf : leaves_) all.push_back(leaf->weight());
    return all;
  }

 private:
  models::Backbone& model_;
  std::span<const Target> targets_;
  std::vector<std::shared_ptr<WeightLeaf>> leaves_;
};

/// Gradients of the mean loss by the targets' weights, undefined where the loss does not depend on one.
std::vector<at::Tensor> gradients_of(models::Backbone& model, std::span<const Target> targets, const Loss& loss,
                                     const TrainConfig& train, int64_t examples) {
  const at::AutoGradMode with_gradients(true);
  const WeightLeaves leaves(model, targets);
  const std::vector<at::Tensor> weights = leaves.weights();
  const int64_t most = train.micro_batch_size > 0 ? train.micro_batch_size : train.batch_size;
  int64_t counted = 0;
  for (int64_t done = 0; done < examples;) {
    const int64_t step = done / train.batch_size, first = done % train.batch_size;
    const int64_t count = std::min({most, train.batch_size - first, examples - done});
    const TrainJob::MicroLoss part = loss(step, first, count);
    part.sum.backward({}, std::nullopt, false, weights);
    counted += part.count;
    done += count;
  }
  if (counted == 0)
    throw core::UserError(fmt::format("algorithms/adapters: the first {} examples have no targets", examples),
                          "raise options.examples, or check that the training data is not all padding");
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& weight : weights)
    gradients.push_back(weight.grad().defined() ? weight.grad().div(static_cast<double>(counted)) : at::Tensor());
  return gradients;
}

/// How many of the targets from `first` on are taken together: one at least.
size_t group_size(std::span<const Target> targets, size_t first) {
  size_t size = 0;
  for (int64_t numbers = 0; first + size < targets.size(); ++size) {
    const models::Slot& slot = targets[first + size].slot;
    numbers += slot.in * slot.out;
    if (size > 0 && numbers > kNumbersAtOnce) break;
  }
  return size;
}

}  // namespace

Calibration calibration_of(models::Backbone& model, Loss loss, const TrainConfig& train) {
  const auto gradients = [&model, loss = std::move(loss), train](std::span<const Target> targets, int64_t examples,
                                                                 const Calibration::Each& each) {
    for (size_t first = 0; first < targets.size();) {
      const auto group = targets.subspan(first, group_size(targets, first));
      const std::vector<at::Tensor> found = gradients_of(model, group, loss, train, examples);
      for (size_t i = 0; i < group.size(); ++i) {
        const models::Slot& slot = group[i].slot;
        const at::Tensor gradient = found[i].defined() ? found[i] : at::zeros({slot.out, slot.in}, at::kFloat);
        if (!at::isfinite(gradient).all().item<bool>())
          throw core::NumericError(
              fmt::format("algorithms/adapters: the gradient of the first examples is not finite: {}", slot.path),
              "look at the first training examples, or use dtype: float32");
        each(first + i, gradient);
      }
      first += group.size();
    }
  };
  return {gradients, train.learning_rate / static_cast<double>(std::max<int64_t>(1, train.warmup_steps))};
}

}  // namespace moraine::algorithms::adapters
