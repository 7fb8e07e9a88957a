#pragma once

#include "kernels/cpu_common.h"

/// The combine primitive on the CPU: pair rows of every expert, weighted and summed into rows of y.
namespace moraine::kernels {
namespace {

constexpr int64_t kSlotPairs = 512;     // pairs of one that adds slot by slot
constexpr int64_t kSlotRanks = 64;      // up to this rank y is summed slot by slot
constexpr int64_t kSlotColumns = 1024;  // columns of such a task
constexpr int64_t kSlotStrip = 256;     // and of y that it sums at a time, at most
constexpr int64_t kSlotBytes =
    128 << 10;  // rows of y that slots are added to, and the next ones, should fit the L2 cache
static_assert(kSlotRanks * kSlotStrip * sizeof(double) <= kPanelBytes);

template <class V, class S>
struct CpuCombine : CpuCommon<V, S> {
  using Base = CpuCommon<V, S>;
  using Base::columns;
  using Base::expand_block;
  using Base::first_pair;
  using Base::flops_of;
  using Base::load;
  using Base::rank_of;
  using Base::row;
  using Base::scratch_of;
  using Base::store;
  using typename Base::Acc;
  using typename Base::G;

  static void combine(const CombineArgs& a, void* scratch, const Exec&) {
    const Route& route = *a.route;
    if (route.tokens == 0 || a.width == 0) return;
    // Small ranks: rows of y are the traffic, a slot at a time is added to them. Large ranks: weights are, they are
    // read once in long strips and pair rows kept meanwhile. Neither changes a bit.
    int64_t max_rank = 0;
    for (int i = 0; i < a.num_terms; ++i)
      max_rank = a.terms[i].segments.max_rank > max_rank ? a.terms[i].segments.max_rank : max_rank;
    const bool by_slot =
        max_rank <= kSlotRanks && a.num_terms == 1 && a.terms[0].matrix != nullptr && route.slots <= kSlotPairs;
    double flops = static_cast<double>(route.pairs() * a.width);
    for (int i = 0; i < a.num_terms; ++i) flops += flops_of(route, a.terms[i].segments, a.width);
    const int64_t block = token_block(by_slot ? kSlotPairs : kPairBlock, route.tokens, route.slots),
                  rows = block * route.slots;
    const int64_t strip =
        by_slot ? kSlotColumns
                : smaller<int64_t>(static_cast<int64_t>(kBufferBytes / sizeof(Acc)) / rows / 64 * 64, 1024);
    const int64_t strips = ceil_div(a.width, strip), blocks = ceil_div(route.tokens, block);
    const auto body = [&](int64_t task, int thread) {
      ThreadScratch& mine = scratch_of(scratch, thread);
      const int64_t t0 = task / strips * block, t1 = smaller(t0 + block, route.tokens);
      const int64_t c0 = task % strips * strip, width = smaller(strip, a.width - c0);
      if (by_slot) return combine_slots(a, t0, t1, c0, width, mine);
      Acc* buffer = reinterpret_cast<Acc*>(mine.buffer[0]);
      std::memset(mine.live[0], 0, static_cast<size_t>(rows));
      for (int i = 0; i < a.num_terms; ++i)
        expand_block(a.terms[i], route, a.width, t0, t1, c0, width, buffer, mine.live[0], mine.panel);
      for (int64_t t = t0; t < t1; ++t)
        combine_row(a, t, c0, width, buffer + (t - t0) * route.slots * width, mine.live[0] + (t - t0) * route.slots);
    };
    for_each_task(blocks * strips, flops, body);
  }

  // The pairs of some tokens in the order combine_slots adds them: by slot, then by expert.
  struct SlotRow {
    const Acc* left;
    int64_t token;
    Acc weight;
    bool first;  // of its token: the sum starts from y0
  };
  struct SlotGroup {
    int64_t expert, begin, end;
  };
  struct SlotRows {
    SlotRow rows[kSlotPairs];
    SlotGroup groups[kSlotPairs];
    int64_t num_groups = 0;
    bool summed[kSlotPairs] = {};  // [token]: has any row
  };

  static void list_slots(const CombineArgs& a, int64_t t0, int64_t t1, SlotRows& out) {
    const Route& route = *a.route;
    const Segments& segments = a.terms[0].segments;
    const auto* weights = static_cast<const Acc*>(a.weights);
    int16_t token_of[kSlotPairs], slot_of[kSlotPairs];
    for (int64_t t = 0, p = 0; t < t1 - t0; ++t)
      for (int64_t j = 0; j < route.slots; ++j, ++p)
        token_of[p] = static_cast<int16_t>(t), slot_of[p] = static_cast<int16_t>(j);
    int64_t count = 0;
    for (int64_t j = 0; j < route.slots; ++j)
      for (int64_t e = 0; e < route.experts; ++e) {
        const int64_t rank = rank_of(segments, e), begin = count;
        if (rank == 0) continue;
        const Acc* pairs = static_cast<const Acc*>(a.terms[0].pairs) + segments.pair_offsets[e];
        for (int64_t s = first_pair(route, route.offsets[e], route.offsets[e + 1], t0 * route.slots);
             s < route.offsets[e + 1]; ++s) {
          const int64_t p = route.perm[s], local = p - t0 * route.slots;
          if (p >= t1 * route.slots) break;
          if (slot_of[local] != j) continue;
          bool& summed = out.summed[token_of[local]];
          out.rows[count++] = {pairs + (s - route.offsets[e]) * padded_rank(rank), t0 + token_of[local],
                               weights == nullptr ? Acc(1) : weights[p], !summed};
          summed = true;
        }
        if (count > begin) out.groups[out.num_groups++] = {e, begin, count};
      }
  }

