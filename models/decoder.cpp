#include "models/decoder.h"

#include <algorithm>
#include <numbers>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "core/error.h"
#include "models/fused_ops.h"
#include "models/kv_cache.h"
#include "models/mixture.h"

namespace moraine::models {
namespace {

// Slots of one layer, in this order; a mixture stops after the FFN.
enum LayerSlot : size_t { kQuery, kKey, kValue, kOutput, kBlock, kFfnSlot, kGate, kUp, kDown, kLayerSlots };
constexpr size_t kMixtureLayerSlots = kFfnSlot + 1;

// Logits held at once by loss(): 64 MB of float32, so that a large vocabulary does not need [tokens, vocab] in one
// piece.
constexpr int64_t kLogitsPerPiece = int64_t{1} << 24;

std::string expert_path(int64_t layer, int64_t expert) {
  return fmt::format("{}.mlp.experts.{}", layer_path(layer), expert);
}

// Frequencies of transformers' rope types, in its order of float32 operations.
at::Tensor scaled_frequencies(const at::Tensor& frequencies, const RopeScaling& scaling) {
  if (scaling.type == RopeScaling::Type::kNone) return frequencies;
  const at::Tensor slowed = frequencies / scaling.factor;
  if (scaling.type == RopeScaling::Type::kLinear) return slowed;
  const auto original = static_cast<double>(scaling.original_max_position_embeddings);
  const double low = scaling.low_freq_factor, high = scaling.high_freq_factor;
  const at::Tensor wave = frequencies.reciprocal() * (2 * std::numbers::pi);
  const at::Tensor kept = (wave.reciprocal() * original - low) / (high - low);
  const at::Tensor blend = (1 - kept) * slowed + kept * frequencies;
  return at::where(wave.gt(original / low), slowed, at::where(wave.lt(original / high), frequencies, blend));
}

// Sums per row of what stands at `places` of [B, T] flattened, all of it when there are none.
at::Tensor by_rows(const at::Tensor& nats, const at::Tensor& places, const at::Tensor& targets) {
  if (!places.defined()) return nats.view(targets.sizes()).sum(1);
  return at::zeros({targets.numel()}, nats.options()).index_copy(0, places, nats).view(targets.sizes()).sum(1);
}

// Positions go on from one segment to the next: rotary attention depends on their differences alone.
at::Tensor mask_of(const at::Tensor& segments) {
  if (!segments.defined()) return {};
  return segments.unsqueeze(2).eq(segments.unsqueeze(1)).tril().unsqueeze(1);
}

}  // namespace

Decoder::Decoder(DecoderConfig config, Weights weights) : Backbone(std::move(weights)), config_(std::move(config)) {
  add_slots();
  refer_to_weights();
}

std::vector<Slot> decoder_slots(const DecoderConfig& config) {
  const int64_t d = config.hidden_size, h = config.intermediate_size;
  const int64_t q = config.num_heads * config.head_dim, kv = config.num_kv_heads * config.head_dim;
  std::vector<Slot> slots;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const std::string path = layer_path(layer);
    const Slot all[kLayerSlots] = {{path + ".self_attn.q_proj", SlotKind::kLinear, d, q},
                                   {path + ".self_attn.k_proj", SlotKind::kLinear, d, kv},
                                   {path + ".self_attn.v_proj", SlotKind::kLinear, d, kv},
                                   {path + ".self_attn.o_proj", SlotKind::kLinear, q, d},
                                   {path, SlotKind::kBlock, d, d},
                                   {path + ".mlp", SlotKind::kFfn, d, d, h},
                                   {path + ".mlp.gate_proj", SlotKind::kLinear, d, h},
                                   {path + ".mlp.up_proj", SlotKind::kLinear, d, h},
                                   {path + ".mlp.down_proj", SlotKind::kLinear, h, d}};
    slots.insert(slots.end(), all, all + (config.is_mixture() ? kMixtureLayerSlots : kLayerSlots));
  }
  slots.push_back({"lm_head", SlotKind::kLinear, d, config.vocab_size});
  return slots;
}

void Decoder::add_slots() {
  const size_t of_layer = config_.is_mixture() ? kMixtureLayerSlots : kLayerSlots;
  for (int64_t layer = 0; layer < config_.num_layers; ++layer)
    blocks_.emplace_back().first_slot = of_layer * static_cast<size_t>(layer);
  for (Slot& slot : decoder_slots(config_)) add_slot(std::move(slot));
}

