// What may be averaged of which type of adapter: the traits that federated rounds ask, by numbers.
#include <algorithm>
#include <functional>
#include <set>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "algorithms/adapters/adapter.h"
#include "core/error.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::adapters {
namespace {

AdapterConfig small(const Parametrisation& type, const std::string& init = "kaiming") {
  AdapterConfig config;
  config.type = type.name();
  if (type.traits().uses_rank) config.rank = 4, config.init = init;
  return config;
}

models::Decoder tiny_decoder() {
  return models::Decoder::from_config(models::tiny_config(models::DecoderConfig::Family::kOlmo2), 3, at::kFloat);
}

/// An adapter away from its start, and the same with some tensors moved two ways and to the mean of both.
class Averaging {
 public:
  explicit Averaging(const AdapterConfig& config)
      : model_(tiny_decoder()), adapter_(Adapter::create(config, model_, 1, at::kCPU, made_up_calibration())) {
    const at::NoGradGuard no_grad;
    uint64_t seed = 70;
    for (const auto& [name, tensor] : adapter_.parameters()) {
      at::Tensor(tensor).add_(models::random_tensor(tensor.sizes().vec(), ++seed, 0.3).to(at::kFloat));
      middle_.emplace_back(name, tensor.clone());
    }
  }

  const Adapter& adapter() const { return adapter_; }
  const models::Decoder& model() const { return model_; }

  /// Moves the tensors that `moves` names `way` of a random step, and puts the others back.
  void place(double way, const std::function<bool(const std::string&)>& moves) {
    const at::NoGradGuard no_grad;
    uint64_t seed = 170;
    for (auto& [name, tensor] : adapter_.parameters()) {
      const at::Tensor& start = std::ranges::find(middle_, name, &std::pair<std::string, at::Tensor>::first)->second;
      const at::Tensor step = models::random_tensor(tensor.sizes().vec(), ++seed, 0.5).to(at::kFloat);
      at::Tensor(tensor).copy_(moves(name) ? start + step * way : start);
    }
  }

  /// The largest distance, over slots, of the mean output of both ways from the output of the mean, as a share of what
  /// the ways differ by.
  double error(const std::function<bool(const std::string&)>& moves) {
    const at::NoGradGuard no_grad;
    const auto one = outputs(-1, moves), two = outputs(1, moves), mean = outputs(0, moves);
    double largest = 0, difference = 0;
    for (size_t i = 0; i < one.size(); ++i) {
      largest = std::max(largest, ((one[i] + two[i]) / 2 - mean[i]).abs().max().item<double>());
      difference = std::max(difference, (one[i] - two[i]).abs().max().item<double>());
    }
    EXPECT_GT(difference, 1e-3) << "what is moved must matter";
    return largest / difference;
  }

 private:
  std::vector<at::Tensor> outputs(double way, const std::function<bool(const std::string&)>& moves) {
    place(way, moves);
    std::vector<at::Tensor> all;
    for (size_t i = 0; i < adapter_.targets().size(); ++i) {
      const models::Slot& slot = adapter_.targets()[i].slot;
      const at::Tensor x = models::random_tensor({5, slot.in}, 900 + i).to(at::kFloat);
      all.push_back(const_cast<SlotAdapter&>(adapter_.function(i))
                        .forward(x, model_.base(slot.path), models::Pass{})
                        .to(at::kDouble));
    }
    return all;
  }

