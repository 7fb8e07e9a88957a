// Several members train one job: threads stand for processes. What they end with is compared with one process.
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/galore/galore.h"
#include "comm/local/channel.h"
#include "comm/threads/group.h"
#include "core/error.h"
#include "tests/worker/scripted_method.h"
#include "tests/worker/tiny_job.h"
#include "worker/members.h"
#include "worker/serve.h"
#include "worker/trainer.h"

namespace moraine::worker {
namespace {

using comm::Message;
using comm::MessageType;
using ::testing::HasSubstr;

struct Trained {
  std::vector<float> parameters;
  algorithms::TrainOutcome outcome;
};

/// Trains tiny_job(steps) in a group; what member 0 ended with. `change` may alter the job or site of one member.
Trained train_in_group(int size, const std::function<void(int, algorithms::TrainJob&, TrainSite&)>& change = {}) {
  Trained leader;
  std::vector<std::thread> threads;
  for (auto& member : comm::threads::make_group(size)) {
    threads.emplace_back([&, group = std::shared_ptr<comm::Group>(std::move(member))]() mutable {
      algorithms::TrainJob job = testing::tiny_job(11);
      TrainSite site;
      site.job = site.label = "tiny";
      site.metric = [](const core::metrics::Record&) {};
      site.progress = [](double, double) {};
      site.stop_requested = [] { return false; };
      site.group = group;
      const int index = group->index();
      if (change) change(index, job, site);
      try {
        TrainResult result = train(job, site);
        if (index == 0) leader = {testing::flat(job.parameters), result.outcome};
      } catch (const core::StopRequested&) {
      }
    });
  }
  for (auto& thread : threads) thread.join();
  return leader;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = a.size() == b.size() ? 0 : std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return largest;
}

// Batches of 6 sequences; 5 members leave some with one sequence, 8 some with none.
TEST(GroupTraining, EqualsOneProcessUpToTheRoundingOfSums) {
  const Trained one = train_in_group(1);
  for (const int size : {2, 3, 5, 8}) {
    const Trained group = train_in_group(size);
    // Eleven steps of AdamW at 0.05 move each parameter by about 0.5. A sum of some 12 float32 terms in another order
    // differs by a few 1e-7 relative; Adam divides by the gradient's own size, so that carries over to 0.05 * 1e-6 per
    // step where gradients do not vanish.
    EXPECT_LT(largest_difference(one.parameters, group.parameters), 2e-5) << size;
    EXPECT_NE(one.parameters, testing::flat(testing::tiny_job(11).parameters)) << "otherwise nothing was trained";
    ASSERT_EQ(one.outcome.curve.size(), group.outcome.curve.size());
    for (size_t i = 0; i < one.outcome.curve.size(); ++i)
      EXPECT_NEAR(one.outcome.curve[i].second, group.outcome.curve[i].second, 1e-5 * one.outcome.curve[i].second);
  }
}

TEST(GroupTraining, MicroBatchesBucketsAndOverlapKeepTheBits) {
  const auto with = [](size_t bucket, bool overlap, int64_t micro) {
    return train_in_group(3, [=](int, algorithms::TrainJob& job, TrainSite& site) {
      site.exchange.bucket_bytes = bucket;
      site.exchange.overlap = overlap;
      job.config.micro_batch_size = micro;
    });
  };
  for (const int64_t micro : {0, 4, 1}) {  // 4: the last micro-batch has fewer sequences than members
    const Trained usual = with(size_t{8} << 20, true, micro);
    EXPECT_EQ(usual.parameters, with(size_t{8} << 20, true, micro).parameters) << "repeated";
    EXPECT_EQ(usual.parameters, with(size_t{8} << 20, false, micro).parameters) << "no overlap";
    EXPECT_EQ(usual.parameters, with(4, true, micro).parameters) << "each tensor alone";
    EXPECT_EQ(usual.outcome.curve, with(4, false, micro).outcome.curve);
  }
}

TEST(GroupTraining, SubspacesOfGradientsAreOfTheWholeBatch) {
  const auto in_subspaces = [](int, algorithms::TrainJob& job, TrainSite&) {
    job.parameters[0].first = "inner.weight";  // [5, 4]
    algorithms::galore::GaLoreConfig config;
    config.rank = 2;
    config.update_proj_gap = 4;
    job.space = algorithms::galore::make_space(
        config, std::vector<models::Slot>{{"inner", models::SlotKind::kLinear, 4, 5}}, job.parameters);
  };
  const Trained one = train_in_group(1, in_subspaces);
  EXPECT_GT(largest_difference(one.parameters, train_in_group(1).parameters), 1e-3) << "subspaces matter";
  // As above, and a subspace turns by the rounding of its gradient over the gap between singular values.
  for (const int size : {2, 3})
    EXPECT_LT(largest_difference(one.parameters, train_in_group(size, in_subspaces).parameters), 1e-4) << size;
}

TEST(GroupTraining, AllStartFromTheLeadersParameters) {
  const Trained usual = train_in_group(2);
  const Trained disturbed = train_in_group(2, [](int index, algorithms::TrainJob& job, TrainSite&) {
    if (index == 1) at::Tensor(job.parameters[0].second.detach()).fill_(0.125f);
  });
  EXPECT_EQ(usual.parameters, disturbed.parameters);
}

TEST(GroupTraining, ParameterWithoutAnyGradientStaysWithout) {
  const auto spare = [](int, algorithms::TrainJob& job, TrainSite&) {
    const at::Tensor unused = at::full({3}, 2.0f, at::kFloat).set_requires_grad(true);
    job.parameters.emplace_back("unused", unused);
    job.config.weight_decay = 0.5;  // would move it if it were updated
  };
  const Trained group = train_in_group(2, spare);
  EXPECT_EQ(std::vector<float>(group.parameters.end() - 3, group.parameters.end()), std::vector<float>(3, 2.0f));
}

TEST(GroupTraining, AParameterThatOnlySomeMembersUseIsUpdatedByAll) {
  // The gradient of `extra` comes from sequence 0 alone, which is member 0's.
  const auto extra_of = [](int, algorithms::TrainJob& job, TrainSite&) {
    const at::Tensor extra = at::full({2}, 1.0f, at::kFloat).set_requires_grad(true);
    job.parameters.emplace_back("extra", extra);
    job.loss = [extra, loss = job.loss](int64_t step, int64_t first, int64_t num) {
      auto result = loss(step, first, num);
      if (first == 0) result.sum = result.sum.add(extra.square().sum());
      return result;
    };
  };
  const Trained one = train_in_group(1, extra_of), two = train_in_group(2, extra_of);
  EXPECT_LT(largest_difference(one.parameters, two.parameters), 2e-5);  // as above
  EXPECT_LT(two.parameters.back(), 0.9f) << "it was trained";
}

/// Every member adds its share of ten rows, each worth itself, and remembers what all were given.
class Shares final : public algorithms::Validation {
 public:
  explicit Shares(std::vector<std::vector<double>>& given) : given_(given) {}
  bool due(int64_t step) const override { return step % 3 == 0; }
  std::vector<double> sums(int64_t member, int64_t members) override {
    const int64_t begin = 10 * member / members, end = 10 * (member + 1) / members;
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) sum += static_cast<double>(row);
    return {sum, static_cast<double>(end - begin)};
  }
  bool scored(int64_t step, const std::vector<double>& sums) override {
    given_.push_back(sums);
    return step == 6;
  }

