#pragma once

#include "algorithms/mergers/merger.h"

namespace moraine::algorithms::mergers {

/// KnOTS-TIES (arXiv 2410.19735, section 4 and algorithm 1): one SVD of the changes side by side gives them a common
/// basis, [W_1 ... W_n] = U [S V_1^T ... S V_n^T]; TIES joins the aligned parts S V_i^T, and U brings the result back.
///
/// Of factors the SVD is that of a small matrix of the sum R of all ranks: QR decompositions of [s_1 B_1 ... s_n B_n]
/// and of every A_i^T. Directions below the numerical rank are left out, as they are in the authors' code. Trimming is
/// by slot (their code: over the whole model); S stands on V's side as in their configurations (s_on_V). The result has
/// up to R ranks; MergeConfig::rank cuts it.
const Merger& knots();

}  // namespace moraine::algorithms::mergers
