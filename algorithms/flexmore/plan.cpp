// What FlexMoRE wants done: one pure walk over the accepted results. A fan-out over domains, a choice of ranks on
// validation text, three merges, and evaluations of every method on every domain.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "algorithms/evaluate.h"
#include "algorithms/flexmore/direct.h"
#include "algorithms/flexmore/encoder.h"
#include "algorithms/flexmore/flexmore.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::flexmore {
const DomainConfig& FlexMore::domain(const std::string& name) const {
  const auto it =
      std::find_if(config_.domains.begin(), config_.domains.end(), [&](const auto& d) { return d.name == name; });
  if (it == config_.domains.end())
    throw core::UserError(fmt::format("algorithms/flexmore: this worker's recipe has no domain '{}'", name),
                          "every process of a run needs the same recipe");
  return *it;
}

std::vector<std::string> FlexMore::evaluated_domains() const {
  std::vector<std::string> names = {"public"};
  for (const auto& d : config_.domains) names.push_back(d.name);
  return names;
}

uint64_t FlexMore::seed_for(const std::string& purpose) const {
  return core::derive_seed(static_cast<uint64_t>(config_.seed), purpose);
}

TextSpec FlexMore::text_spec(const std::string& name, const std::string& split) const {
  return {name, fingerprints_.at(name), split, config_.seq_len, config_.tokenizer};
}

EncoderSpec FlexMore::encoder_spec(const std::string& name) const {
  const std::string text = "encoder/" + name;
  return {encoder_id_,
          seed_for("router/projection"),
          {text, fingerprints_.at(text), "train", DomainEncoder::kTokens, encoder_tokenizer_}};
}

PublicRowsSpec FlexMore::public_rows_spec() const {
  const RouterConfig& router = config_.router;
  PublicRowsSpec spec{.init = router.init};
  if (router.init == "embedding") spec.norm = router.init_norm;
  if (router.init == "random") spec.seed = static_cast<uint64_t>(config_.seed);
  return spec;
}

RowsSpec FlexMore::rows_spec() const {
  const RouterConfig& router = config_.router;
  RowsSpec spec{.embedding_sequences = router.embedding_sequences, .train = router.train, .bias = router.bias};
  if (router.init == "regression") spec.logit = router.init_logit;
  if (router.init == "embedding" || router.init == "centered") spec.norm = router.init_norm;
  if (router.bias != "none") spec.bias_value = router.bias_value;
  return spec;
}

int64_t FlexMore::max_rank(const DomainConfig& d) const {
  if (!chooses_rank(d)) return fixed_rank(d);
  return *std::max_element(config_.ranks.candidates.begin(), config_.ranks.candidates.end());
}

template <typename Spec>
Unit FlexMore::make_unit(const std::string& label, Spec spec, std::vector<std::string> inputs, double cost,
                         const Stages& stages) const {
  spec.compute = compute_identity(config_.workers);
  if constexpr (std::is_base_of_v<OnPublicModel, Spec>) {
    spec.base = *stages.base;
    spec.dtype = config_.train.dtype;
    if (!stages.base->starts_with("dir:")) inputs.push_back(*stages.base);  // execute() finds it by id
  }
  return {Spec::kKind, label, core::to_spec(Spec::schema(), spec), std::move(inputs), Place::kWorker, cost};
}

Unit FlexMore::domain_expert_unit(const DomainConfig& d, const Stages& stages) const {
  TrainExpertSpec spec;
  spec.name = d.name;
  spec.rank = trained_rank(d);
  if (d.adapter) {
    spec.adapter = on_ffn(*d.adapter);
    spec.type_version = adapters::parametrisation(d.adapter->type).result_version();
  } else if (spec.rank > 0) {
    spec.kernels = config_.kernels;
  }
  TrainConfig train = config_.train;
  train.learning_rate = d.learning_rate.value_or(train.learning_rate);
  return expert_unit(std::move(spec), {d.name}, train, stages);
}

