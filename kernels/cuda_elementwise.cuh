#pragma once

#include "kernels/cuda_problems.cuh"

/// Everything around the products: one warp per pair or one block per token, grid-stride. Outputs are overwritten (=)
/// except dot, which its single owner adds to (+=).
namespace moraine::kernels::device {

constexpr int kRowThreads = 128;  // one warp per pair, or one block per token

// Calls body(sorted position, expert, pair, lane) for every pair of the grid's share.
template <class Body>
__device__ inline void for_each_pair(const Ragged& g, Body body) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kRowThreads / 32);
  const int64_t end = g.offsets[g.experts];
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32; s < end; s += warps)
    body(s, g.expert_at(s), static_cast<int64_t>(g.perm[s]), lane);
}

// out = planes summed in order; pad columns zero.
template <class Out>
__global__ void sum_planes(Ragged g, const float* planes, int64_t plane_stride, int64_t splits, Out* out) {
  for_each_pair(g, [&](int64_t s, int e, int64_t, int lane) {
    const int64_t rank = g.rank(e), ld = padded_rank(rank), at = g.pair_offsets[e] + (s - g.offsets[e]) * ld;
    for (int64_t i = lane; i < ld; i += 32) {
      float sum = 0;
      for (int64_t split = 0; split < splits && i < rank; ++split) sum += planes[split * plane_stride + at + i];
      out[at + i] = from_float<Out>(sum);
    }
  });
}

template <class T, class Out>
__global__ void gather_pairs(Ragged g, const T* x, int64_t x_ld, int64_t divisor, Out* out) {
  for_each_pair(g, [&](int64_t s, int e, int64_t p, int lane) {
    const int64_t rank = g.rank(e), ld = padded_rank(rank), at = g.pair_offsets[e] + (s - g.offsets[e]) * ld;
    for (int64_t i = lane; i < ld; i += 32)
      out[at + i] = from_float<Out>(i < rank ? to_float(x[p / divisor * x_ld + i]) : 0.0f);
  });
}

// rows_out[p, :] (+)= the pair's own buffer: an expand by the identity.
template <class T>
__global__ void spread_pairs(Ragged g, const T* pairs, int64_t width, float* rows_out,
                             const int64_t* previous_offsets) {
  for_each_pair(g, [&](int64_t s, int e, int64_t p, int lane) {
    const int64_t rank = g.rank(e), at = g.pair_offsets[e] + (s - g.offsets[e]) * padded_rank(rank);
    const bool add = previous_offsets != nullptr && previous_offsets[e + 1] > previous_offsets[e];
    for (int64_t i = lane; i < rank; i += 32) {
      float& to = rows_out[p * width + i];
      to = add ? to + to_float(pairs[at + i]) : to_float(pairs[at + i]);
    }
  });
}

template <class T>
__global__ void scale_pair_rows(Ragged g, const T* u, const float* v, const float* weights, const float* scale,
                                T* out_u, T* out_v, float* dot) {
  for_each_pair(g, [&](int64_t s, int e, int64_t p, int lane) {
    const int64_t ld = padded_rank(g.rank(e)), at = g.pair_offsets[e] + (s - g.offsets[e]) * ld;
    const float w = weights[p];
    float sum = 0;
    for (int64_t i = lane; i < ld; i += 32) {
      if (dot != nullptr) sum = fmaf(to_float(u[at + i]), v[at + i], sum);
      if (out_u != nullptr) out_u[at + i] = from_float<T>(w * to_float(u[at + i]));
      if (out_v != nullptr) out_v[at + i] = from_float<T>(w * v[at + i]);
    }
    if (dot != nullptr) {
      sum = warp_sum(sum);
      if (lane == 0 && ld > 0) dot[p] += scale[e] * sum;
    }
  });
}

__global__ void pair_weights(Ragged g, const float* gates, const float* scale, float* weighted, float* scaled) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; p < g.pairs; p += step) {
    const int32_t s = g.inverse[p];
    const float mine = s < 0 ? 0.0f : scale[g.expert_at(s)];
    scaled[p] = mine;
    weighted[p] = s < 0 ? 0.0f : gates[p] * mine;
  }
}

