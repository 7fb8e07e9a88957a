// What FlexMoRE wants done: one pure walk over the accepted results. A fan-out over domains, a choice of ranks on
// validation text, three merges, and evaluations of every method on every domain.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "algorithms/evaluate.h"
#include "algorithms/flexmore/encoder.h"
#include "algorithms/flexmore/flexmore.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::flexmore {
namespace {

// Bumped when a change of the code changes results for the same spec.
constexpr int kResultVersion = 1;

core::Json pick(const core::Json& values, std::initializer_list<const char*> keys) {
  core::Json out = core::Json::object();
  for (const char* key : keys) out[key] = values.at(key);
  return out;
}

}  // namespace

const DomainConfig& FlexMore::domain(const std::string& name) const {
  const auto it =
      std::find_if(config_.domains.begin(), config_.domains.end(), [&](const auto& d) { return d.name == name; });
  MORAINE_CHECK(it != config_.domains.end(), "no domain {}", name);
  return *it;
}

std::vector<std::string> FlexMore::evaluated_domains() const {
  std::vector<std::string> names = {"public"};
  for (const auto& d : config_.domains) names.push_back(d.name);
  return names;
}

core::Json FlexMore::data_spec(const std::string& name, const std::string& split) const {
  return {{"name", name},
          {"fingerprint", fingerprints_.at(name)},
          {"split", split},
          {"seq_len", config_.seq_len},
          {"tokenizer", config_.tokenizer}};
}

core::Json FlexMore::encoder_spec(const std::string& name) const {
  const std::string text = "encoder/" + name;
  return {{"identity", encoder_id_},
          {"projection_seed", core::derive_seed(static_cast<uint64_t>(config_.seed), "router/projection")},
          {"data",
           {{"name", text},
            {"fingerprint", fingerprints_.at(text)},
            {"split", "train"},
            {"seq_len", DomainEncoder::kTokens},
            {"tokenizer", encoder_tokenizer_}}}};
}

core::Json FlexMore::router_spec() const {
  return pick(flexmore_schema().to_json(config_).at("router"),
              {"init", "init_logit", "init_norm", "train", "bias", "bias_value", "embedding_sequences"});
}

int64_t FlexMore::max_rank(const DomainConfig& d) const {
  if (const auto fixed = fixed_rank(d)) return *fixed;
  return *std::max_element(config_.ranks.candidates.begin(), config_.ranks.candidates.end());
}

Unit FlexMore::make_unit(const std::string& kind, const std::string& label, core::Json spec,
                         std::vector<std::string> inputs, double cost, const Stages& stages) const {
  spec["method"] = "flexmore";
  spec["version"] = kResultVersion;
  spec.update(compute_identity(config_.workers));
  spec["dtype"] = config_.train.dtype;
  if (stages.base) {
    spec["base"] = *stages.base;
    if (!stages.base->starts_with("dir:")) inputs.push_back(*stages.base);  // execute() finds it by id
  }
  return {kind, label, std::move(spec), std::move(inputs), Place::kWorker, cost};
}

Unit FlexMore::evaluation_unit(const std::string& label, const std::string& what, const std::string& name,
                               const std::string& split, std::vector<std::string> inputs, int64_t rank,
                               const Stages& stages) const {
  const int64_t sequences =
      label.starts_with("validate/") ? config_.evaluation.validation_sequences : config_.evaluation.sequences;
  core::Json spec = {{"what", what},
                     {"data", data_spec(name, split)},
                     {"sequences", sequences},
                     {"batch_size", config_.evaluation.batch_size}};
  if (what == "expert" || what == "mixture" || what == "btm") {  // btm: every expert by itself, then weighted
    const core::Json values = flexmore_schema().to_json(config_);
    spec["mixture"] = pick(values, {"norm_topk_prob", "forward", "kernels"});
    spec["mixture"]["top_k"] = what == "mixture" ? config_.top_k : 2;
    spec["mixture"]["leave_out"] = what == "mixture" ? values.at("leave_out") : core::Json::array();
    spec["rank"] = rank;
    spec["router"] = pick(values.at("router"), {"init", "init_norm"});
  }
  const double tokens = static_cast<double>((sequences ? sequences : 512) * config_.seq_len);
  const double active = static_cast<double>(architecture_.shared_parameters() +
                                            architecture_.ffn_parameters() * (what == "mixture" ? 2 : 1)) *
                        static_cast<double>(what == "btm" ? inputs.size() : 1);
  return make_unit("evaluate", label, std::move(spec), std::move(inputs), 2 * active * tokens, stages);
}

