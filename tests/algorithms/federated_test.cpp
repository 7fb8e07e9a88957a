#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <random>
#include <set>

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/federated/federation.h"
#include "algorithms/federated/partition.h"
#include "algorithms/federated/units.h"
#include "algorithms/federated/weighted_sum.h"
#include "algorithms/register.h"
#include "core/error.h"
#include "core/file.h"
#include "models/tensor_io.h"
#include "worker/context.h"

namespace moraine::algorithms::federated {
namespace {

using testing::AllOf;
using testing::HasSubstr;

TEST(WeightedSum, EqualsTheSumInLongDoubleAndReadsUnalignedParts) {
  constexpr size_t kLength = 10007;  // more than two blocks and a rest
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const std::vector<double> weights = {0.5, 0.3, 0.2};
  std::vector<std::vector<std::byte>> stored;
  std::vector<std::vector<float>> values(3, std::vector<float>(kLength));
  std::vector<std::span<const std::byte>> parts;
  for (auto& part : values) {
    std::generate(part.begin(), part.end(), [&] { return normal(random); });
    stored.emplace_back(kLength * 4 + 1);
    std::memcpy(stored.back().data() + 1, part.data(), kLength * 4);
  }
  for (const auto& part : stored) parts.emplace_back(part.data() + 1, kLength * 4);
  std::vector<float> sum(kLength);
  weighted_sum(parts, weights, sum);
  for (size_t i = 0; i < kLength; ++i) {
    long double expected = 0;
    for (size_t k = 0; k < 3; ++k) expected += static_cast<long double>(weights[k]) * values[k][i];
    // One rounding to float: half a unit of a number below 2^(exponent + 1).
    ASSERT_NEAR(sum[i], static_cast<double>(expected), std::abs(static_cast<double>(expected)) * 6e-8 + 1e-15) << i;
  }
}

std::vector<std::pair<std::string, int64_t>> sizes() { return {{"a", 101}, {"b", 57}, {"c", 300}}; }

TEST(Partition, GivesEverySequenceToExactlyOneClient) {
  for (const char* scheme : {"domain", "iid", "dirichlet"}) {
    ClientsConfig config;
    config.count = 7, config.partition = scheme, config.alpha = 0.3;
    const auto clients = partition(sizes(), config, 5);
    for (const auto& [domain, total] : sizes()) {
      std::set<int64_t> places;
      int64_t given = 0;
      for (const auto& client : clients) {
        if (!client.shares.count(domain)) continue;
        const Share share = client.shares.at(domain);
        given += share.count;
        for (int64_t i = 0; i < share.count; ++i) places.insert(share.first + i);
      }
      EXPECT_EQ(given, total) << scheme << " " << domain;
      EXPECT_EQ(static_cast<int64_t>(places.size()), total) << scheme << " " << domain;
      EXPECT_EQ(*places.rbegin(), total - 1) << scheme << " " << domain;
    }
  }
}

TEST(Partition, SchemesDifferAsTheirNamesSay) {
  ClientsConfig config;
  config.count = 6;
  for (const auto& client : partition(sizes(), config, 1)) EXPECT_EQ(client.shares.size(), 1u) << client.name;
  config.partition = "iid";
  for (const auto& client : partition(sizes(), config, 1))
    EXPECT_NEAR(static_cast<double>(client.sequences()), 458.0 / 6, 3)
        << client.name;  // one of each of three shares by rounding
  // A large alpha is an even split, a small one gives most of a domain to one client.
  config.partition = "dirichlet";
  const auto largest_share = [&](double alpha) {
    config.alpha = alpha;
    int64_t largest = 0;
    for (const auto& client : partition(sizes(), config, 1))
      if (client.shares.count("c")) largest = std::max(largest, client.shares.at("c").count);
    return largest;
  };
  EXPECT_LT(largest_share(1e4), 60);  // 50 each
  EXPECT_GT(largest_share(0.05), 150);
}

TEST(Partition, SamplingIsPerRoundWithoutReplacement) {
  ClientsConfig config;
  config.count = 10, config.partition = "iid";
  const auto clients = partition(sizes(), config, 1);
  std::set<std::vector<size_t>> seen;
  for (int64_t round = 0; round < 8; ++round) {
    const auto chosen = sample_clients(clients, 3, round, 9);
    EXPECT_EQ(std::set<size_t>(chosen.begin(), chosen.end()).size(), 3u);
    EXPECT_EQ(chosen, sample_clients(clients, 3, round, 9));
    seen.insert(chosen);
  }
  EXPECT_GT(seen.size(), 4u);
  EXPECT_EQ(sample_clients(clients, 0, 0, 9).size(), 10u);
}

TEST(ServerStep, ReducesToAveragingAndStandsStillWithoutAChange) {
  const at::Tensor x = at::full({3}, 2.0, at::kFloat), average = at::full({3}, 2.5, at::kFloat);
  ServerConfig config;
  Tensors moments;
  EXPECT_TRUE(server_step(config, "w", x, average, {}, moments).equal(average));
  EXPECT_TRUE(moments.empty());
  config.optimizer = "fedavgm", config.beta1 = 0;
  EXPECT_TRUE(server_step(config, "w", x, average, {}, moments).equal(average));
  config.optimizer = "fedadam", config.beta1 = 0.9;
  EXPECT_TRUE(server_step(config, "w", x, x, {}, moments).equal(x));
}

TEST(ServerStep, MomentsFollowTheirRecurrences) {
  const at::Tensor x = at::zeros({1}, at::kFloat), average = at::full({1}, 0.5, at::kFloat);
  ServerConfig config;
  config.optimizer = "fedavgm", config.beta1 = 0.9;
  Tensors first, second;
  EXPECT_FLOAT_EQ(server_step(config, "w", x, average, {}, first).item<float>(), 0.5F);          // v = D
  EXPECT_FLOAT_EQ(server_step(config, "w", x, average * 3, first, second).item<float>(), 0.6F);  // 0.9 0.5 + 0.1 1.5
  config = {};
  config.optimizer = "fedadam", config.learning_rate = 0.1, config.tau = 0.01;
  first.clear();
  const double m = 0.1 * 0.5, v = 0.99 * (0.01 * 0.01) + (1 - 0.99) * 0.25;
  EXPECT_FLOAT_EQ(server_step(config, "w", x, average, {}, first).item<float>(),
                  static_cast<float>(0.1 * m / (std::sqrt(v) + 0.01)));
  EXPECT_DOUBLE_EQ(first.at("v.w").item<double>(), v);
}

TEST(ServerStep, AdagradAndYogiFollowTheirs) {
  const at::Tensor x = at::zeros({2}, at::kFloat);
  const at::Tensor one = at::tensor({0.5F, 0.01F}), two = at::tensor({0.25F, 2.0F});
  const double tau = 0.1, eta = 0.2;
  ServerConfig config;
  config.optimizer = "fedadagrad", config.learning_rate = eta, config.tau = tau;
  Tensors first, second;
  (void)server_step(config, "w", x, one, {}, first);
  const at::Tensor moved = server_step(config, "w", x, two, first, second);
  const double changes[2][2] = {{0.5, static_cast<double>(0.01F)}, {0.25, 2.0}};
  for (int i = 0; i < 2; ++i) {
    const double v = tau * tau + changes[0][i] * changes[0][i] + changes[1][i] * changes[1][i];
    EXPECT_FLOAT_EQ(moved[i].item<float>(), static_cast<float>(eta * changes[1][i] / (std::sqrt(v) + tau)));
    EXPECT_DOUBLE_EQ(second.at("v.w")[i].item<double>(), v);
  }
  EXPECT_FALSE(second.contains("m.w"));
  config.optimizer = "fedyogi", config.beta1 = 0.5, config.beta2 = 0.75;
  first.clear(), second.clear();
  (void)server_step(config, "w", x, one, {}, first);
  (void)server_step(config, "w", x, two, first, second);
  for (int i = 0; i < 2; ++i) {
    double v = tau * tau, m = 0;
    for (const auto& change : changes) {
      const double square = change[i] * change[i];
      m = 0.5 * m + 0.5 * change[i];
      v += v < square ? 0.25 * square : -0.25 * square;
    }
    EXPECT_DOUBLE_EQ(second.at("m.w")[i].item<double>(), m);
    EXPECT_NEAR(second.at("v.w")[i].item<double>(), v, 1e-15);
  }
}

// Aggregations of made-up contributions through the method itself.
class Aggregate : public testing::Test {
 protected:
  Aggregate() {
    const std::filesystem::path recipes = std::filesystem::path(MORAINE_SOURCE_DIR) / "recipes";
    core::Problems problems;
    const auto path = std::filesystem::path(testing::TempDir()) / fmt::format("federated_{}.yaml", getpid());
    core::write_atomically(
        path,
        fmt::format(
            "name: t\nmethod: fedit\nmodel: {{path: {}}}\ndomains: [{{name: a, path: a.h5}}]\nclients: {{count: 2}}\n"
            "lora: {{rank: 2, alpha: 4, target_modules: [model.layers.0.self_attn.q_proj]}}\n",
            (recipes / "models/tiny-public").string()));
    method_ = load_recipe(path, {}).method;
    base_ = method_->inputs().at("model").get<std::string>();
  }

