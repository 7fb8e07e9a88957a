// The units behind the recipe's `comparisons`. They only add to the plan: ids of all other units are what they were.
#include <algorithm>

#include "algorithms/flexmore/comparisons.h"
#include "algorithms/flexmore/flexmore.h"
#include "core/hash.h"

namespace moraine::algorithms::flexmore {

bool FlexMore::compares(const std::string& name) const {
  return std::find(config_.comparisons.begin(), config_.comparisons.end(), name) != config_.comparisons.end();
}

void FlexMore::test_everywhere(PlanBuilder& plan, Stages& s, const std::string& method, const std::string& what,
                               const std::vector<std::string>& inputs) const {
  for (const auto& name : evaluated_domains())
    if (const auto test = plan.need(
            evaluation_unit("test/" + method + "/" + name, what, name, config_.evaluation.split, inputs, 0, s)))
      s.tests[method][name] = *test;
}

void FlexMore::plan_comparisons(PlanBuilder& plan, Stages& s) const {
  const std::string& split = config_.evaluation.split;
  const auto seed = [&](const std::string& purpose) {
    return core::derive_seed(static_cast<uint64_t>(config_.seed), purpose);
  };
  const auto on_own_text = [&](const std::string& label, const std::string& domain, const std::string& expert,
                               int64_t rank) {
    return evaluation_unit(label, "expert", domain, split, {*s.public_embedding, expert}, rank, s);
  };
  const double model = static_cast<double>(architecture_.shared_parameters() + architecture_.ffn_parameters());

  // One full-size expert beside the public one, trained on the text of all domains with all experts' budget.
  if (compares("joint")) {
    TrainConfig train = config_.train;
    train.steps *= static_cast<int64_t>(config_.domains.size());
    core::Json data = core::Json::array();
    for (const auto& d : config_.domains) data.push_back(data_spec(d.name, "train"));
    core::Json spec = {{"name", "joint"},
                       {"rank", 0},
                       {"train", train_identity(train)},
                       {"log_every", train.log_every},
                       {"router", router_spec()},
                       {"seed", seed("expert/joint")},
                       {"data", data}};
    if (config_.router.init == "encoder") {
      spec["encoder"] = core::Json::array();
      for (const auto& d : config_.domains) spec["encoder"].push_back(encoder_spec(d.name));
    }
    s.joint =
        plan.need(make_unit("train_expert", "train/joint", std::move(spec), {*s.public_embedding},
                            9 * model * static_cast<double>(train.steps * train.batch_size * config_.seq_len), s));
    if (s.joint) test_everywhere(plan, s, "joint", "expert", {*s.public_embedding, *s.joint});
  }
  if (compares("btm") && s.experts.size() == config_.domains.size()) {
    std::vector<std::string> inputs = {*s.public_embedding};
    for (const auto& [name, id] : s.experts) inputs.push_back(id);
    test_everywhere(plan, s, "btm", "btm", inputs);
  }
  const int64_t largest = *std::max_element(config_.ranks.candidates.begin(), config_.ranks.candidates.end());
  const double svd = 4e3 * static_cast<double>(architecture_.ffn_parameters());
  for (const auto& [name, expert] : s.experts) {
    if (compares("cross_domain"))
      for (const auto& text : evaluated_domains())
        if (const auto id = plan.need(evaluation_unit(fmt::format("test/cross/{}/{}", name, text), "expert", text,
                                                      split, {*s.public_embedding, expert}, 0, s)))
          s.cross[name][text] = *id;
    if (compares("scaled_delta"))
      for (const double scale : kScales) {
        Unit unit = on_own_text(fmt::format("test/scaled/{}/{}", name, scale), name, expert, 0);
        unit.spec["scale"] = scale;
        if (const auto id = plan.need(std::move(unit))) s.scaled[name][scale] = *id;
      }
    if (compares("rank_sweep"))
      if (const auto low = plan.need(make_unit("extract", "extract/" + name, {{"rank", largest}}, {expert}, svd, s)))
        for (const int64_t rank : config_.ranks.candidates)
          if (const auto id = plan.need(on_own_text(fmt::format("test/rank/{}/r{}", name, rank), name, *low, rank)))
            s.sweep[name][rank] = *id;
    if (compares("random_subspace")) {
      std::vector<int64_t> ranks;  // all of a sweep, otherwise the one that was chosen
      if (compares("rank_sweep"))
        ranks = config_.ranks.candidates;
      else if (s.ranks.count(name) && s.ranks.at(name) > 0)
        ranks = {s.ranks.at(name)};
      if (ranks.empty()) continue;
      const auto low =
          plan.need(make_unit("extract", "extract/random/" + name,
                              {{"rank", largest}, {"subspace_seed", seed("subspace/" + name)}}, {expert}, svd, s));
      if (!low) continue;
      for (const int64_t rank : ranks)
        if (rank <= largest)
          if (const auto id =
                  plan.need(on_own_text(fmt::format("test/random_subspace/{}/r{}", name, rank), name, *low, rank)))
            s.random_subspace[name][rank] = *id;
    }
  }
}

}  // namespace moraine::algorithms::flexmore
