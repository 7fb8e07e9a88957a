#include "data/image_dataset.h"

#include <functional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/hdf5.h"
#include "data/fingerprint.h"
#include "tests/temporary_directory.h"

namespace moraine::data {
namespace {

using testing::ElementsAre;
using testing::FloatEq;
using testing::HasSubstr;

class Images : public testing::Test {
 protected:
  // Two training images of 1 x 1 x 2 and one test image; `change` spoils the file.
  void write(const std::function<void(core::Hdf5File&)>& change = {}, int64_t label = 1, int64_t width = 2,
             int64_t version = 1) {
    core::Hdf5File file(path_, core::Hdf5File::Mode::kCreate);
    file.set_attribute("format", "moraine-images");
    file.set_attribute("format_version", version);
    file.set_attribute("name", "tiny");
    file.set_attribute("class_names", R"(["left", "right"])");
    file.write<uint8_t>("train/images", std::vector<uint8_t>{0, 255, 51, 102}, {2, 1, 1, 2});
    file.write<int64_t>("train/labels", std::vector<int64_t>{0, label}, {2});
    file.write<uint8_t>("test/images", std::vector<uint8_t>(static_cast<size_t>(width), 7), {1, 1, 1, width});
    file.write<int64_t>("test/labels", std::vector<int64_t>{1}, {1});
    file.set_attribute("fingerprint", image_fingerprint(file));
    if (change) change(file);
    file.close();
  }
  std::string refusal() const {
    try {
      ImageDataset::open(path_);
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "accepted";
  }

  TemporaryDirectory folder_;
  std::filesystem::path path_ = folder_ / "tiny.h5";
};

TEST_F(Images, AreNormalisedAndComeInTheOrderAskedFor) {
  write();
  const auto dataset = ImageDataset::open(path_);
  EXPECT_EQ(dataset.info().num_classes(), 2);
  EXPECT_EQ(dataset.info().pixels(), 2);
  EXPECT_THAT(dataset.labels("train"), ElementsAre(0, 1));
  const std::vector<int64_t> rows = {1, 0, 1};
  EXPECT_THAT(dataset.batch("train", rows, 0.5, 0.5),  // (x / 255 - 0.5) / 0.5
              ElementsAre(FloatEq(-0.6F), FloatEq(-0.2F), FloatEq(-1), FloatEq(1), FloatEq(-0.6F), FloatEq(-0.2F)));
  EXPECT_THROW(dataset.batch("train", std::vector<int64_t>{2}, 0, 1), core::InternalError);
  EXPECT_THROW(dataset.labels("validation"), core::UserError);
}

TEST_F(Images, BrokenFilesAreRefusedWithTheReason) {
  EXPECT_THAT(refusal(), HasSubstr("tiny.h5"));
  write({}, 2);
  EXPECT_THAT(refusal(), HasSubstr("label 2 is outside the 2 classes of split 'train'"));
  write({}, 1, 3);
  EXPECT_THAT(refusal(), HasSubstr("another shape"));
  write({}, 1, 2, 9);
  EXPECT_THAT(refusal(), HasSubstr("version 9"));
  write([](core::Hdf5File& file) { file.set_attribute("format", "moraine-text-domain"); });
  EXPECT_THAT(refusal(), HasSubstr("not an image file"));
  write([](core::Hdf5File& file) { file.set_attribute("class_names", "[]"); });
  EXPECT_THAT(refusal(), HasSubstr("class_names"));
  write([](core::Hdf5File& file) { file.set_attribute("class_names", "2"); });
  EXPECT_THAT(refusal(), HasSubstr("class_names is no list"));
}

TEST_F(Images, PixelsOrLabelsEditedUnderTheOldFingerprintAreRefused) {
  write();
  const std::string before = ImageDataset::open(path_).info().fingerprint;
  const auto claim = [&](core::Hdf5File& file) { file.set_attribute("fingerprint", before); };
  write(claim);
  EXPECT_EQ(refusal(), "accepted");
  write(claim, 0);
  EXPECT_THAT(refusal(), HasSubstr("not what its fingerprint says: " + before));
}

}  // namespace
}  // namespace moraine::data
