#include "comm/threads/group.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <thread>

#include "comm/local/group.h"
#include "comm/nccl/group.h"
#include "core/error.h"
#include "tests/comm/group_script.h"

namespace moraine::comm {
namespace {

using std::chrono::milliseconds;
constexpr milliseconds kLong{30'000};  // a bound for a broken group, never waited for

/// Runs `body` as every member, each in a thread; a member leaves the group when its body returns.
void run_members(int size, const std::function<void(Group&)>& body) {
  std::vector<std::thread> threads;
  for (auto& member : threads::make_group(size))
    threads.emplace_back([&body, member = std::move(member)]() mutable {
      body(*member);
      member.reset();
    });
  for (auto& thread : threads) thread.join();
}

core::Bytes text(const std::string& value) { return bytes_of(std::as_bytes(std::span(value))); }
std::string text_of(const core::Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.span().data()), bytes.size()};
}

TEST(ThreadGroup, SumsInTheOrderOfTheIndicesWhateverArrivesFirst) {
  for (const int size : {1, 2, 3, 5}) {
    // Of values of very different sizes only one order gives these bits.
    for (const size_t count : {size_t{0}, size_t{1}, size_t{4}, size_t{1001}}) {
      std::vector<float> expected = member_values(0, count);
      for (int member = 1; member < size; ++member) {
        const auto values = member_values(member, count);
        for (size_t i = 0; i < count; ++i) expected[i] += values[i];
      }
      run_members(size, [&](Group& group) {
        auto buffer = member_values(group.index(), count);
        const auto sum = group.all_reduce(buffer);
        const auto waited = sum->wait(kLong);
        EXPECT_TRUE(waited.ok()) << waited.error();
        EXPECT_EQ(buffer, expected) << "size " << size;
      });
    }
  }
}

TEST(ThreadGroup, AnOrderOfItsOwnWouldGiveOtherBits) {
  const auto a = member_values(0, 1001), b = member_values(1, 1001), c = member_values(2, 1001);
  int differ = 0;
  for (size_t i = 0; i < a.size(); ++i) differ += (a[i] + b[i]) + c[i] != a[i] + (b[i] + c[i]);
  EXPECT_GT(differ, 100) << "otherwise the test above shows nothing";
}

TEST(ThreadGroup, ManySumsInFlightFinishInAnyOrder) {
  run_members(3, [](Group& group) {
    std::vector<std::vector<float>> buffers;
    std::vector<std::unique_ptr<Reduction>> sums;
    for (size_t i = 0; i < 20; ++i) buffers.push_back(std::vector<float>(i, static_cast<float>(group.index() + 1)));
    for (auto& buffer : buffers) sums.push_back(group.all_reduce(buffer));
    for (size_t i = 20; i-- > 0;) {
      ASSERT_TRUE(sums[i]->wait(kLong).ok());
      EXPECT_EQ(buffers[i], std::vector<float>(i, 6.0f));
    }
  });
}

TEST(ThreadGroup, GatherAndBroadcastCarryBytes) {
  run_members(3, [](Group& group) {
    auto all = group.gather(text(std::string(static_cast<size_t>(group.index()), 'x')), kLong);
    ASSERT_TRUE(all.ok()) << all.error();
    for (size_t i = 0; i < 3; ++i) EXPECT_EQ(text_of(all.value()[i]), std::string(i, 'x'));
    core::Bytes word = text(group.index() == 0 ? "from the leader" : "mine");
    auto came = group.broadcast(word, kLong);
    ASSERT_TRUE(came.ok() && came.value());
    EXPECT_EQ(text_of(word), "from the leader");
    EXPECT_TRUE(group.barrier(kLong).ok());
  });
}

TEST(ThreadGroup, BroadcastThatHasNotComeMayBeAskedForAgain) {
  auto members = threads::make_group(2);
  core::Bytes word;
  auto came = members[1]->broadcast(word, milliseconds(1));
  ASSERT_TRUE(came.ok());
  EXPECT_FALSE(came.value());
  core::Bytes sent = text("now");
  ASSERT_TRUE(members[0]->broadcast(sent, kLong).ok());
  came = members[1]->broadcast(word, kLong);
  ASSERT_TRUE(came.ok() && came.value());
  EXPECT_EQ(text_of(word), "now");
}

TEST(ThreadGroup, DeadlinesPassWithTheNameOfTheSilentMember) {
  auto members = threads::make_group(3);
  std::vector<float> buffer(10);
  const auto waited = members[0]->all_reduce(buffer)->wait(milliseconds(1));
  ASSERT_FALSE(waited.ok());
  EXPECT_NE(waited.error().find("member 1"), std::string::npos) << waited.error();
  EXPECT_FALSE(members[0]->barrier(milliseconds(1)).ok());
}

TEST(ThreadGroup, AMemberThatLeavesFailsTheOthersAtOnce) {
  run_members(3, [](Group& group) {
    std::vector<float> buffer(100, 1.0f);
    ASSERT_TRUE(group.all_reduce(buffer)->wait(kLong).ok());
    if (group.index() == 1) return;  // dies
    const auto waited = group.all_reduce(buffer)->wait(kLong);
    ASSERT_FALSE(waited.ok());
    group.renew();
    EXPECT_FALSE(group.barrier(kLong).ok()) << "a gone member stays gone";
  });
}

TEST(ThreadGroup, WorksAgainWhenEveryMemberHasRenewed) {
  run_members(3, [](Group& group) {
    for (int attempt = 0; attempt < 3; ++attempt) {
      std::vector<float> buffer(100, 1.0f);
      if (group.index() != 2) {
        auto first = group.all_reduce(buffer);
        const auto waited = first->wait(kLong);
        ASSERT_FALSE(waited.ok()) << "member 2 gave up";
        EXPECT_FALSE(group.poll().ok());
      }
      group.renew();
      std::vector<float> again(7, 1.0f);
      const auto sum = group.all_reduce(again);
      ASSERT_TRUE(sum->wait(kLong).ok());
      EXPECT_EQ(again, std::vector<float>(7, 3.0f));
      EXPECT_TRUE(group.poll().ok() || group.index() != 2) << "only the fast ones may be ahead of a slow one";
      ASSERT_TRUE(group.barrier(kLong).ok());
    }
  });
}

TEST(ThreadGroup, MembersOutOfStepAreToldSo) {
  run_members(2, [](Group& group) {
    std::vector<float> buffer(group.index() == 0 ? 4 : 400);
    const auto waited = group.all_reduce(buffer)->wait(kLong);
    ASSERT_FALSE(waited.ok());
  });
  run_members(2, [](Group& group) {
    std::vector<float> buffer(4);
    const auto result = group.index() == 0 ? group.barrier(kLong) : group.all_reduce(buffer)->wait(kLong);
    ASSERT_FALSE(result.ok());
    if (group.index() == 0) {
      EXPECT_NE(result.error().find("out of step"), std::string::npos) << result.error();
    }
  });
}

TEST(ThreadGroup, PlaysTheScriptThatMpiPlays) {
  uint64_t expected = 0;
  run_members(2, [&](Group& group) {
    const uint64_t digest = play_script(group);
    if (group.index() == 0) expected = digest;
  });
  // comm/MpiGroup.SumsHaveTheBitsOfThreads prints and checks the same number.
  EXPECT_EQ(expected, kScriptDigest);
}

TEST(NcclGroup, ABuildWithoutItSaysHowToGetIt) {
  if (nccl::available()) GTEST_SKIP() << "this build has NCCL";
  try {
    nccl::make_group(local::make_group(), 0);
    FAIL() << "a group without NCCL";
  } catch (const core::UserError& error) {
    EXPECT_NE(error.hint().find("MORAINE_WITH_NCCL"), std::string::npos) << error.hint();
  }
}

TEST(LocalGroup, IsDoneAtOnce) {
  const auto group = local::make_group();
  EXPECT_EQ(group->size(), 1);
  std::vector<float> buffer = {1, 2};
  EXPECT_TRUE(group->all_reduce(buffer)->wait(milliseconds(0)).ok());
  EXPECT_EQ(buffer, (std::vector<float>{1, 2}));
  core::Bytes word = text("a");
  EXPECT_TRUE(group->broadcast(word, milliseconds(0)).value());
  EXPECT_EQ(group->gather(text("b"), milliseconds(0)).value().size(), 1u);
}

}  // namespace
}  // namespace moraine::comm
