// Speed of the quickstart model: training (all weights), and one mixture layer: kernels against ATen, factored against
// per-expert, forward and training.
// Prints one JSON object; scripts/compare_speed.py interleaves it with its peers in one run.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <CLI/CLI.hpp>

#include "core/json.h"
#include "models/decoder.h"
#include "models/mixture.h"
#include "worker/trainer.h"

namespace {

using namespace moraine;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

models::DecoderConfig quickstart_model() {
  models::DecoderConfig config;
  config.family = models::DecoderConfig::Family::kOlmo2;
  config.vocab_size = 264;
  config.hidden_size = 128;
  config.intermediate_size = 352;
  config.num_layers = 4;
  config.num_heads = config.num_kv_heads = 4;
  config.head_dim = 32;
  config.max_position_embeddings = 256;
  return config;
}

// Tokens per second of whole optimiser steps, after three warm-up steps.
double training_speed(int64_t steps) {
  auto model = models::Decoder::from_config(quickstart_model(), 1, at::kFloat);
  const at::Tensor batch = at::randint(0, 257, {16, 257}, at::kLong);
  algorithms::TrainConfig config;
  constexpr int64_t kWarmUp = 3;
  config.steps = steps + kWarmUp;
  config.log_every = config.steps;
  algorithms::TrainJob job{config, model.make_trainable(),
                           [&](int64_t, int64_t, int64_t) {
                             const auto loss = model.loss(batch);
                             return algorithms::TrainJob::MicroLoss{loss.sum, loss.count};
                           },
                           256};
  Clock::time_point start;
  worker::TrainSite site{"bench",
                         "bench",
                         {},
                         [](const core::metrics::Record&) {},
                         [&](double done, double) {
                           if (static_cast<int64_t>(done) == kWarmUp) start = Clock::now();
                         },
                         [] { return false; }};
  worker::train(job, site);
  return static_cast<double>(steps * 16 * 256) / seconds_since(start);
}

// GFLOP/s of a large matrix product: the machine's peak as the library reaches it, measured in the same process.
double peak_gflops() {
  const at::Tensor a = at::randn({1024, 1024}), b = at::randn({1024, 1024});
  std::vector<double> times;
  for (int i = 0; i < 9; ++i) {
    const auto start = Clock::now();
    at::matmul(a, b);
    times.push_back(seconds_since(start));
  }
  return 2.0 * 1024 * 1024 * 1024 / median(times) / 1e9;
}

struct LayerTimes {
  double factored_ms = 0, per_expert_ms = 0;    // forward: kernels, every expert by itself
  double reference_ms = 0;                      // forward: factored form out of ATen operators
  double train_ms = 0, train_reference_ms = 0;  // forward and backward of x and every low-rank tensor
};

// One mixture layer, all ways interleaved.
LayerTimes layer_times(int64_t tokens, int64_t d, int64_t h, int64_t experts, int64_t top_k, int64_t rank,
                       at::ScalarType dtype, int repeats) {
  const auto random = [dtype](at::IntArrayRef shape) { return at::randn(shape).mul_(0.05).to(dtype); };
  models::SlotBase base;
  base.gate = random({h, d});
  base.up = random({h, d});
  base.down = random({d, h});
  std::vector<models::FfnExpert> parts;
  const auto pair = [&](int64_t out, int64_t in) {
    return models::LowRank{random({rank, in}).set_requires_grad(true), random({out, rank}).set_requires_grad(true)};
  };
  for (int64_t e = 1; e < experts; ++e) parts.push_back({{}, {}, {}, pair(h, d), pair(h, d), pair(d, h)});
  const at::Tensor router = at::randn({experts, d}).to(dtype);
  models::MixtureFfn trained({router}, {}, parts, {.top_k = top_k});
  for (models::FfnExpert& part : parts)
    for (models::LowRank* p : {&part.gate_delta, &part.up_delta, &part.down_delta}) *p = {p->a.detach(), p->b.detach()};
  models::MixtureFfn frozen({router}, {}, parts, {.top_k = top_k});
  const at::Tensor x = at::randn({tokens, d}).to(dtype).set_requires_grad(true);
  const at::Tensor dy = at::randn({tokens, d}).to(dtype);
  using models::MixtureForward, models::MixtureKernels;
  struct Way {
    MixtureForward forward;
    MixtureKernels kernels;
    bool train;
    double LayerTimes::*median;
    std::vector<double> ms;
  };
  std::vector<Way> ways = {
      {MixtureForward::kFactored, MixtureKernels::kAuto, false, &LayerTimes::factored_ms, {}},
      {MixtureForward::kFactored, MixtureKernels::kReference, false, &LayerTimes::reference_ms, {}},
      {MixtureForward::kPerExpert, MixtureKernels::kReference, false, &LayerTimes::per_expert_ms, {}},
      {MixtureForward::kFactored, MixtureKernels::kAuto, true, &LayerTimes::train_ms, {}},
      {MixtureForward::kFactored, MixtureKernels::kReference, true, &LayerTimes::train_reference_ms, {}}};
  for (int i = 0; i <= repeats; ++i)
    for (Way& way : ways) {
      models::MixtureFfn& layer = way.train ? trained : frozen;
      layer.set_forward(way.forward);
      layer.set_kernels(way.kernels);
      const at::AutoGradMode grad_mode(way.train);
      const auto start = Clock::now();
      const at::Tensor y = layer.forward(x, base);
      if (way.train) y.backward(dy);
      if (i > 0) way.ms.push_back(seconds_since(start) * 1e3);  // the first round warms up
    }
  LayerTimes out;
  for (const Way& way : ways) out.*way.median = median(way.ms);
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Speed of the quickstart model and of a mixture layer");
  int threads = 2, repeats = 7;
  int64_t steps = 15, tokens = 4096;
  std::string dtype = "float32";
  std::vector<int64_t> widths{128, 512};
  bool training = false;
  app.add_option("--threads", threads, "CPU threads");
  app.add_option("--steps", steps, "Timed training steps");
  app.add_option("--repeats", repeats, "Timed rounds of each layer");
  app.add_option("--tokens", tokens, "Tokens of a layer's input");
  app.add_option("--widths", widths, "Widths d of the layers; 128 is quickstart's")
      ->check(CLI::IsMember({128, 512, 2048}));
  app.add_option("--dtype", dtype, "Of the layer")->check(CLI::IsMember({"float32", "bfloat16"}));
  app.add_flag("--training", training, "Training speed only");
  CLI11_PARSE(app, argc, argv);
  at::set_num_threads(threads);
  core::Json out = {{"threads", threads}};
  if (training) {
    out["tokens_per_s"] = training_speed(steps);
  } else {
    out["peak_gflops"] = peak_gflops();
    out["layers"] = core::Json::array();
    const at::ScalarType type = dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
    for (const int64_t d : widths)
      for (const int64_t rank : {4, 16, 64})
        for (const int64_t top_k : {2, 4, 7}) {
          const int64_t h = d * 11 / 4;
          const LayerTimes t = layer_times(tokens, d, h, 7, top_k, rank, type, repeats);
          out["layers"].push_back({{"d", d},
                                   {"h", h},
                                   {"rank", rank},
                                   {"top_k", top_k},
                                   {"factored_ms", t.factored_ms},
                                   {"per_expert_ms", t.per_expert_ms},
                                   {"reference_ms", t.reference_ms},
                                   {"train_ms", t.train_ms},
                                   {"train_reference_ms", t.train_reference_ms}});
        }
  }
  std::puts(out.dump().c_str());
}