  // One term of small ranks, tokens [t0, t1) and columns [c0, c0 + width): strip by strip, a pass per slot adds w_p
  // times the products of that slot's pairs to rows of y, or of a buffer where y's type would round between slots.
  static void combine_slots(const CombineArgs& a, int64_t t0, int64_t t1, int64_t c0, int64_t width,
                            ThreadScratch& mine) {
    SlotRows list;
    list_slots(a, t0, t1, list);
    const int64_t fitting = ceil_div(kSlotBytes / static_cast<int64_t>(sizeof(Acc)) / (t1 - t0), 64) * 64;
    const int64_t strip = smaller(fitting, kSlotStrip);
    for (int64_t c = c0; c < c0 + width; c += strip)
      combine_strip(a, list, t0, t1, c, smaller(strip, c0 + width - c), mine);
  }

  static void combine_strip(const CombineArgs& a, const SlotRows& list, int64_t t0, int64_t t1, int64_t c0,
                            int64_t width, ThreadScratch& mine) {
    const Route& route = *a.route;
    const ExpandTerm& term = a.terms[0];
    constexpr bool kInPlace = std::is_same_v<S, Acc>;
    const bool has_y0 = a.y0.data != nullptr;
    const auto y0_row = [&](int64_t t) { return static_cast<const S*>(a.y0.data) + t * a.y0.ld + c0; };
    const auto y_row = [&](int64_t t) { return static_cast<S*>(a.y.data) + t * a.y.ld + c0; };
    const auto sum_row = [&](int64_t t) -> Acc* {
      if constexpr (kInPlace) return y_row(t);
      return reinterpret_cast<Acc*>(mine.buffer[0]) + (t - t0) * width;
    };
    if constexpr (!kInPlace)
      for (int64_t t = t0; t < t1 && has_y0; ++t)
        columns(width, [&](int64_t c, int n) { store(sum_row(t) + c, load(y0_row(t) + c, n), n); });
    // Packed weights of all experts are kept for the next slot where they fit.
    Acc* panels = reinterpret_cast<Acc*>(mine.buffer[1]);
    unsigned char* kept = mine.live[1];
    const bool keeps = route.slots > 1 &&
                       G::panel_size(term.segments.row_offsets[route.experts], width) * sizeof(Acc) <= kBufferBytes &&
                       route.experts <= static_cast<int64_t>(sizeof mine.live[1]);
    if (keeps) std::memset(kept, 0, static_cast<size_t>(route.experts));
    const bool last_columns = c0 + 2 * width > a.width;
    const S* q[kSlotRanks];
    for (int64_t g = 0; g < list.num_groups; ++g) {
      const SlotGroup group = list.groups[g];
      const int64_t e = group.expert, rank = rank_of(term.segments, e), count = group.end - group.begin;
      const bool last_slot = group.end + t1 - t0 > list.groups[list.num_groups - 1].end;
      const auto row_of = [&](int64_t m) {
        const SlotRow& row = list.rows[group.begin + m];
        Acc* sum = sum_row(row.token);
        typename G::AddRow out{row.left, sum, sum, row.weight, nullptr, nullptr};
        if constexpr (kInPlace) {
          if (row.first) out.base = has_y0 ? y0_row(row.token) : nullptr;
          if (last_slot && !last_columns) {  // while these sums are in the cache: the columns that are next
            out.next_base = has_y0 ? y0_row(row.token) + width : nullptr;
            out.next_c = sum + width;
          }
        } else if (row.first && !has_y0) {
          out.base = nullptr;
        }
        return out;
      };
      const S* matrix = static_cast<const S*>(term.matrix) + term.segments.row_offsets[e] * a.width + c0;
      for (int64_t k = 0; k < rank; ++k) q[k] = matrix + k * a.width;
      const bool filled = keeps && kept[e] != 0;
      Acc* panel = nullptr;
      if (filled || count > V::kTileRows)
        panel =
            keeps ? panels + G::panel_size(term.segments.row_offsets[e], width) : reinterpret_cast<Acc*>(mine.panel);
      G::add_product(row_of, count, width, rank, q, panel, !filled);
      if (panel != nullptr && keeps) kept[e] = 1;
    }
    for (int64_t t = t0; t < t1; ++t) {
      const bool summed = list.summed[t - t0];
      if (kInPlace && summed) continue;
      columns(width, [&](int64_t c, int n) {
        store(y_row(t) + c, summed ? load(sum_row(t) + c, n) : has_y0 ? load(y0_row(t) + c, n) : V::zero(), n);
      });
    }
  }

  static void combine_row(const CombineArgs& a, int64_t t, int64_t c0, int64_t width, const Acc* buffer,
                          const unsigned char* live) {
    const int64_t slots = a.route->slots;
    const Acc* weights = a.weights == nullptr ? nullptr : static_cast<const Acc*>(a.weights) + t * slots;
    const S* y0 = a.y0.data == nullptr ? nullptr : static_cast<const S*>(a.y0.data) + t * a.y0.ld + c0;
    S* y = static_cast<S*>(a.y.data) + t * a.y.ld + c0;
    columns(width, [&](int64_t c, int n) {
      auto sum = y0 == nullptr ? V::zero() : load(y0 + c, n);
      for (int64_t j = 0; j < slots; ++j)
        if (live[j]) {
          const auto row = load(buffer + j * width + c, n);
          sum = weights == nullptr ? V::add(sum, row) : V::fma(V::set1(weights[j]), row, sum);
        }
      store(y + c, sum, n);
    });
  }
};

}  // namespace
}  // namespace moraine::kernels
