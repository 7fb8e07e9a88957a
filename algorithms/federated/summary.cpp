// Tables and curves of a federation, out of its artefacts alone (docs/formats.md, summary.json).
#include "algorithms/adapters/parametrisation.h"
#include "algorithms/evaluate.h"
#include "algorithms/federated/federated.h"
#include "core/error.h"

namespace moraine::algorithms::federated {
namespace {

using core::Json;

Json column(const std::string& key, const std::string& label) { return {{"key", key}, {"label", label}}; }

}  // namespace

core::Json Federated::summary(const RunState& state) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  const auto bits = [&](const std::string& id) {
    return Evaluation::from_json(state.artefact(id)->meta().at("result")).bits_per_byte();
  };
  const auto bytes = [&](const std::string& id) { return static_cast<int64_t>(state.artefact(id)->bytes().size()); };
  Json out = {{"tables", Json::array()},
              {"curves", Json::array()},
              {"heatmaps", Json::array()},
              {"headline", ""},
              {"hash", stages.rounds.size() == static_cast<size_t>(config_.rounds) ? stages.rounds.back().state : ""}};

  // Scores by domain.
  const auto score = [&](const std::string& key, const std::string& label) {
    return Json{{"key", key}, {"label", label}, {"better", "lower"}, {"digits", 3}};
  };
  const RoundResult* last = nullptr;
  for (const auto& round : stages.rounds)
    if (!round.tests.empty()) last = &round;
  Json columns = {column("domain", "domain"), score("base", "base")}, rows = Json::array();
  if (!config_.comparisons.empty() && !stages.alone_tests.empty())
    columns.push_back(score("alone", "clients alone, mean"));
  if (last != nullptr)
    columns.push_back(score("federated", fmt::format("{}, round {}", method_, last - stages.rounds.data() + 1)));
  if (!stages.centralised_tests.empty()) columns.push_back(score("centralised", "centralised"));
  for (const auto& d : config_.domains) {
    Json row = {{"domain", d.name}};
    const auto put = [&](const char* key, const std::map<std::string, std::string>& tests) {
      if (const auto found = tests.find(d.name); found != tests.end()) row[key] = bits(found->second);
    };
    put("base", stages.base);
    if (last != nullptr) put("federated", last->tests);
    put("centralised", stages.centralised_tests);
    double sum = 0;
    int64_t count = 0;
    for (const auto& [client, tests] : stages.alone_tests)
      if (const auto found = tests.find(d.name); found != tests.end()) sum += bits(found->second), ++count;
    if (count > 0) row["alone"] = sum / static_cast<double>(count);
    rows.push_back(std::move(row));
  }
  Json notes = Json::array();
  if (config_.evaluation.split != "test") notes.push_back("validation documents, for choosing settings: not a result");
  if (!stages.alone_tests.empty())
    notes.push_back("clients alone: every client by itself for as many steps as in all rounds; mean over clients");
  if (!stages.centralised_tests.empty())
    notes.push_back("centralised: one adapter on all data, as many sequences as all clients together");
  out["tables"].push_back({{"title", "Bits per byte on held-out documents"},
                           {"columns", columns},
                           {"rows", rows},
                           {"highlight", true},
                           {"notes", notes}});

  // What travelled, as measured: the artefacts' own sizes.
  Json traffic = Json::array(), refusals = Json::array();
  int64_t up_total = 0, down_total = 0;
  for (size_t t = 0; t < stages.rounds.size(); ++t) {
    const RoundResult& round = stages.rounds[t];
    int64_t up = 0, down = 0;
    for (const auto& id : round.updates) up += bytes(id);
    for (const auto& id : round.sent) down += bytes(id);
    up_total += up;
    down_total += down;
    traffic.push_back({{"round", t + 1}, {"clients", round.updates.size()}, {"up", up}, {"down", down}});
    for (const auto& refused : state.artefact(round.state)->meta().value("refused", Json::array()))
      refusals.push_back({{"round", t + 1}, {"client", refused.at("client")}, {"reason", refused.at("reason")}});
  }
  if (!traffic.empty()) {
    traffic.push_back({{"round", "all"}, {"clients", nullptr}, {"up", up_total}, {"down", down_total}});
    out["tables"].push_back(
        {{"title", "Bytes up and down"},
         {"columns",
          {column("round", "round"), column("clients", "clients"), column("up", "bytes up"),
           column("down", "bytes down")}},
         {"rows", traffic},
         {"notes",
          {stages.start ? "sizes of the files that travel, headers included; the adapter as it starts before a "
                          "client's first turn"
                        : "sizes of the files that travel, headers included; in the first round the adapter follows "
                          "from the seed"}}});
  }
  if (!refusals.empty())
    out["tables"].push_back(
        {{"title", "Contributions left out"},
         {"columns", {column("round", "round"), column("client", "client"), column("reason", "reason")}},
         {"rows", refusals},
         {"notes", Json::array()}});

