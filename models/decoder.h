#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/json.h"
#include "core/safetensors.h"
#include "models/slot.h"

namespace moraine::models {

/// Architecture of a decoder, as in a Hugging Face config.json. Unknown model types and options we do not implement are errors.
struct DecoderConfig {
  enum class Family { kLlama, kOlmo2, kFlexOlmo, kFlexMore };
  Family family = Family::kOlmo2;
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0, num_layers = 0;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t max_position_embeddings = 2048;
  double rms_norm_eps = 1e-6, rope_theta = 10000, initializer_range = 0.02;
  bool tie_word_embeddings = false;
  bool attention_bias = false, mlp_bias = false;              // llama only
  // Mixtures.
  int64_t num_experts = 1, num_experts_per_tok = 1;
  bool norm_topk_prob = false;
  std::vector<int64_t> expert_ranks;                          // flexmore: 0 = full-size; entry 0 is the public expert

  /// Throws UserError naming `origin` and the key that is missing, of the wrong type or not implemented (rope scaling, ...).
  static DecoderConfig from_json(const core::Json& json, const std::string& origin);
  core::Json to_json() const;

  bool is_mixture() const { return family == Family::kFlexOlmo || family == Family::kFlexMore; }
  /// Post-norm blocks with q/k norms (OLMo2, FlexOlmo, FlexMoRE) or pre-norm blocks (Llama).
  bool post_norm() const { return family != Family::kLlama; }

  // Closed-form parameter counts (specs: S, F, router). Nothing is allocated.
  int64_t shared_parameters() const;              // everything but FFNs and router
  int64_t ffn_parameters() const;                 // one full FFN over all layers: 3 d h L
  int64_t low_rank_parameters(int64_t rank) const;   // rank * 3 (d + h) L
  int64_t router_parameters(int64_t experts) const;  // experts * L * d
  int64_t total_parameters() const;
};

/// Expected tensor names and shapes of a checkpoint of this config, sorted by name; mixtures list every expert.
std::vector<std::pair<std::string, std::vector<int64_t>>> expected_tensors(const DecoderConfig& config);

/// A causal language model whose weights are frozen and whose slots can be taken over. Weights never change; training
/// touches only what attached slot functions own (or trainable_copy()). Not thread-safe while slots change; forward() of
/// distinct Decoders that share weights may run concurrently.
class Decoder {
 public:
  /// Random weights: normal(0, initializer_range), norms 1, from `seed` alone (independent of thread count).
  static Decoder from_config(const DecoderConfig& config, uint64_t seed, at::ScalarType dtype);
  /// config.json + safetensors (mmap, possibly sharded). Missing, left-over and mis-shaped keys are all listed in one UserError.
  /// `dtype` converts on load; nullopt keeps the file's.
  static Decoder from_directory(const std::filesystem::path& directory, std::optional<at::ScalarType> dtype);
  /// From named tensors that somebody else loaded (an artefact). Same checks; `origin` names the source in messages.
  static Decoder from_tensors(const DecoderConfig& config, const std::vector<core::TensorView>& tensors,
                              const std::string& origin, std::optional<at::ScalarType> dtype);
  /// Shares this model's frozen weights; slots start empty (mixture configs: with their mixture attached).
  Decoder share() const;

  /// tokens [B, T] int64 -> logits [B, T, vocab].
  at::Tensor forward(const at::Tensor& tokens);
  /// Final hidden states after the last norm, [B, T, d]; forward() = these times lm_head.
  at::Tensor hidden_states(const at::Tensor& tokens);
  /// Inputs of every FFN slot (what a router sees), L tensors [B, T, d], without gradients.
  std::vector<at::Tensor> ffn_inputs(const at::Tensor& tokens);

  /// Sum (not mean) of next-token cross entropy in nats over non-negative targets, float32, plus counts.
  struct Loss {
    at::Tensor sum;          // [] float32, differentiable
    int64_t count = 0;       // targets >= 0
    int64_t correct = 0;     // argmax == target; only when asked for
  };
  /// sequences [B, T + 1]: inputs are columns 0..T-1 (padding -1 is read as token 0), targets columns 1..T (-1 is ignored).
  Loss loss(const at::Tensor& sequences, bool count_correct = false);

  const DecoderConfig& config() const { return config_; }
  const std::vector<Slot>& slots() const { return slots_; }
  /// Throws UserError listing the nearest slot paths if `path` is no slot.
  const SlotBase& base(const std::string& path) const;
  /// At most one function per slot. Throws UserError on an unknown path, InternalError if the slot is taken.
  void attach(const std::string& path, std::shared_ptr<SlotFunction> function);
  /// Restores the frozen function bit-exactly.
  void detach(const std::string& path);
  std::shared_ptr<SlotFunction> attached(const std::string& path) const;   // nullptr when empty

  /// Makes every weight a trainable leaf of its own (base pre-training, joint training); returns them by name.
  NamedTensors make_trainable();
  /// Frozen weights by Hugging Face name, sorted.
  const std::map<std::string, at::Tensor>& weights() const { return weights_; }
  at::ScalarType dtype() const;

 private:
  DecoderConfig config_;
  std::map<std::string, at::Tensor> weights_;
  std::vector<Slot> slots_;
  std::map<std::string, SlotBase> bases_;
  std::map<std::string, std::shared_ptr<SlotFunction>> functions_;
};

}  // namespace moraine::models
