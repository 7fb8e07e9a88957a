#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/flexmore/config.h"
#include "algorithms/flexmore/units.h"
#include "algorithms/method.h"
#include "algorithms/register.h"

namespace moraine::models {
class Decoder;
}
namespace moraine::data {
class TextDataset;
}

namespace moraine::algorithms {
struct Evaluation;
}

namespace moraine::algorithms::flexmore {

struct MixtureModel;
struct RowSources;

/// FlexMoRE: one frozen public model, one independently trained FFN expert per data owner next to it, each cut to the
/// rank that suits it, merged behind a softmax router without further training.
///
/// Trained: each expert's FFN (full-size, or A and B directly) and its router row per layer. Frozen: everything else.
/// A worker sends r * 3 (d + h) L numbers (low rank) or 3 d h L (full size) plus L d router numbers.
/// Seeds: `seed` derives data order and initial values per domain, by name.
/// Source: FlexMoRE (arXiv 2602.08818) and FlexOlmo (arXiv 2507.07024); what embeds a domain is our choice (inferred):
/// the public model's own mean FFN input per layer, since FlexOlmo's embedder only fits models of its own width.
/// `router.init: encoder` takes a text encoder of any width instead.
class FlexMore final : public Method {
 public:
  explicit FlexMore(FlexMoreConfig config);
  /// A recorded run's method; plans and reports, but cannot execute.
  FlexMore(FlexMoreConfig config, const core::Json& inputs);

  void open_inputs() override;
  core::Json inputs() const override;
  Plan plan(const RunState& state) const override;
  core::ArtefactPtr execute(const Unit& unit, WorkerContext& context) const override;
  void check_result(const Unit& unit, const core::Artefact& artefact) const override;
  std::optional<std::string> missing_result(const RunState& state) const override;
  core::Json summary(const RunState& state) const override;
  void publish(const RunState& state, const std::filesystem::path& run_directory) const override;
  void export_as(const RunState& state, const ExportRequest& request) const override;
  ParameterTable parameters() const override;

 private:
  /// Everything the procedure has got hold of so far; filled in order by walk().
  struct Stages {
    std::optional<std::string> base;  // "dir:<hash>" or an artefact id
    std::optional<std::string> public_embedding;
    std::map<std::string, std::string> experts;   // by domain: as trained
    std::map<std::string, std::string> low_rank;  // by domain: extracted (or trained) at its largest rank
    std::map<std::string, std::map<int64_t, std::string>> validation;  // domain -> rank -> evaluation
    std::map<std::string, int64_t> ranks;  // chosen; 0 = full-size. Empty until all are known
    std::optional<std::string> mixture, full_mixture, soup;
    std::map<std::string, std::map<std::string, std::string>> tests;  // method -> domain -> evaluation
    std::optional<std::string> joint;                                 // comparisons: the expert trained on all domains,
    std::map<std::string, std::map<std::string, std::string>> cross;  // evaluations by expert and text,
    std::map<std::string, std::map<double, std::string>> scaled;      // by domain and share of the change,
    std::map<std::string, std::map<int64_t, std::string>> sweep, random_subspace;  // by domain and rank
  };
  Stages walk(PlanBuilder& plan) const;
  models::Decoder public_model(const Stages& stages, const RunState& state) const;
  MixtureModel mixture_model(const std::string& id, const Stages& stages, const RunState& state) const;
  std::map<std::string, int64_t> choose_ranks(const Stages& stages, const RunState& state) const;

  void check_adapter(const DomainConfig& domain, const std::string& key, core::Problems& problems) const;
  void check_budget(core::Problems& problems) const;

  // plan.cpp: the steps of the walk. The bool ones say whether what follows can be planned.
  bool need_base(PlanBuilder& plan, Stages& stages) const;
  bool need_public_embedding(PlanBuilder& plan, Stages& stages) const;
  bool need_expert(PlanBuilder& plan, const DomainConfig& domain, Stages& stages) const;
  void need_full_size_results(PlanBuilder& plan, Stages& stages) const;
  void need_mixture(PlanBuilder& plan, Stages& stages) const;
  void test_own(PlanBuilder& plan, Stages& stages, const std::string& method, const std::string& domain,
                const std::string& expert, int64_t rank) const;
  void test_everywhere(PlanBuilder& plan, Stages& stages, const std::string& method, const std::string& what,
                       const std::vector<std::string>& inputs) const;

