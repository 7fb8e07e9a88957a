// Tables, curves and heat maps of the recipe's `comparisons`.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "algorithms/evaluate.h"
#include "algorithms/flexmore/comparisons.h"
#include "algorithms/flexmore/direct.h"
#include "algorithms/flexmore/flexmore.h"

namespace moraine::algorithms::flexmore {
namespace {

using core::Json;

Json bits_column(const std::string& key, const std::string& label) {
  return {{"key", key}, {"label", label}, {"better", "lower"}, {"digits", 3}};
}

}  // namespace

void FlexMore::summarize_comparisons(const Stages& s, const RunState& state, Json& out) const {
  const auto evaluation = [&](const std::string& id) {
    return Evaluation::from_json(state.artefact(id)->meta().at("result"));
  };
  const auto bits = [&](const std::string& id) { return Json(evaluation(id).bits_per_byte()); };
  const auto tested_bits = [&](const std::string& method, const std::string& name) -> Json {
    const auto result = tested(s, state, method, name);
    return result ? Json(result->bits_per_byte()) : Json(nullptr);
  };

  if (!s.scaled.empty()) {
    Json columns = {{{"key", "domain"}, {"label", "domain"}}, bits_column("0", "0 (public model)")},
         rows = Json::array();
    for (const double scale : kScales)
      columns.push_back(bits_column(fmt::format("{}", scale), fmt::format("{}", scale)));
    columns.push_back(bits_column("1", "1 (as trained)"));
    for (const auto& d : members_) {
      if (!s.scaled.count(d.name)) continue;
      const std::string& name = d.name;
      Json row = {{"domain", name}, {"0", tested_bits("base", name)}, {"1", tested_bits("expert", name)}};
      for (const auto& [scale, id] : s.scaled.at(name)) row[fmt::format("{}", scale)] = bits(id);
      rows.push_back(row);
    }
    out["tables"].push_back(
        {{"title", "Own expert with a share of its full-size change, bits per byte"},
         {"columns", columns},
         {"rows", rows},
         {"notes", {"W_0 + share (W_e - W_0); share 0 is the public model without the mixture layer"}}});
  }

  if (!s.random_subspace.empty()) {
    Json rows = Json::array();
    for (const auto& d : members_) {
      if (!s.random_subspace.count(d.name)) continue;
      const std::string& name = d.name;
      for (const auto& [rank, id] : s.random_subspace.at(name)) {
        const bool swept = s.sweep.count(name) && s.sweep.at(name).count(rank);
        rows.push_back({{"domain", name},
                        {"rank", rank},
                        {"base", tested_bits("base", name)},
                        {"random", bits(id)},
                        {"phlora", swept ? bits(s.sweep.at(name).at(rank)) : tested_bits("low_rank_expert", name)},
                        {"full", tested_bits("expert", name)}});
      }
    }
    out["tables"].push_back({{"title", "Own expert at a rank: random subspace against PHLoRA, bits per byte"},
                             {"columns",
                              {{{"key", "domain"}, {"label", "domain"}},
                               {{"key", "rank"}, {"label", "rank"}},
                               bits_column("base", "public model"),
                               bits_column("random", "random subspace"),
                               bits_column("phlora", "PHLoRA"),
                               bits_column("full", "full-size")}},
                             {"rows", rows},
                             {"notes",
                              {"random subspace: the change's part in that many random directions of the input, the "
                               "same for every rank of one domain"}}});
  }

  if (!s.cross.empty()) {
    Json rows = Json::array({"public model"}), values = Json::array();
    Json line = Json::array();
    for (const auto& text : evaluated_domains()) line.push_back(tested_bits("base", text));
    values.push_back(line);
    for (const auto& d : members_) {
      if (!s.cross.count(d.name)) continue;
      const auto& scores = s.cross.at(d.name);
      line = Json::array();
      for (const auto& text : evaluated_domains())
        line.push_back(scores.count(text) ? bits(scores.at(text)) : Json(nullptr));
      rows.push_back(d.name);
      values.push_back(line);
    }
    out["heatmaps"].push_back({{"title", "Each expert on every domain, bits per byte"},
                               {"row_label", "expert"},
                               {"column_label", "text"},
                               {"rows", rows},
                               {"columns", evaluated_domains()},
                               {"values", values},
                               {"digits", 3},
                               {"notes", {"experts as they were trained, beside the public one"}}});
  }

  if (!s.sweep.empty()) summarize_sweep(s, state, out);
}

void FlexMore::summarize_sweep(const Stages& s, const RunState& state, Json& out) const {
  const auto evaluation = [&](const std::string& id) {
    return Evaluation::from_json(state.artefact(id)->meta().at("result"));
  };
  const auto d = static_cast<double>(architecture_.hidden_size),
             h = static_cast<double>(architecture_.intermediate_size);
  const int64_t cap = std::min(architecture_.hidden_size, architecture_.intermediate_size);
  const double break_even = d * h / (d + h);
  Json series = Json::array(),
       score_columns = {{{"key", "rank"}, {"label", "rank"}},
                        {{"key", "share"}, {"label", "% of a full-size expert"}, {"digits", 1}}};
  Json slopes = Json::array();
  std::map<int64_t, Json> score_rows;
  constexpr int64_t kFull = std::numeric_limits<int64_t>::max();  // sorts behind every rank
  for (const auto& domain : members_) {
    const std::string& name = domain.name;
    const auto full = tested(s, state, "expert", name);
    const bool factors = trains_factors(domain);  // of which there is no full-size expert to compare with
    if (!s.sweep.count(name) || s.sweep.at(name).size() != ranks_within(domain, config_.ranks.candidates).size() ||
        (!full && !factors))
      continue;
    const auto& scores = s.sweep.at(name);
    Json points = Json::array();
    for (const auto& [rank, id] : scores) {
      points.push_back({rank, evaluation(id).bits_per_byte()});
      score_rows[rank][name] = evaluation(id).bits_per_byte();
    }
    series.push_back({{"name", name}, {"points", points}});
    score_columns.push_back(bits_column(name, name));
    if (factors) continue;
    score_rows[kFull][name] = full->bits_per_byte();
    const int64_t largest = scores.rbegin()->first;
    // As the paper's analysis codes it: every rank, and full-size one doubling above the largest. Ours: what is cheaper
    // than full size, and full size once, at the rank from which a cut is the same function.
    std::vector<std::pair<double, double>> coded, cheaper, coded_accuracy;
    for (const auto& [rank, id] : scores) {
      const Evaluation e = evaluation(id);
      const double x = std::log2(static_cast<double>(rank));
      coded.emplace_back(x, e.bits_per_byte());
      coded_accuracy.emplace_back(x, 100 * e.accuracy());
      if (static_cast<double>(rank) < break_even) cheaper.emplace_back(x, e.bits_per_byte());
    }
    coded.emplace_back(std::log2(static_cast<double>(largest)) + 1, full->bits_per_byte());
    coded_accuracy.emplace_back(std::log2(static_cast<double>(largest)) + 1, 100 * full->accuracy());
    cheaper.emplace_back(std::log2(static_cast<double>(cap)), full->bits_per_byte());
    Json row = {{"domain", name}};
    const auto add = [&](const std::string& key, const std::vector<std::pair<double, double>>& line_points) {
      if (line_points.size() < 2) return;
      const Line line = least_squares_line(line_points);
      row[key] = line.slope;
      row[key + "_r2"] = line.r2;
    };
    add("coded", coded);
    add("cheaper", cheaper);
    add("accuracy", coded_accuracy);
    if (scores.count(cap)) row["cap"] = evaluation(scores.at(cap)).bits_per_byte() - full->bits_per_byte();
    const auto best = std::min_element(scores.begin(), scores.end(), [&](const auto& a, const auto& b) {
      return evaluation(a.second).bits_per_byte() < evaluation(b.second).bits_per_byte();
    });
    const bool cheap =
        static_cast<double>(best->first) < break_even;  // above, a cut costs more than what it is a cut of
    row["best"] =
        cheap && evaluation(best->second).bits_per_byte() <= full->bits_per_byte() ? Json(best->first) : Json("full");
    slopes.push_back(row);
  }
  if (series.empty()) return;
  Json rows = Json::array();
  for (auto& [rank, row] : score_rows) {
    row["rank"] = rank == kFull ? Json("full") : Json(rank);
    row["share"] = rank == kFull ? 100.0
                                 : 100.0 * static_cast<double>(architecture_.low_rank_parameters(rank)) /
                                       static_cast<double>(architecture_.ffn_parameters());
    rows.push_back(row);
  }
  out["tables"].push_back(
      {{"title", "Rank sweep: own expert cut to a rank, bits per byte"},
       {"columns", score_columns},
       {"rows", rows},
       {"best_in", "column"},
       {"notes",
        {fmt::format("a cut is cheaper than the full-size expert below rank {:.1f} = d h / (d + h), and the same "
                     "function from rank {} = min(d, h) on, so no larger rank is measured",
                     break_even, cap)}}});
  const auto number = [](const char* key, const char* label, int digits) {
    return Json{{"key", key}, {"label", label}, {"digits", digits}};
  };
  if (!slopes.empty())
    out["tables"].push_back({{"title", "Rank sweep: regression of the score on log2(rank)"},
                             {"columns",
                              {{{"key", "domain"}, {"label", "domain"}},
                               number("coded", "bits per byte per doubling, all ranks", 4),
                               number("coded_r2", "R2", 3),
                               number("cheaper", "bits per byte per doubling, ranks below break-even and full once", 4),
                               number("cheaper_r2", "R2", 3),
                               number("accuracy", "accuracy points per doubling, all ranks", 3),
                               number("accuracy_r2", "R2", 3),
                               number("cap", "largest possible rank minus full-size, bits per byte", 5),
                               {{"key", "best"}, {"label", "best below break-even, or full"}}}},
                             {"rows", slopes},
                             {"notes",
                              {"all ranks: as FlexMoRE's analysis, full-size coded as one doubling above the largest "
                               "rank; below break-even: one function counts once",
                               "scores on the text the tables are about, for one seed: a slope says how this domain's "
                               "score moves, not which rank to choose"}}});
  out["curves"].push_back({{"title", "Rank sweep: score against rank"},
                           {"x_label", "rank"},
                           {"y_label", "bits per byte"},
                           {"log_x", true},
                           {"log_y", false},
                           {"series", series},
                           {"notes", Json::array()}});
}

}  // namespace moraine::algorithms::flexmore
