#include "data/permutation.h"

#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"

namespace moraine::data {
namespace {

using testing::ElementsAre;

std::vector<int64_t> first_images(int64_t size, uint64_t key, int64_t count) {
  const Permutation permutation(size, key);
  std::vector<int64_t> images;
  for (int64_t index = 0; index < count; ++index) images.push_back(permutation(index));
  return images;
}

TEST(Permutation, VisitsEveryIndexOnceWhateverTheSize) {
  for (const int64_t size : {1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097}) {
    std::vector<int> visits(static_cast<size_t>(size), 0);
    for (const int64_t image : first_images(size, 99, size)) {
      ASSERT_TRUE(image >= 0 && image < size) << image << " of " << size;
      ++visits[static_cast<size_t>(image)];
    }
    EXPECT_EQ(visits, std::vector<int>(static_cast<size_t>(size), 1)) << size;
  }
}

// Computed with Python's unbounded integers from the definition in the header: the order of a training run is part of
// its result, so it must not change with compiler, platform or release.
TEST(Permutation, IsTheSameOnEveryPlatform) {
  EXPECT_THAT(first_images(10, 42, 10), ElementsAre(2, 7, 4, 0, 8, 3, 6, 9, 5, 1));
  EXPECT_THAT(first_images(1000003, (uint64_t{1} << 63) + 5, 5), ElementsAre(902763, 717514, 312840, 676311, 188190));
  EXPECT_THAT(first_images(int64_t{1} << 40, 7, 3), ElementsAre(328764610306, 1037417164558, 482111555392));
}

TEST(Permutation, AnotherKeyIsAnotherOrder) {
  const auto a = first_images(10000, 1, 10000), b = first_images(10000, 2, 10000);
  int64_t same = 0;
  for (size_t i = 0; i < a.size(); ++i) same += a[i] == b[i];
  EXPECT_LT(same, 10);  // two random permutations agree in one place on average (Poisson): P(>= 10) = 1e-7
}

TEST(Permutation, ChecksItsArguments) {
  EXPECT_THROW(Permutation(0, 1), core::InternalError);
  EXPECT_THROW(Permutation(5, 1)(5), core::InternalError);
  EXPECT_THROW(Permutation(5, 1)(-1), core::InternalError);
}

}  // namespace
}  // namespace moraine::data
