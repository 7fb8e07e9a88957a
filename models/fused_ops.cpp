#include "models/fused_ops.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.h"

namespace moraine::models {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kRowsPerBlock = 64;  // unit of parallel work, and of the weight gradient's partial sums

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Sums term(0) + ... + term(n - 1) in eight fixed lanes: the compiler may not reorder a plain floating-point sum.
template <typename A, typename Term>
A lane_sum(int64_t n, const Term& term) {
  constexpr int64_t kLanes = 8;
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  }
  A total = 0;
  for (const A lane : lanes) total += lane;
  for (; i < n; ++i) total += term(i);
  return total;
}

// Calls body(first, last) for blocks of rows, in parallel.
template <typename Body>
void for_row_blocks(int64_t rows, const Body& body) {
  const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      body(block * kRowsPerBlock, std::min(rows, (block + 1) * kRowsPerBlock));
    }
  });
}

template <typename T>
void rms_norm_rows(const T* x, const T* weight, int64_t rows, int64_t d, double eps, NormRounding rounding, T* y,
                   Accumulate<T>* inverse_rms) {
  using A = Accumulate<T>;
  const bool round_first = rounding == NormRounding::kBeforeWeight;
  for_row_blocks(rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* xr = x + row * d;
      T* yr = y + row * d;
      const A squares = lane_sum<A>(d, [xr](int64_t i) { return static_cast<A>(xr[i]) * static_cast<A>(xr[i]); });
      const A scale = A(1) / std::sqrt(squares / static_cast<A>(d) + static_cast<A>(eps));
      inverse_rms[row] = scale;
      for (int64_t i = 0; i < d; ++i) {
        A value = static_cast<A>(xr[i]) * scale;
        if (round_first) value = static_cast<A>(static_cast<T>(value));
        yr[i] = static_cast<T>(value * static_cast<A>(weight[i]));
      }
    }
  });
}

// dx = s (g - n mean(g n)) with n = x s, g = dy weight; dweight = sum over rows of dy n, when not null.
template <typename T>
void rms_norm_rows_backward(const T* dy, const T* x, const T* weight, const Accumulate<T>* inverse_rms, int64_t rows,
                            int64_t d, T* dx, Accumulate<T>* block_sums) {
  using A = Accumulate<T>;
  for_row_blocks(rows, [&](int64_t first, int64_t last) {
    A* sums = block_sums == nullptr ? nullptr : block_sums + first / kRowsPerBlock * d;
    for (int64_t row = first; row < last; ++row) {
      const T* xr = x + row * d;
      const T* dyr = dy + row * d;
      T* dxr = dx + row * d;
      const A scale = inverse_rms[row];
      const A dot = lane_sum<A>(
          d, [=](int64_t i) { return static_cast<A>(dyr[i]) * static_cast<A>(weight[i]) * static_cast<A>(xr[i]); });
      const A along = dot * scale * scale / static_cast<A>(d);
      for (int64_t i = 0; i < d; ++i) {
        const A g = static_cast<A>(dyr[i]) * static_cast<A>(weight[i]);
        dxr[i] = static_cast<T>(scale * (g - static_cast<A>(xr[i]) * along));
      }
      if (sums == nullptr) continue;
      for (int64_t i = 0; i < d; ++i) sums[i] += static_cast<A>(dyr[i]) * static_cast<A>(xr[i]) * scale;
    }
  });
}

class RmsNorm : public torch::autograd::Function<RmsNorm> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight, double eps,
                            NormRounding rounding) {
    const at::Tensor x = input.contiguous();
    const int64_t d = x.size(-1), rows = d == 0 ? 0 : x.numel() / d;
    at::Tensor y = at::empty_like(x);
    at::Tensor inverse_rms = at::empty({rows}, x.options().dtype(accumulate_type(x)));
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "rms_norm", [&] {
      rms_norm_rows<scalar_t>(x.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(), rows, d, eps, rounding,
                              y.mutable_data_ptr<scalar_t>(), inverse_rms.mutable_data_ptr<Accumulate<scalar_t>>());
    });
    context->save_for_backward({x, weight, inverse_rms});
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &inverse_rms = saved[2];
    const at::Tensor dy = gradients[0].contiguous();
    const int64_t d = x.size(-1), rows = inverse_rms.numel();
    at::Tensor dx = at::empty_like(x), sums, dweight;
    if (context->needs_input_grad(1))
      sums = at::zeros({(rows + kRowsPerBlock - 1) / kRowsPerBlock, d}, inverse_rms.options());
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "rms_norm_backward", [&] {
      using A = Accumulate<scalar_t>;
      A* block_sums = sums.defined() ? sums.mutable_data_ptr<A>() : nullptr;
      rms_norm_rows_backward<scalar_t>(dy.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
                                       weight.const_data_ptr<scalar_t>(), inverse_rms.const_data_ptr<A>(), rows, d,
                                       dx.mutable_data_ptr<scalar_t>(), block_sums);
      if (block_sums == nullptr) return;
      for (int64_t block = 1; block < sums.size(0); ++block) {
        for (int64_t i = 0; i < d; ++i) block_sums[i] += block_sums[block * d + i];
      }
      dweight = sums.size(0) == 0 ? at::zeros({d}, weight.options()) : sums.select(0, 0).to(weight.scalar_type());
    });
    return {dx, dweight, at::Tensor(), at::Tensor()};
  }
};

