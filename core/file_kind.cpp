#include "core/file_kind.h"

#include <algorithm>
#include <string_view>

namespace moraine::core {
namespace {

using namespace std::string_view_literals;

struct Kind {
  std::string_view start;
  const char* name;
};
constexpr Kind kKinds[] = {
    {"PK\x03\x04"sv, "a zip archive (PyTorch's .bin and .pt, NumPy's .npz)"},
    {"\x89HDF\r\n\x1a\n"sv, "an HDF5 file"},
    {"\x1f\x8b"sv, "compressed with gzip"},
    {"\x28\xb5\x2f\xfd"sv, "compressed with zstandard"},
    {"GGUF"sv, "a GGUF file (llama.cpp)"},
    {"\x93NUMPY"sv, "a NumPy array (.npy)"},
    {"\x80\x02"sv, "a Python pickle (PyTorch's .bin and .pt)"},
    {"version https://git-lfs"sv, "a Git LFS pointer: the file itself was not downloaded (git lfs pull)"},
    {"\x89PNG"sv, "a PNG image"},
    {"\xff\xd8\xff"sv, "a JPEG image"},
    {"%PDF"sv, "a PDF document"},
    {"\x7f"
     "ELF"sv,
     "a program"},
};

// A safetensors file starts with the length of its header, whose upper bytes are zero and so no text.
constexpr size_t kLengthBytes = 8;

bool is_text(char c) {
  const auto byte = static_cast<unsigned char>(c);
  return byte >= 0x20 ? byte != 0x7f : c == '\n' || c == '\r' || c == '\t';
}

}  // namespace

const char* kind_of_file(std::span<const std::byte> bytes) {
  if (bytes.empty()) return "an empty file";
  const std::string_view start(reinterpret_cast<const char*>(bytes.data()), std::min<size_t>(bytes.size(), 64));
  for (const Kind& kind : kKinds)
    if (start.starts_with(kind.start)) return kind.name;
  const std::string_view length = start.substr(0, kLengthBytes);
  return std::all_of(length.begin(), length.end(), is_text) ? "text" : nullptr;
}

}  // namespace moraine::core
