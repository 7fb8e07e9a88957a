#include "algorithms/adapters/factor_spectrum.h"

#include <fmt/ranges.h>

#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svdvals.h>
#include <ATen/ops/matmul.h>

#include "core/error.h"

namespace moraine::algorithms::adapters {

at::Tensor singular_values_of_product(const at::Tensor& a, const at::Tensor& b) {
  if (a.dim() != 2 || b.dim() != 2 || a.size(0) != b.size(1))
    throw core::UserError(fmt::format("algorithms/adapters: factors of shapes [{}] and [{}] have no product B A",
                                      fmt::join(a.sizes().vec(), ", "), fmt::join(b.sizes().vec(), ", ")),
                          "A is [rank, in], B is [out, rank]");
  if (!at::isfinite(a).all().item<bool>() || !at::isfinite(b).all().item<bool>())
    throw core::UserError("algorithms/adapters: factors that are not finite have no singular values",
                          "the file is damaged, or its training failed");
  const at::Tensor ra = std::get<1>(at::linalg_qr(a.to(at::kDouble).t(), "r"));
  const at::Tensor rb = std::get<1>(at::linalg_qr(b.to(at::kDouble), "r"));
  return at::linalg_svdvals(at::matmul(rb, ra.t()));
}

}  // namespace moraine::algorithms::adapters
