#pragma once

#include "kernels/types.h"

namespace moraine::kernels {

/// Pairs sorted by expert (stable), built once per routing decision and shared by all projections and by backward.
struct Route {
  int64_t tokens = 0, slots = 0, experts = 0;
  const int32_t* perm = nullptr;     // [P] sorted position -> pair; empty slots last
  const int32_t* inverse = nullptr;  // [P] pair -> sorted position, -1 for empty slots
  const int32_t* offsets = nullptr;  // [E+1] first sorted position of each expert
  const int32_t* status = nullptr;   // CUDA: 0, or 1 once an index was out of range; null on the CPU
  int64_t pairs() const { return tokens * slots; }
};

/// Bytes route_build needs; the route points into them.
size_t route_bytes(int64_t tokens, int64_t slots, int64_t experts, Device device);

/// Sorts the pairs of index [tokens, slots] by expert. Zero tokens, zero experts (all slots empty) and experts without
/// tokens are fine.
/// Throws UserError for an index outside [-1, experts), InternalError for a storage that is too small or more than 2^31
/// pairs. Thread-safe; on CUDA enqueues, and waits only if exec.check_inputs is set.
Route route_build(const int32_t* index, int64_t tokens, int64_t slots, int64_t experts, Workspace storage,
                  const Exec& exec);

}  // namespace moraine::kernels
