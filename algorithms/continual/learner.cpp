#include "algorithms/continual/learner.h"

#include "algorithms/continual/er/er.h"
#include "algorithms/continual/ewc/ewc.h"
#include "algorithms/continual/finetune/finetune.h"
#include "algorithms/continual/joint/joint.h"
#include "algorithms/continual/linear_probe/linear_probe.h"
#include "algorithms/continual/lwf/lwf.h"
#include "algorithms/continual/o_lora/o_lora.h"
#include "algorithms/continual/ranpac/ranpac.h"
#include "algorithms/continual/seq_lora/seq_lora.h"
#include "algorithms/continual/simplecil/simplecil.h"
#include "algorithms/continual/training.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::continual {

const std::vector<const Learner*>& learners() {
  static const Joint joint;
  static const Finetune finetune("finetune", false), finetune_local("finetune_local", true);
  static const SeqLora seq_lora("seq_lora", false), seq_lora_local("seq_lora_local", true);
  static const OLora o_lora;
  static const LinearProbe linear_probe;
  static const Ewc ewc;
  static const Lwf lwf;
  static const Er er;
  static const SimpleCil simplecil;
  static const RanPac ranpac;
  static const std::vector<const Learner*> all = {
      &joint, &finetune, &finetune_local, &seq_lora, &seq_lora_local, &o_lora, &linear_probe, &ewc,
      &lwf,   &er,       &simplecil,      &ranpac};
  return all;
}

const Learner& find_learner(const std::string& name) {
  for (const Learner* learner : learners())
    if (learner->name() == name) return *learner;
  throw core::InternalError(fmt::format("no continual learner '{}'", name));
}

const Learner& learner_of_state(const std::string& kind) {
  for (const Learner* learner : learners())
    if (learner->state_kind() == kind) return *learner;
  throw core::InternalError(fmt::format("no continual learner has states of kind '{}'", kind));
}

const UnitKind& find_unit_kind(const std::string& name) {
  static const auto all = [] {
    std::vector<UnitKind> kinds;
    for (const Learner* learner : learners())
      for (UnitKind& kind : learner->unit_kinds()) kinds.push_back(std::move(kind));
    return kinds;
  }();
  for (const UnitKind& kind : all)
    if (kind.name == name) return kind;
  throw core::InternalError(fmt::format("no continual learner has units of kind '{}'", name));
}

Exportable Learner::exportable(const std::vector<core::ArtefactPtr>&, const EvaluateSpec&, const LearnerSite&) const {
  throw core::UserError(
      fmt::format("algorithms/continual: {} is {}, which is no model or adapter with a linear head", name(), title()),
      "`moraine cp` takes its artefacts as they are");
}

std::vector<std::string> learner_names() {
  std::vector<std::string> names;
  for (const Learner* learner : learners()) names.push_back(learner->name());
  return names;
}

std::vector<int64_t> StreamFacts::classes_until(int64_t last) const {
  std::vector<int64_t> classes;
  for (int64_t task = 0; task <= last; ++task) {
    const auto& own = tasks[static_cast<size_t>(task)].classes;
    classes.insert(classes.end(), own.begin(), own.end());
  }
  return classes;
}

uint64_t head_seed(int64_t seed) { return core::derive_seed(static_cast<uint64_t>(seed), "continual/head"); }

}  // namespace moraine::algorithms::continual
