#include "kernels/route.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/error.h"
#include "kernels/arena.h"
#include "kernels/backend.h"

namespace moraine::kernels {
namespace {

constexpr int64_t kMaxSlots = 128;  // an expand task keeps all pairs of a token in one buffer

struct Storage {
  int32_t *perm, *inverse, *offsets;
};

Storage cut(Arena& arena, int64_t pairs, int64_t experts) {
  return {arena.take<int32_t>(pairs), arena.take<int32_t>(pairs), arena.take<int32_t>(experts + 1)};
}

}  // namespace

size_t route_bytes(int64_t tokens, int64_t slots, int64_t experts, Device device) {
  if (device == Device::kCuda) return cuda_route_bytes(tokens, slots, experts);
  Arena arena;
  cut(arena, tokens * slots, experts);
  return arena.used();
}

Route route_build(const int32_t* index, int64_t tokens, int64_t slots, int64_t experts, Workspace storage,
                  const Exec& exec) {
  MORAINE_CHECK(tokens >= 0 && slots >= 1 && experts >= 0, "kernels/route: bad shape: tokens={} slots={} experts={}",
                tokens, slots, experts);
  MORAINE_CHECK(slots <= kMaxSlots, "kernels/route: more than {} slots per token: {}", kMaxSlots, slots);
  MORAINE_CHECK(tokens <= std::numeric_limits<int32_t>::max() / slots, "kernels/route: more than 2^31 pairs: {} x {}",
                tokens, slots);
  if (exec.device == Device::kCuda) return cuda_route_build(index, tokens, slots, experts, storage, exec);

  Arena arena(storage, "kernels/route");
  const int64_t pairs = tokens * slots;
  const Storage out = cut(arena, pairs, experts);
  arena.check();
  std::fill(out.offsets, out.offsets + experts + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t e = index[p];
    if (e < -1 || e >= experts)
      throw core::UserError(fmt::format("kernels/route: expert index out of range: token {} slot {} has {}, experts {}",
                                        p / slots, p % slots, e, experts),
                            "an index is -1 (empty slot) or the number of an expert");
    if (e >= 0) ++out.offsets[e + 1];
  }
  for (int64_t e = 0; e < experts; ++e) out.offsets[e + 1] += out.offsets[e];
  std::vector<int32_t> next(out.offsets, out.offsets + experts + 1);
  int32_t& empty = next[experts];
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t e = index[p];
    const int32_t at = e < 0 ? empty++ : next[e]++;
    out.perm[at] = static_cast<int32_t>(p);
    out.inverse[p] = e < 0 ? -1 : at;
  }
  return {tokens, slots, experts, out.perm, out.inverse, out.offsets, nullptr};
}

}  // namespace moraine::kernels
