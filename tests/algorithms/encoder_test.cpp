#include "algorithms/flexmore/encoder.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/file.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::flexmore {
namespace {

using testing::HasSubstr;

// Column i of the projection is where unit vector i goes.
at::Tensor matrix(int64_t from, int64_t to, uint64_t seed) {
  std::vector<at::Tensor> columns;
  const at::Tensor unit = at::eye(from, at::kDouble);
  for (int64_t i = 0; i < from; ++i) columns.push_back(project(unit[i], to, seed).to(at::kDouble));
  return at::stack(columns, 1);
}

TEST(Projection, HasOrthogonalRowsThatKeepLengthsOnAverage) {
  const at::Tensor p = matrix(24, 6, 1);
  EXPECT_LE(models::relative_error(at::matmul(p, p.t()), 4.0 * at::eye(6, at::kDouble)),
            1e-6);  // float32 results; 24 / 6
  double mean = 0;
  const at::Tensor x = models::random_tensor({24}, 3);
  for (uint64_t seed = 0; seed < 200; ++seed)
    mean += project(x, 6, seed).to(at::kDouble).square().sum().item<double>() / 200;
  EXPECT_NEAR(mean / x.square().sum().item<double>(), 1,
              0.12);  // one squared length scatters by 0.47: four standard deviations
  EXPECT_LE(models::relative_error(project(x, 6, 1), at::matmul(p, x)), 1e-6);
}

TEST(Projection, IntoMoreDimensionsIsAnIsometry) {
  for (const int64_t width : {5, 9}) {
    const at::Tensor p = matrix(5, width, 2);
    EXPECT_LE(models::relative_error(at::matmul(p.t(), p), at::eye(5, at::kDouble)), 1e-6);
  }
  EXPECT_TRUE(models::same_bits(project(at::eye(5)[0], 9, 2), project(at::eye(5)[0], 9, 2)));
}

TEST(DomainEncoder, SaysWhatItsDirectoryLacks) {
  const TemporaryDirectory directory;
  models::BertConfig config;
  config.vocab_size = 20, config.hidden_size = 8, config.intermediate_size = 8, config.num_layers = 1,
  config.num_heads = 2;
  const auto write = [&](int64_t positions, const std::string& tokenizer) {
    config.max_position_embeddings = positions;
    const models::Bert bert = models::Bert::from_config(config, 1, at::kFloat);
    write_model_directory(directory.path(), bert.config().to_json(), {bert.weights().begin(), bert.weights().end()});
    core::write_atomically(directory.path() / "tokenizer.json", tokenizer);
  };
  const auto open = [&] {
    return models::thrown<core::UserError>([&] { DomainEncoder::open(directory.path(), at::kCPU); });
  };
  const std::string good = R"({"added_tokens": [{"id": 3, "content": "[CLS]"}, {"id": 4, "content": "[SEP]"}]})";
  write(128, good);
  EXPECT_EQ(open(), "");
  const std::string identity = DomainEncoder::identity(directory.path());
  write(128, R"({"added_tokens": [{"id": 3, "content": "[CLS]"}]})");
  EXPECT_THAT(open(), HasSubstr("no token '[SEP]'"));
  for (const char* other :
       {"[]", "{}", R"({"added_tokens": 3})", R"({"added_tokens": [null, {"id": "3", "content": "[CLS]"}]})"}) {
    write(128, other);
    EXPECT_THAT(open(), HasSubstr("names no token '[")) << other;
  }
  write(128, R"({"added_tokens": [{"id": 3, "content": "[CLS]"}]})");
  EXPECT_NE(DomainEncoder::identity(directory.path()), identity);  // another tokeniser: other rows
  write(64, good);
  EXPECT_THAT(open(), HasSubstr("64 positions, 128 are needed"));
}

}  // namespace
}  // namespace moraine::algorithms::flexmore
