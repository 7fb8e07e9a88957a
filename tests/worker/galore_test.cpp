// GaLore with the optimisers it is for: against its definition in double precision, and in the training loop.
#include "algorithms/galore/galore.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_svdvals.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/worker/tiny_job.h"
#include "worker/optimizer.h"
#include "worker/trainer.h"

namespace moraine::worker {
namespace {

using algorithms::galore::GaLoreConfig;
using algorithms::galore::make_space;
using ::testing::HasSubstr;

at::Tensor waves(at::IntArrayRef sizes, double frequency) {
  at::Tensor tensor = at::empty(sizes, at::kFloat);
  for (int64_t i = 0; i < tensor.numel(); ++i)
    tensor.data_ptr<float>()[i] = static_cast<float>(std::sin(frequency * static_cast<double>((i + 1) * (i + 3))));
  return tensor;
}

at::Tensor gradient_at(const at::Tensor& parameter, int64_t which, int64_t step) {
  return waves(parameter.sizes(), 0.37 + 0.11 * static_cast<double>(which) + 0.05 * static_cast<double>(step));
}

/// Two shapes and a square one that are projected, and a vector that is not.
const std::vector<models::Slot> kSlots = {{"tall", models::SlotKind::kLinear, 4, 6},
                                          {"wide", models::SlotKind::kLinear, 5, 3},
                                          {"square", models::SlotKind::kLinear, 4, 4}};

models::NamedTensors make_parameters() {
  return {{"square.weight", waves({4, 4}, 0.3).set_requires_grad(true)},
          {"tall.weight", waves({6, 4}, 0.5).set_requires_grad(true)},
          {"vector", waves({7}, 0.7).set_requires_grad(true)},
          {"wide.weight", waves({3, 5}, 0.9).set_requires_grad(true)}};
}

void set_gradients(const models::NamedTensors& parameters, int64_t step) {
  for (size_t i = 0; i < parameters.size(); ++i)
    parameters[i].second.mutable_grad() = gradient_at(parameters[i].second, static_cast<int64_t>(i), step);
}

GaLoreConfig small_config(int64_t rank = 2, int64_t gap = 4, double scale = 0.25) {
  GaLoreConfig config;
  config.rank = rank;
  config.update_proj_gap = gap;
  config.scale = scale;
  return config;
}

at::Tensor stored(const algorithms::UpdateSpace& space, const std::string& name) {
  for (const auto& [key, tensor] : space.state())
    if (key == name) return tensor;
  throw std::out_of_range(name);
}

/// Of a parameter that is projected on one side.
at::Tensor projection_of(const algorithms::UpdateSpace& space, const std::string& parameter) {
  for (const auto& [key, tensor] : space.state())
    if (key == parameter + "/left" || key == parameter + "/right") return tensor;
  throw std::out_of_range(parameter);
}

/// One matrix as the paper writes it, in double precision. Leading singular vectors come from the eigenvectors of G^T G
/// or G G^T; their signs, which no definition fixes, from `signs`.
struct Reference {
  at::Tensor weight, projection, m, v;  // projection: rows are vectors
  int64_t t = 0;

