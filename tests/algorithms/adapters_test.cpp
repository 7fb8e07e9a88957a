// What every parametrisation has to keep, whichever it is: one table over all of them and two kinds of backbone.
#include <algorithm>
#include <cmath>
#include <set>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/adapter.h"
#include "core/error.h"
#include "models/vit.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::adapters {
namespace {

using models::same_bits;
using testing::HasSubstr;

/// A backbone with an input of its own and what it gives for it.
struct Subject {
  std::unique_ptr<models::Backbone> model;
  std::function<at::Tensor()> output;
};

Subject decoder(at::ScalarType dtype) {
  auto model = std::make_unique<models::Decoder>(
      models::Decoder::from_config(models::tiny_config(models::DecoderConfig::Family::kOlmo2), 3, dtype));
  const at::Tensor tokens = models::random_tokens(2, 7, model->config().vocab_size, 4);
  models::Decoder* raw = model.get();
  return {std::move(model), [raw, tokens] { return raw->forward(tokens); }};
}

Subject vit(at::ScalarType dtype) {
  models::VitConfig config;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.num_layers = 2;
  config.num_heads = 4;
  config.image_size = 8;
  config.patch_size = 4;
  config.num_channels = 1;
  auto model = std::make_unique<models::Vit>(models::Vit::from_config(config, 3, dtype));
  const at::Tensor images = models::random_tensor({3, 1, 8, 8}, 5).to(dtype);
  models::Vit* raw = model.get();
  return {std::move(model), [raw, images] { return raw->features(images); }};
}

/// A configuration of the type that the small backbones have room for.
AdapterConfig small(const Parametrisation& type, const std::string& init = "kaiming") {
  AdapterConfig config;
  config.type = type.name();
  if (type.traits().uses_rank) {
    config.rank = 4;
    config.init = init;
  }
  return config;
}

/// Moves whatever is trained away from where it starts.
void move(const Adapter& adapter) {
  const at::NoGradGuard no_grad;
  uint64_t seed = 70;
  for (const auto& [name, tensor] : adapter.parameters())
    at::Tensor(tensor).add_(models::random_tensor(tensor.sizes().vec(), ++seed, 0.1).to(tensor.scalar_type()));
}

struct Case {
  const Parametrisation* type;
  Subject (*subject)(at::ScalarType);
  const char* backbone;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.type->name() << " on a " << c.backbone; }

class EveryType : public testing::TestWithParam<Case> {
 protected:
  const Parametrisation& type() const { return *GetParam().type; }
  Subject subject(at::ScalarType dtype) const { return GetParam().subject(dtype); }
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Parametrisation* type : parametrisations())
    for (const Case& c : {Case{type, decoder, "decoder"}, Case{type, vit, "vit"}}) all.push_back(c);
  return all;
}

TEST_P(EveryType, AFreshOneChangesNoBitWhereItSaysSoAndDetachRestoresTheBase) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Subject s = subject(dtype);
    const at::NoGradGuard no_grad;
    const at::Tensor before = s.output();
    const Adapter adapter = Adapter::create(small(type()), *s.model, 1, at::kCPU, made_up_calibration());
    adapter.attach(*s.model);
    // A start near zero may still round to no change, depending on the machine.
    if (type().traits().zero_at_init) {
      EXPECT_TRUE(same_bits(s.output(), before));
    }
    move(adapter);
    EXPECT_FALSE(same_bits(s.output(), before)) << "what is trained must matter";
    adapter.detach(*s.model);
    EXPECT_TRUE(same_bits(s.output(), before));
  }
}

TEST_P(EveryType, HasTheNumbersItCounts) {
  const Subject s = subject(at::kFloat);
  const AdapterConfig config = small(type());
  const Adapter adapter = Adapter::create(config, *s.model, 1, at::kCPU, made_up_calibration());
  int64_t trained = 0, kept = 0;
  for (const auto& [name, tensor] : adapter.parameters()) trained += tensor.numel();
  for (const auto& [name, tensor] : adapter.state()) kept += tensor.numel();
  const Counts counts = type().count(adapter.targets(), config);
  EXPECT_EQ(counts.trained, trained);
  EXPECT_EQ(counts.stored, trained + kept);
}

