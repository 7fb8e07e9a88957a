#pragma once

#include <cstddef>
#include <span>

namespace moraine::core {

/// What a file is by its first bytes, for messages: "a zip archive (PyTorch's .bin and .pt, .npz)", "HDF5", "text",
/// "empty", ...; nullptr when they say nothing, as those of a safetensors file.
const char* kind_of_file(std::span<const std::byte> bytes);

}  // namespace moraine::core
