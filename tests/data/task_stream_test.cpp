#include "data/task_stream.h"

#include <algorithm>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/hdf5.h"
#include "data/fingerprint.h"
#include "tests/temporary_directory.h"

namespace moraine::data {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// 7 classes with 6 training and 3 test images each; row r has label r mod 7.
class TaskStreams : public testing::Test {
 protected:
  TaskStreams() {
    core::Hdf5File file(folder_ / "images.h5", core::Hdf5File::Mode::kCreate);
    file.set_attribute("format", "moraine-images");
    file.set_attribute("format_version", 1);
    file.set_attribute("name", "seven");
    file.set_attribute("class_names", R"(["a", "b", "c", "d", "e", "f", "g"])");
    for (const auto& [split, size] : {std::pair{"train", 42}, std::pair{"test", 21}}) {
      std::vector<int64_t> labels;
      for (int64_t row = 0; row < size; ++row) labels.push_back(row % 7);
      file.write<uint8_t>(std::string(split) + "/images", std::vector<uint8_t>(static_cast<size_t>(4 * size), 9),
                          {size, 1, 2, 2});
      file.write<int64_t>(std::string(split) + "/labels", labels, {size});
    }
    file.set_attribute("fingerprint", image_fingerprint(file));
    file.close();
  }
  ImageDataset dataset() const { return ImageDataset::open(folder_ / "images.h5"); }
  TaskStream make(const TaskStreamSpec& spec) const { return TaskStream::make(dataset(), spec); }
  std::string refusal(const TaskStreamSpec& spec) const {
    try {
      make(spec);
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "accepted";
  }

  TemporaryDirectory folder_;
};

// np.random.seed(1993); np.random.permutation(100), and other sizes and seeds, from NumPy 2.2.
TEST(ClassOrder, IsNumPysPermutation) {
  const auto hundred = class_order(100, 1993);
  EXPECT_THAT(std::vector<int64_t>(hundred.begin(), hundred.begin() + 10),
              ElementsAre(68, 56, 78, 8, 23, 84, 90, 65, 74, 76));
  EXPECT_EQ(std::set<int64_t>(hundred.begin(), hundred.end()).size(), 100u);
  EXPECT_THAT(class_order(10, 1993), ElementsAre(4, 2, 7, 6, 0, 3, 5, 8, 9, 1));
  EXPECT_THAT(class_order(7, 0), ElementsAre(6, 2, 1, 3, 0, 5, 4));
  EXPECT_THAT(class_order(16, 1994), ElementsAre(13, 1, 7, 12, 9, 5, 14, 15, 8, 4, 10, 0, 11, 2, 3,
                                                 6));  // a power of two: the mask has no slack
  EXPECT_THAT(class_order(1, 5), ElementsAre(0));
}

TEST_F(TaskStreams, BaseAndIncrementCutTheOrderAndKeepAShortLastTask) {
  const TaskStream stream = make({.base_classes = 3, .increment = 3});
  ASSERT_EQ(stream.tasks.size(), 3u);
  EXPECT_THAT(stream.tasks[0].classes, ElementsAre(0, 1, 2));
  EXPECT_THAT(stream.tasks[1].classes, ElementsAre(3, 4, 5));
  EXPECT_THAT(stream.tasks[2].classes, ElementsAre(6));
  EXPECT_THAT(stream.tasks[2].train, ElementsAre(6, 13, 20, 27, 34, 41));
  EXPECT_THAT(stream.tasks[2].test, ElementsAre(6, 13, 20));
  EXPECT_THAT(stream.classes_until(1), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_EQ(make({.increment = 4, .order = 0}).classes_until(1), class_order(7, 0));
}

TEST_F(TaskStreams, ExplicitListsKeepTheirMembersAndAreReordered) {
  TaskStreamSpec spec{.tasks = {{5, 0}, {1, 2}, {6}}, .leave_out = {3, 4}};
  EXPECT_THAT(make(spec).classes_until(2), ElementsAre(5, 0, 1, 2, 6));
  spec.order = 3;
  std::vector<int64_t> expected;
  for (const int64_t task : class_order(3, 3))
    expected.insert(expected.end(), spec.tasks[static_cast<size_t>(task)].begin(),
                    spec.tasks[static_cast<size_t>(task)].end());
  EXPECT_EQ(make(spec).classes_until(2), expected);
}

TEST_F(TaskStreams, AClassKeepsItsImagesInEveryOrderAndSplitsNeverMeet) {
  const auto rows_of_class_2 = [&](int64_t order, bool validation) {
    const TaskStream stream = make({.increment = 1,
                                    .train_per_class = 3,
                                    .test_per_class = 2,
                                    .validation_per_class = 2,
                                    .evaluate_validation = validation,
                                    .seed = 8,
                                    .order = order});
    for (const auto& task : stream.tasks)
      if (task.classes[0] == 2) return task;
    return TaskStream::Task{};
  };
  const auto task = rows_of_class_2(-1, false), other_order = rows_of_class_2(4, false),
             validation = rows_of_class_2(-1, true);
  EXPECT_EQ(task.train.size(), 3u);
  EXPECT_EQ(task.test.size(), 2u);
  EXPECT_EQ(task.train, other_order.train);
  EXPECT_EQ(task.test, other_order.test);
  EXPECT_EQ(validation.train, task.train);
  EXPECT_EQ(validation.test.size(), 2u);
  for (const int64_t row : validation.test) EXPECT_EQ(std::count(task.train.begin(), task.train.end(), row), 0) << row;
}

TEST_F(TaskStreams, TheHashNamesContentsAndOrder) {
  const std::string hash = make({.order = 1}).hash;
  EXPECT_EQ(hash.size(), 64u);
  EXPECT_EQ(make({.order = 1}).hash, hash);
  EXPECT_EQ(make({.seed = 9, .order = 1}).hash, hash) << "the seed chooses nothing when all images are taken";
  EXPECT_NE(make({.order = 2}).hash, hash);
  EXPECT_NE(make({.train_per_class = 5, .order = 1}).hash, hash);
  EXPECT_NE(make({.train_per_class = 5, .order = 1}).hash, make({.train_per_class = 5, .seed = 9, .order = 1}).hash);
}

TEST_F(TaskStreams, WrongClassListsAreNamed) {
  EXPECT_THAT(refusal({.tasks = {{0, 1}, {2, 1}}, .leave_out = {3, 4, 5, 6}}),
              HasSubstr("class 1 stands twice: in task 0 and in task 1"));
  EXPECT_THAT(refusal({.tasks = {{0, 1, 2}, {4, 5, 6}}}), HasSubstr("class 3 is in no task"));
  EXPECT_THAT(refusal({.tasks = {{0, 1, 2, 3}, {4, 5, 6, 7}}}),
              HasSubstr("class 7 of task 1 is outside the data set's 0..6"));
  EXPECT_THAT(refusal({.tasks = {{0, 1, 2, 3, 4, 5, 6}, {}}}), HasSubstr("task 1 has no class"));
  EXPECT_THAT(refusal({.tasks = {{0, 1, 2, 3, 4, 5, 6}}, .leave_out = {6}}),
              HasSubstr("class 6 stands twice: in leave_out and in task 0"));
  EXPECT_THAT(refusal({.base_classes = 8}), HasSubstr("base_classes 8 is more than the 7 classes"));
  EXPECT_THAT(refusal({.leave_out = {0, 1, 2, 3, 4, 5}}), HasSubstr("leaves 1 of 7"));
  EXPECT_THAT(refusal({.validation_per_class = 6}), HasSubstr("class 0 (a) has no image left to train on"));
}

TEST_F(TaskStreams, AClassWithoutTestImagesIsNamed) {
  core::Hdf5File file(folder_ / "images.h5", core::Hdf5File::Mode::kCreate);
  file.set_attribute("format", "moraine-images");
  file.set_attribute("format_version", 1);
  file.set_attribute("name", "two");
  file.set_attribute("class_names", R"(["a", "b"])");
  file.write<uint8_t>("train/images", std::vector<uint8_t>(8, 0), {2, 1, 2, 2});
  file.write<int64_t>("train/labels", std::vector<int64_t>{0, 1}, {2});
  file.write<uint8_t>("test/images", std::vector<uint8_t>(4, 0), {1, 1, 2, 2});
  file.write<int64_t>("test/labels", std::vector<int64_t>{0}, {1});
  file.set_attribute("fingerprint", image_fingerprint(file));
  file.close();
  EXPECT_THAT(refusal({.increment = 1}), HasSubstr("class 1 (b) has no image left to test on"));
}

}  // namespace
}  // namespace moraine::data
