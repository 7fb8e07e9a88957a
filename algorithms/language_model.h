#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "algorithms/worker_context.h"
#include "core/config.h"
#include "core/json.h"
#include "data/text_dataset.h"
#include "models/decoder.h"

namespace moraine::algorithms {

// What methods on causal language models share: the public model by identity, data sets by fingerprint, the training
// loss.

/// Identity of a model directory, "dir:<sha256>": its configuration and every tensor's bytes; file names and sharding
/// do not matter. Reads the whole model.
std::string model_identity(const std::filesystem::path& directory, const core::Json& config);

/// The model of a directory in `dtype` on the worker's device, loaded once per worker. Throws UserError if `expected`,
/// the identity in the unit, is not `own`, the identity of this site's directory.
std::shared_ptr<models::Decoder> cached_model(const std::filesystem::path& directory, const std::string& expected,
                                              const std::string& own, at::ScalarType dtype, WorkerContext& context);

/// A split of a prepared text file, as units name it.
struct TextSpec {
  std::string name = {};  // which of the recipe's files; its path is the worker's own
  std::string fingerprint = {};
  std::string split = "train";
  int64_t seq_len = 1;
  std::string tokenizer = {};
};
const core::Schema<TextSpec>& text_schema();

/// What `spec`, a TextSpec as JSON, names, opened once per worker. Throws UserError if the file has changed since the
/// run was planned.
std::shared_ptr<data::TextDataset> cached_dataset(const std::filesystem::path& path, const core::Json& spec,
                                                  WorkerContext& context);

/// TextDataset::training_rows as a tensor, [count, seq_len + 1] int64 on `device`.
at::Tensor training_rows(const data::TextDataset& dataset, uint64_t seed, int64_t first, int64_t count,
                         at::Device device);

/// Loss of `model`, which must outlive the function, on the training batches of a data set.
std::function<TrainJob::MicroLoss(int64_t step, int64_t first, int64_t count)> language_model_loss(
    models::Decoder& model, std::shared_ptr<data::TextDataset> dataset, uint64_t seed, int64_t batch_size,
    at::Device device);

/// Points of a training curve as [[step, loss], ...], every kCurveEvery steps whatever log_every is.
core::Json curve_json(const TrainOutcome& outcome);

/// Writes config.json and model.safetensors, or shards of it (models/checkpoint.h).
void write_model_directory(const std::filesystem::path& directory, const core::Json& config,
                           models::NamedTensors tensors);

}  // namespace moraine::algorithms
