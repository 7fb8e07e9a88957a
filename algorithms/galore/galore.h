#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "algorithms/worker_context.h"
#include "core/config.h"
#include "models/slot.h"

namespace moraine::algorithms::galore {

/// Names as in the authors' code.
struct GaLoreConfig {
  int64_t rank = 128;             // of the subspaces; memory of moments grows linearly
  int64_t update_proj_gap = 200;  // updates between two subspaces
  double scale = 0.25;            // of what is brought back
  std::string proj_type = "std";  // std | reverse_std | left | right | full: the side that is projected, or both
  std::vector<std::string> target_modules = {"all-linear"};  // as in AdapterConfig
};
const core::Schema<GaLoreConfig>& galore_schema();

/// Paths of the linear slots whose weights are projected, in slot order. Throws UserError for a name that matches none
/// and a rank that does not fit.
std::vector<std::string> targets_of(const GaLoreConfig& config, std::span<const models::Slot> slots);

/// Trains all weights with moments in a subspace of each selected weight's gradient; others (embeddings, norms, the
/// output layer) move as usual.
///
/// W [m, n], gradient G = U S V^T at updates 0, T, 2 T, ... (T = update_proj_gap) gives the subspace:
///
///   projected on the right (std: m >= n)  Q = V^T[:r] [r, n],  R = G Q^T [m, r],  W += scale * N Q
///   projected on the left  (std: m < n)   P = U[:, :r] [m, r], R = P^T G [r, n],  W += scale * P N
///   projected on both sides (full)        R = P^T G Q^T [r, r],                    W += scale * P N Q
///
/// N is what the optimiser would add to a parameter with gradient R. Moments stay as they are when the subspace
/// changes. Memory of a weight in std: min(m, n) r + 2 max(m, n) r numbers, in full: (m + n) r + 2 r^2; AdamW's 2 m n.
/// The gradient is that of the
/// whole step (summed over micro-batches and members of a group, clipped), so neither changes more than rounding. The
/// decomposition is made on the CPU in float32, at every member alike. Where we differ from the authors' code: epsilon
/// stands behind the bias correction, as in torch.optim.AdamW. Source: GaLore (arXiv 2403.03507), algorithm 2; authors'
/// code for sides, order and defaults.
std::shared_ptr<UpdateSpace> make_space(const GaLoreConfig& config, std::span<const models::Slot> slots,
                                        const models::NamedTensors& parameters);

}  // namespace moraine::algorithms::galore
