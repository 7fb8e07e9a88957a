#include "worker/serve.h"

#include <csignal>
#include <filesystem>
#include <functional>
#include <new>
#include <system_error>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm/local/channel.h"
#include "core/error.h"
#include "models/tensor_io.h"
#include "tests/worker/scripted_method.h"
#include "tests/worker/tiny_job.h"

namespace moraine::worker {
namespace {

using comm::Message;
using comm::MessageType;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// Messages keep their order and sending does not wait, so a whole conversation can be laid out before serve() runs.
class Serve : public ::testing::Test {
 protected:
  void say(MessageType type, core::Json body) {
    ASSERT_TRUE(star_.coordinator->send(1, {type, std::move(body), {}}).ok());
  }
  void lease(const std::string& label, int64_t attempt = 1) {
    say(MessageType::kLease, {{"unit", testing::unit_called(label).to_json()}, {"attempt", attempt}});
  }
  int serve(const std::function<void(algorithms::WorkerContext&)>& body) {
    return worker::serve(*star_.workers[0], testing::ScriptedMethod(body), options_, signals_);
  }
  std::vector<Message> heard() { return testing::heard(*star_.coordinator); }
  std::vector<MessageType> heard_types() {
    std::vector<MessageType> types;
    for (const Message& message : heard()) types.push_back(message.type);
    return types;
  }
  Message only(MessageType type) {
    Message found;
    int count = 0;
    for (Message& message : heard()) {
      if (message.type != type) continue;
      found = std::move(message);
      ++count;
    }
    EXPECT_EQ(count, 1);
    return found;
  }

  comm::local::Star star_ = comm::local::make_star(1);
  WorkerOptions options_;
  std::atomic<int> signals_ = 0;
};

TEST_F(Serve, ConversationOfTwoUnitsEndsWithZeroWhenTheRunIsDone) {
  lease("a");
  lease("b");
  say(MessageType::kStop, {{"reason", "done"}});
  EXPECT_EQ(serve([](auto&) {}), core::kExitOk);
  EXPECT_THAT(heard_types(),
              ElementsAre(MessageType::kHello, MessageType::kPoll, MessageType::kResult, MessageType::kPoll,
                          MessageType::kResult, MessageType::kPoll, MessageType::kStop));
}

TEST_F(Serve, ResultCarriesTheArtefactAndWhatWasMeasured) {
  lease("a", 2);
  say(MessageType::kStop, {{"reason", "done"}});
  serve([](auto&) {});
  const Message result = only(MessageType::kResult);
  EXPECT_EQ(result.body.at("unit"), testing::unit_called("a").id());
  EXPECT_EQ(result.body.at("attempt"), 2);
  EXPECT_GE(result.body.at("seconds").get<double>(), 0);
  EXPECT_GT(result.body.at("stats").at("peak_rss_bytes").get<int64_t>(), 0);
  EXPECT_EQ(core::Artefact::parse(result.payload, result.body.at("artefact"), "test")->meta().at("label"), "a");
}

TEST_F(Serve, EveryKindOfFailureIsReportedAndTheWorkerGoesOn) {
  struct Case {
    std::string kind, text;
    std::function<void()> fail;
  };
  const std::vector<Case> cases = {
      {"user", "no such key", [] { throw core::UserError("no such key", "a hint"); }},
      {"io", "disk full", [] { throw core::IoError("disk full"); }},
      {"io", "late", [] { throw core::TimeoutError("late"); }},
      {"io", "No such file", [] { (void)std::filesystem::file_size("/does/not/exist"); }},
      {"numeric", "NaN", [] { throw core::NumericError("NaN"); }},
      {"internal", "broken", [] { throw core::InternalError("broken"); }},
      {"internal", "surprise", [] { throw std::logic_error("surprise\nsecond line"); }},
      {"internal", "std::exception", [] { throw 7; }},
      {"internal", "mat1 and mat2",
       [] {
         at::matmul(at::empty({2, 3}), at::empty({2, 3}));
       }},
      {"memory", "out of memory", [] { throw std::bad_alloc(); }},
      {"memory", "DefaultCPUAllocator", [] { at::empty({int64_t{1} << 52}); }},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.kind + ": " + c.text);
    star_ = comm::local::make_star(1);
    lease("bad");
    lease("good");
    say(MessageType::kStop, {{"reason", "done"}});
    int calls = 0;
    EXPECT_EQ(serve([&](auto&) {
                if (calls++ == 0) c.fail();
              }),
              core::kExitOk);
    const std::vector<Message> messages = heard();
    ASSERT_EQ(messages.size(), 7u);
    const core::Json& failed = messages[2].body;
    EXPECT_EQ(messages[2].type, MessageType::kFailed);
    EXPECT_EQ(failed.at("unit"), testing::unit_called("bad").id());
    EXPECT_EQ(failed.at("kind"), c.kind);
    EXPECT_THAT(failed.at("text").get<std::string>(), HasSubstr(c.text));
    EXPECT_EQ(failed.at("text").get<std::string>().find('\n'), std::string::npos);
    EXPECT_EQ(messages[4].type, MessageType::kResult);
  }
}

TEST_F(Serve, OutOfMemoryEmptiesTheCaches) {
  const auto before = options_.objects->get("base", [] { return std::make_shared<int>(1); });
  lease("a");
  say(MessageType::kStop, {{"reason", "done"}});
  serve([](auto&) { throw std::bad_alloc(); });
  EXPECT_NE(options_.objects->get("base", [] { return std::make_shared<int>(2); }), before);
}

TEST_F(Serve, SignalDuringTrainingCheckpointsAndTheNextServeFinishesWithTheSameBits) {
  const testing::TempDirectory directory;
  options_.checkpoint_directory = directory.path();
  std::vector<float> trained;
  int64_t first_step = -1;
  const auto body = [&](int64_t signal_at) {
    return [&, signal_at](algorithms::WorkerContext& context) {
      algorithms::TrainJob job = testing::tiny_job(11);
      first_step = -1;
      job.loss = [&, signal_at, loss = job.loss](int64_t step, int64_t first, int64_t num) {
        if (first_step < 0) first_step = step;
        if (step == signal_at) signals_ = 1;
        return loss(step, first, num);
      };
      context.train(job);
      trained = testing::flat(job.parameters);
    };
  };
  lease("a");
  EXPECT_EQ(serve(body(4)), core::kExitRequeue);
  EXPECT_EQ(only(MessageType::kStop).body.at("unit"), testing::unit_called("a").id());

  signals_ = 0;
  star_ = comm::local::make_star(1);
  lease("a");
  say(MessageType::kStop, {{"reason", "done"}});
  EXPECT_EQ(serve(body(-1)), core::kExitOk);
  EXPECT_EQ(first_step, 5);
  const std::vector<float> resumed = trained;
  EXPECT_TRUE(std::filesystem::is_empty(directory.path())) << "an accepted unit leaves no checkpoint behind";

  star_ = comm::local::make_star(1);
  lease("a");
  say(MessageType::kStop, {{"reason", "done"}});
  serve(body(-1));
  EXPECT_EQ(first_step, 0);
  EXPECT_EQ(resumed, trained);
}

TEST_F(Serve, StopOfTheCoordinatorReachesARunningUnit) {
  lease("a");
  say(MessageType::kStop, {{"reason", "stop"}});
  EXPECT_EQ(serve([](algorithms::WorkerContext& context) {
              while (true) context.progress(1, 2);  // looks for a stop about four times a second
            }),
            core::kExitRequeue);
  EXPECT_EQ(only(MessageType::kStop).body.at("unit"), testing::unit_called("a").id());
}

TEST_F(Serve, IdleWorkerEndsWithTheCodeOfTheReason) {
  for (const auto& [reason, code] :
       {std::pair("done", core::kExitOk), {"failed", core::kExitOk}, {"stop", core::kExitRequeue}}) {
    star_ = comm::local::make_star(1);
    say(MessageType::kStop, {{"reason", reason}});
    EXPECT_EQ(serve([](auto&) {}), code) << reason;
  }
  star_ = comm::local::make_star(1);
  signals_ = 1;
  EXPECT_EQ(serve([](auto&) {}), core::kExitRequeue) << "a signal while idle";
}

TEST_F(Serve, RefusedWorkerEndsWithTheCodeItIsGiven) {
  say(MessageType::kRefuse, {{"code", 2}, {"text", "another version"}});
  EXPECT_EQ(serve([](auto&) {}), 2);
}

TEST_F(Serve, LostCoordinatorIsACommErrorAlsoInTheMiddleOfAUnit) {
  lease("a");
  EXPECT_THROW(serve([&](algorithms::WorkerContext& context) {
                 star_.coordinator.reset();
                 context.artefact("0");
               }),
               core::CommError);
  EXPECT_THROW(serve([](auto&) {}), core::CommError);
}

TEST_F(Serve, CudaAskedForButAbsentIsAUserErrorBeforeAnythingIsSaid) {
  options_.device = "cuda";
  try {
    check_options(options_);
    GTEST_SKIP() << "this machine has a CUDA device";
  } catch (const core::UserError&) {
  }
  try {
    serve([](auto&) {});
    FAIL() << "CUDA was not missed";
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.what(), HasSubstr("CUDA asked for but absent"));
    EXPECT_THAT(error.hint(), HasSubstr("workers.device=cpu"));
  }
  EXPECT_TRUE(heard().empty());
}

