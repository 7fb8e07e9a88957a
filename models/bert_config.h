#pragma once

#include <cstdint>
#include <string>

#include "core/json.h"
#include "models/shape.h"

namespace moraine::models {

/// Architecture of a BERT-type encoder, as in a Hugging Face config.json of model type "bert".
struct BertConfig {
  int64_t vocab_size = 30522, hidden_size = 768, intermediate_size = 3072, num_layers = 12, num_heads = 12;
  int64_t max_position_embeddings = 512, type_vocab_size = 2;
  double layer_norm_eps = 1e-12, initializer_range = 0.02;
  bool pooler = true;      // tanh(W h_CLS + b) behind the last layer
  int64_t num_labels = 0;  // rows of the classifier behind the pooler; 0 = none (BertModel)

  /// Absent keys take the defaults of transformers 4.57. Throws one UserError naming `origin` and every key that is of
  /// the wrong type, out of range or not implemented (activations but gelu, relative positions, cross attention, ...).
  /// num_labels stays 0: the weights say whether there is a classifier.
  static BertConfig from_json(const core::Json& json, const std::string& origin);
  /// A config.json that transformers reads.
  core::Json to_json() const;

  /// "bert." in front of the encoder's names in BertForSequenceClassification, "" in BertModel.
  std::string prefix() const { return num_labels > 0 ? "bert." : ""; }
  int64_t total_parameters() const;
};

/// Hugging Face names and shapes of a checkpoint of this config, sorted by name.
NamedShapes expected_tensors(const BertConfig& config);

}  // namespace moraine::models
