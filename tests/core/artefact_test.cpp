#include "core/artefact.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/hash.h"

namespace moraine::core {
namespace {

const std::vector<float> kData = {1, 2, 3, 4};
const TensorView kTensor{.name = "w", .dtype = DType::kF32, .shape = {2, 2}, .data = std::as_bytes(std::span(kData))};

std::string complaint(Bytes bytes, const std::string& expected_id) {
  try {
    Artefact::parse(std::move(bytes), expected_id, "peer");
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Artefact, IsNamedByTheHashOfItsBytes) {
  const auto artefact = Artefact::create("expert", {{"rank", 4}}, std::span(&kTensor, 1));
  EXPECT_EQ(artefact->id(), sha256(artefact->bytes().span()));
  const auto again = Artefact::parse(artefact->bytes(), artefact->id(), "peer");
  EXPECT_EQ(again->kind(), "expert");
  EXPECT_EQ(again->meta(), (Json{{"kind", "expert"}, {"rank", 4}}));
  EXPECT_TRUE(std::ranges::equal(again->file().find("w")->data, kTensor.data));
}

TEST(Artefact, IdDependsOnEveryPart) {
  const auto id = [](const std::string& kind, const Json& meta, const TensorView& tensor) {
    return Artefact::create(kind, meta, std::span(&tensor, 1))->id();
  };
  TensorView flat = kTensor;
  flat.shape = {4};
  const std::string base = id("expert", {{"rank", 4}}, kTensor);
  EXPECT_EQ(base, id("expert", {{"rank", 4}}, kTensor));
  EXPECT_NE(base, id("mixture", {{"rank", 4}}, kTensor));
  EXPECT_NE(base, id("expert", {{"rank", 5}}, kTensor));
  EXPECT_NE(base, id("expert", {{"rank", 4}}, flat));
}

TEST(Artefact, RefusesBytesOfAnotherHash) {
  const auto artefact = Artefact::create("expert", {}, std::span(&kTensor, 1));
  std::vector<std::byte> damaged(artefact->bytes().span().begin(), artefact->bytes().span().end());
  damaged.back() ^= std::byte{1};
  EXPECT_NE(
      complaint(Bytes(damaged), artefact->id()).find("peer: damaged artefact: expected SHA-256 " + artefact->id()),
      std::string::npos);
  EXPECT_EQ(complaint(artefact->bytes(), artefact->id()), "accepted");
}

TEST(Artefact, RefusesAPlainSafetensorsFile) {
  EXPECT_EQ(complaint(Bytes(serialize_safetensors(std::span(&kTensor, 1), {})), ""),
            "peer: a safetensors file, but no Moraine artefact (no metadata key 'moraine')");
  EXPECT_EQ(complaint(Bytes(serialize_safetensors({}, {{"moraine", "{}"}})), ""),
            "peer: the artefact's metadata has no kind");
}

}  // namespace
}  // namespace moraine::core