Unit FlexMore::expert_unit(TrainExpertSpec spec, const std::vector<std::string>& domains, const TrainConfig& train,
                           const Stages& stages) const {
  spec.train = train_identity(train);
  spec.public_rows = public_rows_spec();
  spec.rows = rows_spec();
  spec.norm_topk_prob = config_.norm_topk_prob;
  spec.seed = seed_for("expert/" + spec.name);
  for (const auto& domain : domains) {
    spec.data.push_back(text_spec(domain, "train"));
    if (config_.router.init == "encoder") spec.encoder.push_back(encoder_spec(domain));
  }
  const double model = static_cast<double>(architecture_.shared_parameters() + architecture_.ffn_parameters());
  const std::string label = "train/" + spec.name;
  return make_unit(label, std::move(spec), {*stages.public_embedding}, training_cost(train, 1.5 * model), stages);
}

Unit FlexMore::extraction_unit(const std::string& label, const std::string& expert, int64_t rank,
                               std::optional<uint64_t> subspace_seed, const Stages& stages) const {
  ExtractSpec spec;
  spec.rank = rank;
  spec.subspace_seed = subspace_seed;
  return make_unit(label, std::move(spec), {expert}, 4e3 * static_cast<double>(architecture_.ffn_parameters()), stages);
}

Unit FlexMore::evaluation_unit(const std::string& label, EvaluateSpec spec, std::vector<std::string> inputs,
                               const Stages& stages) const {
  spec.batch_size = config_.evaluation.batch_size;
  const bool alone = spec.what == "expert" || spec.what == "btm";  // btm: every expert by itself, then weighted
  if (alone) spec.public_rows = public_rows_spec();
  if (alone || spec.what == "mixture")
    spec.mixture = MixtureSpec{alone ? 2 : config_.top_k, config_.norm_topk_prob, config_.forward, config_.kernels};
  const double tokens = static_cast<double>((spec.sequences ? spec.sequences : 512) * config_.seq_len);
  const double active = static_cast<double>(architecture_.shared_parameters() +
                                            architecture_.ffn_parameters() * (spec.what == "mixture" ? 2 : 1)) *
                        static_cast<double>(spec.what == "btm" ? inputs.size() : 1);
  return make_unit(label, std::move(spec), std::move(inputs), 2 * active * tokens, stages);
}

EvaluateSpec FlexMore::test_spec(const std::string& what, const std::string& text, int64_t rank) const {
  EvaluateSpec spec;
  spec.what = what;
  spec.data = text_spec(text, config_.evaluation.split);
  spec.sequences = config_.evaluation.sequences;
  spec.rank = rank;
  return spec;
}

Unit FlexMore::test_unit(const std::string& label, const std::string& what, const std::string& text,
                         const std::vector<std::string>& inputs, int64_t rank, const Stages& stages) const {
  return evaluation_unit(label, test_spec(what, text, rank), inputs, stages);
}

Unit FlexMore::merge_unit(const std::string& label, bool full, const Stages& stages) const {
  std::vector<std::pair<std::string, int64_t>> parts;
  for (const auto& [name, expert] : stages.experts) {
    const int64_t rank = full ? 0 : stages.ranks.at(name);
    parts.emplace_back(rank == 0 ? expert : stages.low_rank.at(name), rank);
  }
  std::sort(parts.begin(), parts.end());  // by artefact id: the unit does not depend on the order of the recipe either
  std::vector<std::string> inputs = {*stages.public_embedding};
  MergeSpec spec;
  spec.public_rows = public_rows_spec();
  for (const auto& [id, rank] : parts) {
    inputs.push_back(id);
    spec.ranks.push_back(rank);
  }
  Unit unit = make_unit(label, std::move(spec), std::move(inputs), 1e6, stages);
  unit.place = Place::kCoordinator;
  return unit;
}

