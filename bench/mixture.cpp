// Speed of the quickstart model: training (all weights) and the mixture's forward, factored against per-expert.
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
  algorithms::TrainJob job{config, model.make_trainable(), [&](int64_t, int64_t, int64_t) {
                             const auto loss = model.loss(batch);
                             return algorithms::TrainJob::MicroLoss{loss.sum, loss.count};
                           }, 256};
  Clock::time_point start;
  worker::TrainSite site{"bench", "bench", {}, [](const core::metrics::Record&) {}, [&](double done, double) {
                           if (static_cast<int64_t>(done) == kWarmUp) start = Clock::now();
                         }, [] { return false; }};
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

// Milliseconds of one mixture layer on 4096 tokens, [factored, per_expert], interleaved.
std::vector<double> layer_times(int64_t d, int64_t h, int64_t experts, int64_t top_k, int64_t rank, int repeats) {
  const at::NoGradGuard no_grad;
  const auto random = [](at::IntArrayRef shape) { return at::randn(shape).mul_(0.05); };
  models::SlotBase base;
  base.gate = random({h, d});
  base.up = random({h, d});
  base.down = random({d, h});
  std::vector<models::FfnExpert> parts;
  for (int64_t e = 1; e < experts; ++e)
    parts.push_back({{}, {}, {}, {random({rank, d}), random({h, rank})}, {random({rank, d}), random({h, rank})}, {random({rank, h}), random({d, rank})}});
  models::MixtureFfn layer({at::randn({experts, d})}, {}, parts, {.top_k = top_k});
  const at::Tensor x = at::randn({4096, d});
  std::vector<double> factored, per_expert;
  for (int i = 0; i <= repeats; ++i)
    for (auto* times : {&factored, &per_expert}) {
      layer.set_forward(times == &factored ? models::MixtureForward::kFactored : models::MixtureForward::kPerExpert);
      const auto start = Clock::now();
      layer.forward(x, base);
      if (i > 0) times->push_back(seconds_since(start) * 1e3);   // the first round warms up
    }
  return {median(factored), median(per_expert)};
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Speed of the quickstart model and of a mixture layer");
  int threads = 2, repeats = 7;
  int64_t steps = 15;
  bool training = false;
  app.add_option("--threads", threads, "CPU threads");
  app.add_option("--steps", steps, "Timed training steps");
  app.add_option("--repeats", repeats, "Timed rounds of each layer");
  app.add_flag("--training", training, "Training speed only");
  CLI11_PARSE(app, argc, argv);
  at::set_num_threads(threads);
  core::Json out = {{"threads", threads}};
  if (training) {
    out["tokens_per_s"] = training_speed(steps);
  } else {
    out["peak_gflops"] = peak_gflops();
    out["layers"] = core::Json::array();
    for (const auto& [d, h] : std::vector<std::pair<int64_t, int64_t>>{{128, 352}, {512, 1408}})
      for (const int64_t rank : {16, 64})
        for (const int64_t top_k : {2, 4, 7}) {
          const auto times = layer_times(d, h, 7, top_k, rank, repeats);
          out["layers"].push_back({{"d", d}, {"h", h}, {"rank", rank}, {"top_k", top_k}, {"factored_ms", times[0]}, {"per_expert_ms", times[1]}});
        }
  }
  std::puts(out.dump().c_str());
}
