#include "tests/algorithms/adapter_cases.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::adapters {
namespace {

const core::Safetensors& golden_file() {
  static const core::Safetensors file = core::Safetensors::open(std::filesystem::path(MORAINE_SOURCE_DIR) /
                                                                "tests/algorithms/golden/lora_golden.safetensors");
  return file;
}

at::Tensor logits(models::Decoder& model) {
  const at::NoGradGuard no_grad;
  return model.forward(golden_tensor("tokens"));
}

void expect_factors_are_delta(const Adapter& adapter, const models::Decoder& model) {
  for (size_t i = 0; i < adapter.targets().size(); ++i) {
    const std::string& path = adapter.targets()[i].slot.path;
    const auto factored = adapter.function(i).factored(model.base(path));
    if (!factored) continue;
    const at::Tensor delta = *adapter.function(i).delta(model.base(path));
    at::Tensor sum = at::zeros_like(delta);
    for (const auto& [b, a] : factored->parts) sum = sum + at::matmul(b, a).mul(factored->scale);
    expect_close(sum, delta, "factors of " + path);
  }
}

}  // namespace

at::Tensor golden_tensor(const std::string& name) {
  const core::TensorView* view = golden_file().find(name);
  MORAINE_CHECK(view != nullptr, "no golden tensor: {}", name);
  return models::copy_of(*view);
}

models::Decoder golden_base(std::optional<at::ScalarType> dtype) {
  const auto config =
      models::DecoderConfig::from_json(core::parse_json(golden_file().metadata().at("config"), "golden"), "golden");
  std::vector<core::TensorView> views;
  for (core::TensorView view : golden_file().tensors()) {
    if (!view.name.starts_with("base/")) continue;
    view.name = view.name.substr(5);
    views.push_back(view);
  }
  return models::Decoder::from_tensors(config, views, "golden", dtype);
}

std::vector<models::Slot> decoder_slots(int64_t layers, int64_t d, int64_t kv, int64_t h) {
  using models::SlotKind;
  std::vector<models::Slot> slots;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const std::string at = "model.layers." + std::to_string(layer);
    for (const auto& [name, in, out] : {std::tuple(".self_attn.q_proj", d, d),
                                        {".self_attn.k_proj", d, kv},
                                        {".self_attn.v_proj", d, kv},
                                        {".self_attn.o_proj", d, d},
                                        {".mlp.gate_proj", d, h},
                                        {".mlp.up_proj", d, h},
                                        {".mlp.down_proj", h, d}})
      slots.push_back({at + name, SlotKind::kLinear, in, out});
  }
  return slots;
}

void expect_close(const at::Tensor& actual, const at::Tensor& expected, const std::string& what) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  EXPECT_LE(models::relative_error(actual, expected), 1e-5) << what;
}

Counts count_of(const AdapterConfig& config, const std::vector<models::Slot>& slots) {
  return parametrisation(config.type).count(targets_of(config, slots), config);
}

Adapter trained_adapter(const AdapterConfig& config, const models::Backbone& model, uint64_t seed) {
  Adapter adapter = Adapter::create(config, model, seed, at::kCPU);
  const at::NoGradGuard no_grad;
  for (auto [name, tensor] : adapter.parameters())
    tensor.add_(models::random_tensor(tensor.sizes().vec(), ++seed, 0.2).to(tensor.scalar_type()));
  return adapter;
}

void expect_zero_at_init(const AdapterConfig& config) {
  ASSERT_TRUE(parametrisation(config.type).traits().zero_at_init);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    models::Decoder model = golden_base(dtype);
    const at::Tensor before = logits(model);
    const Adapter adapter = Adapter::create(config, model, 1, at::kCPU);
    adapter.attach(model);
    EXPECT_TRUE(at::equal(logits(model), before));
    {
      const models::PassScope scope(model, {.training = true, .step = 3, .seed = 5});
      EXPECT_TRUE(at::equal(logits(model), before)) << "in training";
    }
    adapter.detach(model);
    EXPECT_TRUE(at::equal(logits(model), before));
  }
}