 private:
  std::vector<std::vector<double>>& given_;
};

TEST(GroupTraining, MembersScoreTheirSharesAndEndTogether) {
  for (const int size : {1, 2, 3}) {
    std::vector<std::vector<std::vector<double>>> given(static_cast<size_t>(size));
    const Trained group = train_in_group(size, [&](int index, algorithms::TrainJob& job, TrainSite&) {
      job.validation = std::make_shared<Shares>(given[static_cast<size_t>(index)]);
    });
    EXPECT_EQ(group.outcome.steps, 6);
    for (const auto& member : given) EXPECT_EQ(member, (std::vector<std::vector<double>>{{45, 10}, {45, 10}})) << size;
  }
}

TEST(GroupTraining, InterruptedAndResumedHasTheSameBits) {
  const testing::TempDirectory directory;
  const Trained whole = train_in_group(2);
  for (const int asked : {0, 1}) {  // whichever member is asked to stop, all do
    std::atomic<int> stopped = 0;
    train_in_group(2, [&](int index, algorithms::TrainJob&, TrainSite& site) {
      if (index == 0) site.checkpoint = directory.path() / "checkpoint";
      site.stop_requested = [&stopped, index, asked, steps = std::make_shared<int>(0)] {
        const bool now = ++*steps == 5 && index == asked;
        if (now) ++stopped;
        return now;
      };
    });
    EXPECT_EQ(stopped, 1);
    ASSERT_TRUE(std::filesystem::exists(directory.path() / "checkpoint"));
    int64_t first_step = -1;
    const Trained resumed = train_in_group(2, [&](int index, algorithms::TrainJob& job, TrainSite& site) {
      if (index != 0) return;
      site.checkpoint = directory.path() / "checkpoint";
      job.loss = [&first_step, loss = job.loss](int64_t step, int64_t first, int64_t num) {
        if (first_step < 0) first_step = step;
        return loss(step, first, num);
      };
    });
    EXPECT_EQ(first_step, 5);
    EXPECT_EQ(resumed.parameters, whole.parameters);
    EXPECT_EQ(resumed.outcome.curve, whole.outcome.curve);
    std::filesystem::remove(directory.path() / "checkpoint");
  }
}

/// One worker of two members behind a channel, as `moraine run` makes it.
class GroupServing : public ::testing::Test {
 protected:
  using Body = std::function<void(int member, algorithms::WorkerContext&)>;