  // Clients.
  const bool has_ranks = adapters::parametrisation(config_.lora.type).traits().uses_rank;
  Json client_columns = {column("client", "client")}, client_rows = Json::array();
  if (has_ranks) client_columns.push_back(column("rank", "rank"));
  client_columns.push_back(column("sequences", "sequences"));
  std::map<std::string, int64_t> ranks;
  for (const auto& round : stages.rounds)
    for (const auto& id : round.updates)
      if (const auto& meta = state.artefact(id)->meta(); !meta.contains("refused"))
        ranks[meta.at("client")] = meta.at("rank");
  for (const auto& d : config_.domains) client_columns.push_back(column(d.name, d.name));
  for (const auto& client : clients_) {
    Json row = {{"client", client.name}, {"sequences", client.sequences()}};
    if (has_ranks) row["rank"] = ranks.count(client.name) ? ranks.at(client.name) : client.rank;
    for (const auto& d : config_.domains)
      row[d.name] = client.shares.count(d.name) ? client.shares.at(d.name).count : 0;
    client_rows.push_back(std::move(row));
  }
  out["tables"].push_back(
      {{"title", "Clients"},
       {"columns", client_columns},
       {"rows", client_rows},
       {"notes", {has_ranks ? "training sequences by domain; rank: the latest" : "training sequences by domain"}}});

  // Score against round; local training losses of the last round.
  Json by_round = Json::array(), training = Json::array();
  for (const auto& d : config_.domains) {
    Json points = Json::array();
    if (stages.base.count(d.name)) points.push_back({0, bits(stages.base.at(d.name))});
    for (size_t t = 0; t < stages.rounds.size(); ++t)
      if (stages.rounds[t].tests.count(d.name)) points.push_back({t + 1, bits(stages.rounds[t].tests.at(d.name))});
    if (points.size() > 1) by_round.push_back({{"name", d.name}, {"points", points}});
  }
  if (!by_round.empty())
    out["curves"].push_back({{"title", "Global model by round"},
                             {"x_label", "round"},
                             {"y_label", "bits per byte"},
                             {"log_x", false},
                             {"log_y", false},
                             {"series", by_round},
                             {"notes", Json::array()}});
  if (!stages.rounds.empty())
    for (const auto& id : stages.rounds.back().updates)
      if (const auto& meta = state.artefact(id)->meta(); !meta.contains("refused"))
        training.push_back({{"name", meta.at("client")}, {"points", meta.at("curve")}});
  if (!training.empty())
    out["curves"].push_back({{"title", "Local training loss, last round"},
                             {"x_label", "step"},
                             {"y_label", "nats per token"},
                             {"log_x", false},
                             {"log_y", false},
                             {"series", training},
                             {"notes", Json::array()}});

  if (last != nullptr) {
    int better = 0, domains = 0;
    for (const auto& d : config_.domains) {
      if (!stages.base.count(d.name) || !last->tests.count(d.name)) continue;
      ++domains;
      better += bits(last->tests.at(d.name)) < bits(stages.base.at(d.name));
    }
    out["headline"] = fmt::format(
        "The global model is better than the base on {} of {} domains after {} rounds; {} bytes up, {} bytes down.",
        better, domains, stages.rounds.size(), up_total, down_total);
  }
  return out;
}

}  // namespace moraine::algorithms::federated
