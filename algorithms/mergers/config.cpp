#include "algorithms/mergers/config.h"

#include "algorithms/mergers/merger.h"

namespace moraine::algorithms::mergers {
namespace {

std::vector<std::string> names_of_types() {
  std::vector<std::string> names;
  for (const Merger* type : mergers()) names.push_back(type->name());
  return names;
}

std::optional<std::string> problem(const MergeConfig& config) {
  const Traits traits = merger(config.type).traits();
  std::string known;
  const auto has = [&](const char* name, bool is) {
    if (is) known += fmt::format("{}{}", known.empty() ? "" : ", ", name);
  };
  has("rank", traits.rank);
  has("density", traits.density);
  has("majority_sign_method", traits.sign);
  has("seed", traits.seed);
  const auto unknown = [&](const char* name) {
    return fmt::format("{}: type {} has no such option (it has: {})", name, config.type,
                       known.empty() ? "none" : known);
  };
  if (config.rank && !traits.rank) return unknown("rank");
  if (config.density && !traits.density) return unknown("density");
  if (config.majority_sign_method && !traits.sign) return unknown("majority_sign_method");
  if (config.seed && !traits.seed) return unknown("seed");
  if (traits.density && !config.density)
    return fmt::format("density: type {} needs it, the share of numbers to keep: 0.2 is usual", config.type);
  return std::nullopt;
}

}  // namespace

const core::Schema<MergeConfig>& merge_schema() {
  using C = MergeConfig;
  static const auto schema =
      core::Schema<C>()
          .field("type", &C::type)
          .choices(names_of_types())
          .doc("The rule (docs/merging.md)")
          .field("rank", &C::rank)
          .min(1)
          .doc("Rank of the result of types that cut it; not given: the largest of the adapters (knots: all)")
          .field("density", &C::density)
          .above(0)
          .max(1)
          .doc("Share of every tensor's numbers that magnitude_prune, ties, dare and knots keep")
          .field("majority_sign_method", &C::majority_sign_method)
          .choices({"frequency", "total"})
          .doc("Who elects a sign in ties, dare_ties and knots: the sum of the values (total, the default) or of signs")
          .field("seed", &C::seed)
          .min(0)
          .doc("Of dare's random masks; not given: 0")
          .check(problem);
  return schema;
}

}  // namespace moraine::algorithms::mergers
