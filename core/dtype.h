#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace moraine::core {

/// Element types of stored tensors, named as safetensors names them.
enum class DType { kF64, kF32, kF16, kBF16, kI64, kI32, kI16, kI8, kU8, kBool };

/// Bytes of one element.
size_t size_of(DType dtype);
/// Name in a safetensors header: "F32", "BF16", ...
std::string_view safetensors_name(DType dtype);
/// nullopt when the name is none of ours.
std::optional<DType> dtype_from_safetensors(std::string_view name);

}  // namespace moraine::core
