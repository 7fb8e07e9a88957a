#include "algorithms/adapters/dora.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <gtest/gtest.h>

#include "core/file.h"
#include "core/json.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

AdapterConfig dora_config(std::vector<std::string> modules = {"all-linear"}, int64_t rank = 3) {
  AdapterConfig config;
  config.type = "dora";
  config.rank = rank;
  config.target_modules = std::move(modules);
  return config;
}

TEST(Dora, CountsEqualThePublishedNumbers) {
  const AdapterConfig config = dora_config({"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}, 32);
  const Counts counts = count_of(config, decoder_slots(32, 4096, 4096, 11008));
  EXPECT_EQ(counts.trained, 56'098'816 + 876'544);
  EXPECT_EQ(counts.stored, counts.trained);
}

TEST(Dora, LogitsLossGradientsChangesAndFilesAreThoseOfPeft) { expect_equal_to_peft("dora"); }

TEST(Dora, RowsOfTheMergedWeightHaveTheMagnitudesAsNorms) {
  const models::Decoder base = golden_base();
  const Adapter adapter = trained_adapter(dora_config(), base);
  const auto deltas = adapter.deltas(base);
  size_t checked = 0;
  for (const auto& [name, magnitude] : adapter.parameters()) {
    if (!name.ends_with("lora_magnitude_vector")) continue;
    const std::string weight = name.substr(0, name.rfind('.')) + ".weight";
    for (const auto& [changed, delta] : deltas) {
      if (changed != weight) continue;
      const at::Tensor merged = base.weights().at(weight) + delta;
      expect_close(at::linalg_vector_norm(merged, 2, at::IntArrayRef({1})), magnitude.detach().abs(), name);
      ++checked;
    }
  }
  EXPECT_EQ(checked, adapter.targets().size());
}

TEST(Dora, KeepsThePromisesOfATypeOfAdapter) {
  AdapterConfig config = dora_config();
  config.rank_pattern = {{"down_proj", 5}};
  expect_zero_at_init(config);
  // B = 0
  expect_linear_promises(config, {"lora_A.weight"}, /*differs=*/true);
}

TEST(Dora, OwnFilesAreReadBack) {
  const TemporaryDirectory directory;
  const models::Decoder base = golden_base();
  const Adapter adapter = trained_adapter(dora_config({"q_proj", "up_proj"}), base);
  adapter.save(directory.path());
  const core::Json written = core::read_json(directory / "adapter_config.json");
  EXPECT_EQ(written.at("use_dora"), true);
  EXPECT_EQ(written.size(), core::read_json(golden_directory() / "dora/adapter_config.json").size());
  const Adapter again = Adapter::load(directory.path(), base, std::nullopt, at::kCPU);
  EXPECT_EQ(again.config().type, "dora");
  for (size_t i = 0; i < adapter.parameters().size(); ++i)
    EXPECT_TRUE(models::same_bits(again.parameters()[i].second, adapter.parameters()[i].second));
}

TEST(Dora, StartValuesFromTheBaseAreRefused) {
  expect_refused({{"type", "dora"}, {"init", "pissa"}}, "init kaiming, gaussian or eva");
}

}  // namespace
}  // namespace moraine::algorithms::adapters
