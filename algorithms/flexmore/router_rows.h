#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/flexmore/units.h"
#include "algorithms/worker_context.h"
#include "core/artefact.h"
#include "data/text_dataset.h"
#include "models/decoder.h"

namespace moraine::algorithms::flexmore {

/// What a domain looks like to the routers: per layer, mean [d] and (when asked for) second moment E[x x^T] [d, d] of
/// the FFN inputs over the first training sequences, float32 on the CPU.
struct Embedding {
  std::vector<at::Tensor> mean, second_moment;
};

Embedding domain_embedding(models::Decoder& model, const data::TextDataset& dataset, int64_t sequences,
                           bool second_moment, WorkerContext& context);

/// The mean of the domains' embeddings: what one expert for all of them looks like to the router.
Embedding mean_embedding(std::vector<Embedding> embeddings);

/// Rows [d] of the public expert, one per layer, out of the artefact of kind "embedding".
std::vector<at::Tensor> public_rows(const core::Artefact& embedding, const PublicRowsSpec& spec);

/// What an expert's own text and the public one look like to its router rows.
struct RowSources {
  Embedding own;
  at::Tensor public_mean, public_moment;  // [L, d]; [L, d, d] for regression
  at::Tensor encoded;                     // [d] for encoder
};

/// The row of layer `l` before training, [d] float32 on the CPU. Throws NumericError if an embedding is zero.
at::Tensor first_row(const TrainExpertSpec& spec, const RowSources& sources, size_t l);

}  // namespace moraine::algorithms::flexmore
