#include "tests/algorithms/adapter_cases.h"

#include <algorithm>
#include <span>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rand.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {

using models::Slot;
using models::SlotKind;
using testing::HasSubstr;

std::filesystem::path golden_directory() {
  return std::filesystem::path(MORAINE_SOURCE_DIR) / "tests/algorithms/golden";
}

std::vector<core::TensorView> below(const core::Safetensors& file, const std::string& prefix) {
  std::vector<core::TensorView> views;
  for (core::TensorView view : file.tensors()) {
    if (!view.name.starts_with(prefix)) continue;
    view.name = view.name.substr(prefix.size());
    views.push_back(view);
  }
  return views;
}

const core::Safetensors& golden() {
  static const core::Safetensors file = core::Safetensors::open(golden_directory() / "lora_golden.safetensors");
  return file;
}

models::Decoder golden_base(std::optional<at::ScalarType> dtype) {
  const auto config =
      models::DecoderConfig::from_json(core::parse_json(golden().metadata().at("config"), "golden"), "golden");
  return models::Decoder::from_tensors(config, below(golden(), "base/"), "golden", dtype);
}

at::Tensor golden_tensor(const std::string& name) {
  const core::TensorView* view = golden().find(name);
  MORAINE_CHECK(view != nullptr, "no golden tensor: {}", name);
  return models::copy_of(*view);
}

void expect_close(const at::Tensor& actual, const at::Tensor& expected, const std::string& what) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  EXPECT_LE(actual.sub(expected).abs().max().item<double>(), 1e-5 * expected.abs().max().item<double>()) << what;
}

std::vector<Slot> decoder_slots(int64_t layers, int64_t d, int64_t kv, int64_t h) {
  std::vector<Slot> slots;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const std::string at = "model.layers." + std::to_string(layer);
    for (const auto& [name, in, out] :
         {std::tuple("q_proj", d, d), {"k_proj", d, kv}, {"v_proj", d, kv}, {"o_proj", d, d}})
      slots.push_back({at + ".self_attn." + name, SlotKind::kLinear, in, out});
    for (const auto& [name, in, out] : {std::tuple("gate_proj", d, h), {"up_proj", d, h}, {"down_proj", h, d}})
      slots.push_back({at + ".mlp." + name, SlotKind::kLinear, in, out});
    slots.push_back({at + ".mlp", SlotKind::kFfn, d, d, h});
  }
  slots.push_back({"lm_head", SlotKind::kLinear, d, 32000});
  return slots;
}

models::Decoder base_with_biases() {
  models::DecoderConfig config = golden_base().config();
  config.attention_bias = config.mlp_bias = true;
  const models::Decoder plain = models::Decoder::from_config(config, 3, at::kFloat);
  models::NamedTensors biases;  // which start at zero
  for (const auto& [name, tensor] : plain.weights())
    if (name.ends_with(".bias"))
      biases.emplace_back(name, models::random_tensor(tensor.sizes().vec(), biases.size()).to(at::kFloat));
  return plain.plus(biases);
}

Counts count_of(const AdapterConfig& config, const std::vector<Slot>& slots) {
  return parametrisation(config.type).count(targets_of(config, slots), config);
}

namespace {

void add_noise(const Adapter& adapter) {
  const at::NoGradGuard no_grad;
  uint64_t seed = 100;
  for (auto [name, tensor] : adapter.parameters())
    tensor.add_(models::random_tensor(tensor.sizes().vec(), ++seed, 0.3).to(tensor.scalar_type()));
}

at::Tensor logits_with(const Adapter& adapter, const models::Decoder& base) {
  models::Decoder model = base.share();
  adapter.attach(model);
  return model.forward(golden_tensor("tokens")).detach();
}

void expect_same_files(const std::filesystem::path& directory, const std::filesystem::path& expected) {
  EXPECT_EQ(core::read_text(directory / "adapter_config.json"), core::read_text(expected / "adapter_config.json"));
  const auto before = core::Safetensors::open(expected / "adapter_model.safetensors"),
             after = core::Safetensors::open(directory / "adapter_model.safetensors");
  EXPECT_EQ(after.metadata(), before.metadata());
  ASSERT_EQ(before.tensors().size(), after.tensors().size());
  for (size_t i = 0; i < before.tensors().size(); ++i) {
    EXPECT_EQ(after.tensors()[i].name, before.tensors()[i].name);
    EXPECT_EQ(after.tensors()[i].shape, before.tensors()[i].shape);
    EXPECT_TRUE(std::ranges::equal(after.tensors()[i].data, before.tensors()[i].data)) << before.tensors()[i].name;
  }
}

}  // namespace

