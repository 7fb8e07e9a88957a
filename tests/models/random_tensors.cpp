#include "tests/models/random_tensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isnan.h>

namespace moraine::models {

at::Tensor random_tensor(const std::vector<int64_t>& shape, uint64_t seed, double deviation) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal(0.0, 1.0);
  at::Tensor tensor = at::empty(shape, at::kDouble);
  double* values = tensor.mutable_data_ptr<double>();
  std::generate(values, values + tensor.numel(), [&] { return deviation * normal(generator); });
  return tensor;
}

at::Tensor random_tokens(int64_t batch, int64_t length, int64_t vocab, uint64_t seed) {
  std::mt19937_64 generator(seed);
  at::Tensor tokens = at::empty({batch, length}, at::kLong);
  int64_t* values = tokens.mutable_data_ptr<int64_t>();
  std::generate(values, values + tokens.numel(),
                [&] { return static_cast<int64_t>(generator() % static_cast<uint64_t>(vocab)); });
  return tokens;
}

double relative_error(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return std::numeric_limits<double>::infinity();
  if (b.numel() == 0) return 0;
  const at::Tensor x = a.detach().to(at::kDouble), y = b.detach().to(at::kDouble);
  const double difference = (x - y).abs().max().item<double>(), scale = y.abs().max().item<double>();
  if (at::isnan(x).any().item<bool>() || at::isnan(y).any().item<bool>())
    return std::numeric_limits<double>::infinity();
  return scale > 0 ? difference / scale : difference;
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const at::Tensor x = a.detach().contiguous(), y = b.detach().contiguous();
  return x.nbytes() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

DecoderConfig tiny_config(DecoderConfig::Family family) {
  DecoderConfig c;
  c.family = family;
  c.vocab_size = 40, c.hidden_size = 16, c.intermediate_size = 24, c.num_layers = 2;
  c.num_heads = 4, c.num_kv_heads = 4, c.head_dim = 4, c.max_position_embeddings = 32;
  c.initializer_range = 0.35;
  if (c.is_mixture()) c.num_experts = 4, c.num_experts_per_tok = 2;
  if (family == DecoderConfig::Family::kFlexMore) c.expert_ranks = {0, 3, 0, 5};
  return c;
}

}  // namespace moraine::models