void Decoder::refer_to_weights() {
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const std::string path = layer_path(layer);
    Block& block = blocks_[layer];
    block.input_norm = weight(path + ".input_layernorm.weight");
    block.post_attention_norm = weight(path + ".post_attention_layernorm.weight");
    block.post_ffn_norm = weight(path + ".post_feedforward_layernorm.weight");
    block.q_norm = weight(path + ".self_attn.q_norm.weight");
    block.k_norm = weight(path + ".self_attn.k_norm.weight");
    block.window = config_.window_of(layer);
    if (config_.is_mixture()) attach_mixture(layer);
  }
  for (size_t i = 0; i < slots().size(); ++i) {
    const std::string& path = slots()[i].path;
    SlotBase& base = slot_base(i);
    if (slots()[i].kind == SlotKind::kBlock) continue;
    if (slots()[i].kind == SlotKind::kLinear) {
      base.weight = weight(path + ".weight");
      base.bias = weight(path + ".bias");
      continue;
    }
    const std::string ffn_path = config_.is_mixture() ? path + ".experts.0" : path;
    base.gate = weight(ffn_path + ".gate_proj.weight");
    base.up = weight(ffn_path + ".up_proj.weight");
    base.down = weight(ffn_path + ".down_proj.weight");
    base.gate_bias = weight(ffn_path + ".gate_proj.bias");
    base.up_bias = weight(ffn_path + ".up_proj.bias");
    base.down_bias = weight(ffn_path + ".down_proj.bias");
  }
  embedding_ = weight("model.embed_tokens.weight");
  final_norm_ = weight("model.norm.weight");
  if (config_.tie_word_embeddings) slot_base(slots().size() - 1).weight = embedding_;
}

void Decoder::attach_mixture(int64_t layer) {
  std::vector<FfnExpert> experts;
  for (int64_t expert = 1; expert < config_.num_experts; ++expert) {
    const std::string path = expert_path(layer, expert);
    const auto full = [&](const char* name) { return weight(fmt::format("{}.{}.weight", path, name)); };
    const auto low_rank = [&](const char* name) {
      return LowRank{weight(fmt::format("{}.{}_a.weight", path, name)),
                     weight(fmt::format("{}.{}_b.weight", path, name))};
    };
    FfnExpert& e = experts.emplace_back();
    if (config_.rank_of(expert) == 0) {
      e.gate = full("gate_proj"), e.up = full("up_proj"), e.down = full("down_proj");
    } else {
      e.gate_delta = low_rank("gate_proj"), e.up_delta = low_rank("up_proj"), e.down_delta = low_rank("down_proj");
    }
  }
  MixtureFfn::Options options;
  options.top_k = config_.num_experts_per_tok;
  options.norm_topk_prob = config_.norm_topk_prob;
  set_function(blocks_[layer].first_slot + kFfnSlot,
               std::make_shared<MixtureFfn>(std::vector<at::Tensor>{weight(layer_path(layer) + ".mlp.gate.weight")},
                                            at::Tensor(), std::move(experts), options));
}

at::Tensor Decoder::norm(const at::Tensor& x, const at::Tensor& weight) const {
  return rms_norm(x, as_type_of(weight, x), config_.rms_norm_eps,
                  config_.post_norm() ? NormRounding::kAfterWeight : NormRounding::kBeforeWeight);
}

void Decoder::extend_rotation(int64_t length) {
  if (cos_.defined() && cos_.size(0) >= length) return;
  const at::NoGradGuard no_grad;
  const at::TensorOptions options = embedding_.options().dtype(at::kFloat).requires_grad(false);
  const at::Tensor exponents = at::arange(0, config_.head_dim, 2, options) / static_cast<double>(config_.head_dim);
  const at::Tensor frequencies = at::pow(config_.rope_theta, exponents).reciprocal();
  const at::Tensor angles =
      at::outer(at::arange(length, options), scaled_frequencies(frequencies, config_.rope_scaling));
  cos_ = angles.cos();
  sin_ = angles.sin();
}

void Decoder::fit_window_mask(int64_t length) {
  if (config_.sliding_window == 0 || length <= config_.sliding_window) return;
  if (window_mask_.defined() && window_mask_.size(0) == length) return;
  window_mask_ = at::ones({length, length}, embedding_.options().dtype(at::kBool).requires_grad(false))
                     .tril()
                     .triu(1 - config_.sliding_window);
}

at::Tensor Decoder::attention(const Block& block, const at::Tensor& x, const Extent& extent, KeyValueCache* cache) {
  const auto& [batch, length, seen, segment_mask] = extent;
  const int64_t heads = config_.num_heads, kv_heads = config_.num_kv_heads, head_dim = config_.head_dim;
  at::Tensor q = apply(block.first_slot + kQuery, x), k = apply(block.first_slot + kKey, x);
  if (block.q_norm.defined()) q = norm(q, block.q_norm), k = norm(k, block.k_norm);
  const at::Tensor cos = cos_.slice(0, seen), sin = sin_.slice(0, seen);
  q = rotate(q.view({batch, length, heads, head_dim}), cos, sin);
  k = rotate(k.view({batch, length, kv_heads, head_dim}), cos, sin);
  const at::Tensor v = apply(block.first_slot + kValue, x).view({batch, length, kv_heads, head_dim});
  if (cache != nullptr) cache->append(static_cast<size_t>(&block - blocks_.data()), k, v);
  const at::Tensor y = seen > 0 ? attend_to_cache(block, q, *cache) : attend(block, q, k, v, segment_mask);
  return apply(block.first_slot + kOutput, y.reshape({batch * length, heads * head_dim}));
}

