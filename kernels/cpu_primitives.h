#pragma once

#include "kernels/backend.h"
#include "kernels/cpu_gemm.h"
#include "kernels/tasks.h"

/// The backend primitives on the CPU, as templates; each cpu_<family>.cpp instantiates them for its vector type. Every output
/// element is computed by one task, and how work is cut into tasks depends on shapes only, never on the number of threads.
namespace moraine::kernels {
namespace {

constexpr int64_t kTokenBlock = 96;        // rows of a shrink task
constexpr int64_t kRankBlock = 128;        // ranks of a shrink task
constexpr int64_t kPairBlock = 2048;       // pairs of an expand task: weights come from memory once for so many
constexpr int64_t kSlotPairs = 512;        // pairs of one that adds slot by slot
constexpr int64_t kOuterStrip = 256;       // columns of an outer task
constexpr int64_t kHiddenStrip = 128;      // columns of a hidden task; fixes the order of <h, q>
constexpr int64_t kSlotRanks = 64;         // up to this rank y is summed slot by slot
constexpr int64_t kSlotColumns = 1024;     // columns of such a task
constexpr int64_t kSlotStrip = 256;        // and of y that it sums at a time, at most
constexpr int64_t kSlotBytes = 128 << 10;  // rows of y that slots are added to, and the next ones, should fit the L2 cache
constexpr size_t kBufferBytes = 1 << 20;   // pair rows of one expand task; those of one expert should fit the L2 cache

static_assert(kSlotRanks * kSlotStrip * sizeof(double) <= kPanelBytes);

struct ThreadScratch {
  alignas(64) char panel[kPanelBytes];
  alignas(64) char buffer[2][kBufferBytes];  // pair rows; a shrink keeps its packed token rows there
  alignas(64) unsigned char live[2][kBufferBytes / 64];
};

/// Tokens of one expand task of at most so many pairs (kPairBlock rows of 64 columns of double just fit the buffer).
inline int64_t token_block(int64_t pairs, int64_t tokens, int64_t slots) {
  return smaller(pairs / slots > 0 ? pairs / slots : 1, tokens);
}

template <class V, class S>
struct Cpu {
  using G = Gemm<V, S>;
  using Acc = typename G::Acc;
  static constexpr int W = V::kWidth;

  static size_t segments_bytes(int64_t experts) { return static_cast<size_t>(experts + 1) * sizeof(int64_t); }

  static Segments make_segments(const Route& route, const int64_t* row_offsets, int64_t max_rank, void* storage,
                                const Exec&) {
    auto* pair_offsets = static_cast<int64_t*>(storage);
    pair_offsets[0] = 0;
    for (int64_t e = 0; e < route.experts; ++e)
      pair_offsets[e + 1] = pair_offsets[e] + (route.offsets[e + 1] - route.offsets[e]) *
                                                  padded_rank(row_offsets[e + 1] - row_offsets[e]);
    return {row_offsets, pair_offsets, nullptr, nullptr, nullptr, max_rank};
  }

  // Thread scratch, then the partial sums of <h, q>.
  static size_t scratch_bytes(int64_t pairs, int64_t /*max_rank*/, int64_t max_width) {
    return static_cast<size_t>(max_task_threads()) * sizeof(ThreadScratch) +
           static_cast<size_t>(pairs * ceil_div(max_width, kHiddenStrip)) * sizeof(Acc);
  }
  static ThreadScratch& scratch_of(void* scratch, int thread) { return static_cast<ThreadScratch*>(scratch)[thread]; }

  static int64_t rank_of(const Segments& segments, int64_t e) {
    return segments.row_offsets[e + 1] - segments.row_offsets[e];
  }
  static double flops_of(const Route& route, const Segments& segments, int64_t width) {
    double sum = 0;
    for (int64_t e = 0; e < route.experts; ++e)
      sum += static_cast<double>(route.offsets[e + 1] - route.offsets[e]) * static_cast<double>(rank_of(segments, e));
    return 2 * sum * static_cast<double>(width);
  }

