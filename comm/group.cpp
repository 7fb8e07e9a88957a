#include "comm/group.h"

namespace moraine::comm {

core::Result<void> Group::barrier(std::chrono::milliseconds deadline) {
  if (auto all = gather({}, deadline); !all.ok()) return all.because("barrier");
  return {};
}

core::Bytes bytes_of(std::span<const std::byte> data) {
  return core::Bytes(std::vector<std::byte>(data.begin(), data.end()));
}

}  // namespace moraine::comm