TEST_P(EveryType, TrainsNothingButItsOwn) {
  const Subject s = subject(at::kFloat);
  const Adapter adapter = Adapter::create(small(type()), *s.model, 1, at::kCPU, made_up_calibration());
  move(adapter);  // from where some start, others get no gradient
  adapter.attach(*s.model);
  const models::PassScope scope(*s.model, {.training = true, .step = 3, .first = 0, .seed = 9});
  s.output().pow(2).sum().backward();
  bool any = false;
  for (const auto& [name, tensor] : adapter.parameters()) {
    EXPECT_TRUE(tensor.is_leaf() && tensor.requires_grad() && tensor.scalar_type() == at::kFloat) << name;
    any |= tensor.grad().defined() && tensor.grad().abs().max().item<float>() > 0;
  }
  EXPECT_TRUE(any);
  for (const auto& [name, tensor] : adapter.state()) EXPECT_FALSE(tensor.requires_grad()) << name;
  for (const auto& [name, weight] : s.model->weights()) EXPECT_FALSE(weight.grad().defined()) << name;
}

TEST_P(EveryType, ReadsBackWhatItWroteBitForBit) {
  const Subject s = subject(at::kFloat);
  const at::NoGradGuard no_grad;
  const Adapter adapter = Adapter::create(small(type()), *s.model, 1, at::kCPU, made_up_calibration());
  move(adapter);
  adapter.attach(*s.model);
  const at::Tensor wanted = s.output();
  adapter.detach(*s.model);
  const auto artefact = adapter.to_artefact({}, 1);
  const Adapter again = Adapter::from_artefact(*artefact, *s.model, at::kCPU);
  again.attach(*s.model);
  EXPECT_TRUE(same_bits(s.output(), wanted));
  EXPECT_EQ(again.to_artefact({}, 1)->id(), artefact->id());
  for (const auto& [name, tensor] : again.parameters()) EXPECT_TRUE(tensor.is_leaf() && tensor.requires_grad()) << name;
}

TEST_P(EveryType, ComesFromItsSeedAlone) {
  const Subject s = subject(at::kFloat);
  const auto id = [&](uint64_t seed) {
    return Adapter::create(small(type()), *s.model, seed, at::kCPU, made_up_calibration()).to_artefact({}, seed)->id();
  };
  EXPECT_EQ(id(1), id(1));
}

TEST_P(EveryType, PassesAreDrawnFromTheStepAloneAndEvaluationDrawsNothing) {
  const Subject s = subject(at::kFloat);
  const at::NoGradGuard no_grad;
  const Adapter adapter = Adapter::create(small(type()), *s.model, 1, at::kCPU, made_up_calibration());
  move(adapter);
  adapter.attach(*s.model);
  const auto at_step = [&](int64_t step, bool training) {
    const models::PassScope scope(*s.model, {.training = training, .step = step, .first = 0, .seed = 9});
    return s.output();
  };
  EXPECT_TRUE(same_bits(at_step(5, true), at_step(5, true)));
  EXPECT_TRUE(same_bits(at_step(5, false), at_step(6, false)));
  EXPECT_TRUE(same_bits(at_step(5, false), s.output()));
}

INSTANTIATE_TEST_SUITE_P(Adapters, EveryType, testing::ValuesIn(cases()),
                         [](const auto& one) { return one.param.type->name() + "_" + one.param.backbone; });

TEST(Adapters, TheirChangeAddedToTheWeightsIsTheAttachedModel) {
  for (const Parametrisation* type : parametrisations()) {
    models::Decoder model =
        models::Decoder::from_config(models::tiny_config(models::DecoderConfig::Family::kOlmo2), 3, at::kDouble);
    const at::NoGradGuard no_grad;
    const Adapter adapter = Adapter::create(small(*type), model, 1, at::kCPU, made_up_calibration());
    move(adapter);
    const auto tokens = models::random_tokens(2, 7, model.config().vocab_size, 4);
    std::optional<at::Tensor> merged;
    try {
      merged = model.plus(adapter.deltas(model)).forward(tokens);
    } catch (const core::UserError& error) {
      EXPECT_THAT(error.what(), testing::AnyOf(HasSubstr("is no change of weights"), HasSubstr("bias")))
          << type->name();
      continue;
    }
    adapter.attach(model);
    // The change is rounded to float32, 6e-8, and passes two layers.
    EXPECT_LT(models::relative_error(*merged, model.forward(tokens)), 1e-5) << type->name();
  }
}