  void say(MessageType type, core::Json body, core::Bytes payload = {}) {
    ASSERT_TRUE(star_.coordinator->send(1, {type, std::move(body), std::move(payload)}).ok());
  }
  void lease(const std::string& label, int64_t attempt = 1) {
    say(MessageType::kLease, {{"unit", testing::unit_called(label).to_json()}, {"attempt", attempt}});
  }
  /// Exit codes of leader and member; -1 when one threw. `dies`: this member leaves before it serves.
  std::vector<int> serve(const Body& body, int dies = -1) {
    std::vector<int> codes(2, -2);
    std::vector<std::thread> threads;
    for (auto& member : comm::threads::make_group(2)) {
      threads.emplace_back([&, group = std::shared_ptr<comm::Group>(std::move(member))]() mutable {
        const int index = group->index();
        if (index == dies) return;
        WorkerOptions options;
        options.faults = faults_;
        if (index == 0) options.checkpoint_directory = checkpoints_;
        options.group = std::move(group);
        const testing::ScriptedMethod method([&](algorithms::WorkerContext& context) { body(index, context); });
        try {
          codes[static_cast<size_t>(index)] = index == 0 ? worker::serve(*star_.workers[0], method, options, signals_)
                                                         : serve_member(method, options, no_signals_);
        } catch (const core::CommError&) {
          codes[static_cast<size_t>(index)] = -1;
        }
      });
    }
    for (auto& thread : threads) thread.join();
    return codes;
  }
  std::vector<Message> heard() { return testing::heard(*star_.coordinator); }
  std::vector<Message> of_type(MessageType type) {
    std::vector<Message> found = heard();
    std::erase_if(found, [&](const Message& message) { return message.type != type; });
    return found;
  }

