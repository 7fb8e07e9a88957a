#include "comm/local/channel.h"

#include <gtest/gtest.h>

#include <thread>

#include "core/error.h"

namespace moraine::comm {
namespace {

using std::chrono::milliseconds;
constexpr milliseconds kLong{10'000};  // a bound for a broken channel, never waited for

Message numbered(int number) { return {MessageType::kProgress, {{"number", number}}, {}}; }

int number_in(core::Result<std::optional<Envelope>> received) {
  if (!received.ok() || !received.value()) return -1;
  return received.value()->message.body.at("number");
}

TEST(LocalChannel, DeliversInOrderAndNamesTheSender) {
  local::Star star = local::make_star(2);
  EXPECT_EQ(star.coordinator->peers(), 2);
  EXPECT_EQ(star.workers[1]->peers(), 1);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(star.workers[1]->send(0, numbered(i)).ok());
  for (int i = 0; i < 3; ++i) {
    auto received = star.coordinator->receive(kLong);
    ASSERT_TRUE(received.ok() && received.value());
    EXPECT_EQ(received.value()->peer, 2);
    EXPECT_EQ(received.value()->message.body.at("number"), i);
  }
  ASSERT_TRUE(star.coordinator->send(1, numbered(7)).ok());
  EXPECT_EQ(number_in(star.workers[0]->receive(kLong)), 7);
}

TEST(LocalChannel, SharesThePayloadInsteadOfCopyingIt) {
  local::Star star = local::make_star(1);
  const core::Bytes payload(std::vector<std::byte>(1000, std::byte{5}));
  ASSERT_TRUE(star.workers[0]->send(0, {MessageType::kResult, {}, payload}).ok());
  auto received = star.coordinator->receive(kLong);
  ASSERT_TRUE(received.ok() && received.value());
  EXPECT_EQ(received.value()->message.payload.span().data(), payload.span().data());
}

TEST(LocalChannel, ReturnsNothingWhenTheDeadlinePasses) {
  local::Star star = local::make_star(1);
  for (Channel* end : {star.coordinator.get(), star.workers[0].get()}) {
    auto received = end->receive(milliseconds(1));
    ASSERT_TRUE(received.ok());
    EXPECT_FALSE(received.value().has_value());
  }
}

TEST(LocalChannel, TellsTheCoordinatorAfterTheLastWordOfAWorkerThatLeft) {
  local::Star star = local::make_star(2);
  ASSERT_TRUE(star.workers[0]->send(0, numbered(1)).ok());
  star.workers[0].reset();
  EXPECT_EQ(number_in(star.coordinator->receive(kLong)), 1);
  auto gone = star.coordinator->receive(kLong);
  ASSERT_TRUE(gone.ok() && gone.value());
  EXPECT_EQ(gone.value()->message.type, MessageType::kGone);
  EXPECT_EQ(gone.value()->peer, 1);
  EXPECT_FALSE(star.coordinator->send(1, numbered(2)).ok());
  EXPECT_TRUE(star.coordinator->send(2, numbered(3)).ok());
}

TEST(LocalChannel, FailsForAWorkerOnceTheCoordinatorsLastWordIsRead) {
  local::Star star = local::make_star(1);
  ASSERT_TRUE(star.coordinator->send(1, numbered(1)).ok());
  star.coordinator.reset();
  EXPECT_EQ(number_in(star.workers[0]->receive(kLong)), 1);
  EXPECT_FALSE(star.workers[0]->receive(kLong).ok());
  EXPECT_FALSE(star.workers[0]->send(0, numbered(2)).ok());
}

TEST(LocalChannel, WakesAReceiverInAnotherThread) {
  local::Star star = local::make_star(4);
  std::vector<std::thread> threads;
  for (auto& worker : star.workers) {
    threads.emplace_back([&worker] {
      const int number = number_in(worker->receive(kLong));
      EXPECT_TRUE(worker->send(0, numbered(number * 10)).ok());
    });
  }
  for (int peer = 1; peer <= 4; ++peer) ASSERT_TRUE(star.coordinator->send(peer, numbered(peer)).ok());
  int sum = 0;
  for (int i = 0; i < 4; ++i) sum += number_in(star.coordinator->receive(kLong));
  EXPECT_EQ(sum, 100);
  for (auto& thread : threads) thread.join();
}

TEST(LocalChannel, RefusesAControlPartThatOtherChannelsCouldNotCarry) {
  local::Star star = local::make_star(1);
  EXPECT_TRUE(star.coordinator->send(1, {MessageType::kStop, std::string(kMaxControlBytes - 2, 'x'), {}}).ok());
  EXPECT_THROW((void)star.coordinator->send(1, {MessageType::kStop, std::string(kMaxControlBytes - 1, 'x'), {}}),
               core::InternalError);
}

}  // namespace
}  // namespace moraine::comm
