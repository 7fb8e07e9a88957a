#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "algorithms/federated/federation.h"
#include "algorithms/federated/partition.h"
#include "algorithms/federated/units.h"
#include "algorithms/method.h"
#include "algorithms/register.h"
#include "models/decoder_config.h"

namespace moraine::models {
class Decoder;
}
namespace moraine::algorithms {
struct TrainOutcome;
}

namespace moraine::algorithms::federated {

/// The whole text of a refused contribution: artefacts hold nothing of the host they were made on.
constexpr const char* kNumbersWentBad = "its training gave numbers that are not finite";

/// Rounds of federated adapters on a frozen decoder: sample clients, each trains the adapter on its own text, the
/// server forms the next global state, repeat. What is trained, sent and averaged is the Federation's; everything else
/// is shared.
///
/// Seeds: `seed` derives the partition, the sampling per round, the adapter's first values and each client's data
/// order. A client is stateless but for its rank (HetLoRA), which its last contribution carries. Contributions are
/// added in the order of the clients' names, whatever order they came in.
class Federated final : public Method {
 public:
  Federated(std::string method, std::unique_ptr<Federation> federation, FederatedConfig config);
  /// A recorded run's method; plans and reports, but cannot execute.
  Federated(std::string method, std::unique_ptr<Federation> federation, FederatedConfig config,
            const core::Json& inputs);
  ~Federated() override;

  void open_inputs() override;
  core::Json inputs() const override;
  Plan plan(const RunState& state) const override;
  core::ArtefactPtr execute(const Unit& unit, WorkerContext& context) const override;
  /// Names, shapes, numbers, and what the plan knows of a client: a contribution that does not fit fails its attempt.
  void check_result(const Unit& unit, const core::Artefact& artefact) const override;
  std::optional<std::string> missing_result(const RunState& state) const override;
  core::Json summary(const RunState& state) const override;
  void publish(const RunState& state, const std::filesystem::path& run_directory) const override;
  /// peft: the global adapter; hf: the merged model, the only form of methods whose rounds change the base.
  void export_as(const RunState& state, const ExportRequest& request) const override;
  ParameterTable parameters() const override;

 private:
  struct RoundResult {
    std::vector<std::string> updates;          // in the order of the clients' names
    std::vector<std::string> sent;             // what clients lacked of start and states, client by client
    std::string state;                         // after the round
    std::map<std::string, std::string> tests;  // by domain
  };
  /// Everything the procedure has got hold of so far; filled in order by walk().
  struct Stages {
    std::map<std::string, std::string> base;  // evaluations by domain
    std::optional<std::string> start;         // the adapter's first values, where they follow from the base's weights
    std::vector<RoundResult> rounds;          // complete ones
    std::optional<std::string> centralised;
    std::map<std::string, std::string> centralised_tests;
    std::map<std::string, std::map<std::string, std::string>> alone_tests;  // client -> domain -> evaluation
  };

  /// What a walk learns of the clients on its way, by position in clients_.
  struct Progress {
    std::vector<int64_t> ranks;                 // HetLoRA: as the last contribution says
    std::vector<std::optional<size_t>> states;  // how many states there were at a client's last turn
  };

  // plan.cpp: pure.
  Stages walk(PlanBuilder& plan) const;
  /// false while the first values are needed and not there.
  bool walk_start(PlanBuilder& plan, Stages& stages) const;
  void walk_comparisons(PlanBuilder& plan, Stages& stages) const;
  /// The units of one round's clients; false while some are not finished.
  bool walk_clients(PlanBuilder& plan, const Stages& stages, std::span<const size_t> sampled, Progress& progress,
                    const std::string& label, RoundResult& round) const;
  void share_out();
  Unit update_unit(const std::string& label, const Client& client, int64_t round, int64_t steps, int64_t rank,
                   std::vector<std::string> inputs, bool in_round = false) const;
  Unit aggregate_unit(const std::string& label, const Stages& stages, std::span<const size_t> sampled,
                      const RoundResult& round) const;
  Unit evaluation_unit(const std::string& label, const std::string& domain, std::vector<std::string> inputs) const;
  std::map<std::string, std::string> evaluate_everywhere(PlanBuilder& plan, const std::string& label,
                                                         const std::vector<std::string>& inputs) const;
  /// What a client or an evaluation needs to rebuild the global model: the start, if there is one, and the last state,
  /// or all of them when rounds change the base.
  std::vector<std::string> model_inputs(const Stages& stages) const;
  TextSpec text_spec(const std::string& domain, const std::string& split) const;
  int64_t server_rank() const;
  GlobalAdapter global_adapter() const;
  /// Of methods whose rounds change the base: numbers of the changes that a client is sent, in the mean over the turns
  /// after the first round, when a contribution of a rank adds `added`. Follows from the sampling.
  double numbers_sent_per_turn(const std::map<int64_t, int64_t>& added) const;

