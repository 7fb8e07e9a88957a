#include "data/token_stream.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace moraine::data {

TokenStream::TokenStream(std::shared_ptr<const core::Hdf5File> file, std::string dataset, int64_t vocab_size,
                         size_t max_blocks)
    : file_(std::move(file)),
      dataset_(std::move(dataset)),
      vocab_size_(vocab_size),
      max_blocks_(std::max<size_t>(1, max_blocks)) {
  const std::vector<int64_t> shape = file_->shape(dataset_);
  if (shape.size() != 1)
    throw core::UserError(fmt::format("data: {} is not a list of tokens: {}", dataset_, file_->path().string()),
                          "prepare the file again with scripts/prepare_text.py");
  size_ = shape[0];
}

void TokenStream::copy(int64_t first, int64_t count, int64_t* out) const {
  MORAINE_CHECK(first >= 0 && count >= 0 && first <= size_ - count, "data: tokens [{}, {}) of {}", first, first + count,
                size_);
  while (count > 0) {
    const Block tokens = block(first / kBlockTokens);
    const int64_t begin = first % kBlockTokens;
    const int64_t length = std::min(count, static_cast<int64_t>(tokens->size()) - begin);
    out = std::copy_n(tokens->begin() + begin, length, out);
    first += length;
    count -= length;
  }
}

TokenStream::Block TokenStream::block(int64_t index) const {
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = cached_.find(index); found != cached_.end()) {
      recent_.splice(recent_.begin(), recent_, found->second);
      return found->second->second;
    }
  }
  Block loaded = load(index);  // outside the lock: two threads may read the same block, which costs time only
  const std::lock_guard lock(mutex_);
  if (cached_.contains(index)) return loaded;
  recent_.emplace_front(index, loaded);
  cached_[index] = recent_.begin();
  if (recent_.size() > max_blocks_) {
    cached_.erase(recent_.back().first);
    recent_.pop_back();
  }
  return loaded;
}

TokenStream::Block TokenStream::load(int64_t index) const {
  const int64_t first = index * kBlockTokens;
  auto tokens = file_->read<int32_t>(dataset_, first, std::min(kBlockTokens, size_ - first));
  for (const int32_t token : tokens) {
    if (token >= 0 && token < vocab_size_) continue;
    throw core::UserError(fmt::format("data: token outside the vocabulary of {}: {} in {} of {}", vocab_size_, token,
                                      dataset_, file_->path().string()),
                          "the file is damaged: prepare it again with scripts/prepare_text.py");
  }
  return std::make_shared<const std::vector<int32_t>>(std::move(tokens));
}

}  // namespace moraine::data