// y_t = y0_t + sum_j weights[p] rows[p]; pairs whose terms all have rank 0 are left out, so y is then y0 exactly.
template <class T>
__global__ void combine_rows(Ragged g, const int64_t* second_offsets, const float* rows, const float* weights,
                             int64_t tokens, int64_t width, const T* y0, int64_t y0_ld, T* y, int64_t y_ld) {
  const float poison = g.poison();
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x)
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      float sum = y0 == nullptr ? 0.0f : to_float(y0[t * y0_ld + c]);
      for (int64_t p = t * g.slots; p < (t + 1) * g.slots; ++p) {
        const int32_t s = g.inverse[p];
        if (s < 0) continue;
        const int e = g.expert_at(s);
        if (g.rank(e) == 0 && (second_offsets == nullptr || second_offsets[e + 1] == second_offsets[e])) continue;
        sum = weights == nullptr ? sum + rows[p * width + c] : fmaf(weights[p], rows[p * width + c], sum);
      }
      y[t * y_ld + c] = from_float<T>(poison == 0 ? sum : poison);
    }
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// h = silu(a) b and its gate-weighted sum; where a projection has rank 0, a (b) is still to be copied from its base.
template <class T>
__global__ void hidden_forward(Ragged g, const int64_t* up_offsets, const float* gates, const T* gate_base,
                               int64_t gate_ld, const T* up_base, int64_t up_ld, int64_t tokens, int64_t width, T* a,
                               T* b, T* h, T* sum_out, int64_t sum_ld) {
  const float poison = g.poison();
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x)
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      float sum = poison;
      for (int64_t p = t * g.slots; p < (t + 1) * g.slots; ++p) {
        const int32_t s = g.inverse[p];
        if (s < 0) continue;
        const int e = g.expert_at(s);
        const int64_t at = p * width + c;
        if (g.rank(e) == 0) a[at] = gate_base[t * gate_ld + c];
        if (up_offsets[e + 1] == up_offsets[e]) b[at] = up_base[t * up_ld + c];
        const float x = to_float(a[at]), hidden = x * sigmoid(x) * to_float(b[at]);
        h[at] = from_float<T>(hidden);
        sum = fmaf(gates[p], hidden, sum);
      }
      sum_out[t * sum_ld + c] = from_float<T>(sum);
    }
}

// One block per token; dot[p] += <h_p, q_t> by a fixed tree over the block.
template <class T>
__global__ void hidden_backward(Ragged g, const float* down_rows, const float* gates, const T* q, int64_t q_ld,
                                int64_t tokens, int64_t width, const T* a, const T* b, T* h, T* da, T* db, T* sum_a_out,
                                int64_t sum_a_ld, T* sum_b_out, int64_t sum_b_ld, float* dot) {
  __shared__ float partial[kRowThreads];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x) {
    for (int64_t p = t * g.slots; p < (t + 1) * g.slots; ++p) {
      const int32_t s = g.inverse[p];
      if (s < 0) continue;
      const bool low_rank = g.rank(g.expert_at(s)) > 0;
      float sum = 0;
      for (int64_t c = thread; c < width; c += kRowThreads) {
        const int64_t at = p * width + c;
        const float x = to_float(a[at]), y = to_float(b[at]), upstream = to_float(q[t * q_ld + c]), sg = sigmoid(x);
        const float hidden = x * sg * y;
        const float dh = gates[p] * upstream + (low_rank ? down_rows[at] : 0.0f);
        sum = fmaf(hidden, upstream, sum);
        h[at] = from_float<T>(hidden);
        da[at] = from_float<T>(dh * y * sg * (1.0f + x * (1.0f - sg)));
        db[at] = from_float<T>(dh * x * sg);
      }
      partial[thread] = sum;
      __syncthreads();
      for (int half = kRowThreads / 2; half > 0; half /= 2) {
        if (thread < half) partial[thread] += partial[thread + half];
        __syncthreads();
      }
      if (thread == 0) dot[p] += partial[0];
      __syncthreads();
    }
    // Slot sums in float from the rounded da and db, converted once.
    for (int64_t c = thread; c < width; c += kRowThreads) {
      float sum_a = g.poison(), sum_b = sum_a;
      for (int64_t p = t * g.slots; p < (t + 1) * g.slots; ++p) {
        if (g.inverse[p] < 0) continue;
        sum_a += to_float(da[p * width + c]);
        sum_b += to_float(db[p * width + c]);
      }
      sum_a_out[t * sum_a_ld + c] = from_float<T>(sum_a);
      sum_b_out[t * sum_b_ld + c] = from_float<T>(sum_b);
    }
  }
}

template <class T>
__global__ void mask_ranks(int64_t count, float scale, const float* u, const float* v, const float* mask, T* masked_u,
                           T* masked_v, float* dmask) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const float m = mask[i];
    if (masked_u != nullptr) masked_u[i] = from_float<T>(m == 0 ? 0.0f : scale * u[i] * m);
    if (masked_v != nullptr) masked_v[i] = from_float<T>(m == 0 ? 0.0f : scale * v[i] * m);
    if (dmask != nullptr) dmask[i] = scale * u[i] * v[i];
  }
}

__global__ void find_not_finite(const float* x, int64_t n, int32_t* found) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
    if (!(fabsf(x[i]) <= 3.4e38f)) *found = 1;
}

}  // namespace moraine::kernels::device
