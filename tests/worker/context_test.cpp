#include "worker/context.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm/local/channel.h"
#include "core/error.h"
#include "tests/worker/tiny_job.h"

namespace moraine::worker {
namespace {

using comm::Message;
using comm::MessageType;

algorithms::Unit tiny_unit() {
  algorithms::Unit unit;
  unit.kind = "train";
  unit.label = "train/tiny";
  unit.spec = {{"steps", 11}};
  return unit;
}

core::ArtefactPtr make_artefact(int value) { return core::Artefact::create("test", {{"value", value}}, {}); }

class ChannelContextTest : public ::testing::Test {
 protected:
  ChannelContext context() { return {unit_, 1, options_, signals_, *star_.workers[0], artefacts_}; }
  void reply(MessageType type, core::Json body, core::Bytes payload = {}) {
    ASSERT_TRUE(star_.coordinator->send(1, {type, std::move(body), std::move(payload)}).ok());
  }
  /// Everything the worker has sent so far.
  std::vector<Message> sent() {
    std::vector<Message> messages;
    while (true) {
      auto received = star_.coordinator->receive(std::chrono::milliseconds(0));
      if (!received.ok() || !received.value()) return messages;
      messages.push_back(std::move(received.value()->message));
    }
  }

  comm::local::Star star_ = comm::local::make_star(1);
  algorithms::Unit unit_ = tiny_unit();
  WorkerOptions options_;
  std::atomic<int> signals_ = 0;
  ChannelContext::ArtefactCache artefacts_{size_t{1} << 20};
};

TEST_F(ChannelContextTest, FetchesAnArtefactOnceForAllUnits) {
  const core::ArtefactPtr wanted = make_artefact(1);
  reply(MessageType::kArtefact, {{"artefact", wanted->id()}}, wanted->bytes());
  EXPECT_EQ(context().artefact(wanted->id())->meta(), wanted->meta());
  EXPECT_EQ(context().artefact(wanted->id())->id(), wanted->id());
  const std::vector<Message> messages = sent();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].type, MessageType::kFetch);
  EXPECT_EQ(messages[0].body, (core::Json{{"artefact", wanted->id()}}));
}

TEST_F(ChannelContextTest, RefusesAnArtefactThatIsNotWhatItsIdSays) {
  const std::string wanted = make_artefact(1)->id();
  reply(MessageType::kArtefact, {{"artefact", wanted}}, make_artefact(2)->bytes());
  EXPECT_THROW(context().artefact(wanted), core::UserError);
  reply(MessageType::kArtefact, {{"artefact", wanted}, {"error", "disk is gone"}});
  EXPECT_THROW(context().artefact(wanted), core::IoError);
}

TEST_F(ChannelContextTest, StopDuringAFetchEndsTheUnit) {
  reply(MessageType::kStop, {{"reason", "failed"}});
  ChannelContext context = this->context();
  EXPECT_THROW(context.artefact("0"), core::StopRequested);
  EXPECT_EQ(context.stop_reason(), "failed");
}

TEST_F(ChannelContextTest, MetricsTravelInFewMessagesAndNoneIsLost) {
  ChannelContext context = this->context();
  for (int64_t step = 0; step < 1000; ++step) context.metric("score", step, 0.5 * static_cast<double>(step));
  context.metric("score", 1000, std::numeric_limits<double>::quiet_NaN());  // has no JSON form
  context.flush();
  int64_t step = 0, messages = 0;
  for (const Message& message : sent()) {
    ASSERT_EQ(message.type, MessageType::kMetrics);
    ++messages;
    for (const core::Json& record : message.body.at("records")) {
      EXPECT_EQ(
          record,
          (core::Json{
              {"unit", "train/tiny"}, {"key", "score"}, {"step", step}, {"value", 0.5 * static_cast<double>(step)}}));
      ++step;
    }
  }
  EXPECT_EQ(step, 1000);
  EXPECT_LE(messages, 10);
}

TEST_F(ChannelContextTest, OnlyTheLatestProgressIsSent) {
  ChannelContext context = this->context();
  for (int i = 1; i <= 3; ++i) context.progress(i, 3);
  context.flush();
  const std::vector<Message> messages = sent();
  ASSERT_FALSE(messages.empty());
  EXPECT_EQ(messages.back().body, (core::Json{{"unit", unit_.id()}, {"done", 3.0}, {"total", 3.0}}));
}

TEST_F(ChannelContextTest, LostCoordinatorIsACommError) {
  star_.coordinator.reset();
  EXPECT_THROW(context().artefact("0"), core::CommError);
  ChannelContext context = this->context();
  context.metric("score", 1, 1);
  EXPECT_THROW(context.flush(), core::CommError);
}

class DirectContextTest : public ::testing::Test {
 protected:
  DirectContext context() {
    return {unit_,
            1,
            options_,
            signals_,
            {.artefact = [](const std::string&) { return make_artefact(3); },
             .metric = [this](const core::metrics::Record& record) { records_.push_back(record); },
             .progress = [](double, double) {}}};
  }
  algorithms::Unit unit_ = tiny_unit();
  WorkerOptions options_;
  std::atomic<int> signals_ = 0;
  std::vector<core::metrics::Record> records_;
};

TEST_F(DirectContextTest, SecondTrainCallOfAUnitResumesBesideTheFinishedFirst) {
  const testing::TempDirectory directory;
  options_.checkpoint_directory = directory.path();
  const auto run = [&](int64_t stop_second_at) {
    DirectContext context = this->context();
    algorithms::TrainJob first = testing::tiny_job(9), second = testing::tiny_job(11);
    context.train(first);
    second.loss = [&, loss = second.loss](int64_t step, int64_t from, int64_t num) {
      if (step + 1 == stop_second_at) signals_ = 1;
      return loss(step, from, num);
    };
    context.train(second);
    EXPECT_EQ(context.checkpoints().size(), 2u);
    EXPECT_EQ(context.stats().at("resumed_steps"), stop_second_at == 0 ? 9 + 4 : 0) << "steps done before in both jobs";
    return std::pair(testing::flat(first.parameters), testing::flat(second.parameters));
  };
  EXPECT_THROW(run(4), core::StopRequested);
  signals_ = 0;
  const auto resumed = run(0);
  std::filesystem::remove_all(directory.path());
  EXPECT_EQ(resumed, run(-1));
}

TEST_F(DirectContextTest, SignalEndsWorkOutsideTraining) {
  DirectContext context = this->context();
  context.progress(1, 2);
  signals_ = 1;
  EXPECT_THROW(context.progress(2, 2), core::StopRequested);
}

TEST_F(DirectContextTest, MetricsCarryTheUnitsLabel) {
  DirectContext context = this->context();
  context.metric("score", 2, 0.5);
  context.flush();
  ASSERT_EQ(records_.size(), 1u);
  EXPECT_EQ(records_[0].unit, "train/tiny");
}

}  // namespace
}  // namespace moraine::worker
