#pragma once

#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/dtype.h"
#include "core/safetensors.h"
#include "models/slot.h"

namespace moraine::models {

core::DType dtype_of(const at::Tensor& tensor);
at::ScalarType scalar_type_of(core::DType dtype);

/// A tensor over somebody else's bytes, without a copy. The bytes must outlive it and must not be written to.
at::Tensor borrow(const core::TensorView& view);
/// A copy that owns its memory.
at::Tensor copy_of(const core::TensorView& view);
/// Views over contiguous CPU tensors for serialisation. `keep` receives the contiguous copies that had to be made.
std::vector<core::TensorView> views_of(const NamedTensors& tensors, std::vector<at::Tensor>& keep);

}  // namespace moraine::models