  core::ArtefactPtr contribution(const std::string& client, double value, int64_t samples, int64_t rank = 2,
                                 const std::string& base = "") {
    models::NamedTensors tensors = {{kSlot + ".lora_A.weight", at::full({rank, 128}, value, at::kFloat)},
                                    {kSlot + ".lora_B.weight", at::full({128, rank}, value, at::kFloat)}};
    std::vector<at::Tensor> keep;
    auto artefact = core::Artefact::create(
        "update", {{"client", client}, {"samples", samples}, {"rank", rank}, {"base", base.empty() ? base_ : base}},
        models::views_of(tensors, keep));
    artefacts_[artefact->id()] = artefact;
    return artefact;
  }

  core::ArtefactPtr aggregate(const std::vector<core::ArtefactPtr>& updates) {
    AggregateSpec spec{.method = "fedit", .base = base_, .clients = {{"client-1", 30}, {"client-2", 10}}};
    spec.adapter.lora.rank = spec.adapter.rank = 2, spec.adapter.lora.alpha = 4;
    spec.adapter.lora.target_modules = {kSlot};
    Unit unit{"aggregate", "aggregate/1", core::to_spec(aggregate_schema(), spec), {}, Place::kCoordinator, 1};
    for (const auto& update : updates) unit.inputs.push_back(update->id());
    const worker::WorkerOptions options;
    const std::atomic<int> signals{0};
    worker::DirectContext context(
        unit, 1, options, signals,
        {.artefact = [&](const std::string& id) { return artefacts_.at(id); }, .metric = {}, .progress = {}});
    return method_->execute(unit, context);
  }

