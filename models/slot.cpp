#include "models/slot.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/silu.h>

#include "core/error.h"

namespace moraine::models {

at::Tensor as_type_of(const at::Tensor& weight, const at::Tensor& x) {
  return weight.defined() && weight.scalar_type() != x.scalar_type() ? weight.to(x.scalar_type()) : weight;
}

at::Tensor apply_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return at::linear(x, as_type_of(weight, x), as_type_of(bias, x));
}

at::Tensor SlotBase::forward(const at::Tensor& x) const {
  MORAINE_CHECK(!weight.defined() || !gate.defined(), "a slot's base is one matrix, a gate/up/down triple or nothing");
  if (weight.defined()) return apply_linear(x, weight, bias);
  if (!gate.defined()) return x;
  return apply_linear(at::silu(apply_linear(x, gate, gate_bias)) * apply_linear(x, up, up_bias), down, down_bias);
}

at::Tensor swiglu(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down) {
  return apply_linear(at::silu(apply_linear(x, gate)) * apply_linear(x, up), down);
}

}  // namespace moraine::models