  static void weights(const WeightsArgs& a, const Exec&) {
    auto* weighted = static_cast<Acc*>(a.weighted);
    auto* scaled = static_cast<Acc*>(a.scaled);
    const auto* gates = static_cast<const Acc*>(a.gates);
    for (int64_t p = 0; p < a.route->pairs(); ++p) weighted[p] = scaled[p] = 0;
    for (int64_t e = 0; e < a.route->experts; ++e)
      for (int64_t s = a.route->offsets[e]; s < a.route->offsets[e + 1]; ++s) {
        const int32_t p = a.route->perm[s];
        scaled[p] = static_cast<Acc>(a.scale[e]);
        weighted[p] = gates[p] * scaled[p];
      }
  }

  static const S* row(const PairRows& x, const Route& route, int64_t s) {
    return static_cast<const S*>(x.data) + route.perm[s] / x.divisor * x.ld;
  }

  static void gather(const ShrinkArgs& a) {
    const auto copy = [&](int64_t e, int) {
      const int64_t rank = rank_of(a.segments, e), ld = padded_rank(rank);
      Acc* out = static_cast<Acc*>(a.out) + a.segments.pair_offsets[e];
      for (int64_t s = a.route->offsets[e]; s < a.route->offsets[e + 1]; ++s, out += ld) {
        const S* from = row(a.x, *a.route, s);
        for (int64_t i = 0; i < ld; ++i) out[i] = i < rank ? widen(from[i]) : Acc(0);
      }
    };
    for_each_task(a.route->experts, flops_of(*a.route, a.segments, 1), copy);
  }

  static void shrink(const ShrinkArgs& a, void* scratch, const Exec&) {
    if (a.matrix == nullptr) return gather(a);
    const Route& route = *a.route;
    const auto tasks_of = [&](int64_t e) {
      return ceil_div(route.offsets[e + 1] - route.offsets[e], kTokenBlock) *
             ceil_div(rank_of(a.segments, e), kRankBlock);
    };
    int64_t tasks = 0;
    for (int64_t e = 0; e < route.experts; ++e) tasks += tasks_of(e);
    const auto body = [&](int64_t task, int thread) {
      int64_t e = 0;
      for (; task >= tasks_of(e); ++e) task -= tasks_of(e);
      const int64_t rank_blocks = ceil_div(rank_of(a.segments, e), kRankBlock);
      shrink_block(a, e, task / rank_blocks * kTokenBlock, task % rank_blocks * kRankBlock, scratch_of(scratch, thread));
    };
    for_each_task(tasks, flops_of(route, a.segments, a.width), body);
  }

  static void shrink_block(const ShrinkArgs& a, int64_t e, int64_t first_row, int64_t first_rank, ThreadScratch& scratch) {
    const Route& route = *a.route;
    const int64_t rank = rank_of(a.segments, e), ld = padded_rank(rank);
    const int64_t begin = route.offsets[e] + first_row;
    const int64_t rows = smaller<int64_t>(kTokenBlock, route.offsets[e + 1] - begin);
    const int64_t ranks = smaller(kRankBlock, rank - first_rank);
    Acc* out = static_cast<Acc*>(a.out) + a.segments.pair_offsets[e] + first_row * ld + first_rank;
    const S* x[kTokenBlock];
    const S* m[kRankBlock];
    const S* soon[kStayRanks + kTokenBlock];  // of the next chunk
    // Rows a power of two apart share cache sets: copy the chunk when rank tiles will read it again and again.
    constexpr int64_t kStride = kChunk + 64 / static_cast<int64_t>(sizeof(S));
    static_assert(kTokenBlock * kStride * sizeof(S) <= 2 * kBufferBytes);
    const bool copy = rows > 8 && ranks > kStayRanks;
    S* packed = reinterpret_cast<S*>(scratch.buffer[0]);
    for (int64_t c = 0; c < a.width; c += kChunk) {
      const int64_t len = smaller(kChunk, a.width - c);
      for (int64_t i = 0; i < rows; ++i) {
        x[i] = row(a.x, route, begin + i) + c;
        if (copy) {
          std::memcpy(packed + i * kStride, x[i], static_cast<size_t>(len) * sizeof(S));
          x[i] = packed + i * kStride;
        }
      }
      for (int64_t i = 0; i < ranks; ++i)
        m[i] = static_cast<const S*>(a.matrix) + (a.segments.row_offsets[e] + first_rank + i) * a.width + c;
      int64_t num_soon = 0;
      if (c + kChunk < a.width && ranks <= kStayRanks) {
        for (int64_t i = 0; i < ranks; ++i) soon[num_soon++] = m[i] + kChunk;
        for (int64_t i = 0; i < rows; ++i) soon[num_soon++] = x[i] + kChunk;
      }
      G::dot_rows(x, rows, m, ranks, len, out, ld, c > 0, soon, num_soon);
    }
    if (first_rank + ranks == rank)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = a.width > 0 ? ranks : 0; r < ld - first_rank; ++r) out[i * ld + r] = 0;
  }

