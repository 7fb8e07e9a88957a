#include "models/checkpoint.h"

#include <algorithm>
#include <string_view>

#include <fmt/ranges.h>

#include "core/error.h"
#include "core/file.h"
#include "models/tensor_io.h"

namespace moraine::models {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

void write_shard(const fs::path& path, const LazyTensor* first, const LazyTensor* last) {
  NamedTensors made;
  for (const LazyTensor* tensor = first; tensor != last; ++tensor) {
    made.emplace_back(tensor->name, tensor->make());
    MORAINE_CHECK(static_cast<int64_t>(made.back().second.nbytes()) == tensor->bytes, "'{}' has {} bytes, announced {}",
                  tensor->name, made.back().second.nbytes(), tensor->bytes);
  }
  std::vector<at::Tensor> keep;
  core::write_atomically(path, core::serialize_safetensors(views_of(made, keep), {{"format", "pt"}}));
}

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
  for (size_t s = 0; s < shards; ++s) {
    const std::string file = shards == 1 ? kSingle : fmt::format("model-{:05}-of-{:05}.safetensors", s + 1, shards);
    for (size_t i = starts[s]; i < starts[s + 1]; ++i) places[tensors[i].name] = file;
    write_shard(directory / file, tensors.data() + starts[s], tensors.data() + starts[s + 1]);
  }
  if (shards > 1)
    core::write_atomically(directory / kIndex,
                           core::Json{{"metadata", {{"total_size", total}}}, {"weight_map", places}}.dump(2) + "\n");
  fs::remove(directory / (shards > 1 ? kSingle : kIndex));  // of another checkpoint
  core::write_atomically(directory / "config.json", config.dump(2) + "\n");
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
    if (tensor.shape.size() != 3 || (gate_up && tensor.shape[1] % 2 != 0)) {
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
