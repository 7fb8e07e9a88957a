#pragma once

#include "kernels/cpu_common.h"

/// The hidden layer of FFN experts on the CPU, forward and backward.
namespace moraine::kernels {
namespace {

template <class V, class S>
struct CpuFfn : CpuCommon<V, S> {
  using Base = CpuCommon<V, S>;
  using Base::columns;
  using Base::expand_block;
  using Base::flops_of;
  using Base::load;
  using Base::scratch_of;
  using Base::store;
  using typename Base::Acc;
  using typename Base::G;

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
      const auto gate_scale = V::set1(static_cast<Acc>(a.gate_scale[e])),
                 up_scale = V::set1(static_cast<Acc>(a.up_scale[e]));
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
};

}  // namespace
}  // namespace moraine::kernels
