#include "algorithms/mergers/merger.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/mergers/elementwise.h"
#include "core/error.h"
#include "models/tensor_io.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::mergers {
namespace {

using core::Json;
using models::random_tensor;
using models::relative_error;
using models::thrown;
using testing::AllOf;
using testing::HasSubstr;

constexpr const char* kSlot = "model.layers.0.mlp.down_proj";

MergeConfig config_of(const Json& fields) {
  Json complete = merge_schema().to_json(MergeConfig());
  complete.update(fields);
  return merge_schema().from_json(complete);
}

/// Changes of [out, in] by ranks, with weights of both signs.
std::vector<Contribution> random_contributions(const std::vector<int64_t>& ranks, int64_t out = 9, int64_t in = 12) {
  std::vector<Contribution> all;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const auto seed = 10 * (i + 1);
    adapters::Factored factors{{{random_tensor({out, ranks[i]}, seed), random_tensor({ranks[i], in}, seed + 1)}},
                               0.5 + static_cast<double>(i)};
    const double weight = i == 1 ? -0.4 : 0.7;
    all.push_back({"adapter " + std::to_string(i), "content " + std::to_string(i), weight, factors, {}});
  }
  return all;
}

Contribution dense_contribution(const at::Tensor& change, double weight = 1, const std::string& identity = "dense") {
  return {identity, identity, weight, std::nullopt, change};
}

Merged merge(const std::vector<Contribution>& contributions, const Json& fields, const std::string& slot = kSlot) {
  const MergeConfig config = config_of(fields);
  return merger(config.type).merge(contributions, config, slot);
}

/// The weighted sum, number by number.
at::Tensor sum_by_loops(const std::vector<Contribution>& contributions) {
  at::Tensor sum;
  for (const Contribution& one : contributions)
    for (const auto& [b, a] : one.factors->parts)
      for (int64_t r = 0; r < a.size(0); ++r) {
        const at::Tensor part =
            b.select(1, r).unsqueeze(1) * a.select(0, r).unsqueeze(0) * (one.weight * one.factors->scale);
        sum = sum.defined() ? sum + part : part;
      }
  return sum;
}

// --- PEFT 0.21 -------------------------------------------------------------------------------------------------------

const core::Safetensors& golden() {
  static const core::Safetensors file =
      core::Safetensors::open(adapters::golden_directory() / "merge_golden.safetensors");
  return file;
}

/// Undefined when there is none of that name.
at::Tensor golden_tensor(const std::string& name) {
  const core::TensorView* view = golden().find(name);
  return view == nullptr ? at::Tensor() : models::copy_of(*view);
}

struct GoldenCase {
  std::string set, name, module;
  Json described;
};

std::vector<Contribution> golden_contributions(const GoldenCase& of) {
  std::vector<Contribution> all;
  const std::array names = {"one", "two", "three"};
  for (size_t i = 0; i < names.size(); ++i) {
    const std::string prefix = of.set + "/" + names[i] + "/" + of.module;
    const at::Tensor a = golden_tensor(prefix + ".lora_A"), b = golden_tensor(prefix + ".lora_B");
    if (!a.defined()) continue;
    const double scale = of.described["sets"][of.set][names[i]];
    all.push_back({names[i], names[i], of.described["weights"][i], adapters::Factored{{{b, a}}, scale}, {}});
  }
  return all;
}

void expect_equal_to_peft(const GoldenCase& of) {
  Json fields = of.described["cases"][of.name];
  if (fields.contains("svd_rank")) fields["rank"] = fields["svd_rank"], fields.erase("svd_rank");
  if (fields["type"] == "cat") fields["type"] = "concat";
  const Merged ours = merge(golden_contributions(of), fields, of.module);
  const std::string prefix = of.set + "/" + of.name + "/" + of.module;
  const at::Tensor a = golden_tensor(prefix + ".lora_A"), b = golden_tensor(prefix + ".lora_B");
  ASSERT_TRUE(a.defined() && ours.factors) << prefix;
  // Theirs is float32: sums of a few products of numbers near one.
  EXPECT_LT(relative_error(ours.change(), at::matmul(b.to(at::kDouble), a.to(at::kDouble))), 2e-6) << prefix;
  if (merger(config_of(fields).type).traits().takes_dense) return;  // factors of an SVD have signs of their own
  EXPECT_LT(relative_error(ours.factors->parts[0].first, b.to(at::kDouble)), 1e-6) << prefix;
  EXPECT_LT(relative_error(ours.factors->parts[0].second, a.to(at::kDouble)), 1e-6) << prefix;
}

