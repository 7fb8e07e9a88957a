#include "models/checkpoint.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/json.h"
#include "models/decoder.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::models {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::vector<LazyTensor> lazy(const NamedTensors& tensors) {
  std::vector<LazyTensor> out;
  for (const auto& [name, tensor] : tensors)
    out.push_back({name, static_cast<int64_t>(tensor.nbytes()), [tensor = tensor] { return tensor; }});
  return out;
}

TEST(Checkpoint, ShardsReadBackAsWritten) {
  const TemporaryDirectory directory;
  NamedTensors tensors;
  for (int i = 0; i < 7; ++i)
    tensors.emplace_back(fmt::format("t{}", i), random_tensor({i + 1, 4}, i).to(i % 2 ? at::kFloat : at::kBFloat16));
  write_checkpoint(directory.path(), {{"a", 1}}, lazy(tensors), /*shard_bytes=*/100);
  EXPECT_FALSE(std::filesystem::exists(directory / "model.safetensors"));
  const core::Json index = core::read_json(directory / "model.safetensors.index.json");
  // Sizes 8 32 24 64 40 96 56, 320 in total, filled in order up to 100 bytes: {8 32 24} {64} {40} {96} {56}.
  EXPECT_EQ(index["metadata"]["total_size"], 320);
  EXPECT_EQ(index["weight_map"]["t2"], "model-00001-of-00005.safetensors");
  EXPECT_EQ(index["weight_map"]["t3"], "model-00002-of-00005.safetensors");
  EXPECT_EQ(index["weight_map"]["t5"], "model-00004-of-00005.safetensors");
  EXPECT_EQ(index["weight_map"]["t6"], "model-00005-of-00005.safetensors");
  const auto files = core::ShardedSafetensors::open(directory.path());
  ASSERT_EQ(files.tensors().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(same_bits(copy_of(*files.find(name)), tensor)) << name;

  tensors.resize(2);
  write_checkpoint(directory.path(), {{"a", 2}}, lazy(tensors));
  EXPECT_EQ(core::ShardedSafetensors::open(directory.path()).tensors().size(), 2u);
  EXPECT_FALSE(std::filesystem::exists(directory / "model.safetensors.index.json"));
}

TEST(Checkpoint, ATensorOfAnotherSizeThanAnnouncedIsOurBug) {
  const TemporaryDirectory directory;
  EXPECT_THROW(write_checkpoint(directory.path(), {}, {{"t", 3, [] { return random_tensor({2}, 1); }}}),
               core::InternalError);
}

// The golden mixture of transformers, its experts packed as transformers 5 packs them.
TEST(Checkpoint, PackedExpertsGiveTransformersLogits) {
  const auto file = core::Safetensors::open(MORAINE_SOURCE_DIR "/tests/models/golden/flexolmo.safetensors");
  const auto config = DecoderConfig::from_json(core::parse_json(file.metadata().at("config"), "golden"), "golden");
  NamedTensors tensors;
  for (const auto& view : file.tensors())
    if (view.name.starts_with("weight/") && view.name.find(".experts.") == std::string::npos)
      tensors.emplace_back(view.name.substr(7), copy_of(view));
  for (int64_t l = 0; l < config.num_layers; ++l) {
    const std::string path = layer_path(l) + ".mlp.experts";
    std::vector<at::Tensor> gate_up, down;
    for (int64_t e = 0; e < config.num_experts; ++e) {
      const auto part = [&](const char* name) {
        return copy_of(*file.find(fmt::format("weight/{}.{}.{}_proj.weight", path, e, name)));
      };
      gate_up.push_back(at::cat({part("gate"), part("up")}));
      down.push_back(part("down"));
    }
    tensors.emplace_back(path + ".gate_up_proj", at::stack(gate_up));
    tensors.emplace_back(path + ".down_proj", at::stack(down));
  }
  std::vector<at::Tensor> keep;
  const at::NoGradGuard no_grad;
  Decoder decoder = Decoder::from_tensors(config, views_of(tensors, keep), "packed", std::nullopt);
  for (const auto& [name, weight] : decoder.weights())
    EXPECT_TRUE(same_bits(weight, copy_of(*file.find("weight/" + name)))) << name;
  // The bound of the golden tests: float32 rounding over two layers of width 16.
  EXPECT_LE(
      relative_error(decoder.forward(copy_of(*file.find("tokens")).slice(1, 0, -1)), copy_of(*file.find("logits"))),
      1e-5);
}

TEST(Checkpoint, PackedTensorsOfAnotherShapeAreNamed) {
  std::vector<at::Tensor> keep;
  const auto odd = views_of({{"model.layers.0.mlp.experts.gate_up_proj", random_tensor({2, 5, 3}, 1)}}, keep);
  EXPECT_THAT(thrown<core::UserError>([&] { unpack_experts(odd, "file"); }),
              AllOf(HasSubstr("file"), HasSubstr("gate_up_proj"), HasSubstr("[2, 5, 3]")));
  const auto flat = views_of({{"model.layers.0.mlp.experts.down_proj", random_tensor({6, 3}, 1)}}, keep);
  EXPECT_THAT(thrown<core::UserError>([&] { unpack_experts(flat, "file"); }), HasSubstr("[E, d, h]"));
}

}  // namespace
}  // namespace moraine::models