  // The first of sorted positions [from, to), all of one expert, whose pair is not before `pair`.
  static int64_t first_pair(const Route& route, int64_t from, int64_t to, int64_t pair) {
    while (from < to) {
      const int64_t middle = (from + to) / 2;
      if (route.perm[middle] < pair) {
        from = middle + 1;
      } else {
        to = middle;
      }
    }
    return from;
  }

  // Adds one term for tokens [t0, t1) and columns [c0, c0 + width) to pair rows `buffer` (row p - t0 k, `width` apart) and marks
  // them live. Only live rows hold anything.
  static void expand_block(const ExpandTerm& term, const Route& route, int64_t matrix_width, int64_t t0, int64_t t1, int64_t c0,
                           int64_t width, Acc* buffer, unsigned char* live, void* panel) {
    for (int64_t e = 0; e < route.experts; ++e) {
      const int64_t rank = rank_of(term.segments, e), ld = padded_rank(rank);
      if (rank == 0) continue;
      const int64_t s0 = first_pair(route, route.offsets[e], route.offsets[e + 1], t0 * route.slots);
      const int64_t s1 = first_pair(route, s0, route.offsets[e + 1], t1 * route.slots);
      if (s0 == s1) continue;
      const auto local = [&](int64_t m) { return route.perm[s0 + m] - t0 * route.slots; };
      const bool add = live[local(0)] != 0;  // a row is live by its expert, so all of these are or none
      const Acc* pairs = static_cast<const Acc*>(term.pairs) + term.segments.pair_offsets[e] + (s0 - route.offsets[e]) * ld;
      const auto c_row = [&](int64_t m) { return buffer + local(m) * width; };
      if (term.matrix == nullptr) {
        for (int64_t m = 0; m < s1 - s0; ++m)
          for (int64_t c = 0; c < width; ++c) c_row(m)[c] = pairs[m * ld + c0 + c] + (add ? c_row(m)[c] : Acc(0));
      } else {
        const S* matrix = static_cast<const S*>(term.matrix) + term.segments.row_offsets[e] * matrix_width + c0;
        const auto q_row = [&](int64_t k) { return matrix + k * matrix_width; };
        G::multiply_rows(s1 - s0, width, rank, [&](int64_t m) { return pairs + m * ld; }, 1, q_row, c_row, add, panel);
      }
      for (int64_t m = 0; m < s1 - s0; ++m) live[local(m)] = 1;
    }
  }

  // body(register load and store helpers): runs over columns [0, width) in vectors, the last one partial.
  template <class Body>
  [[gnu::always_inline]] static void columns(int64_t width, Body&& body) {
    int64_t c = 0;
    for (; c + W <= width; c += W) body(c, W);
    if (c < width) body(c, static_cast<int>(width - c));
  }
  template <class T>
  [[gnu::always_inline]] static typename V::Reg load(const T* p, int n) {
    return n == W ? V::load(p) : V::load_n(p, n);
  }
  template <class T>
  [[gnu::always_inline]] static void store(T* p, typename V::Reg x, int n) {
    if (n == W) {
      V::store(p, x);
    } else {
      V::store_n(p, x, n);
    }
  }

