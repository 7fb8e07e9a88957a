#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"
#include "models/shape.h"

namespace moraine::models {

/// How rotary frequencies are stretched for contexts longer than the trained one: config.json's "rope_scaling".
/// Types whose frequencies depend on the sequence (dynamic, yarn, longrope) are not implemented.
struct RopeScaling {
  enum class Type { kNone, kLinear, kLlama3 };
  Type type = Type::kNone;
  double factor = 1;                                 // linear: all frequencies / factor
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3: waves longer than original / low are divided by factor,
  int64_t original_max_position_embeddings = 8192;   // shorter than original / high are kept, a linear blend between
};

/// Architecture of a decoder, as in a Hugging Face config.json. Unknown model types and options we do not implement are
/// errors. Defaults of absent keys are those of transformers 4.57 for the model type.
struct DecoderConfig {
  enum class Family { kLlama, kMistral, kQwen2, kOlmo2, kFlexOlmo, kFlexMore };
  Family family = Family::kOlmo2;
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0, num_layers = 0;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t max_position_embeddings = 2048;
  double rms_norm_eps = 1e-6, rope_theta = 10000, initializer_range = 0.02;
  RopeScaling rope_scaling;
  bool tie_word_embeddings = false;
  bool attention_bias = false, mlp_bias = false;  // llama only; qwen2 has biases on q, k and v always
  int64_t sliding_window = 0;     // mistral, qwen2: a token sees the last so many, itself included; 0 = all
  int64_t max_window_layers = 0;  // qwen2: layers below see everything
  core::Json bos_token_id, eos_token_id,
      pad_token_id;  // null, a number or a list; kept for files, nothing computes with them
  // Mixtures.
  int64_t num_experts = 1, num_experts_per_tok = 1;
  bool norm_topk_prob = false;
  std::vector<int64_t> expert_ranks;  // flexmore: 0 = full-size; entry 0 is the public expert

  /// Throws one UserError naming `origin` and every key that is missing, of the wrong type, out of range or not
  /// implemented (yarn, clip_qkv, ...). Keys that no forward pass depends on are skipped.
  static DecoderConfig from_json(const core::Json& json, const std::string& origin);
  /// from_json of a model directory's config.json.
  static DecoderConfig from_directory(const std::filesystem::path& directory);
  /// A config.json that `transformers` reads (FlexMoRE: that from_json reads).
  core::Json to_json() const;
  /// What is wrong with the numbers ("top_k 3 exceeds ..."), empty when they can be built.
  std::vector<std::string> problems() const;

  bool is_mixture() const { return family == Family::kFlexOlmo || family == Family::kFlexMore; }
  /// Post-norm blocks with q/k norms (OLMo2, FlexOlmo, FlexMoRE) or pre-norm blocks (Llama, Mistral, Qwen2).
  bool post_norm() const { return family == Family::kOlmo2 || is_mixture(); }
  bool qkv_bias() const { return attention_bias || family == Family::kQwen2; }
  /// Window of one layer, 0 when it sees everything.
  int64_t window_of(int64_t layer) const { return layer >= max_window_layers ? sliding_window : 0; }
  /// Rank of one expert of a mixture, 0 when it is full-size.
  int64_t rank_of(int64_t expert) const { return family == Family::kFlexMore ? expert_ranks.at(expert) : 0; }
  /// Largest rank of a low-rank expert: the smaller side of its matrices.
  int64_t max_rank() const { return hidden_size < intermediate_size ? hidden_size : intermediate_size; }

  // Closed-form parameter counts (FlexMoRE: S, F, router). Nothing is allocated.
  int64_t shared_parameters() const;                 // everything but FFNs and router
  int64_t ffn_parameters() const;                    // one full FFN over all layers: 3 d h L
  int64_t low_rank_parameters(int64_t rank) const;   // rank * 3 (d + h) L
  int64_t router_parameters(int64_t experts) const;  // experts * L * d
  int64_t total_parameters() const;
};

/// Expected tensor names and shapes of a checkpoint of this config, sorted by name; mixtures list every expert.
NamedShapes expected_tensors(const DecoderConfig& config);

/// Hugging Face module path of layer `layer`: "model.layers.3".
std::string layer_path(int64_t layer);

}  // namespace moraine::models
