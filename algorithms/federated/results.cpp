// What a federation believes of what workers send: names, shapes and numbers are compared with what the plan knows,
// before anything is accepted, so that a contribution that does not fit costs its attempt and not the round.
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "algorithms/adapters/adapter.h"
#include "algorithms/evaluate.h"
#include "algorithms/federated/federated.h"
#include "algorithms/federated/global_adapter.h"
#include "core/error.h"
#include "models/decoder.h"

namespace moraine::algorithms::federated {
namespace {

[[noreturn]] void refuse(const Unit& unit, const std::string& what) {
  throw core::UserError(fmt::format("algorithms/federated: the result of {} {}", unit.label, what),
                        "the worker runs other code or was given another unit: look at its log");
}

bool all_finite(const core::TensorView& view) {
  float value = 0;
  for (size_t at = 0; at + sizeof value <= view.data.size(); at += sizeof value) {
    std::memcpy(&value, view.data.data() + at, sizeof value);
    if (!std::isfinite(value)) return false;
  }
  return true;
}

template <typename T>
void expect(const Unit& unit, const core::Json& meta, const char* key, const T& wanted) {
  const auto found = meta.find(key);
  if (found == meta.end() || *found != core::Json(wanted))
    refuse(unit, fmt::format("says {} = {}, planned is {}", key, found == meta.end() ? "nothing" : found->dump(),
                             core::Json(wanted).dump()));
}

void check_tensors(const Unit& unit, const core::Artefact& artefact, const Tensors& expected) {
  std::set<std::string> seen;
  for (const auto& view : artefact.file().tensors()) {
    const auto wanted = expected.find(view.name);
    if (wanted == expected.end()) refuse(unit, fmt::format("has a tensor '{}' that nobody asked for", view.name));
    const auto shape = wanted->second.sizes();
    if (view.dtype != core::DType::kF32 || view.shape != shape.vec())
      refuse(unit, fmt::format("has tensor '{}' of shape [{}], planned is float32 [{}]", view.name,
                               fmt::join(view.shape, ", "), fmt::join(shape, ", ")));
    if (!all_finite(view)) refuse(unit, fmt::format("has values in '{}' that are not finite", view.name));
    seen.insert(view.name);
  }
  for (const auto& [name, tensor] : expected)
    if (!seen.contains(name)) refuse(unit, fmt::format("lacks the tensor '{}'", name));
}

}  // namespace

void Federated::check_update(const Unit& unit, const core::Artefact& artefact) const {
  const UpdateSpec spec = core::from_spec(update_schema(), unit.spec);
  const core::Json& meta = artefact.meta();
  expect(unit, meta, "client", spec.client);
  expect(unit, meta, "round", spec.round);
  if (meta.contains("refused")) {
    if (!spec.tolerant || meta.at("refused") != kNumbersWentBad || !artefact.file().tensors().empty())
      refuse(unit, "refuses what it was not asked to");
    return;
  }
  expect(unit, meta, "base", spec.base);
  expect(unit, meta, "samples", spec.samples());
  const auto rank = meta.find("rank");
  if (rank == meta.end() || !rank->is_number_integer()) refuse(unit, "has no rank");
  const auto sent = rank->get<int64_t>();
  if (sent < 1 || sent > spec.rank || (!federation_->prunes() && sent != spec.rank))
    refuse(unit, fmt::format("is of rank {}, planned is {}", sent, spec.rank));
  if (sends_seed(spec.adapter.lora)) expect(unit, meta, "seed", spec.own_seed());
  check_tensors(unit, artefact,
                sent_tensors(adapters::Adapter::blank(at_rank(spec.adapter.lora, sent), base(), 0, at::kCPU)));
}

void Federated::check_result(const Unit& unit, const core::Artefact& artefact) const {
  static const std::map<std::string, std::string> kinds = {{UpdateSpec::kKind, "update"},
                                                           {StartSpec::kKind, "adapter"},
                                                           {AggregateSpec::kKind, "adapter"},
                                                           {BroadcastSpec::kKind, "adapter"},
                                                           {EvaluateSpec::kKind, "evaluation"}};
  const auto kind = kinds.find(unit.kind);
  MORAINE_CHECK(kind != kinds.end(), "{} has no unit kind '{}'", method_, unit.kind);
  if (artefact.kind() != kind->second) refuse(unit, fmt::format("is of kind '{}'", artefact.kind()));
  try {
    if (unit.kind == UpdateSpec::kKind) check_update(unit, artefact);
    if (unit.kind == EvaluateSpec::kKind)
      if (const auto why = Evaluation::from_json(artefact.meta().at("result")).impossible()) refuse(unit, *why);
  } catch (const core::Json::exception& error) {
    refuse(unit, fmt::format("is malformed: {}", error.what()));
  }
}

}  // namespace moraine::algorithms::federated
