#include "models/checkpoint.h"

#include <algorithm>
#include <string_view>

#include <fmt/ranges.h>

#include "core/checksums.h"
#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "models/tensor_io.h"

namespace moraine::models {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

// Returns the SHA-256.
std::string write_shard(const fs::path& path, const LazyTensor* first, const LazyTensor* last) {
  NamedTensors made;
  for (const LazyTensor* tensor = first; tensor != last; ++tensor) {
    made.emplace_back(tensor->name, tensor->make());
    MORAINE_CHECK(static_cast<int64_t>(made.back().second.nbytes()) == tensor->bytes, "'{}' has {} bytes, announced {}",
                  tensor->name, made.back().second.nbytes(), tensor->bytes);
  }
  std::vector<at::Tensor> keep;
  const auto bytes = core::serialize_safetensors(views_of(made, keep), {{"format", "pt"}});
  core::write_atomically(path, bytes);
  return core::sha256(bytes);
}

bool is_zero(int64_t side) { return side == 0; }

/// One matrix of a packed tensor: rows [first, first + rows) of the stacked matrices.
core::TensorView rows_of(const core::TensorView& packed, std::string name, int64_t first, int64_t rows) {
  const int64_t columns = packed.shape[2];
  const auto row_bytes = static_cast<size_t>(columns) * core::size_of(packed.dtype);
  return {std::move(name),
          packed.dtype,
          {rows, columns},
          packed.data.subspan(static_cast<size_t>(first) * row_bytes, static_cast<size_t>(rows) * row_bytes)};
}

}  // namespace

void write_checkpoint(const fs::path& directory, const core::Json& config, std::vector<LazyTensor> tensors,
                      int64_t shard_bytes) {
  std::ranges::sort(tensors, {}, &LazyTensor::name);
  std::vector<size_t> starts = {0};  // of shards
  int64_t total = 0, in_shard = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (in_shard > 0 && in_shard + tensors[i].bytes > shard_bytes) {
      starts.push_back(i);
      in_shard = 0;
    }
    in_shard += tensors[i].bytes;
    total += tensors[i].bytes;
  }
  starts.push_back(tensors.size());
  const size_t shards = starts.size() - 1;
  core::Json places = core::Json::object();
  core::Checksums sums;
  fs::remove(directory / core::kChecksumsFile);  // of another checkpoint
  for (size_t s = 0; s < shards; ++s) {
    const std::string file = shards == 1 ? kSingle : fmt::format("model-{:05}-of-{:05}.safetensors", s + 1, shards);
    for (size_t i = starts[s]; i < starts[s + 1]; ++i) places[tensors[i].name] = file;
    sums[file] = write_shard(directory / file, tensors.data() + starts[s], tensors.data() + starts[s + 1]);
  }
  if (shards > 1)
    core::write_atomically(directory / kIndex,
                           core::Json{{"metadata", {{"total_size", total}}}, {"weight_map", places}}.dump(2) + "\n");
  fs::remove(directory / (shards > 1 ? kSingle : kIndex));  // of another checkpoint
  core::write_atomically(directory / "config.json", config.dump(2) + "\n");
  core::write_checksums(directory, sums);
}

std::vector<std::string> copy_companions(const fs::path& from, const fs::path& to) {
  std::vector<std::string> copied;
  if (from.empty() || !fs::is_directory(from) || (fs::exists(to) && fs::equivalent(from, to))) return copied;
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
                           "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
                           "chat_template.jinja", "chat_template.json", "generation_config.json"}) {
    if (!fs::is_regular_file(from / name)) continue;
    core::write_atomically(to / name, core::Bytes::map_file(from / name).span());
    copied.emplace_back(name);
  }
  return copied;
}

std::vector<core::TensorView> without_redundant(std::vector<core::TensorView> tensors, const DecoderConfig& config,
                                                const std::string& origin) {
  std::erase_if(tensors, [](const auto& tensor) { return tensor.name.ends_with(".rotary_emb.inv_freq"); });
  if (!config.tie_word_embeddings) return tensors;
  const auto find = [&](std::string_view name) {
    return std::ranges::find_if(tensors, [&](const auto& tensor) { return tensor.name == name; });
  };
  const auto head = find("lm_head.weight"), embedding = find("model.embed_tokens.weight");
  if (head == tensors.end() || embedding == tensors.end()) return tensors;
  if (head->dtype != embedding->dtype || head->shape != embedding->shape ||
      !std::ranges::equal(head->data, embedding->data))
    throw core::UserError(
        fmt::format("models: {}: 'tie_word_embeddings' is true, but lm_head.weight is not model.embed_tokens.weight",
                    origin),
        "set tie_word_embeddings to false in config.json if the head is a matrix of its own");
  tensors.erase(head);
  return tensors;
}

std::vector<core::TensorView> unpack_experts(const std::vector<core::TensorView>& tensors, const std::string& origin) {
  constexpr std::string_view kGateUp = ".mlp.experts.gate_up_proj", kDown = ".mlp.experts.down_proj";
  std::vector<core::TensorView> out;
  for (const core::TensorView& tensor : tensors) {
    const bool gate_up = tensor.name.ends_with(kGateUp), down = tensor.name.ends_with(kDown);
    if (!gate_up && !down) {
      out.push_back(tensor);
      continue;
    }
    if (tensor.shape.size() != 3 || (gate_up && tensor.shape[1] % 2 != 0) ||
        std::ranges::any_of(tensor.shape, is_zero)) {
      throw core::UserError(fmt::format("models: {}: '{}' is [{}], expected {}", origin, tensor.name,
                                        fmt::join(tensor.shape, ", "), gate_up ? "[E, 2h, d]" : "[E, d, h]"),
                            "check that these are the weights of a FlexOlmo model");
    }
    const std::string path = tensor.name.substr(0, tensor.name.rfind('.'));
    const int64_t rows = tensor.shape[1], half = rows / 2;
    for (int64_t expert = 0; expert < tensor.shape[0]; ++expert) {
      const std::string prefix = fmt::format("{}.{}.", path, expert);
      if (down) {
        out.push_back(rows_of(tensor, prefix + "down_proj.weight", expert * rows, rows));
      } else {
        out.push_back(rows_of(tensor, prefix + "gate_proj.weight", expert * rows, half));
        out.push_back(rows_of(tensor, prefix + "up_proj.weight", expert * rows + half, half));
      }
    }
  }
  return out;
}

}  // namespace moraine::models