Unit FlexMore::soup_unit(const Stages& stages) const {
  std::vector<std::string> inputs;
  for (const auto& [name, id] : stages.experts) inputs.push_back(id);
  std::sort(inputs.begin(), inputs.end());
  SoupSpec spec;
  spec.base = *stages.base;
  Unit unit = make_unit("merge/soup", std::move(spec), std::move(inputs), 1e6, stages);
  unit.place = Place::kCoordinator;
  return unit;
}

double FlexMore::training_cost(const TrainConfig& train, double parameters) const {
  return 6 * parameters * static_cast<double>(train.steps * train.batch_size * config_.seq_len);
}

int64_t FlexMore::rank_limit() const {
  const double full = static_cast<double>(architecture_.ffn_parameters()) * static_cast<double>(members_.size());
  return static_cast<int64_t>(
      std::floor(config_.ranks.budget * full / static_cast<double>(architecture_.low_rank_parameters(1))));
}

std::map<std::string, int64_t> FlexMore::choose_ranks(const Stages& stages, const RunState& state) const {
  // Exact search: ranks are few and the budget couples them only through the sum of ranks, so a table over "rank units
  // spent" -> least summed bits per byte is small. Ties go to the smaller sum, then to the earlier candidate.
  struct Best {
    double bits = 0;
    std::map<std::string, int64_t> ranks;
  };
  const int64_t limit = rank_limit();
  std::map<int64_t, Best> table = {{0, {}}};
  for (const auto& d : members_) {
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
    if (chooses_rank(d)) {
      for (const auto& [rank, id] : stages.validation.at(d.name))
        extend(rank, rank, Evaluation::from_json(state.artefact(id)->meta().at("result")).bits_per_byte());
    } else {
      extend(fixed_rank(d), 0, 0);  // the user's own choice does not count against the budget
    }
    table = std::move(next);
  }
  if (table.empty())
    throw core::UserError(
        fmt::format(
            "algorithms/flexmore: no choice of ranks fits ranks.budget = {}: at most {} rank units for {} experts",
            config_.ranks.budget, limit, members_.size()),
        "raise ranks.budget or add smaller ranks.candidates");
  const auto least = std::min_element(table.begin(), table.end(),
                                      [](const auto& a, const auto& b) { return a.second.bits < b.second.bits; });
  return least->second.ranks;
}

bool FlexMore::need_base(PlanBuilder& plan, Stages& s) const {
  if (!model_id_.empty()) {
    s.base = model_id_;
    return true;
  }
  const TrainConfig& train = *config_.model.train;
  TrainBaseSpec spec;
  spec.architecture = architecture_.to_json();
  spec.train = train_identity(train);
  spec.save_dtype = config_.model.save_dtype;
  spec.seed = seed_for("base");
  spec.data = text_spec("public", "train");
  const double model = static_cast<double>(architecture_.shared_parameters() + architecture_.ffn_parameters());
  s.base = plan.need(make_unit("train/public", std::move(spec), {}, training_cost(train, model), s));
  return s.base.has_value();
}

bool FlexMore::need_public_embedding(PlanBuilder& plan, Stages& s) const {
  EmbedPublicSpec spec;
  spec.data = text_spec("public", "train");
  spec.sequences = config_.router.embedding_sequences;
  spec.second_moment = config_.router.init == "regression";
  if (config_.router.init == "encoder") spec.encoder = encoder_spec("public");
  const double model = static_cast<double>(architecture_.shared_parameters() + architecture_.ffn_parameters());
  const double cost = 2 * model * static_cast<double>(spec.sequences * config_.seq_len);
  s.public_embedding = plan.need(make_unit("embed/public", std::move(spec), {}, cost, s));
  return s.public_embedding.has_value();
}