TEST(Mergers, EveryTypeWithoutRandomMasksDoesWhatPeftDoes) {
  const Json described = core::parse_json(golden().metadata().at("described"), "golden");
  int compared = 0;
  for (const std::string set : {"same", "mixed"})
    for (const auto& [name, options] : described["cases"].items())
      for (const std::string module : {"model.layers.0.self_attn.q_proj", kSlot}) {
        if (!golden_tensor(set + "/" + name + "/" + module + ".lora_A").defined()) continue;
        expect_equal_to_peft({set, name, module, described});
        ++compared;
      }
  EXPECT_EQ(compared, (14 + 8) * 2);
}

// --- one rule at a time ----------------------------------------------------------------------------------------------

TEST(Mergers, ConcatIsTheWeightedSumOfChangesAndItsRanksAddUp) {
  const auto contributions = random_contributions({2, 3, 4});
  const Merged merged = merge(contributions, {{"type", "concat"}});
  EXPECT_EQ(merged.factors->parts[0].second.size(0), 9);
  EXPECT_LT(relative_error(merged.change(), sum_by_loops(contributions)), 1e-14);
}

TEST(Mergers, ConcatOfAChangeWithoutFactorsIsDenseAndExact) {
  auto contributions = random_contributions({2, 3});
  const at::Tensor change = random_tensor({9, 12}, 77);
  const at::Tensor expected = sum_by_loops(contributions) + 1.5 * change;
  contributions.push_back(dense_contribution(change, 1.5));
  const Merged merged = merge(contributions, {{"type", "concat"}});
  EXPECT_FALSE(merged.factors);
  EXPECT_LT(relative_error(merged.change(), expected), 1e-14);
}

// The best approximation of a rank is unique here: singular values of random matrices differ.
TEST(Mergers, SvdIsTheTruncationOfTheDenseSum) {
  for (const auto& ranks : {std::vector<int64_t>{2, 3, 1}, {6, 7, 8}}) {  // above the full rank, too
    const auto contributions = random_contributions(ranks);
    const auto [u, s, vt] = at::linalg_svd(sum_by_loops(contributions), false);
    for (const int64_t rank : {1, 4, 9}) {
      const Merged merged = merge(contributions, {{"type", "svd"}, {"rank", rank}});
      const at::Tensor expected = at::matmul(u.narrow(1, 0, rank) * s.narrow(0, 0, rank), vt.narrow(0, 0, rank));
      EXPECT_LT(relative_error(merged.change(), expected), 1e-12) << rank;
      const double all = s.square().sum().item<double>(), lost = s.slice(0, rank).square().sum().item<double>();
      EXPECT_NEAR(merged.norm2, all, 1e-12 * all);
      EXPECT_NEAR(merged.lost2, lost, 1e-12 * all);
    }
  }
}

TEST(Mergers, SvdTakesTheLargestRankWhenNoneIsGiven) {
  EXPECT_EQ(merge(random_contributions({2, 5, 1}), {{"type", "svd"}}).factors->parts[0].second.size(0), 5);
  const auto dense = std::vector{dense_contribution(random_tensor({4, 3}, 1))};
  EXPECT_THAT(thrown<core::UserError>([&] { merge(dense, {{"type", "svd"}}); }), HasSubstr("give the rank"));
  EXPECT_EQ(merge(dense, {{"type", "svd"}, {"rank", 2}}).factors->parts[0].second.size(0), 2);
}

/// What `type`_dense makes of rows of numbers.
at::Tensor merged_row(const std::vector<at::Tensor>& rows, const std::vector<double>& weights, Json fields) {
  std::vector<Contribution> contributions;
  for (size_t i = 0; i < rows.size(); ++i)
    contributions.push_back(dense_contribution(rows[i].to(at::kDouble).unsqueeze(0), weights[i], std::to_string(i)));
  return merge(contributions, fields).change().squeeze(0);
}