TEST(Adapters, DropoutZeroesItsShareInTrainingAlone) {
  models::Pass training{.training = true, .step = 2, .first = 0, .seed = 1};
  const at::Tensor x = at::ones({200, 50});
  const at::Tensor out = dropped(x, 0.25, training, "slot");
  const double kept = out.ne(0).to(at::kDouble).mean().item<double>();
  EXPECT_NEAR(kept, 0.75, 0.02);  // 10,000 values: standard deviation 0.0043
  EXPECT_NEAR(out.max().item<double>(), 1 / 0.75, 1e-6);
  EXPECT_TRUE(same_bits(out, dropped(x, 0.25, training, "slot")));
  EXPECT_FALSE(same_bits(out, dropped(x, 0.25, training, "other")));
  training.step = 3;
  EXPECT_FALSE(same_bits(out, dropped(x, 0.25, training, "slot")));
  EXPECT_TRUE(same_bits(x, dropped(x, 0.25, {}, "slot")));
}

/// Of an adapter that starts from the base: its start and what is left of the weight without it.
struct Start {
  at::Tensor weight, part;  // [out, in]: s B A
};

Start start_of(const std::string& init, double alpha) {
  const Subject s = decoder(at::kFloat);
  AdapterConfig config;
  config.rank = 4;
  config.alpha = alpha;
  config.init = init;
  config.target_modules = {"up_proj"};
  const Adapter adapter = Adapter::create(config, *s.model, 1, at::kCPU);
  const auto parameters = adapter.parameters();
  const std::string path = adapter.targets()[0].slot.path;
  return {s.model->base(path).weight.to(at::kDouble),
          at::matmul(parameters[1].second.detach().to(at::kDouble), parameters[0].second.detach().to(at::kDouble)) *
              (alpha / 4)};
}

TEST(PiSSA, StartsFromTheBestApproximationOfItsRankForAnyAlpha) {
  for (const double alpha : {4.0, 7.0}) {
    const Start start = start_of("pissa", alpha);
    const auto singular = [](const at::Tensor& matrix) { return std::get<1>(at::linalg_svd(matrix, false)); };
    const at::Tensor all = singular(start.weight), rest = singular(start.weight - start.part);
    // Eckart and Young: what is left has the next singular value as its largest. Factors are float32.
    EXPECT_NEAR(rest[0].item<double>(), all[4].item<double>(), 1e-6 * all[0].item<double>());
  }
}

TEST(OLoRA, StartsFromTheLeadingPartOfTheQrOfTheWeight) {
  const Start start = start_of("olora", 4);
  // Q [:, :r] R [:r] has the weight's first r columns: R is triangular.
  EXPECT_LT(models::relative_error(start.part.narrow(1, 0, 4), start.weight.narrow(1, 0, 4)), 1e-5);
}

TEST(Adapters, OptionsAndKeysThatATypeDoesNotHaveAreRefused) {
  const auto problem = [](core::Json json) {
    core::Json values = adapter_schema().to_json({});
    values.update(json);
    return models::thrown<core::UserError>([&] { (void)adapter_schema().from_json(values); });
  };
  EXPECT_EQ(problem({{"type", "dora"}}), "");
  EXPECT_THAT(problem({{"type", "dorra"}}), HasSubstr("dora"));
  EXPECT_THAT(problem({{"type", "dora"}, {"init", "pissa"}}), HasSubstr("kaiming, gaussian or eva"));
  EXPECT_THAT(problem({{"options", {{"ranks", 3}}}}), HasSubstr("no such option"));
}

}  // namespace
}  // namespace moraine::algorithms::adapters