void expect_gradients(const AdapterConfig& config, const models::Decoder& base, const std::vector<std::string>& still) {
  models::Decoder model = base.share();
  const Adapter adapter = Adapter::create(config, model, 1, at::kCPU);
  adapter.attach(model);
  const models::PassScope scope(model, {.training = true});
  model.loss(golden_tensor("tokens")).sum.backward();
  for (const auto& [name, tensor] : adapter.parameters()) {
    const bool is_still =
        std::ranges::any_of(still, [&, &path = name](const std::string& end) { return path.ends_with(end); });
    ASSERT_TRUE(tensor.grad().defined()) << name;
    EXPECT_EQ(tensor.grad().abs().max().item<float>() == 0, is_still) << name;
  }
  for (const auto& [name, tensor] : adapter.state()) EXPECT_FALSE(tensor.grad().defined()) << name;
  for (const auto& [name, weight] : model.weights()) EXPECT_FALSE(weight.grad().defined()) << name;
}

void expect_merge_is_forward(const AdapterConfig& config, const models::Decoder& base) {
  models::Decoder model = base.share();
  const Adapter adapter = trained_adapter(config, model);
  expect_factors_are_delta(adapter, model);
  const at::NoGradGuard no_grad;
  models::Decoder merged = model.plus(adapter.deltas(model));
  const at::Tensor before = logits(model);
  adapter.attach(model);
  EXPECT_GT(models::relative_error(logits(model), before), 1e-3) << "the adapter does nothing";
  expect_close(logits(merged), logits(model), "merged logits");
}

void expect_round_trip(const AdapterConfig& config, const models::Decoder& base) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    models::Decoder model = dtype == at::kFloat ? base.share() : golden_base(dtype);
    const Adapter adapter = trained_adapter(config, model, 9);
    const core::ArtefactPtr artefact = adapter.to_artefact(core::Json::object(), 9);
    const Counts planned = count_of(config, model.slots());
    int64_t stored = 0, trained = 0;
    for (const auto& tensor : artefact->file().tensors()) stored += tensor.numel();
    for (const auto& [name, tensor] : adapter.parameters()) trained += tensor.numel();
    EXPECT_EQ(stored, planned.stored);
    EXPECT_EQ(trained, planned.trained);
    adapter.attach(model);
    const at::Tensor expected = logits(model);
    adapter.detach(model);
    Adapter::from_artefact(*artefact, model, at::kCPU).attach(model);
    EXPECT_TRUE(at::equal(logits(model), expected));
  }
}

void expect_depends_on_seed(const AdapterConfig& config, bool differs) {
  // Noise of its own in every trained tensor, so that what a seed draws shows although a fresh adapter does nothing.
  const auto deltas = [&](uint64_t seed) {
    const models::Decoder model = golden_base();
    const Adapter adapter = Adapter::create(config, model, seed, at::kCPU);
    const at::NoGradGuard no_grad;
    for (auto [name, tensor] : adapter.parameters())
      tensor.add_(models::random_tensor(tensor.sizes().vec(), 3).to(tensor.scalar_type()));
    return adapter.deltas(model);
  };
  const auto first = deltas(1);
  (void)at::rand({3});
  const auto again = deltas(1), other = deltas(2);
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_TRUE(at::equal(first[i].second, again[i].second)) << first[i].first;
    EXPECT_EQ(at::equal(first[i].second, other[i].second), !differs) << first[i].first;
  }
}

void expect_refused(const core::Json& config, const std::string& text) {
  const std::string message =
      models::thrown<core::UserError>([&] { (void)adapter_schema().from_json(config, "recipe"); });
  EXPECT_THAT(message, ::testing::HasSubstr(text)) << config.dump();
}

}  // namespace moraine::algorithms::adapters
