#include "worker/blockwise_moment.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

namespace moraine::worker {
namespace {

at::Tensor varied(int64_t count, bool is_signed) {
  at::Tensor values = at::empty({count}, at::kFloat);
  for (int64_t i = 0; i < count; ++i) {
    const double magnitude = std::pow(10.0, 6 * std::sin(1.3 * static_cast<double>(i)) - 6);  // 1e-12 to 1
    values[i] = is_signed && i % 3 == 0 ? -magnitude : magnitude;
  }
  return values;
}

TEST(DynamicCodeBook, HasTheValuesOfItsDefinition) {
  for (const bool is_signed : {true, false}) {
    const std::vector<float> book = dynamic_code_book(is_signed);
    ASSERT_EQ(book.size(), 256U);
    EXPECT_TRUE(std::ranges::is_sorted(book));
    EXPECT_EQ(std::ranges::adjacent_find(book), book.end());
    EXPECT_EQ(std::ranges::count(book, 0.0F), 1);
    EXPECT_EQ(book.back(), 1);
  }
  const std::vector<float> with = dynamic_code_book(true), without = dynamic_code_book(false);
  EXPECT_FLOAT_EQ(with.front(), -0.99296875F);  // the middle of the last of 64 parts of [0.1, 1]
  EXPECT_FLOAT_EQ(with[128], 5.5e-7F);          // one part of [1e-7, 1e-6]
  EXPECT_FLOAT_EQ(without[254], 0.996484375F);  // of 128 parts
  EXPECT_EQ(without.front(), 0);
  EXPECT_FLOAT_EQ(without[1], 3.25e-7F);
}

TEST(BlockwiseMoment, KeepsTheNearestCodeTimesTheLargestOfItsBlock) {
  for (const bool is_signed : {true, false}) {
    const int64_t count = 256 * 3 + 17;
    const at::Tensor values = varied(count, is_signed);
    BlockwiseMoment moment({count}, is_signed, at::kCPU);
    EXPECT_EQ(moment.values().abs().max().item<float>(), 0) << "starts at zero";
    moment.store(values);
    EXPECT_EQ(moment.codes().nbytes() + moment.scales().nbytes(), size_t{4} * (256 + 4));
    const at::Tensor kept = moment.values();
    const std::vector<float> book = dynamic_code_book(is_signed);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = i / 256, size = std::min<int64_t>(256, count - 256 * block);
      const double largest = values.narrow(0, 256 * block, size).abs().max().item<double>();
      const double value = values[i].item<double>();
      double nearest = 1e9;
      for (const float code : book)
        if (std::abs(code * largest - value) < std::abs(nearest - value)) nearest = code * largest;
      if (!is_signed && nearest == 0) nearest = book[1] * largest;
      // Half way between two codes either will do.
      EXPECT_LE(std::abs(kept[i].item<double>() - value), std::abs(nearest - value) + 1e-6 * largest) << i;
    }
  }
}

TEST(BlockwiseMoment, AnUnsignedValueNeverVanishes) {
  at::Tensor values = at::zeros({300}, at::kFloat);
  values[0] = 1;
  values[1] = 1e-20;
  BlockwiseMoment moment({300}, false, at::kCPU);
  moment.store(values);
  EXPECT_GT(moment.values()[1].item<float>(), 0);
  EXPECT_EQ(moment.values()[2].item<float>(), 0);
}

}  // namespace
}  // namespace moraine::worker