Unit FlexMore::merge_unit(const std::string& label, bool full, const Stages& stages) const {
  std::vector<std::pair<std::string, int64_t>> parts;
  for (const auto& [name, expert] : stages.experts) {
    const int64_t rank = full ? 0 : stages.ranks.at(name);
    parts.emplace_back(rank == 0 ? expert : stages.low_rank.at(name), rank);
  }
  std::sort(parts.begin(), parts.end());  // by artefact id: the unit does not depend on the order of the recipe either
  std::vector<std::string> inputs = {*stages.public_embedding};
  core::Json ranks = core::Json::array();
  for (const auto& [id, rank] : parts) {
    inputs.push_back(id);
    ranks.push_back(rank);
  }
  const core::Json router = pick(flexmore_schema().to_json(config_).at("router"), {"init", "init_norm"});
  Unit unit = make_unit("merge", label, {{"ranks", ranks}, {"router", router}}, std::move(inputs), 1e6, stages);
  unit.place = Place::kCoordinator;
  return unit;
}

std::map<std::string, int64_t> FlexMore::choose_ranks(const Stages& stages, const RunState& state) const {
  // Exact search: ranks are few and the budget couples them only through the sum of ranks, so a table over "rank units
  // spent" -> least summed bits per byte is small. Ties go to the smaller sum, then to the earlier candidate.
  struct Best {
    double bits = 0;
    std::map<std::string, int64_t> ranks;
  };
  const double full = static_cast<double>(architecture_.ffn_parameters()) * static_cast<double>(config_.domains.size());
  const auto limit = static_cast<int64_t>(
      std::floor(config_.ranks.budget * full / static_cast<double>(architecture_.low_rank_parameters(1))));
  std::map<int64_t, Best> table = {{0, {}}};
  for (const auto& d : config_.domains) {
    std::map<int64_t, Best> next;
    const auto extend = [&](int64_t rank, int64_t cost, double bits) {
      for (const auto& [spent, best] : table) {
        const int64_t total = spent + cost;
        if (total > limit) continue;
        Best candidate{best.bits + bits, best.ranks};
        candidate.ranks[d.name] = rank;
        const auto [it, inserted] = next.try_emplace(total, candidate);
        if (!inserted && candidate.bits < it->second.bits) it->second = candidate;
      }
    };
    if (d.rank == "auto") {
      for (const auto& [rank, id] : stages.validation.at(d.name))
        extend(rank, rank, Evaluation::from_json(state.artefact(id)->meta().at("result")).bits_per_byte());
    } else {
      extend(fixed_rank(d).value_or(0), 0, 0);  // the user's own choice does not count against the budget
    }
    table = std::move(next);
  }
  if (table.empty())
    throw core::UserError(
        fmt::format(
            "algorithms/flexmore: no choice of ranks fits ranks.budget = {}: at most {} rank units for {} experts",
            config_.ranks.budget, limit, config_.domains.size()),
        "raise ranks.budget or add smaller ranks.candidates");
  const auto least = std::min_element(table.begin(), table.end(),
                                      [](const auto& a, const auto& b) { return a.second.bits < b.second.bits; });
  return least->second.ranks;
}

