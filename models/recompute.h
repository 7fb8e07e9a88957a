#pragma once

#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace moraine::models {

/// part(x) of which only x is kept for the gradient: it is computed a second time when that is asked for (gradient
/// checkpointing; Chen et al., arXiv 1604.06174). Same bits as part(x), and gradients of x and of the `leaves` that
/// `part` uses, however they are asked for. `part` must give the same both times, and what it refers to must live until
/// then. Plain part(x) where no gradient is recorded.
at::Tensor recomputed(const std::function<at::Tensor(const at::Tensor&)>& part, const at::Tensor& x,
                      const std::vector<at::Tensor>& leaves);

}  // namespace moraine::models
