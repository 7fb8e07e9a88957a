#include "algorithms/adapters/calibration.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

constexpr int64_t kBytesAtOnce = int64_t{1} << 30;  // of gradients, or of moments

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

/// A slot's own function that adds up what it is given.
class InputMoments final : public models::SlotFunction {
 public:
  explicit InputMoments(const at::Tensor& weight)
      : sum_(at::zeros({weight.size(1), weight.size(1)}, weight.options().dtype(at::kDouble))) {}
  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass&) override {
    const at::Tensor rows = x.reshape({-1, x.size(-1)}).to(at::kDouble);
    sum_.addmm_(rows.t(), rows);
    return base.forward(x);
  }
  models::NamedTensors parameters() const override { return {}; }
  const at::Tensor& sum() const { return sum_; }

 private:
  at::Tensor sum_;
};

/// A Function made of the weight sits on some slots until the end of the scope.
template <typename Function>
class OnSlots {
 public:
  OnSlots(models::Backbone& model, std::span<const Target> targets) : model_(model), targets_(targets) {
    for (const Target& target : targets) {
      functions_.push_back(std::make_shared<Function>(model.base(target.slot.path).weight));
      model.attach(target.slot.path, functions_.back());
    }
  }
  ~OnSlots() {
    for (const Target& target : targets_) model_.detach(target.slot.path);
  }
  OnSlots(const OnSlots&) = delete;
  OnSlots& operator=(const OnSlots&) = delete;

  std::vector<at::Tensor> each(const at::Tensor& (Function::*of)() const) const {
    std::vector<at::Tensor> all;
    for (const auto& function : functions_) all.push_back((function.get()->*of)());
    return all;
  }

 private:
  models::Backbone& model_;
  std::span<const Target> targets_;
  std::vector<std::shared_ptr<Function>> functions_;
};

/// Gradients of the mean loss by the targets' weights.
std::vector<at::Tensor> gradients_of(models::Backbone& model, std::span<const Target> targets, const Loss& loss,
                                     const TrainConfig& train, int64_t examples) {
  const at::AutoGradMode with_gradients(true);
  const OnSlots<WeightLeaf> leaves(model, targets);
  const std::vector<at::Tensor> weights = leaves.each(&WeightLeaf::weight);
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
  for (const at::Tensor& weight : weights)  // the loss need not depend on every one
    gradients.push_back(weight.grad().defined() ? weight.grad().div(static_cast<double>(counted))
                                                : at::zeros_like(weight.detach()));
  return gradients;
}

/// Sums of x x^T over the targets' inputs. An example alone in its pass is not padded.
std::vector<at::Tensor> input_moments_of(models::Backbone& model, std::span<const Target> targets, const Loss& loss,
                                         const TrainConfig& train, int64_t examples) {
  const at::NoGradGuard no_grad;
  const OnSlots<InputMoments> moments(model, targets);
  for (int64_t done = 0; done < examples; ++done) (void)loss(done / train.batch_size, done % train.batch_size, 1);
  return moments.each(&InputMoments::sum);
}

/// How many of the targets from `first` on are taken together: one at least.
size_t group_size(std::span<const Target> targets, size_t first, int64_t (*bytes_of)(const models::Slot&)) {
  size_t size = 0;
  for (int64_t bytes = 0; first + size < targets.size(); ++size) {
    bytes += bytes_of(targets[first + size].slot);
    if (size > 0 && bytes > kBytesAtOnce) break;
  }
  return size;
}

int64_t gradient_bytes(const models::Slot& slot) { return 4 * slot.in * slot.out; }
int64_t moment_bytes(const models::Slot& slot) { return 8 * slot.in * slot.in; }

using OfGroup = std::function<std::vector<at::Tensor>(std::span<const Target> targets, int64_t examples)>;

/// What `of_group` finds for some targets, for all of them in groups. `what` names it in messages.
Calibration::OfTargets in_groups(OfGroup of_group, int64_t (*bytes_of)(const models::Slot&), const char* what) {
  return [of_group = std::move(of_group), bytes_of, what](std::span<const Target> targets, int64_t examples,
                                                          const Calibration::Each& each) {
    for (size_t first = 0; first < targets.size();) {
      const auto group = targets.subspan(first, group_size(targets, first, bytes_of));
      const std::vector<at::Tensor> found = of_group(group, examples);
      for (size_t i = 0; i < group.size(); ++i) {
        if (!at::isfinite(found[i]).all().item<bool>())
          throw core::NumericError(fmt::format("algorithms/adapters: the {} of the first examples is not finite: {}",
                                               what, group[i].slot.path),
                                   "look at the first training examples, or use dtype: float32");
        each(first + i, found[i]);
      }
      first += group.size();
    }
  };
}

}  // namespace

Calibration calibration_of(models::Backbone& model, Loss loss, const TrainConfig& train) {
  const OfGroup gradients = [&model, loss, train](std::span<const Target> targets, int64_t examples) {
    return gradients_of(model, targets, loss, train, examples);
  };
  const OfGroup moments = [&model, loss, train](std::span<const Target> targets, int64_t examples) {
    return input_moments_of(model, targets, loss, train, examples);
  };
  return {in_groups(gradients, gradient_bytes, "gradient"),
          train.learning_rate / static_cast<double>(std::max<int64_t>(1, train.warmup_steps)),
          in_groups(moments, moment_bytes, "sum over inputs")};
}

}  // namespace moraine::algorithms::adapters