TEST_F(Serve, InjectedFailuresHitTheirUnitAndAttemptOnly) {
  options_.faults = Faults::parse("throw@a:1,nan@b:2");
  const auto kind_of = [&](const std::string& label, int64_t attempt) -> std::string {
    star_ = comm::local::make_star(1);
    lease(label, attempt);
    say(MessageType::kStop, {{"reason", "done"}});
    serve([](algorithms::WorkerContext& context) { context.train(testing::tiny_job(2)); });
    for (const Message& message : heard()) {
      if (message.type == MessageType::kFailed) return message.body.at("kind");
    }
    return "none";
  };
  EXPECT_EQ(kind_of("a", 1), "io");
  EXPECT_EQ(kind_of("a", 2), "none");
  EXPECT_EQ(kind_of("b", 2), "numeric");
  EXPECT_EQ(kind_of("b", 3), "none");
  EXPECT_EQ(kind_of("c", 1), "none");
}

TEST(Faults, ExitKillsTheProcessAfterItsStep) {
  const Faults faults = Faults::parse("exit@train/x:3");
  faults.after_step("train/x", 2);
  EXPECT_EXIT(faults.after_step("train/x", 3), ::testing::KilledBySignal(SIGKILL), "");
}

TEST(Faults, MalformedListsAreUserErrors) {
  for (const char* text : {"nan", "nan@x", "nan@x:0", "nan@x:-1", "boom@x:1", "throw@x:1,,", ":1@x"})
    EXPECT_THROW(Faults::parse(text), core::UserError) << text;
  EXPECT_NO_THROW(Faults::parse(""));
}

}  // namespace
}  // namespace moraine::worker