Calibration made_up_calibration() {
  const auto gradients = [](std::span<const Target> targets, int64_t, const Calibration::Each& each) {
    for (size_t i = 0; i < targets.size(); ++i)
      each(i, models::random_tensor({targets[i].slot.out, targets[i].slot.in}, 40 + i).to(at::kFloat));
  };
  const auto moments = [](std::span<const Target> targets, int64_t, const Calibration::Each& each) {
    for (size_t i = 0; i < targets.size(); ++i) {
      const at::Tensor x = models::random_tensor({2 * targets[i].slot.in, targets[i].slot.in}, 80 + i).to(at::kDouble);
      each(i, at::matmul(x.t(), x));
    }
  };
  return {gradients, 0.01, moments};
}

Adapter trained_adapter(const AdapterConfig& config, const models::Backbone& model, uint64_t seed) {
  Adapter adapter = Adapter::create(config, model, seed, at::kCPU, made_up_calibration());
  add_noise(adapter);
  return adapter;
}

void expect_equal_to_peft(const std::string& name) {
  const auto file = core::Safetensors::open(golden_directory() / "peft_golden.safetensors");
  const auto tensor = [&](const std::string& key) { return models::copy_of(*file.find(name + "/" + key)); };
  const at::Tensor tokens = golden_tensor("tokens");
  models::Decoder model = golden_base();
  const Adapter adapter = Adapter::load(golden_directory() / name, model, std::nullopt, at::kCPU);
  adapter.attach(model);
  expect_close(model.forward(tokens.narrow(1, 0, tokens.size(1) - 1)).detach(), tensor("logits"), "logits");
  const at::Tensor loss = model.loss(tokens).sum;
  expect_close(loss.detach(), tensor("loss"), "loss");
  loss.backward();
  const auto gradients = below(file, name + "/grad/");
  const models::NamedTensors parameters = adapter.parameters();
  ASSERT_EQ(parameters.size(), gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    ASSERT_EQ(parameters[i].first, gradients[i].name);
    expect_close(parameters[i].second.grad(), models::borrow(gradients[i]), gradients[i].name);
  }
  const auto changes = below(file, name + "/delta/");
  const models::NamedTensors deltas = adapter.deltas(model);
  ASSERT_EQ(deltas.size(), changes.size());
  for (size_t i = 0; i < changes.size(); ++i) {
    ASSERT_EQ(deltas[i].first, changes[i].name);
    expect_close(deltas[i].second.detach(), models::borrow(changes[i]), changes[i].name);
  }
  const TemporaryDirectory directory;
  adapter.save(directory.path());
  expect_same_files(directory.path(), golden_directory() / name);
}

void expect_zero_at_init(const AdapterConfig& config) {
  ASSERT_TRUE(parametrisation(config.type).traits().zero_at_init);
  const at::Tensor tokens = golden_tensor("tokens");
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    models::Decoder model = golden_base(dtype);
    const at::Tensor before = model.forward(tokens);
    const Adapter adapter = Adapter::create(config, model, 1, at::kCPU, made_up_calibration());
    adapter.attach(model);
    EXPECT_TRUE(at::equal(model.forward(tokens), before)) << config.type;
    {
      const models::PassScope scope(model, {.training = true, .step = 3, .seed = 5});
      EXPECT_TRUE(at::equal(model.forward(tokens), before)) << config.type << " in training";
    }
    adapter.detach(model);
    EXPECT_TRUE(at::equal(model.forward(tokens), before)) << config.type;
  }
}