  static void combine(const CombineArgs& a, void* scratch, const Exec&) {
    const Route& route = *a.route;
    if (route.tokens == 0 || a.width == 0) return;
    // Small ranks: rows of y are the traffic, a slot at a time is added to them. Large ranks: weights are, they are read once in
    // long strips and pair rows kept meanwhile. Neither changes a bit.
    int64_t max_rank = 0;
    for (int i = 0; i < a.num_terms; ++i)
      max_rank = a.terms[i].segments.max_rank > max_rank ? a.terms[i].segments.max_rank : max_rank;
    const bool by_slot = max_rank <= kSlotRanks && a.num_terms == 1 && a.terms[0].matrix != nullptr && route.slots <= kSlotPairs;
    double flops = static_cast<double>(route.pairs() * a.width);
    for (int i = 0; i < a.num_terms; ++i) flops += flops_of(route, a.terms[i].segments, a.width);
    const int64_t block = token_block(by_slot ? kSlotPairs : kPairBlock, route.tokens, route.slots), rows = block * route.slots;
    const int64_t strip = by_slot ? kSlotColumns : smaller<int64_t>(static_cast<int64_t>(kBufferBytes / sizeof(Acc)) / rows / 64 * 64, 1024);
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
      for (int64_t t = t0; t < t1; ++t) combine_row(a, t, c0, width, buffer + (t - t0) * route.slots * width,
                                                    mine.live[0] + (t - t0) * route.slots);
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
      for (int64_t j = 0; j < route.slots; ++j, ++p) token_of[p] = static_cast<int16_t>(t), slot_of[p] = static_cast<int16_t>(j);
    int64_t count = 0;
    for (int64_t j = 0; j < route.slots; ++j)
      for (int64_t e = 0; e < route.experts; ++e) {
        const int64_t rank = rank_of(segments, e), begin = count;
        if (rank == 0) continue;
        const Acc* pairs = static_cast<const Acc*>(a.terms[0].pairs) + segments.pair_offsets[e];
        for (int64_t s = first_pair(route, route.offsets[e], route.offsets[e + 1], t0 * route.slots); s < route.offsets[e + 1]; ++s) {
          const int64_t p = route.perm[s], local = p - t0 * route.slots;
          if (p >= t1 * route.slots) break;
          if (slot_of[local] != j) continue;
          bool& summed = out.summed[token_of[local]];
          out.rows[count++] = {pairs + (s - route.offsets[e]) * padded_rank(rank), t0 + token_of[local], weights == nullptr ? Acc(1) : weights[p], !summed};
          summed = true;
        }
        if (count > begin) out.groups[out.num_groups++] = {e, begin, count};
      }
  }

  // One term of small ranks, tokens [t0, t1) and columns [c0, c0 + width): strip by strip, a pass per slot adds w_p times the
  // products of that slot's pairs to rows of y, or of a buffer where y's type would round between slots.
  static void combine_slots(const CombineArgs& a, int64_t t0, int64_t t1, int64_t c0, int64_t width, ThreadScratch& mine) {
    SlotRows list;
    list_slots(a, t0, t1, list);
    const int64_t fitting = ceil_div(kSlotBytes / static_cast<int64_t>(sizeof(Acc)) / (t1 - t0), 64) * 64;
    const int64_t strip = smaller(fitting, kSlotStrip);
    for (int64_t c = c0; c < c0 + width; c += strip) combine_strip(a, list, t0, t1, c, smaller(strip, c0 + width - c), mine);
  }

