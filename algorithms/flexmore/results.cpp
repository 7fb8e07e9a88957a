// What is believed of what workers send: an expert has the planned name, rank and base, and shapes that fit the public
// model, before it is accepted, so that one which does not costs its attempt and not the merge.
#include <map>

#include "algorithms/evaluate.h"
#include "algorithms/flexmore/direct.h"
#include "algorithms/flexmore/experts.h"
#include "algorithms/flexmore/flexmore.h"
#include "algorithms/flexmore/units.h"
#include "core/error.h"

namespace moraine::algorithms::flexmore {
namespace {

[[noreturn]] void refuse(const Unit& unit, const std::string& what) {
  throw core::UserError(fmt::format("algorithms/flexmore: the result of {} {}", unit.label, what),
                        "the worker runs other code or was given another unit: look at its log");
}

void check_expert(const Unit& unit, const core::Artefact& artefact, int64_t rank, const std::string& base,
                  const std::vector<double>& scales, const models::DecoderConfig& public_model) {
  const Expert expert = read_expert(artefact, 0);  // names of tensors, and shapes that fit each other
  if (expert.rank() != rank) refuse(unit, fmt::format("is of rank {}, planned is {}", expert.rank(), rank));
  if (artefact.meta().at("base") != base) refuse(unit, "was trained against another public model");
  if (expert.scales_by_rank != scales) refuse(unit, "has other scales of its lower ranks than its adapter");
  if (static_cast<int64_t>(expert.layers.size()) != public_model.num_layers)
    refuse(unit, fmt::format("has {} layers, the public model {}", expert.layers.size(), public_model.num_layers));
  for (size_t l = 0; l < expert.layers.size(); ++l) {
    const models::FfnExpert& ffn = expert.layers[l];
    const int64_t hidden = ffn.full() ? ffn.gate.size(0) : ffn.gate_delta.b.size(0);
    if (expert.router_rows[l].size(0) != public_model.hidden_size || hidden != public_model.intermediate_size)
      refuse(unit,
             fmt::format("has an FFN of {} x {} in layer {}, the public model {} x {}", hidden,
                         expert.router_rows[l].size(0), l, public_model.intermediate_size, public_model.hidden_size));
  }
}

}  // namespace

void FlexMore::check_result(const Unit& unit, const core::Artefact& artefact) const {
  static const std::map<std::string, std::string> kinds = {
      {TrainBaseSpec::kKind, "base"},     {EmbedPublicSpec::kKind, "embedding"}, {TrainExpertSpec::kKind, "expert"},
      {ExtractSpec::kKind, "expert"},     {SoupSpec::kKind, "expert"},           {MergeSpec::kKind, "mixture"},
      {EvaluateSpec::kKind, "evaluation"}};
  const auto kind = kinds.find(unit.kind);
  MORAINE_CHECK(kind != kinds.end(), "flexmore has no unit kind '{}'", unit.kind);
  if (artefact.kind() != kind->second) refuse(unit, fmt::format("is of kind '{}'", artefact.kind()));
  try {
    if (unit.kind == TrainExpertSpec::kKind) {
      const TrainExpertSpec spec = core::from_spec(TrainExpertSpec::schema(), unit.spec);
      if (artefact.meta().at("name") != spec.name) refuse(unit, "is an expert of another name");
      check_expert(unit, artefact, spec.rank, spec.base,
                   spec.adapter ? scales_by_rank(*spec.adapter) : std::vector<double>(), architecture_);
    } else if (unit.kind == ExtractSpec::kKind) {
      const ExtractSpec spec = core::from_spec(ExtractSpec::schema(), unit.spec);
      check_expert(unit, artefact, spec.rank, spec.base, {}, architecture_);
    } else if (unit.kind == EvaluateSpec::kKind) {
      if (const auto why = Evaluation::from_json(artefact.meta().at("result")).impossible()) refuse(unit, *why);
    }
  } catch (const core::Json::exception& error) {
    refuse(unit, fmt::format("is malformed: {}", error.what()));
  }
}

}  // namespace moraine::algorithms::flexmore
