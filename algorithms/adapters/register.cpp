#include <algorithm>

#include "algorithms/adapters/adaptertune.h"
#include "algorithms/adapters/bitfit.h"
#include "algorithms/adapters/compacter.h"
#include "algorithms/adapters/dora.h"
#include "algorithms/adapters/dylora.h"
#include "algorithms/adapters/ia3.h"
#include "algorithms/adapters/lora.h"
#include "algorithms/adapters/lora_sb.h"
#include "algorithms/adapters/lora_xs.h"
#include "algorithms/adapters/matryoshka.h"
#include "algorithms/adapters/nola.h"
#include "algorithms/adapters/parametrisation.h"
#include "algorithms/adapters/shira.h"
#include "algorithms/adapters/vera.h"
#include "core/error.h"
#include "core/registry.h"

namespace moraine::algorithms::adapters {

const std::vector<const Parametrisation*>& parametrisations() {
  static const std::vector<const Parametrisation*> all = {
      &adaptertune(), &bitfit(),  &compacter(),  &dora(), &dylora(), &ia3(), &lora(),
      &lora_sb(),     &lora_xs(), &matryoshka(), &nola(), &shira(),  &vera()};
  return all;
}

const Parametrisation& parametrisation(const std::string& name) {
  std::vector<std::string> known;
  for (const Parametrisation* candidate : parametrisations()) {
    if (candidate->name() == name) return *candidate;
    known.push_back(candidate->name());
  }
  throw core::UserError(fmt::format("algorithms/adapters: no type of adapter '{}'", name),
                        core::name_hint(name, known));
}

}  // namespace moraine::algorithms::adapters