// By hand: density 0.5 keeps two of four.
TEST(Mergers, TiesTrimsElectsAndAverages) {
  const std::vector<at::Tensor> rows = {at::tensor({3.0, -1.0, 2.0, 0.5}), at::tensor({-2.0, -2.5, 1.0, 0.0}),
                                        at::tensor({4.0, 0.0, -5.0, 0.1})};
  const std::vector<double> weights = {1, 2, 0.5};
  // Trimmed: (3 . 2 .), (-2 -2.5 . .), (4 . -5 .); elected by sums: + - - +; means of those that agree, weighted.
  const at::Tensor total = at::tensor({(3 + 0.5 * 4) / 2, 2 * -2.5, 0.5 * -5, 0.0}, at::kDouble);
  EXPECT_TRUE(merged_row(rows, weights, {{"type", "ties_dense"}, {"density", 0.5}}).equal(total));
  // By counts the third place is a tie, which elects +.
  const at::Tensor frequency = at::tensor({2.5, -5.0, 2.0, 0.0}, at::kDouble);
  EXPECT_TRUE(
      merged_row(rows, weights, {{"type", "ties_dense"}, {"density", 0.5}, {"majority_sign_method", "frequency"}})
          .equal(frequency));
}

TEST(Mergers, PruningKeepsTheLargestAndOfEqualOnesTheFirst) {
  const at::Tensor values = at::tensor({1.0, -2.0, 2.0, 2.0, 0.0, -3.0}, at::kDouble);
  EXPECT_TRUE(pruned(values, 0.5).equal(at::tensor({0.0, -2.0, 2.0, 0.0, 0.0, -3.0}, at::kDouble)));
  EXPECT_TRUE(pruned(values, 0.1).equal(at::zeros_like(values)));
  EXPECT_TRUE(pruned(values, 1).equal(values));
  EXPECT_TRUE(merged_row({values, -values}, {2, 1}, {{"type", "magnitude_prune_dense"}, {"density", 0.2}})
                  .equal(at::tensor({0.0, 0.0, 0.0, 0.0, 0.0, -3.0}, at::kDouble)));
}

/// The numbers that dare keeps of one contribution: of ones it leaves 0 and 1 / density.
at::Tensor dare_mask(const std::string& identity, int64_t seed, double density, const std::string& slot = kSlot) {
  const std::vector ones = {dense_contribution(at::ones({40, 50}, at::kDouble), 1, identity)};
  return merge(ones, {{"type", "dare_linear_dense"}, {"density", density}, {"seed", seed}}, slot).change() * density;
}

TEST(Mergers, DareKeepsTheExpectationAndItsMasksFollowFromSeedSlotAndContributionAlone) {
  const at::Tensor mask = dare_mask("a", 1, 0.3);
  EXPECT_TRUE((mask == 0).logical_or(mask == 1).all().item<bool>());
  // 2000 draws: five standard deviations of the share.
  EXPECT_NEAR(mask.mean().item<double>(), 0.3, 5 * std::sqrt(0.3 * 0.7 / 2000));
  EXPECT_TRUE(mask.equal(dare_mask("a", 1, 0.3)));
  EXPECT_FALSE(mask.equal(dare_mask("b", 1, 0.3)));
  EXPECT_FALSE(mask.equal(dare_mask("a", 2, 0.3)));
  EXPECT_FALSE(mask.equal(dare_mask("a", 1, 0.3, "lm_head")));
  // Beside others the same: w_a t_a mask_a / density + ...
  const at::Tensor first = random_tensor({40, 50}, 1), second = random_tensor({40, 50}, 2);
  const std::vector both = {dense_contribution(first, 0.7, "a"), dense_contribution(second, -2, "b")};
  const at::Tensor expected = (0.7 * first * mask - 2 * second * dare_mask("b", 1, 0.3)) / 0.3;
  const Json fields = {{"type", "dare_linear_dense"}, {"density", 0.3}, {"seed", 1}};
  EXPECT_LT(relative_error(merge(both, fields).change(), expected), 1e-14);
}

