#include "coordinator/verify.h"

#include <cstring>

#include <fmt/format.h>

namespace moraine::coordinator {
namespace {

/// Index of the first element whose exponent bits are all ones (IEEE: NaN or infinity), -1 if there is none.
template <typename Bits>
int64_t find_non_finite(std::span<const std::byte> data, Bits exponent) {
  for (size_t at = 0; at + sizeof(Bits) <= data.size(); at += sizeof(Bits)) {
    Bits value;
    std::memcpy(&value, data.data() + at, sizeof value);
    if ((value & exponent) == exponent) return static_cast<int64_t>(at / sizeof(Bits));
  }
  return -1;
}

int64_t find_non_finite(const core::TensorView& tensor) {
  switch (tensor.dtype) {
    case core::DType::kF64:
      return find_non_finite<uint64_t>(tensor.data, 0x7ff0'0000'0000'0000);
    case core::DType::kF32:
      return find_non_finite<uint32_t>(tensor.data, 0x7f80'0000);
    case core::DType::kF16:
      return find_non_finite<uint16_t>(tensor.data, 0x7c00);
    case core::DType::kBF16:
      return find_non_finite<uint16_t>(tensor.data, 0x7f80);
    default:
      return -1;
  }
}

}  // namespace

std::optional<std::string> first_non_finite(const core::Artefact& artefact) {
  for (const core::TensorView& tensor : artefact.file().tensors()) {
    if (const int64_t index = find_non_finite(tensor); index >= 0) {
      return fmt::format("tensor '{}' element {} is NaN or infinite", tensor.name, index);
    }
  }
  return std::nullopt;
}

}  // namespace moraine::coordinator