// q [B, T, heads, D], k and v [B, T, kv_heads, D] of the same tokens; returns [B, T, heads, D].
at::Tensor Decoder::attend(const Block& block, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& segment_mask) const {
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), kv_heads = k.size(2), head_dim = q.size(3);
  const auto repeat = [&](const at::Tensor& t) {
    if (kv_heads == heads) return t;
    return t.unsqueeze(3)
        .expand({batch, length, kv_heads, heads / kv_heads, head_dim})
        .reshape({batch, length, heads, head_dim});
  };
  const bool windowed = block.window > 0 && length > block.window;
  std::optional<at::Tensor> mask = windowed ? std::optional(window_mask_) : std::nullopt;
  if (segment_mask.defined()) mask = windowed ? segment_mask.logical_and(window_mask_) : segment_mask;
  return at::scaled_dot_product_attention(q.transpose(1, 2), repeat(k).transpose(1, 2), repeat(v).transpose(1, 2), mask,
                                          0.0, /*is_causal=*/!mask)
      .transpose(1, 2);
}

// The same for tokens that stand at the end of the cache. Heads that share keys become rows of one product, so that no
// key is copied.
at::Tensor Decoder::attend_to_cache(const Block& block, const at::Tensor& q, const KeyValueCache& cache) const {
  const KeyValueCache::Layer& layer = cache.layer(static_cast<size_t>(&block - blocks_.data()));
  const int64_t batch = q.size(0), length = q.size(1), kv_heads = config_.num_kv_heads, head_dim = config_.head_dim;
  const int64_t share = config_.num_heads / kv_heads, seen = layer.length - length;
  const int64_t first = block.window > 0 ? std::max<int64_t>(0, seen + 1 - block.window) : 0;
  const at::Tensor keys = layer.keys.slice(2, first, layer.length), values = layer.values.slice(2, first, layer.length);
  std::optional<at::Tensor> mask;
  if (length > 1) {
    at::Tensor visible = at::ones({length, layer.length - first}, q.options().dtype(at::kBool)).tril(seen - first);
    if (block.window > 0) visible = visible.triu(seen - first + 1 - block.window);
    mask = visible.repeat({share, 1});
  }
  const at::Tensor rows = q.view({batch, length, kv_heads, share, head_dim})
                              .permute({0, 2, 3, 1, 4})
                              .reshape({batch, kv_heads, share * length, head_dim});
  return at::scaled_dot_product_attention(rows, keys, values, mask)
      .reshape({batch, kv_heads, share, length, head_dim})
      .permute({0, 3, 1, 2, 4});
}

at::Tensor Decoder::ffn(const Block& block, const at::Tensor& x) {
  const size_t whole = block.first_slot + kFfnSlot;
  if (config_.is_mixture() || taken(whole)) return apply(whole, x);
  return apply(block.first_slot + kDown,
               at::silu(apply(block.first_slot + kGate, x)) * apply(block.first_slot + kUp, x));
}

// Rows [B * T, d] through one layer. With ffn_inputs it notes what its FFN sees; behind the last of these nothing is
// asked for.
at::Tensor Decoder::layer(const Block& block, at::Tensor x, const Extent& extent, KeyValueCache* cache,
                          std::vector<at::Tensor>* ffn_inputs) {
  const auto last_noted = [&](const at::Tensor& input) {
    if (ffn_inputs == nullptr) return false;
    ffn_inputs->push_back(input.view({extent.batch, extent.length, config_.hidden_size}));
    return &block == &blocks_.back();
  };
  if (config_.post_norm()) {
    x = x + norm(attention(block, x, extent, cache), block.post_attention_norm);
    if (last_noted(x)) return x;
    x = x + norm(ffn(block, x), block.post_ffn_norm);
  } else {
    x = x + attention(block, norm(x, block.input_norm), extent, cache);
    const at::Tensor input = norm(x, block.post_attention_norm);
    if (last_noted(input)) return x;
    x = x + ffn(block, input);
  }
  return taken(block.first_slot + kBlock) ? apply(block.first_slot + kBlock, x) : x;
}

