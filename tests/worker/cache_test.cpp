#include "worker/cache.h"

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace moraine::worker {
namespace {

TEST(LruCache, DropsTheLeastRecentlyUsedFirst) {
  LruCache<int> cache(10);
  cache.insert("a", 1, 4);
  cache.insert("b", 2, 4);
  EXPECT_EQ(cache.find("a"), 1);  // now b is the older one
  cache.insert("c", 3, 4);
  EXPECT_EQ(cache.find("b"), std::nullopt);
  EXPECT_EQ(cache.find("a"), 1);
  EXPECT_EQ(cache.find("c"), 3);
}

TEST(LruCache, DoesNotKeepWhatIsHeavierThanAll) {
  LruCache<int> cache(10);
  cache.insert("a", 1, 4);
  cache.insert("huge", 2, 11);
  EXPECT_EQ(cache.find("huge"), std::nullopt);
  EXPECT_EQ(cache.find("a"), 1);
}

TEST(ObjectCache, MakesAnObjectOnceForManyThreads) {
  ObjectCache cache(4);
  std::atomic<int> made = 0;
  std::vector<std::shared_ptr<void>> seen(4);
  std::vector<std::thread> threads;
  for (auto& slot : seen) {
    threads.emplace_back([&] { slot = cache.get("base", [&] { return std::make_shared<int>(++made); }); });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(made, 1);
  for (const auto& object : seen) EXPECT_EQ(object, seen[0]);
}

TEST(ObjectCache, TriesAgainAfterAFailure) {
  ObjectCache cache(4);
  EXPECT_THROW(cache.get("k", []() -> std::shared_ptr<void> { throw std::runtime_error("no"); }), std::runtime_error);
  EXPECT_NE(cache.get("k", [] { return std::make_shared<int>(1); }), nullptr);
}

TEST(ObjectCache, DroppedObjectLivesWhileUsed) {
  ObjectCache cache(1);
  const auto held = cache.get("a", [] { return std::make_shared<int>(7); });
  cache.get("b", [] { return std::make_shared<int>(8); });
  EXPECT_EQ(*std::static_pointer_cast<int>(held), 7);
  EXPECT_NE(cache.get("a", [] { return std::make_shared<int>(9); }), held) << "the bound of one object holds";
}

}  // namespace
}  // namespace moraine::worker
