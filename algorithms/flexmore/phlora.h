#pragma once

#include <ATen/core/Tensor.h>

#include "models/mixture.h"

namespace moraine::algorithms::flexmore {

/// Thin SVD of one weight difference, cached once and sliced for every rank.
struct Spectrum {
  at::Tensor u;   // [out, m] float32, m = min(out, in)
  at::Tensor s;   // [m] float32, falling
  at::Tensor vh;  // [m, in] float32
};

/// SVD of `tuned` - `base` (both [out, in]), computed in float32.
Spectrum spectrum_of_difference(const at::Tensor& tuned, const at::Tensor& base);

/// The best rank-`rank` correction, balanced: A = diag(sqrt s) Vh [r, in], B = U diag(sqrt s) [out, r], no alpha/r
/// factor. `rank` above m is clamped to m: higher ranks are the same function. Columns are ordered by s, so the first
/// r' rows of A and columns of B are the rank-r' extraction, bit for bit. Throws UserError if rank is not positive.
/// Source: PHLoRA (arXiv 2509.10971) as used by FlexMoRE (arXiv 2602.08818).
models::LowRank low_rank_of(const Spectrum& spectrum, int64_t rank);

/// The leading `rank` directions of a balanced pair. Throws UserError if the pair has fewer.
models::LowRank slice(const models::LowRank& pair, int64_t rank);

}  // namespace moraine::algorithms::flexmore