TEST(Mergers, DareTiesElectsAmongWhatDareKept) {
  const at::Tensor first = random_tensor({40, 50}, 1), second = random_tensor({40, 50}, 2);
  const at::Tensor a = first * dare_mask("a", 5, 0.6) / 0.6, b = second * dare_mask("b", 5, 0.6) / 0.6;
  at::Tensor expected = at::zeros_like(a);
  const auto at_ = [](const at::Tensor& of, int64_t i) { return of.const_data_ptr<double>()[i]; };
  for (int64_t i = 0; i < a.numel(); ++i) {
    const double sign = at_(a, i) + at_(b, i) >= 0 ? 1 : -1;
    double sum = 0, count = 0;
    if (at_(a, i) * sign > 0) sum += 0.7 * at_(a, i), ++count;
    if (at_(b, i) * sign > 0) sum += 1.2 * at_(b, i), ++count;
    expected.mutable_data_ptr<double>()[i] = sum / std::max(count, 1.0);
  }
  const std::vector both = {dense_contribution(first, 0.7, "a"), dense_contribution(second, 1.2, "b")};
  const Json fields = {{"type", "dare_ties_dense"}, {"density", 0.6}, {"seed", 5}};
  EXPECT_LT(relative_error(merge(both, fields).change(), expected), 1e-14);
}

// KnOTS as the paper writes it, on dense changes.
at::Tensor knots_by_dense_svd(const std::vector<Contribution>& contributions, double density) {
  std::vector<at::Tensor> changes;
  for (const Contribution& one : contributions) changes.push_back(change_of(one));
  const auto [u, s, vt] = at::linalg_svd(at::cat(changes, 1), false);
  std::vector<Contribution> aligned;
  const int64_t in = changes[0].size(1), k = (s > 1e-10 * s[0]).sum().item<int64_t>();
  const at::Tensor svt = at::matmul(at::diag(s.narrow(0, 0, k)), vt.narrow(0, 0, k));
  for (size_t i = 0; i < changes.size(); ++i)
    aligned.push_back(dense_contribution(svt.narrow(1, static_cast<int64_t>(i) * in, in), contributions[i].weight));
  return at::matmul(u.narrow(1, 0, k), merge(aligned, {{"type", "ties_dense"}, {"density", density}}).change());
}

TEST(Mergers, KnotsIsTiesInTheBasisOfTheDenseSvd) {
  for (const auto& ranks : {std::vector<int64_t>{2, 3, 1}, {4, 5, 6}}) {  // above the rows' number, too
    const auto contributions = random_contributions(ranks);
    for (const double density : {0.3, 1.0}) {
      const Merged merged = merge(contributions, {{"type", "knots"}, {"density", density}});
      EXPECT_LT(relative_error(merged.change(), knots_by_dense_svd(contributions, density)), 1e-10);
    }
  }
}

TEST(Mergers, KnotsOfOneAdapterIsThatAdapterAndEqualOnesShareTheirDirections) {
  const auto one = random_contributions({3});
  EXPECT_LT(relative_error(merge(one, {{"type", "knots"}, {"density", 1}}).change(), sum_by_loops(one)), 1e-13);
  auto twice = random_contributions({3});
  twice.push_back(twice[0]);
  const Merged merged = merge(twice, {{"type", "knots"}, {"density", 1}});
  EXPECT_LT(relative_error(merged.change(), sum_by_loops(one)), 1e-13);  // their mean
  EXPECT_LT(merge(twice, {{"type", "knots"}, {"density", 1}, {"rank", 3}}).lost2, 1e-20 * merged.norm2);
}

TEST(Mergers, AFactoredChangeOfSeveralPartsIsOneOfTheirRanksSum) {
  auto contributions = random_contributions({3, 3});
  auto parts = contributions;  // A and A0 of one that started from the base
  for (Contribution& one : parts) {
    const auto [b, a] = one.factors->parts[0];
    one.factors->parts = {{b.narrow(1, 0, 1), a.narrow(0, 0, 1)}, {b.narrow(1, 1, 2), a.narrow(0, 1, 2)}};
  }
  for (const Merger* type : mergers()) {
    Json fields = {{"type", type->name()}};
    if (type->traits().density) fields["density"] = 0.5;
    EXPECT_LT(relative_error(merge(parts, fields).change(), merge(contributions, fields).change()), 1e-14)
        << type->name();
  }
}