  // execute.cpp: what a unit's specification says; of config_ only paths, and how often to save and to log.
  core::ArtefactPtr update(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr start(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr train_client(const Unit& unit, const UpdateSpec& spec, WorkerContext& context) const;
  core::ArtefactPtr contribution(const UpdateSpec& spec, int64_t sequences, const adapters::Adapter& adapter,
                                 const Tensors& before, const TrainOutcome& outcome) const;
  core::ArtefactPtr aggregate(const Unit& unit, WorkerContext& context) const;
  Round round_of(const AggregateSpec& spec, std::vector<Contribution> contributions,
                 std::span<const core::ArtefactPtr> known) const;
  core::ArtefactPtr broadcast(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr evaluate_unit(const Unit& unit, WorkerContext& context) const;
  std::vector<Contribution> contributions(const Unit& unit, const AggregateSpec& spec, WorkerContext& context,
                                          core::Json& refused) const;
  void require_own_method(const std::string& method) const;
  std::shared_ptr<data::TextDataset> open(const TextSpec& text, WorkerContext& context) const;
  models::Decoder global_model(const std::vector<std::string>& states, const std::string& base,
                               const std::string& dtype, WorkerContext& context) const;
  /// The frozen model as it is stored, opened once.
  const models::Decoder& base() const;
  /// An adapter's tensors that a client sends: what is trained, and what nobody else has.
  Tensors sent_tensors(const adapters::Adapter& adapter) const;
  /// Contributions that start afresh say which seed what is not stored follows from.
  bool sends_seed(const adapters::AdapterConfig& adapter) const;

  // results.cpp
  void check_update(const Unit& unit, const core::Artefact& artefact) const;

  /// The global adapter after the last round.
  adapters::Adapter last_adapter(const RunState& state, const Stages& stages) const;
  /// The base, everything the rounds added to it and the last adapter, as a Hugging Face directory.
  void write_merged_model(const RunState& state, const Stages& stages, const std::filesystem::path& directory) const;

  std::string method_;
  std::unique_ptr<Federation> federation_;
  FederatedConfig config_;
  models::DecoderConfig architecture_;
  std::map<std::string, std::string> fingerprints_;  // domain -> fingerprint of its prepared text
  std::map<std::string, int64_t> sequences_;         // domain -> training sequences
  std::string model_id_;                             // identity of the model's directory
  std::vector<Client> clients_;                      // who holds what; follows from the above
  mutable std::once_flag base_once_;
  mutable std::unique_ptr<models::Decoder> base_;
};

ParsedRecipe parse_recipe(const core::ConfigNode& root, core::Problems& problems, const char* name,
                          std::unique_ptr<Federation> federation);

/// The registry's entry of a method of this family; Variant is a Federation with a static kName.
template <typename Variant>
MethodEntry method_entry_of(const char* summary) {
  return {Variant::kName,
          summary,
          [](const core::ConfigNode& root, core::Problems& problems) {
            return parse_recipe(root, problems, Variant::kName, std::make_unique<Variant>());
          },
          [](const core::Json& values, const core::Json& inputs) -> std::unique_ptr<Method> {
            return std::make_unique<Federated>(Variant::kName, std::make_unique<Variant>(),
                                               federated_schema().from_json(values), inputs);
          },
          [](const core::Json& values) { return federated_schema().identity(values); },
          [] { return federated_schema().json_schema(); },
          [] { return federated_schema().markdown(); }};
}

}  // namespace moraine::algorithms::federated
