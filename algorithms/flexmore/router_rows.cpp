#include "algorithms/flexmore/router_rows.h"

#include <algorithm>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::flexmore {
namespace {

// Least squares row: w minimises E_public (w x)^2 + E_domain (w x - logit)^2 + ridge |w|^2, so that the domain's tokens
// stand out against public ones in closed form and without a bias, and rows of different owners have one scale. Our
// choice (inferred): FlexOlmo's mean embeddings say nothing about the scale of a token's logit.
at::Tensor regression_row(const at::Tensor& mean, const at::Tensor& own, const at::Tensor& open, double logit) {
  const at::Tensor moments = (own + open).to(at::kDouble);
  const int64_t width = moments.size(0);
  const double ridge = 1e-3 * moments.diagonal().mean().item<double>();
  const at::Tensor row =
      at::linalg_solve(moments + ridge * at::eye(width, moments.options()), mean.to(at::kDouble) * logit);
  return row.to(at::kFloat).contiguous();
}

at::Tensor unit_norm(const at::Tensor& row, double norm) {
  const double length = row.to(at::kDouble).norm().item<double>();
  if (length == 0)
    throw core::NumericError("algorithms/flexmore: a domain embedding is zero", "use router.init: random");
  return row * (norm / length);
}

// Rows of a router without embeddings: normal(0, 0.002) clipped to [-0.006, 0], as FlexOlmo initialises them.
at::Tensor random_row(int64_t width, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  return at::empty({width}, at::kFloat).normal_(0, 0.002, generator).clamp_(-0.006, 0);
}

}  // namespace

Embedding domain_embedding(models::Decoder& model, const data::TextDataset& dataset, int64_t sequences,
                           bool second_moment, WorkerContext& context) {
  const at::NoGradGuard no_grad;
  constexpr int64_t kBatch = 16;
  std::vector<at::Tensor> sums, squares;
  int64_t tokens = 0;
  for (int64_t first = 0; first < sequences; first += kBatch) {
    const int64_t count = std::min(kBatch, sequences - first);
    const at::Tensor batch = training_rows(dataset, /*seed=*/0, first, count, context.device());
    const auto inputs = model.ffn_inputs(batch.narrow(1, 0, dataset.seq_len()).contiguous());
    sums.resize(inputs.size());
    squares.resize(second_moment ? inputs.size() : 0);
    for (size_t l = 0; l < inputs.size(); ++l) {
      const at::Tensor x = inputs[l].to(at::kDouble).flatten(0, 1);
      const auto add = [](at::Tensor& total, const at::Tensor& part) { total = total.defined() ? total + part : part; };
      add(sums[l], x.sum(0));
      if (second_moment) add(squares[l], at::matmul(x.t(), x));
    }
    tokens += count * dataset.seq_len();
  }
  for (auto* totals : {&sums, &squares})
    for (auto& total : *totals) total = (total / static_cast<double>(tokens)).to(at::kFloat).cpu();
  return {sums, squares};
}

Embedding mean_embedding(std::vector<Embedding> embeddings) {
  Embedding mean = std::move(embeddings.front());
  const auto count = static_cast<double>(embeddings.size());
  const auto average = [&](std::vector<at::Tensor> Embedding::*part) {
    for (size_t l = 0; l < (mean.*part).size(); ++l) {
      at::Tensor& sum = (mean.*part)[l];
      for (size_t i = 1; i < embeddings.size(); ++i) sum = sum + (embeddings[i].*part)[l];
      sum = sum / count;
    }
  };
  if (embeddings.size() > 1) average(&Embedding::mean), average(&Embedding::second_moment);
  return mean;
}

std::vector<at::Tensor> public_rows(const core::Artefact& embedding, const PublicRowsSpec& spec) {
  const at::Tensor rows = models::copy_of(*embedding.file().find("embedding"));
  std::vector<at::Tensor> out;
  for (int64_t l = 0; l < rows.size(0); ++l) {
    if (spec.init == "encoder") {
      out.push_back(models::copy_of(*embedding.file().find("encoded")));  // one vector for all layers, as FlexOlmo
    } else if (spec.init == "embedding") {
      out.push_back(unit_norm(rows[l], spec.norm).contiguous());
    } else if (spec.init == "centered" || spec.init == "regression") {
      out.push_back(at::zeros({rows.size(1)}, at::kFloat));
    } else {
      out.push_back(random_row(rows.size(1), core::derive_seed(spec.seed, fmt::format("router/public/{}", l))));
    }
  }
  return out;
}

at::Tensor first_row(const TrainExpertSpec& spec, const RowSources& sources, size_t l) {
  const auto layer = static_cast<int64_t>(l);
  const at::Tensor& mean = sources.own.mean[l];
  const std::string& init = spec.public_rows.init;
  if (init == "regression")
    return regression_row(mean, sources.own.second_moment[l], sources.public_moment[layer], spec.rows.logit);
  if (init == "encoder") return sources.encoded;
  if (init == "random") return random_row(mean.size(0), core::derive_seed(spec.seed, fmt::format("router/{}", l)));
  return unit_norm(init == "centered" ? mean - sources.public_mean[layer] : mean, spec.rows.norm);
}

}  // namespace moraine::algorithms::flexmore