TEST(Mergers, NoTypeDependsOnTheOrderOfContributions) {
  const auto contributions = random_contributions({3, 3, 3});
  const std::vector turned = {contributions[2], contributions[0], contributions[1]};
  for (const Merger* type : mergers()) {
    Json fields = {{"type", type->name()}};
    if (type->traits().density) fields["density"] = 0.5;
    // Sums of three in another order, float64.
    EXPECT_LT(relative_error(merge(turned, fields).change(), merge(contributions, fields).change()), 1e-12)
        << type->name();
    EXPECT_TRUE(merge(turned, fields).change().equal(merge(turned, fields).change())) << type->name();
  }
}

// --- what is refused -------------------------------------------------------------------------------------------------

TEST(Mergers, AreSortedAndUnknownOnesAreNamedWithWhatIsNear) {
  for (size_t i = 1; i < mergers().size(); ++i) EXPECT_LT(mergers()[i - 1]->name(), mergers()[i]->name());
  EXPECT_THAT(thrown<core::UserError>([] { merger("tise"); }), AllOf(HasSubstr("'tise'"), HasSubstr("'ties'")));
}

TEST(Mergers, OptionsThatATypeHasNoUseForOrLacksAreProblems) {
  const auto problem = [](const Json& fields) { return thrown<core::UserError>([&] { config_of(fields); }); };
  EXPECT_THAT(problem({{"type", "concat"}, {"rank", 4}}), AllOf(HasSubstr("rank: type concat"), HasSubstr("none")));
  EXPECT_THAT(problem({{"type", "svd"}, {"density", 0.5}}), AllOf(HasSubstr("density: type svd"), HasSubstr("rank")));
  EXPECT_THAT(problem({{"type", "ties"}}), AllOf(HasSubstr("density: type ties needs it")));
  EXPECT_THAT(problem({{"type", "ties"}, {"density", 0.5}, {"seed", 1}}), HasSubstr("seed: type ties"));
  EXPECT_THAT(problem({{"type", "linear"}, {"majority_sign_method", "total"}}), HasSubstr("majority_sign_method"));
  EXPECT_THAT(problem({{"type", "svd"}, {"rank", 0}}), HasSubstr("rank"));
  for (const double density : {0.0, -0.1, 1.01})
    EXPECT_THAT(problem({{"type", "ties"}, {"density", density}}), HasSubstr("density"));
}

TEST(Mergers, DifferentRanksAndChangesWithoutFactorsAreRefusedByTypesOnFactors) {
  auto contributions = random_contributions({2, 3});
  for (const char* type : {"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"}) {
    Json fields = {{"type", type}};
    if (merger(type).traits().density) fields["density"] = 0.5;
    EXPECT_THAT(thrown<core::UserError>([&] { merge(contributions, fields); }),
                AllOf(HasSubstr("'adapter 0' has 2 and 'adapter 1' 3"), HasSubstr(kSlot), HasSubstr("concat")));
    auto with_dense = random_contributions({2});
    with_dense.push_back(dense_contribution(random_tensor({9, 12}, 5)));
    EXPECT_THAT(thrown<core::UserError>([&] { merge(with_dense, fields); }),
                AllOf(HasSubstr("works on factors"), HasSubstr("'dense'"), HasSubstr("_svd")));
  }
}

TEST(Mergers, NumbersThatAreNotFiniteAreNamed) {
  auto contributions = random_contributions({2, 2});
  contributions[1].factors->parts[0].second[1][3] = std::numeric_limits<double>::infinity();
  for (const Merger* type : mergers()) {
    Json fields = {{"type", type->name()}};
    if (type->traits().density) fields["density"] = 0.5;
    EXPECT_THAT(thrown<core::UserError>([&] { merge(contributions, fields); }),
                AllOf(HasSubstr("'adapter 1' is not finite"), HasSubstr(kSlot)));
  }
}

}  // namespace
}  // namespace moraine::algorithms::mergers
