#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/hdf5.h"

namespace moraine::data {

/// A long sequence of tokens that stays on disk: blocks of one HDF5 chunk are read when touched and the least recently
/// used are forgotten, so memory is bounded (32 MiB by default) whatever the length. Thread-safe.
class TokenStream {
 public:
  static constexpr int64_t kBlockTokens = 16384;  // the chunk size scripts/prepare_text.py writes
  static constexpr size_t kDefaultBlocks = 512;

  TokenStream(std::shared_ptr<const core::Hdf5File> file, std::string dataset, int64_t vocab_size,
              size_t max_blocks = kDefaultBlocks);

  int64_t size() const { return size_; }
  /// Writes tokens [first, first + count) to `out`; the range lies inside [0, size()).
  /// Throws UserError if a token is outside the vocabulary, IoError if the file cannot be read.
  void copy(int64_t first, int64_t count, int64_t* out) const;

 private:
  using Block = std::shared_ptr<const std::vector<int32_t>>;
  Block block(int64_t index) const;
  Block load(int64_t index) const;

  std::shared_ptr<const core::Hdf5File> file_;
  std::string dataset_;
  int64_t vocab_size_;
  size_t max_blocks_;
  int64_t size_ = 0;

  mutable std::mutex mutex_;
  mutable std::list<std::pair<int64_t, Block>> recent_;  // most recently used first
  mutable std::unordered_map<int64_t, std::list<std::pair<int64_t, Block>>::iterator> cached_;
};

}  // namespace moraine::data
