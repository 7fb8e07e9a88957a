// Tables, curves and heat maps of a run, out of its artefacts alone (docs/formats.md, summary.json).
#include <algorithm>

#include "algorithms/evaluate.h"
#include "algorithms/flexmore/direct.h"
#include "algorithms/flexmore/flexmore.h"
#include "core/error.h"

namespace moraine::algorithms::flexmore {
namespace {

using core::Json;

struct MethodColumn {
  const char* key;
  const char* label;
};
constexpr MethodColumn kMethods[] = {{"base", "base"},
                                     {"expert", "own expert, full-size"},
                                     {"low_rank_expert", "own expert, chosen rank"},
                                     {"mixture", "mixture, chosen ranks"},
                                     {"full_mixture", "mixture, full-size"},
                                     {"soup", "weight soup"},
                                     {"btm", "branch-train-merge, top 2"},
                                     {"joint", "one expert, all domains' text"}};

Json column(const std::string& key, const std::string& label) { return {{"key", key}, {"label", label}}; }

Json score_column(const std::string& key, const std::string& label, const char* better, int digits) {
  return {{"key", key}, {"label", label}, {"better", better}, {"digits", digits}};
}

// Mean singular value per index over all matrices of an extracted expert.
Json mean_spectrum(const core::Artefact& artefact) {
  std::vector<double> sums;
  int64_t matrices = 0;
  for (const auto& tensor : artefact.file().tensors()) {
    if (!tensor.name.starts_with("spectrum.")) continue;
    const auto* values = reinterpret_cast<const float*>(tensor.data.data());
    sums.resize(std::max(sums.size(), static_cast<size_t>(tensor.numel())));
    for (int64_t i = 0; i < tensor.numel(); ++i) sums[static_cast<size_t>(i)] += static_cast<double>(values[i]);
    ++matrices;
  }
  Json points = Json::array();
  for (size_t i = 0; i < sums.size(); ++i) points.push_back({i + 1, sums[i] / static_cast<double>(matrices)});
  return points;
}

}  // namespace

std::optional<Evaluation> FlexMore::tested(const Stages& stages, const RunState& state, const std::string& method,
                                           const std::string& name) const {
  const auto tests = stages.tests.find(method);
  if (tests == stages.tests.end() || !tests->second.count(name)) return std::nullopt;
  return Evaluation::from_json(state.artefact(tests->second.at(name))->meta().at("result"));
}

// Domains x methods.
void FlexMore::summarize_scores(const Stages& stages, const RunState& state, Json& out) const {
  Json notes = Json::array();
  if (config_.evaluation.split != "test") notes.push_back("validation documents, for choosing settings: not a result");
  if (!config_.leave_out.empty())
    notes.push_back(fmt::format("left out: {}; their text is measured, their experts are in no result",
                                fmt::join(config_.leave_out, ", ")));
  const auto table = [&](const std::string& title, const char* better, int digits, auto&& value) {
    Json columns = Json::array({column("domain", "domain")}), rows = Json::array();
    if (!stages.ranks.empty()) columns.push_back(column("rank", "rank"));
    for (const auto& method : kMethods)
      if (stages.tests.count(method.key)) columns.push_back(score_column(method.key, method.label, better, digits));
    for (const auto& name : evaluated_domains()) {
      Json row = {{"domain", name}};
      if (!is_member(config_, name) && !stages.ranks.empty()) row["rank"] = "left out";
      if (const auto rank = stages.ranks.find(name); rank != stages.ranks.end())
        row["rank"] = rank->second > 0 ? Json(rank->second) : Json("full");
      for (const auto& method : kMethods)
        if (const auto evaluation = tested(stages, state, method.key, name)) row[method.key] = value(*evaluation);
      rows.push_back(std::move(row));
    }
    out["tables"].push_back(
        {{"title", title}, {"columns", columns}, {"rows", rows}, {"highlight", true}, {"notes", notes}});
  };
  table("Bits per byte on held-out documents", "lower", 3, [](const Evaluation& e) { return e.bits_per_byte(); });
  table("Next-token accuracy, %", "higher", 1, [](const Evaluation& e) { return 100 * e.accuracy(); });
}

// Parameters and bytes.
void FlexMore::summarize_sizes(const Stages& stages, const RunState& state, Json& out) const {
  Json shipped = Json::array();
  const auto ship = [&](const std::string& name, const Json& rank, int64_t parameters, int64_t bytes) {
    const double share = 100.0 * static_cast<double>(parameters) / static_cast<double>(architecture_.ffn_parameters());
    shipped.push_back({{"what", name}, {"rank", rank}, {"parameters", parameters}, {"share", share}, {"bytes", bytes}});
  };
  for (const auto& d : members_) {
    if (stages.experts.count(d.name)) {
      const auto expert = state.artefact(stages.experts.at(d.name));
      ship("expert " + d.name, expert->meta().at("rank") == 0 ? Json("full") : expert->meta().at("rank"),
           expert->meta().at("parameters").get<int64_t>(), static_cast<int64_t>(expert->bytes().size()));
    }
    const auto rank = stages.ranks.find(d.name);
    if (rank != stages.ranks.end() && rank->second != trained_rank(d)) {
      const int64_t parameters = architecture_.low_rank_parameters(rank->second) + architecture_.router_parameters(1);
      ship("expert " + d.name, rank->second, parameters, parameters * 4);
    }
  }
  const auto ship_mixture = [&](const std::string& label, const std::optional<std::string>& id) {
    if (!id) return;
    const auto artefact = state.artefact(*id);
    ship(label, nullptr, artefact->meta().at("added_parameters").get<int64_t>(),
         static_cast<int64_t>(artefact->bytes().size()));
  };
  ship_mixture("mixture, chosen ranks: added", stages.mixture);
  ship_mixture("mixture, full-size: added", stages.full_mixture);
  if (shipped.empty()) return;
  Json notes = {fmt::format("public model: {} parameters; bytes are float32", architecture_.total_parameters())};
  for (const auto& d : members_)
    if (d.adapter)
      notes.push_back(fmt::format("{}: {} trained {} numbers", d.name, d.adapter->type,
                                  adapter_counts(*d.adapter, architecture_).trained));
  out["tables"].push_back({{"title", "Parameters and bytes shipped"},
                           {"columns",
                            {column("what", "what"),
                             column("rank", "rank"),
                             column("parameters", "parameters"),
                             {{"key", "share"}, {"label", "% of one full-size expert"}, {"digits", 1}},
                             column("bytes", "bytes")}},
                           {"rows", shipped},
                           {"notes", notes}});
}

// Rank against score, spectra, training curves.
void FlexMore::summarize_curves(const Stages& stages, const RunState& state, Json& out) const {
  Json by_rank = Json::array(), spectra = Json::array(), training = Json::array();
  const auto add_training = [&](const std::string& name, const std::string& id) {
    training.push_back({{"name", name}, {"points", state.artefact(id)->meta().at("curve")}});
  };
  if (stages.base && model_id_.empty()) add_training("public", *stages.base);
  for (const auto& d : members_) {
    if (const auto expert = stages.experts.find(d.name); expert != stages.experts.end())
      add_training(d.name, expert->second);
    if (const auto scores = stages.validation.find(d.name); scores != stages.validation.end()) {
      Json points = Json::array();
      for (const auto& [rank, id] : scores->second)
        points.push_back({rank, Evaluation::from_json(state.artefact(id)->meta().at("result")).bits_per_byte()});
      by_rank.push_back({{"name", d.name}, {"points", points}});
    }
    if (const auto low = stages.low_rank.find(d.name); low != stages.low_rank.end()) {
      const auto artefact = state.artefact(low->second);
      if (artefact->meta().contains("extracted_from"))
        spectra.push_back({{"name", d.name}, {"points", mean_spectrum(*artefact)}});
    }
  }
  if (stages.joint) add_training("all domains", *stages.joint);
  const auto curve = [&](const std::string& title, const std::string& x, const std::string& y, bool log_x, bool log_y,
                         const Json& series, const std::string& note) {
    if (series.empty()) return;
    out["curves"].push_back({{"title", title},
                             {"x_label", x},
                             {"y_label", y},
                             {"log_x", log_x},
                             {"log_y", log_y},
                             {"series", series},
                             {"notes", note.empty() ? Json::array() : Json::array({note})}});
  };
  curve("Training loss", "step", "nats per token", false, false, training, "");
  curve("Validation score against rank", "rank", "bits per byte", true, false, by_rank,
        "each expert beside the public one, cut to the rank; ranks are chosen from this curve, never from test text");
  curve("Singular values of the experts' differences", "index", "mean singular value", false, true, spectra,
        "W_expert - W_public, averaged over layers and the three FFN matrices");
}

// Share of tokens that select each expert, averaged over layers, and per layer; experts in the order of the texts.
void FlexMore::summarize_load(const Stages& stages, const RunState& state, const std::string& method,
                              const std::string& title, Json& out) const {
  const auto tests = stages.tests.find(method);
  if (tests == stages.tests.end()) return;
  Json rows = Json::array(), values = Json::array(), layer_rows = Json::array(), layer_values = Json::array();
  std::vector<std::string> experts;
  for (const auto& name : evaluated_domains()) {
    if (!tests->second.count(name)) continue;
    const core::ArtefactPtr artefact = state.artefact(tests->second.at(name));
    const Json& load = artefact->meta().at("load");
    const auto stored = load.at("experts").get<std::vector<std::string>>();
    std::vector<size_t> order;
    experts.clear();
    for (const auto& expert : evaluated_domains())
      if (const auto at = std::find(stored.begin(), stored.end(), expert); at != stored.end()) {
        experts.push_back(expert);
        order.push_back(static_cast<size_t>(at - stored.begin()));
      }
    const Json& selected = load.at("selected");
    std::vector<double> mean(order.size());
    for (size_t l = 0; l < selected.size(); ++l) {
      Json line = Json::array();
      for (size_t e = 0; e < order.size(); ++e) {
        const double share = selected[l][order[e]].get<double>();
        mean[e] += share / static_cast<double>(selected.size());
        line.push_back(100 * share);
      }
      layer_rows.push_back(fmt::format("{}, layer {}", name, l));
      layer_values.push_back(line);
    }
    Json line = Json::array();
    for (const double share : mean) line.push_back(100 * share);
    rows.push_back(name);
    values.push_back(line);
  }
  if (rows.empty()) return;
  const std::string note =
      fmt::format("% of tokens that select the expert, mean over layers; {} experts per token", config_.top_k);
  const auto map = [&](const std::string& name, const char* row_label, const Json& lines, const Json& numbers,
                       const Json& notes) {
    out["heatmaps"].push_back({{"title", name},
                               {"row_label", row_label},
                               {"column_label", "expert"},
                               {"rows", lines},
                               {"columns", experts},
                               {"values", numbers},
                               {"digits", 0},
                               {"notes", notes}});
  };
  map(title, "text", rows, values, Json::array({note}));
  map(title + ", by layer", "text, layer", layer_rows, layer_values, Json::array());
}

// One sentence, from this run's own numbers.
std::string FlexMore::headline(const Stages& stages, const RunState& state) const {
  if (!stages.mixture) return "";
  int better = 0, domains = 0;
  for (const auto& d : members_) {
    const auto base = tested(stages, state, "base", d.name), mixture = tested(stages, state, "mixture", d.name);
    if (!base || !mixture) continue;
    ++domains;
    better += mixture->bits_per_byte() < base->bits_per_byte();
  }
  if (domains == 0) return "";
  std::string text = fmt::format("The mixture at the chosen ranks is better than the public model on {} of {} domains",
                                 better, domains);
  const auto added = [&](const std::string& id) {
    return static_cast<double>(state.artefact(id)->meta().at("added_parameters").get<int64_t>());
  };
  if (stages.full_mixture)
    text += fmt::format(", with {:.0f} % of the full-size mixture's added parameters",
                        100 * added(*stages.mixture) / added(*stages.full_mixture));
  return text + ".";
}

core::Json FlexMore::summary(const RunState& state) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  Json out = {{"tables", Json::array()},
              {"curves", Json::array()},
              {"heatmaps", Json::array()},
              {"headline", headline(stages, state)},
              {"hash", stages.mixture.value_or("")}};
  summarize_scores(stages, state, out);
  summarize_sizes(stages, state, out);
  summarize_curves(stages, state, out);
  summarize_load(stages, state, "mixture", "Router load of the mixture, chosen ranks", out);
  summarize_load(stages, state, "full_mixture", "Router load of the full-size mixture", out);
  summarize_comparisons(stages, state, out);
  return out;
}

}  // namespace moraine::algorithms::flexmore
