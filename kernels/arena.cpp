#include "kernels/arena.h"

#include "core/error.h"

namespace moraine::kernels {

Arena::Arena(Workspace workspace, const char* who)
    : base_(static_cast<char*>(workspace.data)), capacity_(workspace.bytes), who_(who) {
  MORAINE_CHECK(reinterpret_cast<uintptr_t>(workspace.data) % 64 == 0, "{}: workspace is not aligned to 64 bytes", who);
}

void* Arena::take_bytes(size_t bytes) {
  const size_t at = used_;
  used_ += (bytes + kAlign - 1) / kAlign * kAlign;
  return base_ == nullptr ? nullptr : base_ + at;
}

void Arena::check() const {
  MORAINE_CHECK(used_ <= capacity_, "{}: workspace too small: have {} bytes, need {}", who_, capacity_, used_);
}

}  // namespace moraine::kernels
