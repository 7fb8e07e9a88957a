#pragma once

#include <ATen/core/Tensor.h>

namespace moraine::algorithms::adapters {

/// Singular values of B A without forming it: SVD of R_B R_A^T, from QR decompositions of B and A^T.
///
/// Shapes: A [r, in], B [out, r]; returns [min(r, in, out)] float64, falling. Work grows as r^2 (in + out).
/// Throws UserError if the shapes do not fit.
at::Tensor singular_values_of_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace moraine::algorithms::adapters