// Turns every pair by its angle, or back (the transpose: the backward pass).
at::Tensor rotate_pairs(const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin, bool back) {
  const at::Tensor x = input.contiguous();
  const int64_t length = x.size(1), heads = x.size(2), half = x.size(3) / 2;
  at::Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "rotate", [&] {
    using A = Accumulate<scalar_t>;
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    const float* cosines = cos.const_data_ptr<float>();
    const float* sines = sin.const_data_ptr<float>();
    const A sign = back ? A(-1) : A(1);
    for_row_blocks(x.size(0) * length, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const float* c = cosines + row % length * half;
        const float* s = sines + row % length * half;
        for (int64_t head = 0; head < heads; ++head) {
          const scalar_t* low = from + (row * heads + head) * 2 * half;
          scalar_t* out = to + (row * heads + head) * 2 * half;
          for (int64_t i = 0; i < half; ++i) {
            const A a = static_cast<A>(low[i]), b = static_cast<A>(low[i + half]);
            out[i] = static_cast<scalar_t>(a * static_cast<A>(c[i]) - b * sign * static_cast<A>(s[i]));
            out[i + half] = static_cast<scalar_t>(b * static_cast<A>(c[i]) + a * sign * static_cast<A>(s[i]));
          }
        }
      }
    });
  });
  return y;
}

class Rotate : public torch::autograd::Function<Rotate> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    context->save_for_backward({cos, sin});
    return rotate_pairs(x, cos, sin, false);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    return {rotate_pairs(gradients[0], saved[0], saved[1], true), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, NormRounding rounding) {
  MORAINE_CHECK(x.scalar_type() == weight.scalar_type(), "rms_norm: x and weight differ in dtype");
  MORAINE_CHECK_EQ(x.size(-1), weight.numel());
  if (!x.is_cpu()) return rms_norm_reference(x, weight, eps, rounding);
  return RmsNorm::apply(x, weight.contiguous(), eps, rounding);
}

at::Tensor rms_norm_reference(const at::Tensor& x, const at::Tensor& weight, double eps, NormRounding rounding) {
  const at::ScalarType wide = accumulate_type(x);
  const at::Tensor y = x.to(wide);
  const at::Tensor normal = y * at::rsqrt(at::mean(y * y, {-1}, true) + eps);
  if (rounding == NormRounding::kBeforeWeight) return normal.to(x.scalar_type()) * weight;
  return (normal * weight.to(wide)).to(x.scalar_type());
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  MORAINE_CHECK(x.dim() == 4 && cos.size(0) >= x.size(1) && cos.size(1) * 2 == x.size(3) && cos.sizes() == sin.sizes(),
                "rotate: x does not fit the tables of {} positions and {} pairs", cos.size(0), cos.size(1));
  if (!x.is_cpu()) return rotate_reference(x, cos, sin);
  return Rotate::apply(x, cos.contiguous(), sin.contiguous());
}

at::Tensor rotate_reference(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const at::ScalarType wide = accumulate_type(x);
  const at::Tensor c = cos.slice(0, 0, x.size(1)).unsqueeze(1).to(wide),
                   s = sin.slice(0, 0, x.size(1)).unsqueeze(1).to(wide);
  const int64_t half = x.size(3) / 2;
  const at::Tensor a = x.slice(3, 0, half).to(wide), b = x.slice(3, half).to(wide);
  return at::cat({a * c - b * s, b * c + a * s}, 3).to(x.scalar_type());
}

}  // namespace moraine::models
