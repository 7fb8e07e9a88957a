#include "core/dtype.h"

#include "core/error.h"

namespace moraine::core {

namespace {

struct DTypeInfo {
  DType dtype;
  size_t size;
  std::string_view name;
};
constexpr DTypeInfo kDTypes[] = {
    {DType::kF64, 8, "F64"}, {DType::kF32, 4, "F32"},   {DType::kF16, 2, "F16"}, {DType::kBF16, 2, "BF16"},
    {DType::kI64, 8, "I64"}, {DType::kI32, 4, "I32"},   {DType::kI16, 2, "I16"}, {DType::kI8, 1, "I8"},
    {DType::kU8, 1, "U8"},   {DType::kBool, 1, "BOOL"},
};

const DTypeInfo& info_of(DType dtype) {
  for (const auto& info : kDTypes)
    if (info.dtype == dtype) return info;
  throw InternalError(fmt::format("core/dtype: unknown dtype {}", static_cast<int>(dtype)));
}

}  // namespace

size_t size_of(DType dtype) { return info_of(dtype).size; }

std::string_view safetensors_name(DType dtype) { return info_of(dtype).name; }

std::optional<DType> dtype_from_safetensors(std::string_view name) {
  for (const auto& info : kDTypes)
    if (info.name == name) return info.dtype;
  return std::nullopt;
}

}  // namespace moraine::core