at::Tensor Decoder::trunk(const at::Tensor& tokens, const Aside& aside) {
  MORAINE_CHECK(tokens.dim() == 2 && tokens.scalar_type() == at::kLong, "tokens must be [B, T] int64");
  const int64_t batch = tokens.size(0), length = tokens.size(1);
  const int64_t seen = aside.cache != nullptr ? aside.cache->length() : 0;
  if (tokens.numel() > 0) {
    const int64_t low = tokens.min().item<int64_t>(), high = tokens.max().item<int64_t>();
    if (low < 0 || high >= config_.vocab_size) {
      throw core::UserError(fmt::format("models: token outside the model's vocabulary of {}: {}", config_.vocab_size,
                                        low < 0 ? low : high),
                            "the data was prepared with another tokeniser than the model's");
    }
  }
  if (seen == 0) {
    extend_rotation(length);
    fit_window_mask(length);
  } else if (cos_.size(0) < seen + length) {
    extend_rotation(2 * (seen + length));  // further than needed: token after token follows
  }
  const Extent extent{batch, length, seen, mask_of(aside.segments)};
  at::Tensor x = at::embedding(embedding_, tokens).to(dtype()).view({batch * length, config_.hidden_size});
  for (const Block& block : blocks_)
    x = through(x, [this, &block, extent, cache = aside.cache, noted = aside.ffn_inputs](const at::Tensor& input) {
      return layer(block, input, extent, cache, noted);
    });
  return norm(x, final_norm_);
}

at::Tensor Decoder::hidden_states(const at::Tensor& tokens) {
  return trunk(tokens, {}).view({tokens.size(0), tokens.size(1), -1});
}

at::Tensor Decoder::forward(const at::Tensor& tokens) { return apply(slots().size() - 1, hidden_states(tokens)); }

at::Tensor Decoder::next_logits(const at::Tensor& tokens, KeyValueCache& cache) {
  MORAINE_CHECK(tokens.dim() == 2 && tokens.size(1) > 0, "tokens must be [B, T] with T >= 1");
  const at::NoGradGuard no_grad;
  const at::Tensor x = trunk(tokens, {.cache = &cache}).view({tokens.size(0), tokens.size(1), -1});
  return apply(slots().size() - 1, x.select(1, -1));
}

std::vector<at::Tensor> Decoder::ffn_inputs(const at::Tensor& tokens) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> inputs;
  trunk(tokens, {.ffn_inputs = &inputs});
  return inputs;
}

at::Tensor Decoder::features(const Input& input) {
  const at::Tensor states = hidden_states(input.tokens);
  if (!input.mask.defined()) return states.select(1, -1);
  const at::Tensor last = input.mask.sum(1).sub(1).view({-1, 1, 1}).expand({-1, 1, config_.hidden_size});
  return states.gather(1, last).squeeze(1);
}

TokenLoss Decoder::loss(const at::Tensor& sequences, bool count_correct) {
  MORAINE_CHECK(sequences.dim() == 2 && sequences.size(1) >= 2, "sequences must be [B, T + 1] with T >= 1");
  return token_loss({.tokens = sequences.slice(1, 0, -1).clamp_min(0)}, sequences.slice(1, 1),
                    {.correct = count_correct});
}

TokenLoss Decoder::token_loss(const Input& input, const at::Tensor& wanted, const TokenLossOptions& options) {
  at::Tensor x = trunk(input.tokens, {.segments = input.segments}), targets = wanted.reshape({-1}), places;
  if (options.few_targets) {
    places = targets.ge(0).nonzero().squeeze(1);
    x = x.index_select(0, places), targets = targets.index_select(0, places);
  }
  const int64_t rows = targets.numel(), piece = std::max<int64_t>(1, kLogitsPerPiece / config_.vocab_size);
  TokenLoss loss;
  loss.count = targets.ge(0).sum().item<int64_t>();
  std::vector<at::Tensor> each;
  for (int64_t first = 0; first < rows; first += piece) {
    const int64_t end = std::min(rows, first + piece);
    const at::Tensor logits = apply(slots().size() - 1, x.slice(0, first, end)),
                     expected = targets.slice(0, first, end);
    const at::Tensor nats =
        at::cross_entropy_loss(logits.to(dtype() == at::kDouble ? at::kDouble : at::kFloat), expected, {},
                               options.rows ? at::Reduction::None : at::Reduction::Sum,
                               /*ignore_index=*/-1, options.label_smoothing);
    const at::Tensor sum = options.rows ? nats.sum() : nats;
    loss.sum = loss.sum.defined() ? loss.sum + sum : sum;
    if (options.rows) each.push_back(nats);
    if (options.correct) loss.correct += at::argmax(logits.detach(), -1).eq(expected).sum().item<int64_t>();
  }
  if (options.rows) loss.rows = by_rows(at::cat(each), places, wanted);
  return loss;
}

}  // namespace moraine::models
