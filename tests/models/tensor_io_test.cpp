#include <gtest/gtest.h>

#include <cstring>

#include <ATen/TensorOperators.h>

#include "core/error.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

TEST(TensorIo, EveryFloatTypeSurvivesAFile) {
  NamedTensors tensors;
  for (const auto& [name, dtype] : {std::pair("a", at::kDouble), std::pair("b", at::kFloat),
                                    std::pair("c", at::kBFloat16), std::pair("d", at::kHalf)}) {
    tensors.emplace_back(name, random_tensor({3, 5}, 1).to(dtype));
  }
  tensors.emplace_back("e", random_tokens(2, 2, 9, 1));
  tensors.emplace_back("f", random_tensor({0, 4}, 1));
  std::vector<at::Tensor> keep;
  const core::Safetensors file =
      core::Safetensors::parse(core::Bytes(core::serialize_safetensors(views_of(tensors, keep), {})), "memory");
  for (const auto& [name, tensor] : tensors) {
    EXPECT_TRUE(same_bits(borrow(*file.find(name)), tensor)) << name;
    EXPECT_TRUE(same_bits(copy_of(*file.find(name)), tensor)) << name;
  }
}

TEST(TensorIo, ViewsOfATransposeHoldItsRows) {
  const at::Tensor tensor = random_tensor({3, 4}, 2).to(at::kFloat);
  std::vector<at::Tensor> keep;
  const auto views = views_of({{"t", tensor.t()}}, keep);
  EXPECT_EQ(views[0].shape, (Shape{4, 3}));
  EXPECT_TRUE(same_bits(copy_of(views[0]), tensor.t().contiguous()));
}

TEST(TensorIo, BorrowedTensorKeepsItsOwnerAlive) {
  auto owner = std::make_shared<std::vector<float>>(std::vector<float>{1, 2, 3, 4});
  const core::TensorView view = {"v", core::DType::kF32, {4}, std::as_bytes(std::span(*owner))};
  std::weak_ptr<std::vector<float>> watch = owner;
  at::Tensor tensor = borrow(view, std::move(owner));
  owner.reset();
  ASSERT_FALSE(watch.expired());
  EXPECT_EQ(tensor[3].item<float>(), 4.0f);
  tensor = at::Tensor();
  EXPECT_TRUE(watch.expired());
}

TEST(TensorIo, MisalignedBytesAreCopied) {
  alignas(8) std::byte bytes[12] = {};
  const float value = 2.5f;
  std::memcpy(bytes + 2, &value, sizeof value);
  const at::Tensor tensor = borrow({"v", core::DType::kF32, {1}, {bytes + 2, 4}});
  EXPECT_EQ(tensor[0].item<float>(), 2.5f);
  EXPECT_NE(tensor.const_data_ptr(), bytes + 2);
}

TEST(TensorIo, RefusesTypesWithoutAStoredForm) {
  EXPECT_THROW(dtype_of(random_tensor({2}, 1).to(at::kComplexFloat)), core::InternalError);
}

}  // namespace
}  // namespace moraine::models
