#include "models/tensor_io.h"

#include <array>
#include <cstring>
#include <utility>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "core/error.h"

namespace moraine::models {
namespace {

constexpr std::array<std::pair<core::DType, at::ScalarType>, 10> kTypes = {{
    {core::DType::kF64, at::kDouble},
    {core::DType::kF32, at::kFloat},
    {core::DType::kF16, at::kHalf},
    {core::DType::kBF16, at::kBFloat16},
    {core::DType::kI64, at::kLong},
    {core::DType::kI32, at::kInt},
    {core::DType::kI16, at::kShort},
    {core::DType::kI8, at::kChar},
    {core::DType::kU8, at::kByte},
    {core::DType::kBool, at::kBool},
}};

}  // namespace

core::DType dtype_of(const at::Tensor& tensor) {
  for (const auto& [stored, scalar] : kTypes) {
    if (scalar == tensor.scalar_type()) return stored;
  }
  throw core::InternalError(fmt::format("tensor type has no stored form: {}", c10::toString(tensor.scalar_type())));
}

at::ScalarType scalar_type_of(core::DType dtype) {
  for (const auto& [stored, scalar] : kTypes) {
    if (stored == dtype) return scalar;
  }
  throw core::InternalError("dtype without a scalar type");
}

at::Tensor borrow(const core::TensorView& view, std::shared_ptr<const void> owner) {
  const auto address = reinterpret_cast<std::uintptr_t>(view.data.data());
  if (view.data.empty() || address % core::size_of(view.dtype) != 0) return copy_of(view);
  auto* bytes = const_cast<std::byte*>(view.data.data());  // ATen has no read-only tensors
  return at::from_blob(
      bytes, view.shape, [owner = std::move(owner)](void*) {}, at::TensorOptions(scalar_type_of(view.dtype)));
}

at::Tensor copy_of(const core::TensorView& view) {
  at::Tensor tensor = at::empty(view.shape, at::TensorOptions(scalar_type_of(view.dtype)));
  MORAINE_CHECK_EQ(tensor.nbytes(), view.data.size());
  if (!view.data.empty()) std::memcpy(tensor.mutable_data_ptr(), view.data.data(), view.data.size());
  return tensor;
}

std::vector<core::TensorView> views_of(const NamedTensors& tensors, std::vector<at::Tensor>& keep) {
  std::vector<core::TensorView> views;
  views.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) {
    MORAINE_CHECK(tensor.defined() && tensor.is_cpu(), "cannot serialise '{}': not a CPU tensor", name);
    const at::Tensor flat = tensor.detach().contiguous();
    keep.push_back(flat);
    views.push_back({name,
                     dtype_of(flat),
                     flat.sizes().vec(),
                     {static_cast<const std::byte*>(flat.const_data_ptr()), flat.nbytes()}});
  }
  return views;
}

}  // namespace moraine::models
