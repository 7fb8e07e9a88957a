#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/safetensors.h"
#include "models/backbone.h"
#include "models/decoder_config.h"

namespace moraine::models {

class KeyValueCache;

/// The slots of a decoder, from shapes alone.
std::vector<Slot> decoder_slots(const DecoderConfig& config);

/// A causal language model.
///
/// Slots: q/k/v/o_proj and mlp.{gate,up,down}_proj of every layer, "model.layers.N.mlp" as a whole, the block
/// "model.layers.N", and "lm_head". A
/// mixture has no inner mlp slots: its mlp slot's base is expert 0 and carries a MixtureFfn of all others from the
/// start. Sources: transformers 4.57 (llama, mistral, qwen2, olmo2, flex_olmo); FlexMoRE (arXiv 2602.08818) for
/// low-rank experts.
class Decoder final : public Backbone {
 public:
  /// Random weights: normal(0, initializer_range), norms 1, biases 0; each tensor from `seed` and its name alone.
  static Decoder from_config(const DecoderConfig& config, uint64_t seed, at::ScalarType dtype);
  /// config.json + safetensors (mmap, possibly sharded). Missing, left-over and mis-shaped keys are listed in one
  /// UserError (of each kind the first twelve and the number of the others). `dtype` (float32, bfloat16, float64)
  /// converts on load; nullopt keeps the file's, without a copy.
  static Decoder from_directory(const std::filesystem::path& directory, std::optional<at::ScalarType> dtype);
  /// From named tensors that somebody else loaded. Same checks; `origin` names the source in messages. The weights
  /// borrow the bytes when an `owner` is given that keeps them alive (an ArtefactPtr), else they are copied.
  static Decoder from_tensors(const DecoderConfig& config, const std::vector<core::TensorView>& tensors,
                              const std::string& origin, std::optional<at::ScalarType> dtype,
                              const std::shared_ptr<const void>& owner = nullptr);
  /// Shares this model's weights, frozen; slots start empty (mixture configs: with a fresh mixture attached).
  Decoder share() const { return on(device()); }
  /// The same on another device: weights are copied there unless they are there already.
  Decoder on(at::Device device) const;
  /// share() with some weights changed: W + delta, in W's dtype, for every "<weight name>" given; all others are
  /// shared. Throws UserError on a name that is no weight of this model or a delta of another shape.
  Decoder plus(const NamedTensors& deltas) const;

  /// tokens [B, T] int64 -> logits [B, T, vocab]. Throws UserError on a token outside the vocabulary.
  at::Tensor forward(const at::Tensor& tokens);
  /// Final hidden states after the last norm, [B, T, d]; forward() = lm_head of these.
  at::Tensor hidden_states(const at::Tensor& tokens);
  /// Logits [B, vocab] of the token that follows: tokens [B, T >= 1] come after those in `cache`, which takes them in.
  /// A prompt at once and then one token at a time gives what forward() gives for the whole at its last position,
  /// within rounding. Without gradients. Throws UserError as forward() does, InternalError on another batch than the
  /// cache's.
  at::Tensor next_logits(const at::Tensor& tokens, KeyValueCache& cache);
  /// Inputs of every FFN slot (what a router sees), L tensors [B, T, d], without gradients.
  std::vector<at::Tensor> ffn_inputs(const at::Tensor& tokens);

  /// token_loss() of sequences [B, T + 1]: inputs are columns 0..T-1 (padding -1 is read as token 0), targets columns
  /// 1..T (-1 is ignored).
  TokenLoss loss(const at::Tensor& sequences, bool count_correct = false);

  at::Tensor features(const Input& input) override;
  int64_t width() const override { return config_.hidden_size; }
  TokenLoss token_loss(const Input& input, const at::Tensor& targets, const TokenLossOptions& options) override;
  core::Json config_json() const override { return config_.to_json(); }

  const DecoderConfig& config() const { return config_; }

 private:
  struct Block {
    at::Tensor input_norm, post_attention_norm, post_ffn_norm, q_norm, k_norm;  // as the family has them
    size_t first_slot = 0;
    int64_t window = 0;  // 0 = none
  };
  struct Extent {
    int64_t batch, length, seen;  // sequences, tokens of each in this pass, tokens before them in a cache
    at::Tensor segment_mask;      // [B, 1, T, T] bool: who sees whom; undefined where a row is one sequence
  };

  Decoder(DecoderConfig config, Weights weights);
  void add_slots();
  void refer_to_weights() override;
  std::unique_ptr<Backbone> with_weights(Weights weights) const override;
  void attach_mixture(int64_t layer);

  at::Tensor norm(const at::Tensor& x, const at::Tensor& weight) const;
  at::Tensor attention(const Block& block, const at::Tensor& x, const Extent& extent, KeyValueCache* cache);
  at::Tensor attend(const Block& block, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& segment_mask) const;
  at::Tensor attend_to_cache(const Block& block, const at::Tensor& q, const KeyValueCache& cache) const;
  at::Tensor ffn(const Block& block, const at::Tensor& x);
  at::Tensor layer(const Block& block, at::Tensor x, const Extent& extent, KeyValueCache* cache,
                   std::vector<at::Tensor>* ffn_inputs);
  /// What a pass takes beside the tokens.
  struct Aside {
    std::vector<at::Tensor>* ffn_inputs = nullptr;
    KeyValueCache* cache = nullptr;
    at::Tensor segments = {};
  };
  at::Tensor trunk(const at::Tensor& tokens, const Aside& aside);
  void extend_rotation(int64_t length);
  void fit_window_mask(int64_t length);

  DecoderConfig config_;
  std::vector<Block> blocks_;
  at::Tensor embedding_, final_norm_;
  at::Tensor cos_, sin_;    // [positions, head_dim / 2] float32
  at::Tensor window_mask_;  // [T, T] bool: who sees whom; undefined while every sequence fits the window
};

}  // namespace moraine::models