  comm::local::Star star_ = comm::local::make_star(1);
  Faults faults_;
  std::filesystem::path checkpoints_;
  std::atomic<int> signals_ = 0;
  const std::atomic<int> no_signals_ = 0;
};

const std::vector<int> kBothWell = {core::kExitOk, core::kExitOk};

TEST_F(GroupServing, OneLeaseIsOneResultOfBothMembers) {
  const core::ArtefactPtr input = core::Artefact::create("test", {{"value", 1}}, {});
  lease("a");
  say(MessageType::kArtefact, {{"artefact", input->id()}}, input->bytes());
  lease("b");
  say(MessageType::kStop, {{"reason", "done"}});
  std::atomic<int> executed = 0, artefacts = 0;
  EXPECT_EQ(serve([&](int, algorithms::WorkerContext& context) {
              ++executed;
              artefacts += context.artefact(input->id())->id() == input->id();
              context.train(testing::tiny_job(3));
            }),
            kBothWell);
  EXPECT_EQ(executed, 4);
  EXPECT_EQ(artefacts, 4);
  const std::vector<Message> messages = heard();
  EXPECT_EQ(std::ranges::count(messages, MessageType::kResult, &Message::type), 2);
  EXPECT_EQ(std::ranges::count(messages, MessageType::kFetch, &Message::type), 1) << "the leader fetches, once";
  EXPECT_EQ(std::ranges::count(messages, MessageType::kHello, &Message::type), 1);
}

TEST_F(GroupServing, AFailureOfEitherMemberIsReportedAndTheGroupGoesOn) {
  for (const int failing : {0, 1}) {
    star_ = comm::local::make_star(1);
    lease("bad");
    lease("good");
    say(MessageType::kStop, {{"reason", "done"}});
    std::array<int, 2> calls{};
    EXPECT_EQ(serve([&](int member, algorithms::WorkerContext& context) {
                algorithms::TrainJob job = testing::tiny_job(5);
                const bool now = member == failing && calls[static_cast<size_t>(member)]++ == 0;
                job.loss = [now, loss = job.loss](int64_t step, int64_t first, int64_t num) {
                  if (now && step == 2) throw std::bad_alloc();
                  return loss(step, first, num);
                };
                context.train(job);
              }),
              kBothWell);
    const std::vector<Message> messages = heard();
    const auto failed = std::ranges::find(messages, MessageType::kFailed, &Message::type);
    ASSERT_NE(failed, messages.end());
    EXPECT_EQ(failed->body.at("kind"), "memory");
    EXPECT_THAT(failed->body.at("text").get<std::string>(),
                HasSubstr(failing == 1 ? "member 1 of the group" : "out of memory"));
    EXPECT_EQ(std::ranges::count(messages, MessageType::kResult, &Message::type), 1) << "unit good";
  }
}

TEST_F(GroupServing, NotANumberIsANumericFailureNotALostMember) {
  faults_ = Faults::parse("nan@a:1");
  lease("a");
  say(MessageType::kStop, {{"reason", "done"}});
  EXPECT_EQ(serve([](int, algorithms::WorkerContext& context) { context.train(testing::tiny_job(5)); }), kBothWell);
  const auto failed = of_type(MessageType::kFailed);
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_EQ(failed[0].body.at("kind"), "numeric");
}

TEST_F(GroupServing, ALossThatIsNotANumberAtOneMemberAloneIsNumericToo) {
  lease("a");
  say(MessageType::kStop, {{"reason", "done"}});
  serve([](int member, algorithms::WorkerContext& context) {
    algorithms::TrainJob job = testing::tiny_job(5);
    job.loss = [member, loss = job.loss](int64_t step, int64_t first, int64_t num) {
      auto result = loss(step, first, num);
      if (member == 1 && step == 1) result.sum = result.sum.mul(std::numeric_limits<double>::quiet_NaN());
      return result;
    };
    context.train(job);
  });
  const auto failed = of_type(MessageType::kFailed);
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_EQ(failed[0].body.at("kind"), "numeric");
}

TEST_F(GroupServing, ADeadMemberEndsTheWorkerInsteadOfHangingIt) {
  lease("a");
  EXPECT_EQ(serve([](int, algorithms::WorkerContext& context) { context.train(testing::tiny_job(5)); }, /*dies=*/1),
            (std::vector<int>{-1, -2}));
  EXPECT_TRUE(of_type(MessageType::kResult).empty());
}

TEST_F(GroupServing, AMemberEndsWhenItsLeaderIsGone) {
  EXPECT_EQ(serve([](int, algorithms::WorkerContext&) {}, /*dies=*/0), (std::vector<int>{-2, -1}));
}

TEST_F(GroupServing, StopDuringTrainingCheckpointsAndTheNextServeFinishesWithTheSameBits) {
  const testing::TempDirectory directory;
  checkpoints_ = directory.path();
  std::vector<float> trained;
  const auto body = [&](int64_t signal_at) {
    return [&, signal_at](int member, algorithms::WorkerContext& context) {
      algorithms::TrainJob job = testing::tiny_job(11);
      job.loss = [&, member, signal_at, loss = job.loss](int64_t step, int64_t first, int64_t num) {
        if (step == signal_at && member == 0) signals_ = 1;
        return loss(step, first, num);
      };
      context.train(job);
      if (member == 0) trained = testing::flat(job.parameters);
    };
  };
  lease("a");
  EXPECT_EQ(serve(body(4)), (std::vector<int>{core::kExitRequeue, core::kExitRequeue}));
  signals_ = 0;
  std::vector<float> resumed;
  for (int whole = 0; whole < 2; ++whole) {
    star_ = comm::local::make_star(1);
    lease("a");
    say(MessageType::kStop, {{"reason", "done"}});
    EXPECT_EQ(serve(body(-1)), kBothWell);
    if (whole == 0) resumed = trained;
  }
  EXPECT_EQ(resumed, trained);
}

TEST_F(GroupServing, StopOutsideTrainingEndsTheOtherMemberToo) {
  lease("a");
  say(MessageType::kStop, {{"reason", "stop"}});
  EXPECT_EQ(serve([](int, algorithms::WorkerContext& context) {
              while (true) context.progress(1, 2);
            }),
            (std::vector<int>{core::kExitRequeue, core::kExitRequeue}));
}

}  // namespace
}  // namespace moraine::worker
