// Tables, curves and heat maps of a run, out of its artefacts alone (docs/formats.md, summary.json).
#include <cmath>

#include "algorithms/evaluate.h"
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

core::Json FlexMore::summary(const RunState& state) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  const auto result = [&](const std::string& id) {
    return Evaluation::from_json(state.artefact(id)->meta().at("result"));
  };
  const auto test = [&](const std::string& method, const std::string& name) -> std::optional<Evaluation> {
    const auto m = stages.tests.find(method);
    if (m == stages.tests.end() || !m->second.count(name)) return std::nullopt;
    return result(m->second.at(name));
  };
  Json out = {{"tables", Json::array()},
              {"curves", Json::array()},
              {"heatmaps", Json::array()},
              {"headline", ""},
              {"hash", stages.mixture.value_or("")}};

  // Scores: domains x methods.
  const auto score_table = [&](const std::string& title, const char* better, int digits, auto&& value) {
    Json columns = Json::array({column("domain", "domain")}), rows = Json::array();
    if (!stages.ranks.empty()) columns.push_back(column("rank", "rank"));
    for (const auto& method : kMethods)
      if (stages.tests.count(method.key)) columns.push_back(score_column(method.key, method.label, better, digits));
    for (const auto& name : evaluated_domains()) {
      Json row = {{"domain", name}};
      if (!stages.ranks.empty())
        row["rank"] = !stages.ranks.count(name) ? Json(nullptr)
                      : stages.ranks.at(name)   ? Json(stages.ranks.at(name))
                                                : Json("full");
      for (const auto& method : kMethods) {
        if (!stages.tests.count(method.key)) continue;
        const auto evaluation = test(method.key, name);
        row[method.key] = evaluation ? Json(value(*evaluation)) : Json(nullptr);
      }
      rows.push_back(std::move(row));
    }
    out["tables"].push_back(
        {{"title", title},
         {"columns", columns},
         {"rows", rows},
         {"highlight", true},
         {"notes", config_.evaluation.split == "test"
                       ? Json::array()
                       : Json::array({"validation documents, for choosing settings: not a result"})}});
  };
  score_table("Bits per byte on held-out documents", "lower", 3, [](const Evaluation& e) { return e.bits_per_byte(); });
  score_table("Next-token accuracy, %", "higher", 1, [](const Evaluation& e) { return 100 * e.accuracy(); });

  // Parameters and bytes.
  Json shipped = Json::array();
  const auto ship = [&](const std::string& name, const Json& rank, int64_t parameters, int64_t bytes) {
    const double share = 100.0 * static_cast<double>(parameters) / static_cast<double>(architecture_.ffn_parameters());
    shipped.push_back({{"what", name}, {"rank", rank}, {"parameters", parameters}, {"share", share}, {"bytes", bytes}});
  };
  for (const auto& d : config_.domains) {
    if (stages.experts.count(d.name)) {
      const auto expert = state.artefact(stages.experts.at(d.name));
      ship("expert " + d.name, expert->meta().at("rank") == 0 ? Json("full") : expert->meta().at("rank"),
           expert->meta().at("parameters").get<int64_t>(), static_cast<int64_t>(expert->bytes().size()));
    }
    const auto rank = stages.ranks.find(d.name);
    if (d.train == "full" && rank != stages.ranks.end() && rank->second > 0) {
      const int64_t parameters = architecture_.low_rank_parameters(rank->second) + architecture_.router_parameters(1);
      ship("expert " + d.name, rank->second, parameters, parameters * 4);
    }
  }
  const auto ship_mixture = [&](const std::string& label, const std::optional<std::string>& id) -> int64_t {
    if (!id) return 0;
    const auto artefact = state.artefact(*id);
    const auto added = artefact->meta().at("added_parameters").get<int64_t>();
    ship(label, nullptr, added, static_cast<int64_t>(artefact->bytes().size()));
    return added;
  };
  const int64_t added = ship_mixture("mixture, chosen ranks: added", stages.mixture);
  const int64_t added_full = ship_mixture("mixture, full-size: added", stages.full_mixture);
  if (!shipped.empty())
    out["tables"].push_back(
        {{"title", "Parameters and bytes shipped"},
         {"columns",
          {column("what", "what"),
           column("rank", "rank"),
           column("parameters", "parameters"),
           {{"key", "share"}, {"label", "% of one full-size expert"}, {"digits", 1}},
           column("bytes", "bytes")}},
         {"rows", shipped},
         {"notes", {fmt::format("public model: {} parameters; bytes are float32", architecture_.total_parameters())}}});

  // Rank against score, spectra, training curves.
  Json by_rank = Json::array(), spectra = Json::array(), training = Json::array();
  for (const auto& [name, scores] : stages.validation) {
    Json points = Json::array();
    for (const auto& [rank, id] : scores) points.push_back({rank, result(id).bits_per_byte()});
    by_rank.push_back({{"name", name}, {"points", points}});
  }
  for (const auto& [name, id] : stages.low_rank) {
    const auto artefact = state.artefact(id);
    if (artefact->meta().contains("extracted_from"))
      spectra.push_back({{"name", name}, {"points", mean_spectrum(*artefact)}});
  }
  const auto add_training = [&](const std::string& name, const std::string& id) {
    training.push_back({{"name", name}, {"points", state.artefact(id)->meta().at("curve")}});
  };
  if (stages.base && model_id_.empty()) add_training("public", *stages.base);
  for (const auto& [name, id] : stages.experts) add_training(name, id);
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

  // Router load of the mixtures: share of tokens that select each expert, averaged over layers, and per layer.
  const auto load_map = [&](const std::string& method, const std::string& title) {
    const auto tests = stages.tests.find(method);
    if (tests == stages.tests.end()) return;
    Json rows = Json::array(), values = Json::array(), names, layer_rows = Json::array(), layer_values = Json::array();
    for (const auto& name : evaluated_domains()) {
      if (!tests->second.count(name)) continue;
      const Json& load = state.artefact(tests->second.at(name))->meta().at("load");
      names = load.at("experts");
      std::vector<double> mean(names.size());
      for (size_t l = 0; l < load.at("selected").size(); ++l) {
        Json line = Json::array();
        for (size_t e = 0; e < mean.size(); ++e) {
          const double share = load.at("selected")[l][e].get<double>();
          mean[e] += share / static_cast<double>(load.at("selected").size());
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
    out["heatmaps"].push_back(
        {{"title", title},
         {"row_label", "text"},
         {"column_label", "expert"},
         {"rows", rows},
         {"columns", names},
         {"values", values},
         {"digits", 0},
         {"notes",
          {fmt::format("% of tokens that select the expert, mean over layers; {} experts per token", config_.top_k)}}});
    out["heatmaps"].push_back({{"title", title + ", by layer"},
                               {"row_label", "text, layer"},
                               {"column_label", "expert"},
                               {"rows", layer_rows},
                               {"columns", names},
                               {"values", layer_values},
                               {"digits", 0},
                               {"notes", Json::array()}});
  };
  load_map("mixture", "Router load of the mixture, chosen ranks");
  load_map("full_mixture", "Router load of the full-size mixture");
  summarize_comparisons(stages, state, out);

  // One sentence, from this run's own numbers.
  if (added > 0) {
    int better = 0, domains = 0;
    for (const auto& d : config_.domains) {
      const auto base = test("base", d.name), mixture = test("mixture", d.name);
      if (!base || !mixture) continue;
      ++domains;
      better += mixture->bits_per_byte() < base->bits_per_byte();
    }
    if (domains > 0) {
      std::string text = fmt::format(
          "The mixture at the chosen ranks is better than the public model on {} of {} domains", better, domains);
      if (added_full > 0)
        text += fmt::format(", with {:.0f} % of the full-size mixture's added parameters",
                            100.0 * static_cast<double>(added) / static_cast<double>(added_full));
      out["headline"] = text + ".";
    }
  }
  return out;
}

}  // namespace moraine::algorithms::flexmore
