#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// NOLA: a LoRA whose factors are combinations of random matrices that a seed regenerates.
///
///   y = base(x) + (alpha / r) (drop(x) A^T) B^T,   A = A0 + sum over i of a_i A_i,   B = sum over j of b_j B_j
///
/// Shapes: a, b [k]; A0, A_i [r, in]; B_j [out, r]; i, j = 1 .. k. Entries of A_i and B_j are uniform in
/// +-1/sqrt(k), A0 starts as init says. Trained and stored: a and b, from 0, so 2 k numbers a slot whatever its shape
/// and rank. The bases are drawn anew in every forward and backward pass, a part at a time, on the CPU whatever the
/// device. It is the authors' variant for language models; the one of their ViT code, with A0 = 0 and a change at the
/// start, is not here.
///
/// Options: bases, k (512). PEFT does not know it: it is written as the LoRA of rank r that it computes.
/// Source: NOLA (arXiv 2310.02556), equation 3; A0 and the bases' scale are those of UCDvision/NOLA, gpt/.
const Parametrisation& nola();

/// sum over i of c_i M_i, [rows, columns] in the type of c [k]; differentiable once by c. M_i, uniform in +-1/sqrt(k),
/// are drawn in order as float32 from one generator of `seed`, about `at_once` numbers at a time.
at::Tensor random_combination(const at::Tensor& c, uint64_t seed, int64_t rows, int64_t columns,
                              int64_t at_once = int64_t{1} << 22);

}  // namespace moraine::algorithms::adapters
