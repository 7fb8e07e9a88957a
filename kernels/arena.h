#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace moraine::kernels {

/// Cuts a workspace into aligned arrays. Constructed without memory it only counts, so that the size function and the
/// operation run the same cutting code and cannot disagree.
class Arena {
 public:
  Arena() = default;
  /// Throws InternalError if the workspace is misaligned. `who` starts the message of overflow errors; it must outlive
  /// this.
  Arena(Workspace workspace, const char* who);

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  void* take_bytes(size_t bytes);

  /// Throws InternalError with the size needed if more was taken than the workspace holds. Call before the first write.
  void check() const;
  size_t used() const { return used_; }
  bool counting() const { return base_ == nullptr; }

 private:
  static constexpr size_t kAlign = 256;
  char* base_ = nullptr;
  size_t capacity_ = 0, used_ = 0;
  const char* who_ = "";
};

}  // namespace moraine::kernels
