#include "algorithms/flexmore/encoder.h"

#include <algorithm>
#include <cmath>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/mv.h>

#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"
#include "core/safetensors.h"

namespace moraine::algorithms::flexmore {
namespace {

int64_t special_token(const core::Json& tokenizer, const std::string& name, const std::string& origin) {
  const auto found = tokenizer.find("added_tokens");  // end() of what is no object, too
  if (found != tokenizer.end() && found->is_array())
    for (const auto& token : *found)
      if (token.is_object() && token.value("content", core::Json()) == name && token.contains("id") &&
          token["id"].is_number_integer())
        return token["id"].get<int64_t>();
  throw core::UserError(fmt::format("algorithms/flexmore: {} names no token '{}'", origin, name),
                        "the encoder must be a BERT-type model with its own tokenizer.json");
}

}  // namespace

DomainEncoder DomainEncoder::open(const std::filesystem::path& directory, at::Device device) {
  const auto file = directory / "tokenizer.json";
  const core::Json tokenizer = core::read_json(file);
  models::Bert bert = models::Bert::from_directory(directory, at::kFloat).on(device);
  if (bert.config().max_position_embeddings < kTokens + 2)
    throw core::UserError(fmt::format("algorithms/flexmore: the encoder in {} has {} positions, {} are needed",
                                      directory.string(), bert.config().max_position_embeddings, kTokens + 2));
  return DomainEncoder(std::move(bert), special_token(tokenizer, "[CLS]", file.string()),
                       special_token(tokenizer, "[SEP]", file.string()));
}

at::Tensor DomainEncoder::embed(const data::TextDataset& dataset, int64_t sequences) {
  const at::NoGradGuard no_grad;
  MORAINE_CHECK_EQ(dataset.seq_len(), kTokens);
  constexpr int64_t kBatch = 16;
  at::Tensor sum;
  for (int64_t first = 0; first < sequences; first += kBatch) {
    const int64_t count = std::min(kBatch, sequences - first);
    const at::Tensor rows = training_rows(dataset, /*seed=*/0, first, count, bert_.device()).narrow(1, 0, kTokens);
    const auto column = [&](int64_t id) { return at::full({count, 1}, id, rows.options()); };
    const at::Tensor part = bert_.embed(at::cat({column(cls_), rows, column(sep_)}, 1)).to(at::kDouble).sum(0);
    sum = sum.defined() ? sum + part : part;
  }
  return (sum / static_cast<double>(sequences)).to(at::kFloat).cpu();
}

std::string DomainEncoder::identity(const std::filesystem::path& directory) {
  const auto files = core::ShardedSafetensors::open(directory);
  std::string text = core::read_json(directory / "config.json").dump() + tokenizer(directory);
  for (const auto& tensor : files.tensors())
    text += fmt::format("\n{} {} {}", tensor.name, core::safetensors_name(tensor.dtype), core::sha256(tensor.data));
  return "encoder:" + core::sha256(text);
}

std::string DomainEncoder::tokenizer(const std::filesystem::path& directory) {
  return "hf:" + core::sha256(core::read_text(directory / "tokenizer.json"));
}

at::Tensor project(const at::Tensor& embedding, int64_t width, uint64_t seed) {
  const int64_t n = embedding.size(0), large = std::max(n, width), small = std::min(n, width);
  auto generator = at::detail::createCPUGenerator(seed);
  const at::Tensor basis = std::get<0>(at::linalg_qr(at::empty({large, small}, at::kDouble).normal_(0, 1, generator)));
  const at::Tensor x = embedding.to(at::kDouble);
  const at::Tensor y = n > width ? at::mv(basis.t(), x) * std::sqrt(static_cast<double>(n) / static_cast<double>(width))
                                 : at::mv(basis, x);
  return y.to(at::kFloat).contiguous();
}

}  // namespace moraine::algorithms::flexmore
