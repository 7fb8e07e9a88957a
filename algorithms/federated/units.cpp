#include "algorithms/federated/units.h"

#include <cmath>
#include <numeric>

#include <fmt/format.h>

#include "core/hash.h"

namespace moraine::algorithms::federated {
namespace {

const core::Schema<GlobalAdapter>& adapter_schema() {
  using C = GlobalAdapter;
  static const auto schema = core::Schema<C>()
                                 .object("lora", &C::lora, adapters::adapter_schema())
                                 .field("rank", &C::rank)
                                 .field("seed", &C::seed)
                                 .field("type_version", &C::type_version)
                                 .joined_later()
                                 .field("start", &C::start)
                                 .joined_later();
  return schema;
}

const core::Schema<ShareSpec>& share_schema() {
  using C = ShareSpec;
  static const auto schema = core::Schema<C>()
                                 .object("data", &C::data, text_schema())
                                 .field("first", &C::first)
                                 .min(0)
                                 .field("count", &C::count)
                                 .min(1);
  return schema;
}

const core::Schema<RoundClient>& client_schema() {
  using C = RoundClient;
  static const auto schema = core::Schema<C>().field("name", &C::name).field("samples", &C::samples).min(1);
  return schema;
}

}  // namespace

int64_t UpdateSpec::samples() const {
  return std::accumulate(shares.begin(), shares.end(), int64_t{0},
                         [](int64_t sum, const ShareSpec& share) { return sum + share.count; });
}

uint64_t UpdateSpec::own_seed() const {
  return core::derive_seed(static_cast<uint64_t>(adapter.seed), fmt::format("adapter/{}/{}", client, round));
}

const core::Schema<UpdateSpec>& update_schema() {
  using C = UpdateSpec;
  static const auto schema = core::Schema<C>()
                                 .field("version", &C::version)
                                 .min(C::kVersion)
                                 .max(C::kVersion)
                                 .field("method", &C::method)
                                 .field("method_version", &C::method_version)
                                 .field("compute", &C::compute)
                                 .field("base", &C::base)
                                 .field("client", &C::client)
                                 .field("round", &C::round)
                                 .list("shares", &C::shares, share_schema())
                                 .field("rank", &C::rank)
                                 .min(1)
                                 .object("adapter", &C::adapter, adapter_schema())
                                 .field("train", &C::train)
                                 .field("tolerant", &C::tolerant)
                                 .field("proximal", &C::proximal)
                                 .joined_later()
                                 .optional_object("pruning", &C::pruning, pruning_schema());
  return schema;
}

const core::Schema<StartSpec>& start_schema() {
  using C = StartSpec;
  static const auto schema = core::Schema<C>()
                                 .field("version", &C::version)
                                 .min(C::kVersion)
                                 .max(C::kVersion)
                                 .field("compute", &C::compute)
                                 .field("base", &C::base)
                                 .field("dtype", &C::dtype)
                                 .choices({"float32", "bfloat16"})
                                 .object("adapter", &C::adapter, adapter_schema());
  return schema;
}

const core::Schema<AggregateSpec>& aggregate_schema() {
  using C = AggregateSpec;
  static const auto schema = core::Schema<C>()
                                 .field("version", &C::version)
                                 .min(C::kVersion)
                                 .max(C::kVersion)
                                 .field("method", &C::method)
                                 .field("method_version", &C::method_version)
                                 .field("compute", &C::compute)
                                 .field("base", &C::base)
                                 .field("round", &C::round)
                                 .list("clients", &C::clients, client_schema())
                                 .field("weighting", &C::weighting)
                                 .choices({"samples", "uniform"})
                                 .field("min_per_round", &C::min_per_round)
                                 .object("server", &C::server, server_schema())
                                 .object("adapter", &C::adapter, adapter_schema())
                                 .field("has_state", &C::has_state);
  return schema;
}

const core::Schema<BroadcastSpec>& broadcast_schema() {
  using C = BroadcastSpec;
  static const auto schema = core::Schema<C>()
                                 .field("version", &C::version)
                                 .min(C::kVersion)
                                 .max(C::kVersion)
                                 .field("rank", &C::rank)
                                 .min(1)
                                 .object("lora", &C::lora, adapters::adapter_schema());
  return schema;
}

const core::Schema<EvaluateSpec>& evaluate_schema() {
  using C = EvaluateSpec;
  static const auto schema = core::Schema<C>()
                                 .field("version", &C::version)
                                 .min(C::kVersion)
                                 .max(C::kVersion)
                                 .field("compute", &C::compute)
                                 .field("base", &C::base)
                                 .field("dtype", &C::dtype)
                                 .choices({"float32", "bfloat16"})
                                 .object("data", &C::data, text_schema())
                                 .field("sequences", &C::sequences)
                                 .min(0)
                                 .field("batch_size", &C::batch_size)
                                 .min(1)
                                 .optional_object("adapter", &C::adapter, adapter_schema());
  return schema;
}

adapters::AdapterConfig at_rank(const adapters::AdapterConfig& lora, int64_t rank) {
  if (rank == lora.rank) return lora;
  adapters::AdapterConfig other = lora;
  other.rank = rank;
  other.alpha = adapters::scale_of(lora.alpha, lora.rank, lora.use_rslora) *
                (lora.use_rslora ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank));
  return other;
}

}  // namespace moraine::algorithms::federated
