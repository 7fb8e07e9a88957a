#include "algorithms/method.h"

#include "core/error.h"

namespace moraine::algorithms {

void Method::export_as(const RunState&, const ExportRequest& request) const {
  throw core::UserError(fmt::format("algorithms: the results of this run's method cannot be exported as '{}': they are "
                                    "no sums of linear updates of a model",
                                    request.format),
                        "--what LABEL exports the artefact of one unit if it is a LoRA; `moraine cp` copies any, for "
                        "safetensors readers");
}

}  // namespace moraine::algorithms