bool FlexMore::need_expert(PlanBuilder& plan, const DomainConfig& d, Stages& s) const {
  const auto expert = plan.need(domain_expert_unit(d, s));
  if (!expert) return false;
  s.experts[d.name] = *expert;
  if (!trains_factors(d) && d.rank == "full") return true;
  const auto low = trains_factors(d)
                       ? expert
                       : plan.need(extraction_unit("extract/" + d.name, *expert, max_rank(d), std::nullopt, s));
  if (!low) return false;
  s.low_rank[d.name] = *low;
  if (!chooses_rank(d)) return true;
  const std::vector<int64_t> ranks = ranks_within(d, config_.ranks.candidates);
  for (const int64_t rank : ranks) {
    EvaluateSpec spec;
    spec.what = "expert";
    spec.data = text_spec(d.name, "validation");
    spec.sequences = config_.evaluation.validation_sequences;
    spec.rank = cut_to(d, rank);
    if (const auto id = plan.need(evaluation_unit(fmt::format("validate/{}/r{}", d.name, rank), std::move(spec),
                                                  {*s.public_embedding, *low}, s)))
      s.validation[d.name][rank] = *id;
  }
  return s.validation[d.name].size() == ranks.size();
}

void FlexMore::test_own(PlanBuilder& plan, Stages& s, const std::string& method, const std::string& name,
                        const std::string& expert, int64_t rank) const {
  if (const auto test =
          plan.need(test_unit("test/" + method + "/" + name, "expert", name, {*s.public_embedding, expert}, rank, s)))
    s.tests[method][name] = *test;
}

void FlexMore::test_everywhere(PlanBuilder& plan, Stages& s, const std::string& method, const std::string& what,
                               const std::vector<std::string>& inputs) const {
  for (const auto& name : evaluated_domains())
    if (const auto test = plan.need(test_unit("test/" + method + "/" + name, what, name, inputs, 0, s)))
      s.tests[method][name] = *test;
}

void FlexMore::need_full_size_results(PlanBuilder& plan, Stages& s) const {
  s.full_mixture = plan.need(merge_unit("merge/full", true, s));
  if (s.full_mixture) test_everywhere(plan, s, "full_mixture", "mixture", {*s.full_mixture});
  s.soup = plan.need(soup_unit(s));
  if (s.soup) test_everywhere(plan, s, "soup", "soup", {*s.soup});
}

void FlexMore::need_mixture(PlanBuilder& plan, Stages& s) const {
  s.ranks = choose_ranks(s, plan.state());
  for (const auto& d : members_)
    if (const int64_t rank = s.ranks.at(d.name); rank > 0)
      test_own(plan, s, "low_rank_expert", d.name, s.low_rank.at(d.name), cut_to(d, rank));
  s.mixture = plan.need(merge_unit("merge/mixture", false, s));
  if (s.mixture) test_everywhere(plan, s, "mixture", "mixture", {*s.mixture});
}

FlexMore::Stages FlexMore::walk(PlanBuilder& plan) const {
  Stages s;
  if (!need_base(plan, s)) return s;
  test_everywhere(plan, s, "base", "base", {});
  if (members_.empty() || !need_public_embedding(plan, s)) return s;

  bool ranks_known = true;
  for (const auto& d : members_) ranks_known &= need_expert(plan, d, s);
  const bool all_trained = s.experts.size() == members_.size();
  bool all_full = true;
  for (const auto& d : members_) {
    all_full &= !trains_factors(d);
    if (!trains_factors(d) && s.experts.count(d.name)) test_own(plan, s, "expert", d.name, s.experts.at(d.name), 0);
  }
  if (all_trained && all_full) need_full_size_results(plan, s);
  if (ranks_known) need_mixture(plan, s);
  if (!config_.comparisons.empty()) need_comparisons(plan, s);
  return s;
}

Plan FlexMore::plan(const RunState& state) const {
  PlanBuilder builder(state);
  walk(builder);
  return builder.finish();
}

std::optional<std::string> FlexMore::missing_result(const RunState& state) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  if (members_.empty() || stages.mixture || !builder.finish().pending.empty()) return std::nullopt;
  return "there is no mixture: the plan ended before the experts were merged";
}

}  // namespace moraine::algorithms::flexmore
