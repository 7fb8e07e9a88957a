// Bad and empty input of the kernels' autograd function; its numbers are checked through MixtureFfn (mixture_test.cpp).
#include "models/expert_kernels.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>

#include "core/error.h"
#include "models/mixture.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

using testing::HasSubstr;

// One correct call of two tokens with two slots; tests break one thing at a time.
struct Call {
  FfnExpert expert{{}, {}, {}, pair(10, 6), pair(10, 6), pair(6, 10)};
  std::vector<const FfnExpert*> experts = {nullptr, &expert};
  at::Tensor x = random_tensor({2, 6}, 1), gate_base = random_tensor({2, 10}, 2), up_base = random_tensor({2, 10}, 3);
  at::Tensor gates = at::full({2, 2}, 0.5, at::kDouble), index = at::full({2, 2}, 1, at::kInt);

  static LowRank pair(int64_t out, int64_t in) { return {random_tensor({3, in}, 4), random_tensor({out, 3}, 5)}; }
  std::pair<at::Tensor, at::Tensor> run() const { return ragged_ffn(x, gate_base, up_base, gates, index, experts); }
};

template <typename Change>
std::string refused(const Change& change) {
  Call call;
  change(call);
  return thrown<core::InternalError>([&] { call.run(); });
}

TEST(RaggedFfn, RefusesDtypesAndShapesThatDoNotAgree) {
  EXPECT_THAT(refused([](Call& c) { c.x = c.x.to(at::kHalf); }), HasSubstr("float32, bfloat16 or float64"));
  EXPECT_THAT(refused([](Call& c) { c.gate_base = c.gate_base.to(at::kFloat); }), HasSubstr("dtypes differ"));
  EXPECT_THAT(refused([](Call& c) { c.gates = c.gates.to(at::kFloat); }), HasSubstr("dtypes differ"));
  EXPECT_THAT(refused([](Call& c) { c.index = c.index.to(at::kLong); }), HasSubstr("dtypes differ"));
  EXPECT_THAT(refused([](Call& c) { c.up_base = c.up_base.narrow(0, 0, 1); }), HasSubstr("shapes differ"));
  EXPECT_THAT(refused([](Call& c) { c.gates = c.gates.narrow(1, 0, 1); }), HasSubstr("shapes differ"));
}

TEST(RaggedFfn, RefusesAnIndexOutOfRange) {
  Call call;
  call.index[1][0] = 2;
  EXPECT_THAT(thrown<core::UserError>([&] { call.run(); }), HasSubstr("token 1 slot 0 has 2, experts 2"));
}

TEST(RaggedFfn, WithoutTokensReturnsNothingAndNoGradients) {
  Call call;
  for (at::Tensor* rows : {&call.x, &call.gate_base, &call.up_base, &call.gates, &call.index})
    *rows = rows->narrow(0, 0, 0);
  call.expert.gate_delta.a.set_requires_grad(true);
  const auto [hidden, delta] = call.run();
  EXPECT_EQ(hidden.sizes(), (std::vector<int64_t>{0, 10}));
  EXPECT_EQ(delta.sizes(), (std::vector<int64_t>{0, 6}));
  (hidden.sum() + delta.sum()).backward();
  EXPECT_FALSE(call.expert.gate_delta.a.grad().defined());
}

TEST(RaggedFfn, AnExpertNobodyChoseGetsNoGradient) {
  Call call;
  FfnExpert idle{{}, {}, {}, Call::pair(10, 6), Call::pair(10, 6), Call::pair(6, 10)};
  call.experts = {&idle, &call.expert};
  idle.up_delta.b.set_requires_grad(true);
  call.expert.up_delta.b.set_requires_grad(true);
  const auto [hidden, delta] = call.run();
  (hidden.sum() + delta.sum()).backward();
  EXPECT_FALSE(idle.up_delta.b.grad().defined());
  EXPECT_GT(call.expert.up_delta.b.grad().abs().sum().item<double>(), 0.0);
}

TEST(RaggedFfn, KeptWeightsAreThoseOfTheCallUntilOneChanges) {
  Call call;
  PackedExperts kept;
  const auto run = [&] {
    return ragged_ffn(call.x, call.gate_base, call.up_base, call.gates, call.index, call.experts, &kept);
  };
  const auto equals_fresh = [&] {
    const auto [hidden, delta] = run();
    const auto [fresh_hidden, fresh_delta] = call.run();
    return hidden.equal(fresh_hidden) && delta.equal(fresh_delta);
  };
  EXPECT_TRUE(equals_fresh());
  const ExpertSlabs* first = kept.slabs.get();
  EXPECT_TRUE(equals_fresh());
  EXPECT_EQ(kept.slabs.get(), first);
  call.expert.down_delta.a.mul_(2);
  EXPECT_TRUE(equals_fresh());
  call.expert.up_delta.b = random_tensor({10, 3}, 9);
  EXPECT_TRUE(equals_fresh());
  call.experts = {&call.expert, nullptr};
  call.index.fill_(0);
  EXPECT_TRUE(equals_fresh());
}

TEST(RaggedFfn, TrainedWeightsAreNotKept) {
  Call call;
  PackedExperts kept;
  call.expert.gate_delta.b.set_requires_grad(true);
  ragged_ffn(call.x, call.gate_base, call.up_base, call.gates, call.index, call.experts, &kept);
  EXPECT_EQ(kept.slabs, nullptr);
}

TEST(RaggedFfn, EmptySlotsContributeNothing) {
  Call call;
  call.index.fill_(-1);
  const auto [hidden, delta] = call.run();
  EXPECT_EQ(hidden.abs().sum().item<double>(), 0.0);
  EXPECT_EQ(delta.abs().sum().item<double>(), 0.0);
}

}  // namespace
}  // namespace moraine::models
