#include "worker/cache.h"

namespace moraine::worker {

std::shared_ptr<void> ObjectCache::get(const std::string& key, const std::function<std::shared_ptr<void>()>& make) {
  std::shared_ptr<Entry> entry;
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = entries_.find(key)) {
      entry = *found;
    } else {
      entry = std::make_shared<Entry>();
      entries_.insert(key, entry, 1);
    }
  }
  const std::lock_guard making(entry->making);
  if (entry->object == nullptr) entry->object = make();
  return entry->object;
}

void ObjectCache::clear() {
  const std::lock_guard lock(mutex_);
  entries_.clear();
}

}  // namespace moraine::worker
