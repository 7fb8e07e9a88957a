// The units behind the recipe's `comparisons`. They only add to the plan: ids of all other units are what they were.
#include <algorithm>

#include "algorithms/flexmore/comparisons.h"
#include "algorithms/flexmore/direct.h"
#include "algorithms/flexmore/flexmore.h"

namespace moraine::algorithms::flexmore {

bool FlexMore::compares(const std::string& name) const {
  return std::find(config_.comparisons.begin(), config_.comparisons.end(), name) != config_.comparisons.end();
}

// One full-size expert beside the public one, trained on the text of all members with all experts' budget.
void FlexMore::need_joint(PlanBuilder& plan, Stages& s) const {
  TrainConfig train = config_.train;
  train.steps *= static_cast<int64_t>(members_.size());
  std::vector<std::string> names;
  for (const auto& d : members_) names.push_back(d.name);
  TrainExpertSpec spec;
  spec.name = "joint";
  s.joint = plan.need(expert_unit(std::move(spec), names, train, s));
  if (s.joint) test_everywhere(plan, s, "joint", "expert", {*s.public_embedding, *s.joint});
}

void FlexMore::need_branch_train_merge(PlanBuilder& plan, Stages& s) const {
  std::vector<std::string> inputs = {*s.public_embedding};
  for (const auto& [name, id] : s.experts) inputs.push_back(id);
  test_everywhere(plan, s, "btm", "btm", inputs);
}

void FlexMore::need_scaled_change(PlanBuilder& plan, const std::string& name, Stages& s) const {
  for (const double scale : kScales) {
    EvaluateSpec spec = test_spec("expert", name, 0);
    spec.scale = scale;
    if (const auto id = plan.need(evaluation_unit(fmt::format("test/scaled/{}/{}", name, scale), std::move(spec),
                                                  {*s.public_embedding, s.experts.at(name)}, s)))
      s.scaled[name][scale] = *id;
  }
}

void FlexMore::need_rank_sweep(PlanBuilder& plan, const std::string& name, Stages& s) const {
  const DomainConfig& d = domain(name);
  const auto ranks = ranks_within(d, config_.ranks.candidates);
  if (ranks.empty()) return;
  const std::optional<std::string> low =
      trains_factors(d) ? s.experts.at(name)
                        : plan.need(extraction_unit("extract/" + name, s.experts.at(name),
                                                    *std::max_element(ranks.begin(), ranks.end()), std::nullopt, s));
  if (!low) return;
  for (const int64_t rank : ranks)
    if (const auto id = plan.need(test_unit(fmt::format("test/rank/{}/r{}", name, rank), "expert", name,
                                            {*s.public_embedding, *low}, cut_to(d, rank), s)))
      s.sweep[name][rank] = *id;
}

void FlexMore::need_random_subspace(PlanBuilder& plan, const std::string& name, Stages& s) const {
  std::vector<int64_t> ranks;  // all of a sweep, otherwise the one that was chosen
  if (compares("rank_sweep"))
    ranks = config_.ranks.candidates;
  else if (s.ranks.count(name) && s.ranks.at(name) > 0)
    ranks = {s.ranks.at(name)};
  if (ranks.empty()) return;
  const auto& candidates = config_.ranks.candidates;
  const int64_t largest =
      std::max(*std::max_element(candidates.begin(), candidates.end()), *std::max_element(ranks.begin(), ranks.end()));
  const auto low = plan.need(
      extraction_unit("extract/random/" + name, s.experts.at(name), largest, seed_for("subspace/" + name), s));
  if (!low) return;
  for (const int64_t rank : ranks)
    if (const auto id = plan.need(test_unit(fmt::format("test/random_subspace/{}/r{}", name, rank), "expert", name,
                                            {*s.public_embedding, *low}, rank, s)))
      s.random_subspace[name][rank] = *id;
}

void FlexMore::need_comparisons(PlanBuilder& plan, Stages& s) const {
  if (compares("joint")) need_joint(plan, s);
  if (compares("btm") && s.experts.size() == members_.size()) need_branch_train_merge(plan, s);
  for (const auto& [name, expert] : s.experts) {
    if (compares("cross_domain"))
      for (const auto& text : evaluated_domains())
        if (const auto id = plan.need(test_unit(fmt::format("test/cross/{}/{}", name, text), "expert", text,
                                                {*s.public_embedding, expert}, 0, s)))
          s.cross[name][text] = *id;
    if (compares("scaled_delta")) need_scaled_change(plan, name, s);
    if (compares("rank_sweep")) need_rank_sweep(plan, name, s);
    if (compares("random_subspace")) need_random_subspace(plan, name, s);
  }
}

}  // namespace moraine::algorithms::flexmore
