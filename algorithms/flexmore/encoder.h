#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include <ATen/core/Tensor.h>

#include "data/text_dataset.h"
#include "models/bert.h"

namespace moraine::algorithms::flexmore {

/// A text encoder that says what a domain is like, for `router.init: encoder`: a Hugging Face directory of a BERT-type
/// model with its tokenizer.json. FlexOlmo (arXiv 2507.07024) embeds domains with GritLM, whose width is the model's;
/// another width is brought to the model's by project() (inferred).
class DomainEncoder {
 public:
  /// Tokens of one text between [CLS] and [SEP] (inferred: FlexOlmo embeds whole documents).
  static constexpr int64_t kTokens = 126;

  /// Throws UserError if the directory is no encoder, its tokenizer.json names no [CLS] and [SEP], or it has fewer than
  /// kTokens + 2 positions.
  static DomainEncoder open(const std::filesystem::path& directory, at::Device device);

  /// Mean of the unit-length embeddings of the first `sequences` training sequences, [n] float32 on the CPU; not
  /// normalised, as FlexOlmo's rows. `dataset` has sequences of kTokens tokens of the encoder's tokeniser. Not
  /// thread-safe.
  at::Tensor embed(const data::TextDataset& dataset, int64_t sequences);

  /// "encoder:<sha256>" of the configuration, the tokeniser and every tensor. Reads the whole model.
  static std::string identity(const std::filesystem::path& directory);
  /// What prepare_text.py calls the directory's tokeniser: "hf:<sha256 of tokenizer.json>".
  static std::string tokenizer(const std::filesystem::path& directory);

 private:
  DomainEncoder(models::Bert bert, int64_t cls, int64_t sep) : bert_(std::move(bert)), cls_(cls), sep_(sep) {}
  models::Bert bert_;
  int64_t cls_, sep_;
};

/// [n] -> [width] by a random orthogonal projection that depends on n, width and seed alone: a random
/// `width`-dimensional subspace scaled by sqrt(n / width) when n > width, so that lengths are kept on average; an
/// isometry otherwise.
at::Tensor project(const at::Tensor& embedding, int64_t width, uint64_t seed);

}  // namespace moraine::algorithms::flexmore
