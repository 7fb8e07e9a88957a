#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/json.h"
#include "core/safetensors.h"
#include "models/decoder_config.h"

namespace moraine::models {

/// A tensor that is made when it is written, so that a model larger than memory can be converted.
struct LazyTensor {
  std::string name;
  int64_t bytes = 0;
  std::function<at::Tensor()> make;  // on the CPU
};

inline constexpr int64_t kShardBytes = int64_t{4} << 30;

/// Writes a Hugging Face directory: the weights, their SHA256SUMS (core/checksums.h) and config.json. Up to
/// `shard_bytes` they are one model.safetensors, above that shards in order of names and model.safetensors.index.json;
/// a tensor larger than that has a shard of its own. Holds one shard in memory. Replaces a checkpoint that is there.
/// Throws IoError; InternalError if a tensor made is not as large as it said.
void write_checkpoint(const std::filesystem::path& directory, const core::Json& config, std::vector<LazyTensor> tensors,
                      int64_t shard_bytes = kShardBytes);

/// Copies what other tools want beside the weights (tokeniser files, generation_config.json, a chat template) from one
/// model's directory to another's, and returns the names. Nothing when `from` is empty, no directory, or `to` itself.
std::vector<std::string> copy_companions(const std::filesystem::path& from, const std::filesystem::path& to);

/// The tensors without those that writing tools add and nothing reads: rotary `inv_freq` buffers, and a tied model's
/// lm_head.weight when it is the embedding once more. Throws UserError naming `origin` if that head differs.
std::vector<core::TensorView> without_redundant(std::vector<core::TensorView> tensors, const DecoderConfig& config,
                                                const std::string& origin);

/// FlexOlmo's experts under one name per tensor. transformers 5 packs them: mlp.experts.gate_up_proj [E, 2h, d] (gate
/// rows first) and mlp.experts.down_proj [E, d, h]; views of such tensors are cut into views of single matrices,
/// without a copy. Other tensors pass unchanged. Throws UserError naming `origin` and the tensor if a packed one has no
/// such shape. Source: transformers 4.57 and 5, flex_olmo.
std::vector<core::TensorView> unpack_experts(const std::vector<core::TensorView>& tensors, const std::string& origin);

}  // namespace moraine::models
