#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/safetensors.h"
#include "models/backbone.h"
#include "models/bert_config.h"

namespace moraine::models {

/// A bidirectional text encoder: word, position and type embeddings, post-norm blocks, an optional pooler and
/// classifier.
///
/// Slots, by Hugging Face module path: "encoder.layer.N.attention.self.{query,key,value}", ".attention.output.dense",
/// ".intermediate.dense", ".output.dense", then "pooler.dense" and "classifier" where there are any; with a classifier
/// all but the last begin with "bert.". All tokens are of type 0. Dropout is not applied, in training neither. `mask`
/// is [B, T] bool, true on real tokens; undefined = no padding. What padding holds does not matter beyond rounding.
/// Threads and frozen weights as Backbone. Source: transformers 4.57 (bert); BERT (arXiv 1810.04805).
class Bert final : public Backbone {
 public:
  /// Random weights: normal(0, initializer_range), norms 1, biases 0; each tensor from `seed` and its name alone.
  static Bert from_config(const BertConfig& config, uint64_t seed, at::ScalarType dtype);
  /// config.json + safetensors of a BertModel, a BertForSequenceClassification or a model of pre-training, whose heads
  /// ("cls.*") are left out, or of a sentence-transformers directory around one; old names of norms (gamma, beta) too.
  /// Other keys and shapes are checked as match_weights() does; `dtype` as there.
  static Bert from_directory(const std::filesystem::path& directory, std::optional<at::ScalarType> dtype);
  /// From named tensors that somebody else loaded; they say whether there are a pooler and a classifier.
  static Bert from_tensors(BertConfig config, const std::vector<core::TensorView>& tensors, const std::string& origin,
                           std::optional<at::ScalarType> dtype, const std::shared_ptr<const void>& owner = nullptr);
  /// Shares this model's weights, frozen; slots start empty.
  Bert share() const { return on(device()); }
  Bert on(at::Device device) const;
  /// The same without its classifier; the pooler stays.
  Bert without_classifier() const;

  /// tokens [B, T] int64 -> last hidden states [B, T, d]. Throws UserError on a token outside the vocabulary, more
  /// tokens than positions, or a row without a real token.
  at::Tensor hidden_states(const at::Tensor& tokens, const at::Tensor& mask = {});
  /// tanh(pooler(first token)) [B, d]. Throws InternalError without a pooler.
  at::Tensor pooled(const at::Tensor& tokens, const at::Tensor& mask = {});
  /// classifier(pooled) [B, num_labels]. Throws InternalError without a classifier.
  at::Tensor logits(const at::Tensor& tokens, const at::Tensor& mask = {});
  /// Mean of the real tokens' hidden states, scaled to length 1, [B, d]: what sentence-transformers calls mean pooling
  /// and normalisation. `tokens` hold [CLS] and [SEP] already.
  at::Tensor embed(const at::Tensor& tokens, const at::Tensor& mask = {});

  at::Tensor features(const Input& input) override;
  int64_t width() const override { return config_.hidden_size; }
  core::Json config_json() const override { return config_.to_json(); }

  const BertConfig& config() const { return config_; }

 private:
  struct Norm {
    at::Tensor weight, bias;
  };
  struct Block {
    Norm attention, output;
    size_t first_slot = 0;
  };
  Bert(BertConfig config, Weights weights);
  void refer_to_weights() override;
  std::unique_ptr<Backbone> with_weights(Weights weights) const override;
  at::Tensor mean_of(const at::Tensor& states, const at::Tensor& mask) const;
  Norm norm_at(const std::string& path) const;
  at::Tensor normalise(const at::Tensor& x, const Norm& norm) const;
  at::Tensor attention(const Block& block, const at::Tensor& x, const at::Tensor& mask) const;
  at::Tensor layer(const Block& block, at::Tensor x, const at::Tensor& mask) const;

  BertConfig config_;
  std::vector<Block> blocks_;
  at::Tensor words_, positions_, types_;
  Norm embedding_norm_;
};

}  // namespace moraine::models