void expect_gradients(const AdapterConfig& config, const models::Decoder& base, const std::vector<std::string>& still) {
  models::Decoder model = base.share();
  const Adapter adapter = Adapter::create(config, model, 1, at::kCPU, made_up_calibration());
  adapter.attach(model);
  const models::PassScope scope(model, {.training = true});
  model.loss(golden_tensor("tokens")).sum.backward();
  for (const auto& [name, tensor] : adapter.parameters()) {
    ASSERT_TRUE(tensor.grad().defined()) << name;
    const bool zero = std::ranges::any_of(still, [&](const std::string& end) { return name.ends_with(end); });
    EXPECT_EQ(tensor.grad().abs().max().item<float>() == 0, zero) << name;
  }
  for (const auto& [name, weight] : model.weights()) EXPECT_FALSE(weight.grad().defined()) << name;
  for (const auto& [name, tensor] : adapter.state()) EXPECT_FALSE(tensor.requires_grad()) << name;
}

void expect_merge_is_forward(const AdapterConfig& config, const models::Decoder& base) {
  const at::NoGradGuard no_grad;
  const Adapter adapter = trained_adapter(config, base);
  const at::Tensor frozen = base.share().forward(golden_tensor("tokens"));
  EXPECT_GT(models::relative_error(logits_with(adapter, base), frozen), 1e-3) << "the adapter does nothing";
  models::Decoder merged = base.plus(adapter.deltas(base));
  expect_close(merged.forward(golden_tensor("tokens")), logits_with(adapter, base), "merged logits");
  for (size_t i = 0; i < adapter.targets().size(); ++i) {
    const models::SlotBase& slot = base.base(adapter.targets()[i].slot.path);
    const auto factored = adapter.function(i).factored(slot);
    if (!factored) continue;
    at::Tensor sum;
    for (const auto& [b, a] : factored->parts) sum = sum.defined() ? sum + at::matmul(b, a) : at::matmul(b, a);
    expect_close(sum * factored->scale, *adapter.function(i).delta(slot), adapter.targets()[i].slot.path);
  }
}

void expect_round_trip(const AdapterConfig& config, const models::Decoder& base) {
  const Adapter adapter = trained_adapter(config, base, 7);
  const auto artefact = adapter.to_artefact({{"note", "kept"}}, 7);
  EXPECT_EQ(artefact->meta().at("note"), "kept");
  int64_t numbers = 0, trained = 0;
  for (const auto& tensor : artefact->file().tensors()) numbers += tensor.numel();
  for (const auto& [name, tensor] : adapter.parameters()) trained += tensor.numel();
  const Counts counts = parametrisation(config.type).count(adapter.targets(), config);
  EXPECT_EQ(numbers, counts.stored);
  EXPECT_EQ(trained, counts.trained);
  const Adapter again = Adapter::from_artefact(*artefact, base, at::kCPU);
  EXPECT_TRUE(models::same_bits(logits_with(again, base), logits_with(adapter, base)));
  EXPECT_FALSE(at::equal(logits_with(again, base), base.share().forward(golden_tensor("tokens")).detach()));
  for (const auto& [name, tensor] : again.parameters()) EXPECT_TRUE(tensor.requires_grad() && tensor.is_leaf()) << name;
}

void expect_depends_on_seed(const AdapterConfig& config, bool differs) {
  // What a seed draws shows in the changes of trained adapters, of which all have the same noise.
  const models::Decoder base = base_with_biases();
  const auto deltas = [&](uint64_t seed) { return trained_adapter(config, base, seed).deltas(base); };
  const auto first = deltas(1);
  (void)at::rand({3});
  const auto same = deltas(1), other = deltas(2);
  bool any = false;
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_TRUE(models::same_bits(first[i].second, same[i].second)) << first[i].first;
    any = any || !models::same_bits(first[i].second, other[i].second);
  }
  EXPECT_EQ(any, differs);
}

void expect_linear_promises(const AdapterConfig& config, const std::vector<std::string>& still, bool differs) {
  expect_gradients(config, golden_base(), still);
  expect_merge_is_forward(config, golden_base(at::kDouble));
  expect_merge_is_forward(config, base_with_biases());
  expect_round_trip(config, golden_base());
  expect_round_trip(config, golden_base(at::kBFloat16));
  expect_depends_on_seed(config, differs);
}

AdapterConfig checked_config(const core::Json& fields) {
  core::Json json = adapter_schema().to_json(AdapterConfig());
  json.update(fields);
  return adapter_schema().from_json(json);
}

void expect_refused(const core::Json& fields, const std::string& text) {
  EXPECT_THAT(models::thrown<core::UserError>([&] { checked_config(fields); }), HasSubstr(text)) << fields.dump();
}

}  // namespace moraine::algorithms::adapters