  models::Decoder model_;
  Adapter adapter_;
  models::NamedTensors middle_;
};

bool exact(const TrainedTensors& trained, const std::string& name) { return trained.at(name).traits.averages_exactly; }

std::string relative_name(const TrainedTensors& trained, const std::string& name) {
  const std::string& slot = trained.at(name).slot;
  return slot.empty() ? name : name.substr(slot.size() + 1);
}

TEST(AveragingExactly, IsAffineInThoseTensorsTogetherAndInNoOtherBesideThem) {
  for (const Parametrisation* type : parametrisations()) {
    SCOPED_TRACE(type->name());
    Averaging averaging(small(*type));
    const TrainedTensors trained = averaging.adapter().trained();
    const auto is_exact = [&](const std::string& name) { return exact(trained, name); };
    // Affine: what is left is rounding of float32 sums of a few dozen terms.
    EXPECT_LT(averaging.error(is_exact), 1e-5);
    std::set<std::string> others;
    for (const auto& [name, tensor] : trained)
      if (!is_exact(name)) others.insert(relative_name(trained, name));
    EXPECT_EQ(others.empty(), type->traits().averages_exactly);
    for (const std::string& other : others)
      EXPECT_GT(averaging.error(
                    [&](const std::string& name) { return is_exact(name) || relative_name(trained, name) == other; }),
                1e-3)
          << other;
  }
}

TEST(Factors, AreThereIfTheTraitSaysSoAndAffineInWhatIsTrained) {
  std::vector<AdapterConfig> configs;
  for (const Parametrisation* type : parametrisations()) configs.push_back(small(*type));
  configs.push_back(small(parametrisation("lora"), "pissa"));
  for (const AdapterConfig& config : configs) {
    SCOPED_TRACE(config.type + " " + config.init);
    Averaging averaging(config);
    const at::NoGradGuard no_grad;
    const auto all = [](const std::string&) { return true; };
    const auto factors = [&](double way) {
      averaging.place(way, all);
      std::vector<Factored> found;
      for (size_t i = 0; i < averaging.adapter().targets().size(); ++i) {
        const auto& path = averaging.adapter().targets()[i].slot.path;
        if (auto factored = averaging.adapter().function(i).factored(averaging.model().base(path))) {
          for (auto& [b, a] : factored->parts) b = b.clone(), a = a.clone();  // they may be the tensors themselves
          found.push_back(*factored);
        }
      }
      return found;
    };
    const auto one = factors(-1), two = factors(1), mean = factors(0);
    EXPECT_EQ(!one.empty(), parametrisation(config.type).change(config) == Change::kFactors);
    for (size_t i = 0; i < one.size(); ++i)
      for (size_t part = 0; part < one[i].parts.size(); ++part) {
        const auto& [b1, a1] = one[i].parts[part];
        const auto& [b2, a2] = two[i].parts[part];
        const auto& [b, a] = mean[i].parts[part];
        EXPECT_LT(models::relative_error((b1 + b2) / 2, b), 1e-5);
        EXPECT_LT(models::relative_error((a1 + a2) / 2, a), 1e-5);
        const bool frozen = part + one[i].frozen >= one[i].parts.size();
        EXPECT_EQ(models::same_bits(b1, b2) && models::same_bits(a1, a2), frozen);
      }
  }
}

TEST(RanksAt, IsWhereAnAdapterOfALowerRankStands) {
  for (const Parametrisation* type : parametrisations()) {
    const AdapterConfig config = small(*type);
    if (!can_be_truncated(config)) continue;
    SCOPED_TRACE(type->name());
    const Averaging averaging(config);
    const Adapter cut = averaging.adapter().truncated(3, averaging.model());
    // One of that rank from the start has the shapes that its type gives it, whatever the traits say.
    const auto wanted = Adapter::blank(cut.config(), averaging.model(), 1, at::kCPU).parameters();
    const auto has = cut.parameters();
    ASSERT_EQ(has.size(), wanted.size());
    for (size_t i = 0; i < has.size(); ++i) EXPECT_EQ(has[i].second.sizes(), wanted[i].second.sizes()) << has[i].first;
  }
}

TEST(ABlankAdapter, HasTheShapesAndTheSeedsOfTheOneItWillBe) {
  for (const Parametrisation* type : parametrisations()) {
    SCOPED_TRACE(type->name());
    Averaging averaging(small(*type));
    const at::NoGradGuard no_grad;
    const Adapter blank = Adapter::blank(small(*type), averaging.model(), 1, at::kCPU);
    for (const auto& [from, to] : {std::pair(averaging.adapter().parameters(), blank.parameters()),
                                   std::pair(averaging.adapter().state(), blank.state())}) {
      ASSERT_EQ(from.size(), to.size());
      for (size_t i = 0; i < from.size(); ++i) {
        EXPECT_EQ(from[i].first, to[i].first);
        at::Tensor(to[i].second).copy_(from[i].second);
      }
    }
    EXPECT_EQ(blank.to_artefact({}, 1)->id(), averaging.adapter().to_artefact({}, 1)->id());
    for (size_t i = 0; i < blank.targets().size(); ++i) {
      const auto& base = averaging.model().base(blank.targets()[i].slot.path);
      const auto wanted = averaging.adapter().function(i).delta(base), has = blank.function(i).delta(base);
      ASSERT_EQ(wanted.has_value(), has.has_value());
      if (wanted) {
        EXPECT_TRUE(models::same_bits(*wanted, *has)) << blank.targets()[i].slot.path;
      }
    }
  }
}

}  // namespace
}  // namespace moraine::algorithms::adapters
