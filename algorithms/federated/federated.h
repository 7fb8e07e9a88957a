#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/federated/federation.h"
#include "algorithms/federated/partition.h"
#include "algorithms/method.h"
#include "algorithms/register.h"
#include "models/decoder_config.h"

namespace moraine::models {
class Backbone;
class Decoder;
}  // namespace moraine::models
namespace moraine::algorithms::adapters {
class LoraAdapter;
}

namespace moraine::algorithms::federated {

/// Rounds of federated LoRA on a frozen decoder: sample clients, each trains the adapter on its own text, the server
/// forms the next global state, repeat. What is trained, sent and averaged is the Federation's; everything else is
/// shared.
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

  void open_inputs() override;
  core::Json inputs() const override;
  Plan plan(const RunState& state) const override;
  core::ArtefactPtr execute(const Unit& unit, WorkerContext& context) const override;
  core::Json summary(const RunState& state) const override;
  void publish(const RunState& state, const std::filesystem::path& run_directory) const override;
  /// peft: the global adapter; hf: the merged model, the only form of methods whose rounds change the base.
  void export_as(const RunState& state, const ExportRequest& request) const override;
  ParameterTable parameters() const override;

 private:
  struct RoundResult {
    std::vector<std::string> updates;          // in the order of the clients' names
    std::vector<std::string> sent;             // what each client was sent for the round; none in the first one
    std::string state;                         // after the round
    std::map<std::string, std::string> tests;  // by domain
  };
  /// Everything the procedure has got hold of so far; filled in order by walk().
  struct Stages {
    std::map<std::string, std::string> base;  // evaluations by domain
    std::vector<RoundResult> rounds;          // complete ones
    std::optional<std::string> centralised;
    std::map<std::string, std::string> centralised_tests;
    std::map<std::string, std::map<std::string, std::string>> alone_tests;  // client -> domain -> evaluation
  };

  // plan.cpp: pure.
  Stages walk(PlanBuilder& plan) const;
  std::vector<Client> clients() const;
  Unit make_unit(const std::string& kind, const std::string& label, core::Json spec, std::vector<std::string> inputs,
                 double cost) const;
  Unit update_unit(const std::string& label, const Client& client, int64_t round, int64_t steps, int64_t rank,
                   std::vector<std::string> inputs) const;
  Unit evaluation_unit(const std::string& label, const std::string& domain, std::vector<std::string> inputs) const;
  std::map<std::string, std::string> evaluate_everywhere(PlanBuilder& plan, const std::string& label,
                                                         const std::vector<std::string>& inputs) const;
  /// What a client or an evaluation needs to rebuild the global model: the last state, or all of them when rounds
  /// change the base.
  std::vector<std::string> model_inputs(const std::vector<RoundResult>& rounds) const;
  core::Json data_spec(const std::string& domain, const std::string& split) const;
  const DomainConfig& domain(const std::string& name) const;
  /// The adapter's configuration at a rank: alpha follows, so that the scale is the same for all clients (inferred:
  /// FLoRA's code takes alpha_k = 2 r_k; papers with one alpha for all would weigh clients by 1 / r_k).
  adapters::LoraConfig lora(int64_t rank) const;
  double scale() const;  // s of y = W0 x + s B A x
  int64_t server_rank() const;

  // execute.cpp
  core::ArtefactPtr update(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr train_client(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr aggregate(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr broadcast(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr evaluate_unit(const Unit& unit, WorkerContext& context) const;
  std::shared_ptr<models::Decoder> load_base(WorkerContext& context, const std::string& id) const;
  models::Decoder global_model(const Unit& unit, WorkerContext& context) const;
  Factors global_factors(const Unit& unit, WorkerContext& context, const models::Backbone& model) const;
  Factors first_factors(const models::Backbone& model) const;
  void write_adapter(const RunState& state, const std::string& id, const std::filesystem::path& directory) const;
  /// The base, everything the rounds added to it and the last adapter, as a Hugging Face directory.
  void write_merged_model(const RunState& state, const std::vector<RoundResult>& rounds,
                          const std::filesystem::path& directory) const;
  /// Replaces an adapter's values; both must have the same names and shapes.
  void set_factors(const adapters::LoraAdapter& adapter, const Factors& factors) const;

  std::string method_;
  std::unique_ptr<Federation> federation_;
  FederatedConfig config_;
  models::DecoderConfig architecture_;
  std::map<std::string, std::string> fingerprints_;  // domain -> fingerprint of its prepared text
  std::map<std::string, int64_t> sequences_;         // domain -> training sequences
  std::string model_id_;                             // identity of the model's directory
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