  // plan.cpp: the units
  template <typename Spec>
  Unit make_unit(const std::string& label, Spec spec, std::vector<std::string> inputs, double cost,
                 const Stages& stages) const;
  Unit domain_expert_unit(const DomainConfig& domain, const Stages& stages) const;
  Unit expert_unit(TrainExpertSpec spec, const std::vector<std::string>& domains, const TrainConfig& train,
                   const Stages& stages) const;
  Unit extraction_unit(const std::string& label, const std::string& expert, int64_t rank,
                       std::optional<uint64_t> subspace_seed, const Stages& stages) const;
  Unit evaluation_unit(const std::string& label, EvaluateSpec spec, std::vector<std::string> inputs,
                       const Stages& stages) const;
  EvaluateSpec test_spec(const std::string& what, const std::string& text, int64_t rank) const;
  Unit test_unit(const std::string& label, const std::string& what, const std::string& text,
                 const std::vector<std::string>& inputs, int64_t rank, const Stages& stages) const;
  Unit merge_unit(const std::string& label, bool full, const Stages& stages) const;
  Unit soup_unit(const Stages& stages) const;
  TextSpec text_spec(const std::string& domain, const std::string& split) const;
  EncoderSpec encoder_spec(const std::string& domain) const;
  PublicRowsSpec public_rows_spec() const;
  RowsSpec rows_spec() const;
  uint64_t seed_for(const std::string& purpose) const;
  double training_cost(const TrainConfig& train, double parameters) const;
  std::vector<std::string> evaluated_domains() const;
  int64_t max_rank(const DomainConfig& domain) const;
  int64_t rank_limit() const;  // units of rank that ranks.budget has room for

  // summary.cpp: the parts of the summary
  std::optional<Evaluation> tested(const Stages& stages, const RunState& state, const std::string& method,
                                   const std::string& domain) const;
  void summarize_scores(const Stages& stages, const RunState& state, core::Json& out) const;
  void summarize_sizes(const Stages& stages, const RunState& state, core::Json& out) const;
  void summarize_curves(const Stages& stages, const RunState& state, core::Json& out) const;
  void summarize_load(const Stages& stages, const RunState& state, const std::string& method, const std::string& title,
                      core::Json& out) const;
  std::string headline(const Stages& stages, const RunState& state) const;

  // comparison_plan.cpp, comparison_summary.cpp
  bool compares(const std::string& name) const;
  void need_comparisons(PlanBuilder& plan, Stages& stages) const;
  void need_joint(PlanBuilder& plan, Stages& stages) const;
  void need_branch_train_merge(PlanBuilder& plan, Stages& stages) const;
  void need_scaled_change(PlanBuilder& plan, const std::string& domain, Stages& stages) const;
  void need_rank_sweep(PlanBuilder& plan, const std::string& domain, Stages& stages) const;
  void need_random_subspace(PlanBuilder& plan, const std::string& domain, Stages& stages) const;
  void summarize_comparisons(const Stages& stages, const RunState& state, core::Json& out) const;
  void summarize_sweep(const Stages& stages, const RunState& state, core::Json& out) const;

  // execute.cpp, train_expert.cpp: what workers do. Of the recipe these read paths alone; what is computed is in the
  // unit.
  core::ArtefactPtr train_base(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr embed_public(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr train_expert(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr extract(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr evaluate_unit(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr merge_experts(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr make_soup(const Unit& unit, WorkerContext& context) const;
  std::shared_ptr<models::Decoder> load_base(const OnPublicModel& spec, WorkerContext& context) const;
  std::shared_ptr<data::TextDataset> load_text(const TextSpec& spec, WorkerContext& context) const;
  RowSources row_sources(const TrainExpertSpec& spec, const core::Artefact& public_embedding, models::Decoder& model,
                         WorkerContext& context) const;
  at::Tensor encoded_row(const EncoderSpec& spec, int64_t sequences, int64_t width, WorkerContext& context) const;

  std::filesystem::path data_path(const std::string& domain) const;
  const DomainConfig& domain(const std::string& name) const;

  FlexMoreConfig config_;
  std::vector<DomainConfig> members_;  // the domains that are not left out
  models::DecoderConfig architecture_;
  std::map<std::string, std::string>
      fingerprints_;      // data, by domain; "public" for public text; "encoder/..." for the encoder's
  std::string model_id_;  // of a model that is loaded: "dir:<hash>"
  std::string encoder_id_, encoder_tokenizer_;  // router.init = encoder
};

MethodEntry method_entry();

}  // namespace moraine::algorithms::flexmore
