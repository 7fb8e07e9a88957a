#include "algorithms/continual/head.h"

#include <algorithm>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include "core/error.h"
#include "core/hash.h"
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

at::Tensor HeadClassifier::scores(const models::Input& batch, std::span<const int64_t> labels, std::optional<int64_t>) {
  const auto [weight, bias] = head_.rows(labels, seed_, model_->width(), model_->device());
  return at::linear(model_->features(batch), weight, bias);
}

}  // namespace moraine::algorithms::continual
