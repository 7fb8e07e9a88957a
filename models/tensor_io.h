#pragma once

#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/dtype.h"
#include "core/safetensors.h"
#include "models/slot.h"

namespace moraine::models {

/// Throws InternalError for a type that has no stored form (complex, quantised).
core::DType dtype_of(const at::Tensor& tensor);
at::ScalarType scalar_type_of(core::DType dtype);

/// A tensor over somebody else's bytes, without a copy; they must not be written to. `owner` is kept alive with the
/// tensor's storage; without one the caller sees to it that the bytes outlive the tensor. Bytes that are not aligned to
/// their element are copied.
at::Tensor borrow(const core::TensorView& view, std::shared_ptr<const void> owner = nullptr);
/// A copy that owns its memory.
at::Tensor copy_of(const core::TensorView& view);
/// Views over contiguous CPU tensors for serialisation. `keep` receives the contiguous copies that had to be made.
std::vector<core::TensorView> views_of(const NamedTensors& tensors, std::vector<at::Tensor>& keep);

}  // namespace moraine::models