FlexMore::Stages FlexMore::walk(PlanBuilder& plan) const {
  Stages s;
  const double model = static_cast<double>(architecture_.shared_parameters() + architecture_.ffn_parameters());
  const auto training_cost = [&](const TrainConfig& train, double parameters) {
    return 6 * parameters * static_cast<double>(train.steps * train.batch_size * config_.seq_len);
  };
  // The public model.
  if (!model_id_.empty()) {
    s.base = model_id_;
  } else {
    core::Json spec = {{"architecture", architecture_.to_json()},
                       {"initializer_range", architecture_.initializer_range},
                       {"train", train_identity(*config_.model.train)},
                       {"log_every", config_.model.train->log_every},
                       {"save_dtype", config_.model.save_dtype},
                       {"seed", core::derive_seed(static_cast<uint64_t>(config_.seed), "base")},
                       {"data", data_spec("public", "train")}};
    s.base = plan.need(
        make_unit("train_base", "train/public", std::move(spec), {}, training_cost(*config_.model.train, model), s));
    if (!s.base) return s;
  }
  for (const auto& name : evaluated_domains())
    if (const auto id =
            plan.need(evaluation_unit("test/base/" + name, "base", name, config_.evaluation.split, {}, 0, s)))
      s.tests["base"][name] = *id;
  if (config_.domains.empty()) return s;

  // What the router rows start from.
  const double embedding_cost = 2 * model * static_cast<double>(config_.router.embedding_sequences * config_.seq_len);
  const bool encoded = config_.router.init == "encoder";
  core::Json embedding = {{"data", data_spec("public", "train")},
                          {"sequences", config_.router.embedding_sequences},
                          {"second_moment", config_.router.init == "regression"}};
  if (encoded) embedding["encoder"] = encoder_spec("public");
  s.public_embedding =
      plan.need(make_unit("embed_public", "embed/public", std::move(embedding), {}, embedding_cost, s));
  if (!s.public_embedding) return s;

  // One expert per domain; its cuts; their scores on validation text.
  bool ranks_known = true;
  for (const auto& d : config_.domains) {
    core::Json spec = {{"name", d.name},
                       {"rank", d.train == "direct" ? *fixed_rank(d) : 0},
                       {"train", train_identity(config_.train)},
                       {"log_every", config_.train.log_every},
                       {"router", router_spec()},
                       {"seed", core::derive_seed(static_cast<uint64_t>(config_.seed), "expert/" + d.name)},
                       {"data", data_spec(d.name, "train")}};
    if (encoded) spec["encoder"] = encoder_spec(d.name);
    if (d.train == "direct") spec["kernels"] = config_.kernels;  // a full-size expert does not pass through them
    const auto expert = plan.need(make_unit("train_expert", "train/" + d.name, std::move(spec), {*s.public_embedding},
                                            training_cost(config_.train, 1.5 * model), s));
    if (!expert) {
      ranks_known = false;
      continue;
    }
    s.experts[d.name] = *expert;
    if (d.train == "direct") {
      s.low_rank[d.name] = *expert;
    } else {
      const int64_t rank = d.rank == "full" ? 0 : max_rank(d);
      if (rank > 0) {
        const auto low = plan.need(make_unit("extract", "extract/" + d.name, {{"rank", rank}}, {*expert},
                                             4e3 * static_cast<double>(architecture_.ffn_parameters()), s));
        if (low) s.low_rank[d.name] = *low;
      }
    }
    if (d.rank != "auto") continue;
    if (s.low_rank.count(d.name))
      for (const int64_t rank : config_.ranks.candidates)
        if (const auto id =
                plan.need(evaluation_unit(fmt::format("validate/{}/r{}", d.name, rank), "expert", d.name, "validation",
                                          {*s.public_embedding, s.low_rank.at(d.name)}, rank, s)))
          s.validation[d.name][rank] = *id;
    if (s.validation[d.name].size() != config_.ranks.candidates.size()) ranks_known = false;
  }
  const bool all_full =
      std::all_of(config_.domains.begin(), config_.domains.end(), [](const auto& d) { return d.train == "full"; });
  const bool all_trained = s.experts.size() == config_.domains.size();

  // Tests of single experts, merges, tests of the merged models.
  for (const auto& [name, id] : s.experts)
    if (const auto test = plan.need(evaluation_unit("test/expert/" + name, "expert", name, config_.evaluation.split,
                                                    {*s.public_embedding, id}, 0, s)))
      s.tests["expert"][name] = *test;
  if (all_trained && all_full) {
    s.full_mixture = plan.need(merge_unit("merge/full", true, s));
    if (s.full_mixture) test_everywhere(plan, s, "full_mixture", "mixture", {*s.full_mixture});
    std::vector<std::string> inputs;
    for (const auto& [name, id] : s.experts) inputs.push_back(id);
    std::sort(inputs.begin(), inputs.end());
    Unit unit = make_unit("soup", "merge/soup", core::Json::object(), inputs, 1e6, s);
    unit.place = Place::kCoordinator;
    s.soup = plan.need(std::move(unit));
    if (s.soup) test_everywhere(plan, s, "soup", "soup", {*s.soup});
  }
  const bool cuts_known = std::all_of(config_.domains.begin(), config_.domains.end(),
                                      [&](const auto& d) { return d.rank == "full" || s.low_rank.count(d.name); });
  if (all_trained && ranks_known && cuts_known) {
    s.ranks = choose_ranks(s, plan.state());
    for (const auto& [name, rank] : s.ranks)
      if (rank > 0)
        if (const auto test =
                plan.need(evaluation_unit("test/low_rank_expert/" + name, "expert", name, config_.evaluation.split,
                                          {*s.public_embedding, s.low_rank.at(name)}, rank, s)))
          s.tests["low_rank_expert"][name] = *test;
    s.mixture = plan.need(merge_unit("merge/mixture", false, s));
    if (s.mixture) test_everywhere(plan, s, "mixture", "mixture", {*s.mixture});
  }
  if (!config_.comparisons.empty()) plan_comparisons(plan, s);
  return s;
}

Plan FlexMore::plan(const RunState& state) const {
  PlanBuilder builder(state);
  walk(builder);
  return builder.finish();
}

}  // namespace moraine::algorithms::flexmore