  std::string refusal(const std::vector<core::ArtefactPtr>& updates) {
    try {
      aggregate(updates);
    } catch (const core::Error& error) {
      return error.what();
    }
    return "accepted";
  }

  const std::string kSlot = "model.layers.0.self_attn.q_proj";
  std::unique_ptr<Method> method_;
  std::string base_;
  std::map<std::string, core::ArtefactPtr> artefacts_;
};

TEST_F(Aggregate, WeighsBySamples) {
  const auto state = aggregate({contribution("client-1", 1.0, 30), contribution("client-2", 3.0, 10)});
  EXPECT_TRUE(
      models::copy_of(*state->file().find(kSlot + ".lora_A.weight")).equal(at::full({2, 128}, 1.5, at::kFloat)));
}

TEST_F(Aggregate, RefusesWhatDoesNotBelong) {
  const auto good = contribution("client-1", 1.0, 30);
  EXPECT_THAT(refusal({good, good}), AllOf(HasSubstr("client-2"), HasSubstr("client-1")));
  EXPECT_THAT(refusal({good, contribution("client-2", 1.0, 10, 4)}),
              AllOf(HasSubstr("client-2"), HasSubstr("[4, 128]"), HasSubstr("[2, 128]")));
  EXPECT_THAT(refusal({good, contribution("client-2", 1.0, 1000)}), AllOf(HasSubstr("1000"), HasSubstr("gave it 10")));
  EXPECT_THAT(refusal({good, contribution("client-2", 1.0, 10, 2, "dir:other")}),
              AllOf(HasSubstr("client-2"), HasSubstr("another base")));
  const auto empty =
      core::Artefact::create("update", {{"client", "client-2"}, {"samples", 10}, {"rank", 2}, {"base", base_}}, {});
  artefacts_[empty->id()] = empty;
  EXPECT_THAT(refusal({good, empty}), AllOf(HasSubstr("client-2"), HasSubstr("lora_A")));
}

}  // namespace
}  // namespace moraine::algorithms::federated