  static void combine_strip(const CombineArgs& a, const SlotRows& list, int64_t t0, int64_t t1, int64_t c0, int64_t width, ThreadScratch& mine) {
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
    const bool keeps = route.slots > 1 && G::panel_size(term.segments.row_offsets[route.experts], width) * sizeof(Acc) <= kBufferBytes &&
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
        panel = keeps ? panels + G::panel_size(term.segments.row_offsets[e], width) : reinterpret_cast<Acc*>(mine.panel);
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

  static void outer(const OuterArgs& a, void* scratch, const Exec&) {
    const Route& route = *a.route;
    const int64_t strips = ceil_div(a.width, kOuterStrip);
    const auto body = [&](int64_t task, int thread) {
      const int64_t e = task / strips, c0 = task % strips * kOuterStrip;
      const int64_t width = smaller(kOuterStrip, a.width - c0), rank = rank_of(a.segments, e);
      const int64_t begin = route.offsets[e], n = route.offsets[e + 1] - begin;
      const Acc* pairs = static_cast<const Acc*>(a.pairs) + a.segments.pair_offsets[e];
      Acc* out = static_cast<Acc*>(a.out) + a.segments.row_offsets[e] * a.width + c0;
      const auto q_row = [&](int64_t k) { return row(a.rows, route, begin + k) + c0; };
      const auto c_row = [&](int64_t m) { return out + m * a.width; };
      G::multiply_rows(rank, width, n, [&](int64_t m) { return pairs + m; }, padded_rank(rank), q_row, c_row, a.accumulate,
                       scratch_of(scratch, thread).panel);
    };
    for_each_task(route.experts * strips, flops_of(route, a.segments, a.width), body);
  }

  static void scale_pairs(const ScalePairsArgs& a, const Exec&) {
    const Route& route = *a.route;
    const auto* weights = static_cast<const Acc*>(a.weights);
    auto* dot = static_cast<Acc*>(a.dot);
    if (dot != nullptr && !a.accumulate_dot)
      for (int64_t p = 0; p < route.pairs(); ++p) dot[p] = 0;
    const auto body = [&](int64_t e, int) {
      const int64_t ld = padded_rank(rank_of(a.segments, e));
      for (int64_t s = route.offsets[e]; s < route.offsets[e + 1] && ld > 0; ++s) {
        const int64_t at = a.segments.pair_offsets[e] + (s - route.offsets[e]) * ld;
        const int32_t p = route.perm[s];
        const Acc w = weights[p];
        const Acc* u = a.u == nullptr ? nullptr : static_cast<const Acc*>(a.u) + at;
        const Acc* v = static_cast<const Acc*>(a.v) + at;
        if (dot != nullptr) {
          auto sum = V::zero();
          columns(ld, [&](int64_t c, int n) { sum = V::fma(load(u + c, n), load(v + c, n), sum); });
          dot[p] += static_cast<Acc>(a.scale[e]) * V::sum(sum);
        }
        scale_row(u, w, a.out_u, at, ld);
        scale_row(v, w, a.out_v, at, ld);
      }
    };
    for_each_task(route.experts, flops_of(route, a.segments, 4), body);
  }
  static void scale_row(const Acc* from, Acc w, void* out, int64_t at, int64_t ld) {
    if (out == nullptr) return;
    Acc* to = static_cast<Acc*>(out) + at;
    columns(ld, [&](int64_t c, int n) { store(to + c, V::mul(V::set1(w), load(from + c, n)), n); });
  }

  // Runs body(t0, t1, c0, width, strip, scratch) over token blocks x strips of the hidden width.
  template <class Body>
  static void hidden_tasks(const Route& route, int64_t width, double flops, void* scratch, const Body& body) {
    if (route.tokens == 0) return;
    const int64_t block = smaller<int64_t>(token_block(kPairBlock, route.tokens, route.slots),
                                           kBufferBytes / sizeof(Acc) / kHiddenStrip / route.slots);
    const int64_t strips = ceil_div(width, kHiddenStrip);
    const auto task_body = [&](int64_t task, int thread) {
      const int64_t t0 = task / strips * block, c0 = task % strips * kHiddenStrip;
      body(t0, smaller(t0 + block, route.tokens), c0, smaller(kHiddenStrip, width - c0), task % strips,
           scratch_of(scratch, thread));
    };
    for_each_task(ceil_div(route.tokens, block) * strips, flops, task_body);
  }

  static int64_t expert_of(const Route& route, int64_t p) {  // of a pair that is not empty
    const int64_t s = route.inverse[p];
    int64_t low = 0, high = route.experts;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (route.offsets[middle] <= s) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  static void ffn_hidden(const FfnHiddenArgs& a, void* scratch, const Exec&) {
    const Route& route = *a.route;
    const double flops = flops_of(route, a.gate.segments, a.width) + flops_of(route, a.up.segments, a.width) +
                         30.0 * static_cast<double>(route.pairs() * a.width);
    hidden_tasks(route, a.width, flops, scratch,
                 [&](int64_t t0, int64_t t1, int64_t c0, int64_t width, int64_t, ThreadScratch& mine) {
                   const size_t rows = static_cast<size_t>((t1 - t0) * route.slots);
                   std::memset(mine.live[0], 0, rows);
                   std::memset(mine.live[1], 0, rows);
                   Acc* gate = reinterpret_cast<Acc*>(mine.buffer[0]);
                   Acc* up = reinterpret_cast<Acc*>(mine.buffer[1]);
                   expand_block(a.gate, route, a.width, t0, t1, c0, width, gate, mine.live[0], mine.panel);
                   expand_block(a.up, route, a.width, t0, t1, c0, width, up, mine.live[1], mine.panel);
                   for (int64_t t = t0; t < t1; ++t) hidden_row(a, t, t0, c0, width, gate, up, mine);
                 });
  }

  static void hidden_row(const FfnHiddenArgs& a, int64_t t, int64_t t0, int64_t c0, int64_t width, const Acc* gate,
                         const Acc* up, const ThreadScratch& mine) {
    const Route& route = *a.route;
    const S* gate_base = static_cast<const S*>(a.gate_base.data) + t * a.gate_base.ld + c0;
    const S* up_base = static_cast<const S*>(a.up_base.data) + t * a.up_base.ld + c0;
    S* out = static_cast<S*>(a.hidden_sum.data) + t * a.hidden_sum.ld + c0;
    Acc sum[kHiddenStrip] = {};
    for (int64_t j = 0; j < route.slots; ++j) {
      const int64_t p = t * route.slots + j, local = p - t0 * route.slots;
      if (route.inverse[p] < 0) continue;
      const int64_t e = expert_of(route, p);
      const auto gate_scale = V::set1(static_cast<Acc>(a.gate_scale[e])), up_scale = V::set1(static_cast<Acc>(a.up_scale[e]));
      const auto g = V::set1(static_cast<const Acc*>(a.gates)[p]);
      S* h = static_cast<S*>(a.h) + p * a.width + c0;
      S* save_a = a.a == nullptr ? nullptr : static_cast<S*>(a.a) + p * a.width + c0;
      S* save_b = a.b == nullptr ? nullptr : static_cast<S*>(a.b) + p * a.width + c0;
      columns(width, [&](int64_t c, int n) {
        auto x = load(gate_base + c, n), y = load(up_base + c, n);
        if (mine.live[0][local]) x = V::fma(gate_scale, load(gate + local * width + c, n), x);
        if (mine.live[1][local]) y = V::fma(up_scale, load(up + local * width + c, n), y);
        if (save_a != nullptr) {
          store(save_a + c, x, n);
          store(save_b + c, y, n);
        }
        const auto hidden = V::mul(V::mul(x, V::sigmoid(x)), y);
        store(h + c, hidden, n);
        store(sum + c, V::fma(g, hidden, load(sum + c, n)), n);
      });
    }
    columns(width, [&](int64_t c, int n) { store(out + c, load(sum + c, n), n); });
  }

  static void ffn_hidden_backward(const FfnHiddenBackwardArgs& a, void* scratch, const Exec&) {
    const Route& route = *a.route;
    const int64_t strips = ceil_div(a.width, kHiddenStrip);
    auto* partial = reinterpret_cast<Acc*>(static_cast<char*>(scratch) +
                                           static_cast<size_t>(max_task_threads()) * sizeof(ThreadScratch));
    const double flops =
        flops_of(route, a.down.segments, a.width) + 40.0 * static_cast<double>(route.pairs() * a.width);
    hidden_tasks(route, a.width, flops, scratch,
                 [&](int64_t t0, int64_t t1, int64_t c0, int64_t width, int64_t strip, ThreadScratch& mine) {
                   std::memset(mine.live[0], 0, static_cast<size_t>((t1 - t0) * route.slots));
                   Acc* down = reinterpret_cast<Acc*>(mine.buffer[0]);
                   expand_block(a.down, route, a.width, t0, t1, c0, width, down, mine.live[0], mine.panel);
                   for (int64_t t = t0; t < t1; ++t)
                     hidden_backward_row(a, t, t0, c0, width, down, mine, partial + strip * route.pairs());
                 });
    auto* dot = static_cast<Acc*>(a.dot);
    for (int64_t p = 0; p < route.pairs(); ++p) {
      Acc sum = 0;
      for (int64_t strip = 0; strip < strips; ++strip) sum += partial[strip * route.pairs() + p];
      dot[p] += sum;
    }
  }

  static void hidden_backward_row(const FfnHiddenBackwardArgs& a, int64_t t, int64_t t0, int64_t c0, int64_t width,
                                  const Acc* down, const ThreadScratch& mine, Acc* partial) {
    const Route& route = *a.route;
    const S* q = static_cast<const S*>(a.q.data) + t * a.q.ld + c0;
    Acc sum_a[kHiddenStrip] = {}, sum_b[kHiddenStrip] = {};
    const auto one = V::set1(1), minus = V::set1(-1);
    for (int64_t j = 0; j < route.slots; ++j) {
      const int64_t p = t * route.slots + j, local = p - t0 * route.slots, at = p * a.width + c0;
      partial[p] = 0;
      if (route.inverse[p] < 0) continue;
      const auto g = V::set1(static_cast<const Acc*>(a.gates)[p]);
      auto dot = V::zero();
      columns(width, [&](int64_t c, int n) {
        const auto x = load(static_cast<const S*>(a.a) + at + c, n), y = load(static_cast<const S*>(a.b) + at + c, n);
        const auto upstream = load(q + c, n);
        const auto sigmoid = V::sigmoid(x);
        const auto silu = V::mul(x, sigmoid);
        const auto hidden = V::mul(silu, y);
        dot = V::fma(hidden, upstream, dot);
        auto dh = V::mul(g, upstream);
        if (mine.live[0][local]) dh = V::add(dh, load(down + local * width + c, n));
        // d silu = sg (1 + x (1 - sg))
        const auto slope = V::mul(sigmoid, V::fma(x, V::fma(minus, sigmoid, one), one));
        const auto da = V::mul(V::mul(dh, y), slope), db = V::mul(dh, silu);
        store(static_cast<S*>(a.h) + at + c, hidden, n);
        store(static_cast<S*>(a.da) + at + c, da, n);
        store(static_cast<S*>(a.db) + at + c, db, n);
        store(sum_a + c, V::add(load(sum_a + c, n), da), n);
        store(sum_b + c, V::add(load(sum_b + c, n), db), n);
      });
      partial[p] = V::sum(dot);
    }
    S* da = static_cast<S*>(a.dgate_base.data) + t * a.dgate_base.ld + c0;
    S* db = static_cast<S*>(a.dup_base.data) + t * a.dup_base.ld + c0;
    columns(width, [&](int64_t c, int n) {
      store(da + c, load(sum_a + c, n), n);
      store(db + c, load(sum_b + c, n), n);
    });
  }

  static void mask(const MaskArgs& a, const Exec&) {
    const auto *u = static_cast<const Acc*>(a.u), *v = static_cast<const Acc*>(a.v), *m = static_cast<const Acc*>(a.mask);
    auto *masked_u = static_cast<Acc*>(a.masked_u), *masked_v = static_cast<Acc*>(a.masked_v);
    auto* dmask = static_cast<Acc*>(a.dmask);
    const Acc scale = static_cast<Acc>(a.scale);
    for (int64_t i = 0; i < a.tokens * a.row; ++i) {
      // Not selected means not touched: 0 x NaN must not leak through the mask.
      if (masked_u != nullptr) masked_u[i] = m[i] == 0 ? Acc(0) : scale * u[i] * m[i];
      if (dmask != nullptr) dmask[i] = scale * u[i] * v[i];
      if (masked_v != nullptr) masked_v[i] = m[i] == 0 ? Acc(0) : scale * v[i] * m[i];
    }
  }

  static const Backend& table() {
    static const Backend backend{sizeof(Acc), segments_bytes, make_segments, scratch_bytes, weights,
                                 shrink,      shrink,         combine,       outer,         scale_pairs,
                                 ffn_hidden,  ffn_hidden_backward, mask};
    return backend;
  }
};

}  // namespace
}  // namespace moraine::kernels
