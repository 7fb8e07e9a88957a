#pragma once

#include <cstddef>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

namespace moraine::worker {

/// Values by key, least recently used ones dropped first, bounded by the sum of weights. A value heavier than the whole
/// capacity is not kept. Not thread-safe.
template <typename T>
class LruCache {
 public:
  explicit LruCache(size_t capacity) : capacity_(capacity) {}

  std::optional<T> find(const std::string& key) {
    const auto found = index_.find(key);
    if (found == index_.end()) return std::nullopt;
    entries_.splice(entries_.begin(), entries_, found->second);
    return found->second->value;
  }

  /// The key must not be present.
  void insert(const std::string& key, T value, size_t weight) {
    if (weight > capacity_) return;
    entries_.push_front({key, std::move(value), weight});
    index_[key] = entries_.begin();
    weight_ += weight;
    while (weight_ > capacity_) {
      weight_ -= entries_.back().weight;
      index_.erase(entries_.back().key);
      entries_.pop_back();
    }
  }

  void clear() {
    entries_.clear();
    index_.clear();
    weight_ = 0;
  }

 private:
  struct Entry {
    std::string key;
    T value;
    size_t weight;
  };
  size_t capacity_, weight_ = 0;
  std::list<Entry> entries_;  // most recently used first
  std::map<std::string, typename std::list<Entry>::iterator> index_;
};

/// Objects that units share (a loaded base, an open data set), by key. Thread-safe: workers that are threads of one
/// process may share one cache, and an object that two of them ask for at once is made once. Dropped objects live on
/// while used.
class ObjectCache {
 public:
  explicit ObjectCache(size_t max_objects) : entries_(max_objects) {}
  /// What make() returned for this key. If make() throws, nothing is kept and the next call tries again.
  std::shared_ptr<void> get(const std::string& key, const std::function<std::shared_ptr<void>()>& make);
  void clear();

 private:
  struct Entry {
    std::mutex making;
    std::shared_ptr<void> object;
  };
  std::mutex mutex_;
  LruCache<std::shared_ptr<Entry>> entries_;
};

}  // namespace moraine::worker