  void step(const at::Tensor& g, const GaLoreConfig& config, const at::Tensor& signs, double rate, double decay) {
    const bool right = weight.size(0) >= weight.size(1);
    if (t % config.update_proj_gap == 0) {
      const at::Tensor square = right ? at::matmul(g.t(), g) : at::matmul(g, g.t());
      const at::Tensor vectors = std::get<1>(at::linalg_eigh(square)).flip(1).narrow(1, 0, config.rank).t();
      const at::Tensor with = (right ? signs : signs.t()).to(at::kDouble);
      projection = vectors * (vectors * with).sum(1, true).sign();
    }
    const at::Tensor r = right ? at::matmul(g, projection.t()) : at::matmul(projection, g);
    if (!m.defined()) m = at::zeros_like(r), v = at::zeros_like(r);
    ++t;
    m = 0.9 * m + 0.1 * r;
    v = 0.95 * v + 0.05 * r * r;
    const double count = static_cast<double>(t);
    const at::Tensor n = (m / (1 - std::pow(0.9, count))) / ((v / (1 - std::pow(0.95, count))).sqrt() + 1e-8) * -rate;
    weight = weight + config.scale * (right ? at::matmul(n, projection) : at::matmul(projection.t(), n));
    weight = weight - rate * decay * weight;
  }
};

TEST(GaLore, WithAdamWEqualsItsDefinitionInDoublePrecision) {
  algorithms::TrainConfig config;
  config.weight_decay = 0.1;
  const GaLoreConfig galore = small_config();
  const models::NamedTensors parameters = make_parameters(), plain = make_parameters();
  const auto space = make_space(galore, kSlots, parameters);
  Optimizer optimizer(config, parameters, {}, space), usual(config, {plain[2]});
  std::map<std::string, Reference> references;
  for (const auto& [name, tensor] : parameters)
    if (tensor.dim() == 2) references[name].weight = tensor.detach().to(at::kDouble);
  for (int64_t step = 0; step < 11; ++step) {
    set_gradients(parameters, step);
    plain[2].second.mutable_grad() = gradient_at(plain[2].second, 2, step);
    std::map<std::string, at::Tensor> gradients;
    for (const auto& [name, tensor] : parameters) gradients[name] = tensor.grad().to(at::kDouble);
    optimizer.step(0.05);
    usual.step(0.05);
    for (auto& [name, reference] : references)
      reference.step(gradients.at(name), galore, projection_of(*space, name), 0.05, 0.1);
  }
  for (const auto& [name, tensor] : parameters) {
    if (tensor.dim() != 2) continue;
    // Eleven float32 updates of size 0.05, three decompositions among them.
    EXPECT_LT((tensor.detach() - references.at(name).weight).abs().max().item<double>(), 5e-6) << name;
  }
  EXPECT_EQ(testing::flat({parameters[2]}), testing::flat({plain[2]})) << "what is not selected moves as usual";
}

TEST(GaLore, FullRankWithSgdIsSgdBecauseTheProjectionIsOrthogonal) {
  algorithms::TrainConfig config;
  config.optimizer = "sgd";
  config.momentum = 0.9;
  const std::vector<models::Slot> slots = {kSlots[0], kSlots[2]};
  models::NamedTensors parameters = make_parameters(), plain = make_parameters();
  const auto space = make_space(small_config(4, 100, 1), slots, parameters);
  Optimizer optimizer(config, parameters, {}, space), usual(config, plain);
  for (int64_t step = 0; step < 5; ++step) {
    set_gradients(parameters, step);
    set_gradients(plain, step);
    optimizer.step(0.05);
    usual.step(0.05);
  }
  for (size_t i = 0; i < plain.size(); ++i)
    EXPECT_LT((parameters[i].second - plain[i].second).abs().max().item<double>(), 1e-6) << parameters[i].first;
  const at::Tensor q = stored(*space, "tall.weight/right");
  EXPECT_LT((at::matmul(q, q.t()) - at::eye(4)).abs().max().item<double>(), 1e-6);
}

TEST(GaLore, FullRankWithAdamIsAdamInTheRotatedBasis) {
  const algorithms::TrainConfig config;
  const std::vector<models::Slot> slots = {kSlots[0]};
  models::NamedTensors parameters = {make_parameters()[1]};
  const at::Tensor start = parameters[0].second.detach().clone();
  const auto space = make_space(small_config(4, 100, 1), slots, parameters);
  Optimizer optimizer(config, parameters, {}, space);
  std::optional<Optimizer> rotated;
  models::NamedTensors moving;
  for (int64_t step = 0; step < 4; ++step) {
    const at::Tensor gradient = gradient_at(start, 1, step);
    parameters[0].second.mutable_grad() = gradient.clone();
    optimizer.step(0.05);
    const at::Tensor q = stored(*space, "tall.weight/right");
    if (!rotated) {
      moving = {{"rotated", at::matmul(start, q.t()).contiguous().set_requires_grad(true)}};
      rotated.emplace(config, moving);
    }
    moving[0].second.mutable_grad() = at::matmul(gradient, q.t()).contiguous();
    rotated->step(0.05);
  }
  const at::Tensor back = at::matmul(moving[0].second.detach(), stored(*space, "tall.weight/right"));
  EXPECT_LT((parameters[0].second.detach() - back).abs().max().item<double>(), 1e-6);
}

TEST(GaLore, KSubspacesChangeAWeightByRankKTimesR) {
  models::NamedTensors parameters = {{"tall.weight", waves({12, 9}, 0.5).set_requires_grad(true)}};
  const std::vector<models::Slot> slots = {{"tall", models::SlotKind::kLinear, 9, 12}};
  const at::Tensor start = parameters[0].second.detach().clone();
  Optimizer optimizer({}, parameters, {}, make_space(small_config(2, 3, 1), slots, parameters));
  for (int64_t step = 0; step < 6; ++step) {
    set_gradients(parameters, step);
    optimizer.step(0.05);
    const at::Tensor values = at::linalg_svdvals(parameters[0].second.detach().sub(start).to(at::kDouble));
    const int64_t rank = values.gt(1e-6).sum().item<int64_t>();  // float32 rounding of the sums
    EXPECT_EQ(rank, step < 3 ? 2 : 4) << step;
  }
}

TEST(GaLore, OfATransposedWeightIsTheTransposed) {
  const at::Tensor start = waves({6, 4}, 0.5);
  models::NamedTensors parameters = {{"tall.weight", start.clone().set_requires_grad(true)},
                                     {"wide.weight", start.t().contiguous().set_requires_grad(true)}};
  const std::vector<models::Slot> slots = {kSlots[0], {"wide", models::SlotKind::kLinear, 6, 4}};
  Optimizer optimizer({}, parameters, {}, make_space(small_config(2, 100), slots, parameters));
  for (int64_t step = 0; step < 5; ++step) {
    const at::Tensor gradient = gradient_at(start, 1, step);
    parameters[0].second.mutable_grad() = gradient.clone();
    parameters[1].second.mutable_grad() = gradient.t().contiguous();
    optimizer.step(0.05);
  }
  EXPECT_LT((parameters[0].second - parameters[1].second.t()).abs().max().item<double>(), 1e-6);
}

TEST(GaLore, ProjectsTheSideItIsToldTo) {
  const auto parameters = make_parameters();
  const auto shape = [&](const std::string& type, const std::string& name) {
    GaLoreConfig config = small_config();
    config.proj_type = type;
    return make_space(config, kSlots, parameters)->shape(name + ".weight").value();
  };
  using Shape = std::vector<int64_t>;
  EXPECT_EQ(shape("std", "tall"), (Shape{6, 2}));
  EXPECT_EQ(shape("std", "wide"), (Shape{2, 5}));
  EXPECT_EQ(shape("std", "square"), (Shape{4, 2}));
  EXPECT_EQ(shape("reverse_std", "tall"), (Shape{2, 4}));
  EXPECT_EQ(shape("reverse_std", "wide"), (Shape{3, 2}));
  EXPECT_EQ(shape("left", "tall"), (Shape{2, 4}));
  EXPECT_EQ(shape("right", "wide"), (Shape{3, 2}));
  EXPECT_EQ(shape("full", "tall"), (Shape{2, 2}));
  EXPECT_EQ(shape("full", "wide"), (Shape{2, 2}));
  EXPECT_FALSE(make_space(small_config(), kSlots, parameters)->shape("vector").has_value());
}

TEST(GaLore, BothSidesMoveByTheCoreOfTheGradientAlone) {
  // With plain SGD an update is -rate * scale * P P^T G Q^T Q, by loops of matrices in double precision.
  algorithms::TrainConfig config;
  config.optimizer = "sgd";
  config.momentum = 0;
  GaLoreConfig galore = small_config(2, 2, 0.25);
  galore.proj_type = "full";
  models::NamedTensors parameters = {{"tall.weight", waves({6, 4}, 0.5).set_requires_grad(true)}};
  const std::vector<models::Slot> slots = {kSlots[0]};
  const auto space = make_space(galore, slots, parameters);
  Optimizer optimizer(config, parameters, {}, space);
  at::Tensor expected = parameters[0].second.detach().to(at::kDouble);
  at::Tensor p, q;
  for (int64_t step = 0; step < 5; ++step) {
    const at::Tensor gradient = gradient_at(parameters[0].second, 1, step), g = gradient.to(at::kDouble);
    if (step % 2 == 0) {
      p = std::get<1>(at::linalg_eigh(at::matmul(g, g.t()))).flip(1).narrow(1, 0, 2);
      q = std::get<1>(at::linalg_eigh(at::matmul(g.t(), g))).flip(1).narrow(1, 0, 2).t();
    }
    parameters[0].second.mutable_grad() = gradient.clone();
    optimizer.step(0.05);
    const at::Tensor core = at::matmul(at::matmul(p.t(), g), q.t());
    expected = expected - 0.05 * 0.25 * at::matmul(at::matmul(p, core), q);  // signs of P and Q cancel
    const at::Tensor left = stored(*space, "tall.weight/left"), right = stored(*space, "tall.weight/right");
    EXPECT_LT((at::matmul(left.t(), left) - at::eye(2)).abs().max().item<double>(), 1e-6);
    EXPECT_LT((at::matmul(right, right.t()) - at::eye(2)).abs().max().item<double>(), 1e-6);
  }
  EXPECT_LT((parameters[0].second.detach() - expected).abs().max().item<double>(), 1e-6);
  // [m, n] keeps (m + n) r + r^2 numbers without momentum's second moment.
  config.momentum = 0.9;
  EXPECT_EQ(Optimizer(config, parameters, {}, make_space(galore, slots, parameters)).state_bytes(),
            4 * ((6 + 4) * 2 + 2 * 2 + 1));
}

TEST(GaLore, ARankThatDoesNotFitAndUnknownModulesAreRefused) {
  const auto refused = [&](GaLoreConfig config) -> std::string {
    try {
      (void)algorithms::galore::targets_of(config, kSlots);
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(refused(small_config(4)), HasSubstr("rank 4 does not fit wide"));
  GaLoreConfig named = small_config();
  named.target_modules = {"tall", "talll"};
  EXPECT_THAT(refused(named), HasSubstr("'talll'"));
}

/// What a matrix [m, n] and a vector of 300 keep, with and without GaLore and 8 bits.
int64_t bytes_of(const std::string& optimizer, std::optional<int64_t> rank, int64_t m, int64_t n) {
  algorithms::TrainConfig config;
  config.optimizer = optimizer;
  const models::NamedTensors parameters = {{"vector", waves({300}, 0.1).set_requires_grad(true)},
                                           {"w.weight", waves({m, n}, 0.2).set_requires_grad(true)}};
  const std::vector<models::Slot> slots = {{"w", models::SlotKind::kLinear, n, m}};
  return Optimizer(config, parameters, {}, rank ? make_space(small_config(*rank), slots, parameters) : nullptr)
      .state_bytes();
}

TEST(GaLore, MemoryIsThatOfTheClosedForms) {
  const int64_t m = 160, n = 96, r = 32;
  const int64_t others = 2 * 300 * 4 + 4 + 4;  // the vector's moments and two counts of steps
  EXPECT_EQ(bytes_of("adamw", std::nullopt, m, n), 2 * m * n * 4 + others);
  EXPECT_EQ(bytes_of("adamw8bit", std::nullopt, m, n), 2 * (m * n / 256) * (256 + 4) + others);
  for (const auto& [rows, columns] : {std::pair(m, n), std::pair(n, m)}) {
    EXPECT_EQ(bytes_of("adamw", r, rows, columns), (n * r + 2 * m * r) * 4 + 4 + others);
    EXPECT_EQ(bytes_of("adamw8bit", r, rows, columns), n * r * 4 + 2 * (m * r / 256) * (256 + 4) + 4 + others);
  }
}

TEST(AdamW8Bit, EqualsAdamWWhoseMomentsAreRoundedBetweenSteps) {
  algorithms::TrainConfig config;
  config.optimizer = "adamw8bit";
  config.weight_decay = 0.1;
  const models::NamedTensors parameters = {{"p", waves({4200}, 0.3).set_requires_grad(true)}};
  Optimizer optimizer(config, parameters);
  at::Tensor expected = parameters[0].second.detach().to(at::kDouble), m = at::zeros_like(expected),
             v = at::zeros_like(expected);
  BlockwiseMoment first({4200}, true, at::kCPU), second({4200}, false, at::kCPU);
  for (int64_t step = 1; step <= 6; ++step) {
    const at::Tensor gradient = gradient_at(expected, 0, step);
    parameters[0].second.mutable_grad() = gradient.clone();
    optimizer.step(0.05);
    const at::Tensor g = gradient.to(at::kDouble);
    m = 0.9 * first.values().to(at::kDouble) + 0.1 * g;
    v = 0.95 * second.values().to(at::kDouble) + 0.05 * g * g;
    const double count = static_cast<double>(step);
    expected = expected * (1 - 0.05 * 0.1) -
               0.05 * (m / (1 - std::pow(0.9, count))) / ((v / (1 - std::pow(0.95, count))).sqrt() + 1e-8);
    first.store(m.to(at::kFloat));
    second.store(v.to(at::kFloat));
  }
  // A value half way between two codes may round to either: few do.
  const at::Tensor off = (parameters[0].second.detach() - expected).abs();
  EXPECT_LE(off.gt(5e-6).sum().item<int64_t>(), 4);
  EXPECT_LT(off.max().item<double>(), 0.05);
}

TEST(AdamW8Bit, SmallTensorsKeepMomentsInFloat32) {
  algorithms::TrainConfig eight, usual;
  eight.optimizer = "adamw8bit";
  const models::NamedTensors one = make_parameters(), other = make_parameters();
  Optimizer first(eight, one), second(usual, other);
  for (int64_t step = 0; step < 3; ++step) {
    set_gradients(one, step);
    set_gradients(other, step);
    first.step(0.05);
    second.step(0.05);
  }
  EXPECT_EQ(testing::flat(one), testing::flat(other));
}

/// A regression large enough for moments in 8 bits, in subspaces too.
algorithms::TrainJob wide_job(const std::string& optimizer, bool galore, int64_t micro = 0) {
  algorithms::TrainJob job;
  job.config.optimizer = optimizer;
  job.config.steps = 7;
  job.config.batch_size = 6;
  job.config.micro_batch_size = micro;
  job.config.learning_rate = 0.01;
  job.tokens_per_sequence = 1;
  const at::Tensor w = waves({64, 80}, 0.3).set_requires_grad(true), v = waves({4100}, 0.2).set_requires_grad(true);
  job.parameters = {{"v", v}, {"w.weight", w}};
  job.loss = [w, v](int64_t step, int64_t first, int64_t num) {
    const at::Tensor x = waves({6, 80}, 0.013 + 0.001 * static_cast<double>(step)).narrow(0, first, num);
    const at::Tensor y = at::matmul(x, w.t()) + v.narrow(0, 64 * (step % 3), 64);
    return algorithms::TrainJob::MicroLoss{
        (y - 1).square().sum() + (v.square().sum() + w.square().sum()) * static_cast<double>(num), num};
  };
  if (galore)
    job.space = make_space(small_config(52, 3), std::vector<models::Slot>{{"w", models::SlotKind::kLinear, 80, 64}},
                           job.parameters);
  return job;
}

TrainSite site_of(const std::filesystem::path& checkpoint, std::optional<int64_t> stop_after) {
  TrainSite site;
  site.job = "unit/0";
  site.label = "train/wide";
  site.checkpoint = checkpoint;
  site.metric = [](const core::metrics::Record&) {};
  site.progress = [](double, double) {};
  site.stop_requested = [stop_after, done = int64_t{0}]() mutable { return ++done == stop_after; };
  return site;
}

TEST(GaLore, StoppedAnywhereAndResumedEqualsUninterruptedBitForBit) {
  const testing::TempDirectory directory;
  for (const std::string optimizer : {"adamw", "adamw8bit", "sgd"})
    for (const bool galore : {true, false}) {
      auto whole = wide_job(optimizer, galore);
      const TrainResult expected = train(whole, site_of({}, std::nullopt));
      for (const int64_t stop : {1, 3, 5}) {
        SCOPED_TRACE(fmt::format("{} {} stopped after {}", optimizer, galore, stop));
        const auto checkpoint = directory.path() / fmt::format("{}{}{}", optimizer, galore, stop);
        EXPECT_THROW(train(wide_job(optimizer, galore), site_of(checkpoint, stop)), core::StopRequested);
        auto resumed = wide_job(optimizer, galore);
        const TrainResult result = train(resumed, site_of(checkpoint, std::nullopt));
        EXPECT_EQ(result.resumed_at, stop);
        EXPECT_EQ(result.optimizer_bytes, expected.optimizer_bytes);
        EXPECT_EQ(testing::flat(resumed.parameters), testing::flat(whole.parameters));
      }
    }
}

TEST(GaLore, MicroBatchesChangeRoundingOnly) {
  auto whole = wide_job("adamw", true), cut = wide_job("adamw", true, 2);
  (void)train(whole, site_of({}, std::nullopt));
  (void)train(cut, site_of({}, std::nullopt));
  for (size_t i = 0; i < whole.parameters.size(); ++i) {
    const at::Tensor off = whole.parameters[i].second - cut.parameters[i].second;
    EXPECT_LT(off.norm().item<double>(), 1e-3 * whole.parameters[i].second.norm().item<double>());
  }
}

}  // namespace
}  // namespace moraine::worker
