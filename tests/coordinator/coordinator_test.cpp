#include "coordinator/coordinator.h"

#include <gmock/gmock.h>

#include <fstream>
#include <random>
#include <thread>

#include "comm/local/channel.h"
#include "coordinator/run_record.h"
#include "core/error.h"
#include "core/hash.h"
#include "toy.h"

namespace moraine::coordinator {
namespace {

using algorithms::Place;
using algorithms::Plan;
using algorithms::PlanBuilder;
using algorithms::RunState;
using algorithms::Unit;
using comm::Channel;
using comm::Message;
using comm::MessageType;
using testing::HasSubstr;

constexpr std::chrono::milliseconds kLong{30'000};  // a bound for a broken conversation, never waited for

/// Four experts, a merge on the coordinator, two evaluations of it, a report on the coordinator.
Plan toy_plan(const RunState& state) {
  PlanBuilder plan(state);
  const auto all = [&](const std::string& kind, int count, const std::vector<std::string>& inputs) {
    std::vector<std::string> results;
    for (int i = 0; i < count; ++i) {
      Unit unit = toy_unit(fmt::format("{}/{}", kind, i), count - i, inputs);
      unit.kind = kind;
      if (const auto result = plan.need(unit)) results.push_back(*result);
    }
    return results;
  };
  const auto experts = all("train", 4, {});
  if (experts.size() < 4) return plan.finish();
  const auto merged = plan.need(toy_unit("merge", 1, experts, Place::kCoordinator));
  if (!merged) return plan.finish();
  auto scores = all("evaluate", 2, {*merged});
  if (scores.size() == 2) plan.need(toy_unit("report", 1, scores, Place::kCoordinator));
  return plan.finish();
}

/// What a unit makes follows from its id and the numbers of its inputs alone.
core::ArtefactPtr toy_execute(const Unit& unit, const std::function<core::ArtefactPtr(const std::string&)>& input) {
  float sum = static_cast<float>(core::derive_seed(1, unit.id()) % 1000);
  for (const std::string& id : unit.inputs) {
    float value = 0;
    std::memcpy(&value, input(id)->file().tensors().at(0).data.data(), sizeof value);
    sum += value;
  }
  return toy_artefact(unit.id(), sum);
}

enum class Fault { kNone, kThrow, kNan, kCorrupt, kDie, kTwice, kNonsense };
using Faults = std::function<Fault(const Unit&, int attempt)>;

std::optional<Message> next(Channel& channel) {
  auto received = channel.receive(kLong);
  if (!received.ok() || !received.value()) return std::nullopt;
  return std::move(received.value()->message);
}

/// A worker as docs/recovery.md describes it, with faults. Returns when it is told to stop, refused or left alone.
void toy_worker(std::unique_ptr<Channel> channel, const Faults& faults) {
  const auto say = [&](MessageType type, core::Json body, core::Bytes payload = {}) {
    (void)channel->send(0, {type, std::move(body), std::move(payload)});
  };
  const auto fetch = [&](const std::string& id) {
    say(MessageType::kFetch, {{"artefact", id}});
    auto answer = next(*channel);
    if (!answer || answer->type != MessageType::kArtefact) throw core::CommError("no artefact came");
    return core::Artefact::parse(answer->payload, id, "fetched");
  };
  say(MessageType::kHello, {{"host", "here"}, {"pid", 1}, {"threads", 1}, {"device", "cpu"}, {"version", "1"}});
  say(MessageType::kPoll, core::Json::object());
  while (const auto message = next(*channel)) {
    if (message->type == MessageType::kRefuse) return;
    if (message->type == MessageType::kStop) return say(MessageType::kStop, {{"unit", ""}});
    if (message->type != MessageType::kLease) continue;
    const Unit unit = Unit::from_json(message->body.at("unit"));
    const int attempt = message->body.at("attempt");
    const Fault fault = faults(unit, attempt);
    if (fault == Fault::kDie) return;
    if (fault == Fault::kNonsense) say(MessageType::kProgress, {{"unit", 7}});
    try {
      if (fault == Fault::kThrow) throw std::runtime_error("injected");
      core::ArtefactPtr artefact = toy_execute(unit, fetch);
      if (fault == Fault::kNan) artefact = toy_artefact("nan", std::numeric_limits<float>::quiet_NaN());
      core::Bytes bytes = artefact->bytes();
      if (fault == Fault::kCorrupt) {
        std::vector<std::byte> copy(bytes.span().begin(), bytes.span().end());
        copy.back() ^= std::byte{1};
        bytes = core::Bytes(std::move(copy));
      }
      say(MessageType::kMetrics, {{"records",
                                   {{{"unit", unit.label}, {"key", "loss"}, {"step", 1}, {"value", 0.5}},
                                    {{"unit", unit.label}, {"key", "loss"}, {"step", 2}, {"value", nullptr}}}}});
      for (int copy = 0; copy < (fault == Fault::kTwice ? 2 : 1); ++copy) {
        say(MessageType::kResult,
            {{"unit", unit.id()},
             {"attempt", attempt},
             {"artefact", artefact->id()},
             {"seconds", 1.0},
             {"stats", {{"tokens", 10}}}},
            bytes);
      }
    } catch (const std::exception& error) {
      say(MessageType::kFailed,
          {{"unit", unit.id()}, {"attempt", attempt}, {"kind", "internal"}, {"text", error.what()}, {"hint", ""}});
    }
    say(MessageType::kPoll, core::Json::object());
  }
}

/// Thrown where a process would die; nothing in the product catches it.
struct Crash {};

/// Dies at the n-th call.
class CrashingChannel final : public Channel {
 public:
  CrashingChannel(std::unique_ptr<Channel> inner, int calls) : inner_(std::move(inner)), calls_(calls) {}
  int peers() const override { return inner_->peers(); }
  core::Result<void> send(int peer, Message message) override {
    count();
    return inner_->send(peer, std::move(message));
  }
  core::Result<std::optional<comm::Envelope>> receive(std::chrono::milliseconds deadline) override {
    auto received = inner_->receive(deadline);
    if (!received.ok() || received.value()) count();  // waiting in vain is no point in the conversation
    return received;
  }

 private:
  void count() {
    if (--calls_ == 0) throw Crash();
  }
  std::unique_ptr<Channel> inner_;
  int calls_;
};

class CoordinatorTest : public testing::Test {
 protected:
  static constexpr int kNever = 1 << 30;

  RunOutcome run(
      int workers, const Faults& faults = [](const Unit&, int) { return Fault::kNone; }, int crash_at = kNever) {
    const RunDirectory run_directory =
        RunDirectory::open(root_, {"toy", "toy", {{"seed", 1}, {"name", "toy"}, {"method", "toy"}}}, false);
    auto star = comm::local::make_star(workers);
    std::vector<std::thread> threads;
    for (auto& worker : star.workers) threads.emplace_back(toy_worker, std::move(worker), std::cref(faults));
    RunOutcome outcome{-1, "crashed", "", false};
    try {
      CrashingChannel channel(std::move(star.coordinator), crash_at);
      const RunState* state = nullptr;
      Coordinator coordinator(
          run_directory, channel, plan_,
          [&](const Unit& unit) {
            return toy_execute(unit, [&](const std::string& id) { return state->artefact(id); });
          },
          options_, signals_);
      state = &coordinator.state();
      outcome = coordinator.run();
    } catch (const Crash&) {
    }
    for (auto& thread : threads) thread.join();
    return outcome;
  }

  /// The artefact id of the report, which follows from every other result; "" while the run is not finished.
  std::string final_artefact() const {
    const RunRecord record = read_run(root_);
    const Plan plan = toy_plan(*record.state);
    return record.finished && plan.pending.empty() ? record.state->result(plan.finished_ids.back()).value() : "";
  }

  void start_anew() { std::filesystem::remove_all(root_); }

  TemporaryDirectory directory_;
  std::filesystem::path root_ = directory_.path() / "run";
  std::atomic<int> signals_ = 0;
  Coordinator::Options options_ = {{.version = "1"}};
  Core::Planner plan_ = toy_plan;
};

TEST_F(CoordinatorTest, ResultDoesNotDependOnTheNumberOfWorkers) {
  std::vector<std::string> finals;
  for (const int workers : {1, 2, 4}) {
    start_anew();
    const RunOutcome outcome = run(workers);
    ASSERT_EQ(outcome.exit_code, 0) << outcome.message;
    finals.push_back(final_artefact());
  }
  EXPECT_NE(finals[0], "");
  EXPECT_EQ(finals[0], finals[1]);
  EXPECT_EQ(finals[0], finals[2]);
}

TEST_F(CoordinatorTest, RecordsUnitsMetricsAndTimesForReports) {
  ASSERT_EQ(run(2).exit_code, 0);
  const RunRecord record = read_run(root_);
  ASSERT_EQ(record.units.size(), 8u);
  EXPECT_EQ(record.units[0].label.substr(0, 6), "train/");
  EXPECT_EQ(record.units[4].label, "merge");
  EXPECT_EQ(record.units[4].worker, 0);
  EXPECT_EQ(record.units[0].host, "here");
  EXPECT_EQ(record.units[0].stats.at("tokens"), 10);
  for (const auto& unit : record.units) EXPECT_LE(unit.started, unit.ended) << unit.label;
  EXPECT_EQ(record.epochs.size(), 1u);
  EXPECT_EQ(record.epochs[0].processes, 3);
  EXPECT_EQ(record.state->artefact(record.units[4].artefact)->meta().at("name"), record.units[4].unit);
  const std::string metrics = core::read_text(record.layout.metrics());
  EXPECT_EQ(std::count(metrics.begin(), metrics.end(), '\n'), 6) << "one finite value per worker unit";
}

TEST_F(CoordinatorTest, ReadsFailuresOfOlderJournals) {
  const RunDirectory run_directory =
      RunDirectory::open(root_, {"toy", "toy", {{"seed", 1}, {"name", "toy"}, {"method", "toy"}}}, false);
  Journal(run_directory.layout().journal())
      .append(RecordType::kFail, {{"unit", "ab"},
                                  {"label", "train/2"},
                                  {"attempt", 1},
                                  {"worker", 2},
                                  {"host", "here"},
                                  {"kind", "io"},
                                  {"text", "it broke"},
                                  {"time", 7.5}});
  const auto failures = read_run(root_).failures;
  ASSERT_EQ(failures.size(), 1u);
  EXPECT_EQ(failures[0].problem, "io");
  EXPECT_EQ(failures[0].kind, "");
  EXPECT_EQ(failures[0].started, 7.5) << "a failure without a length";
}

TEST_F(CoordinatorTest, FaultsOfWorkersChangeNothingInTheResult) {
  ASSERT_EQ(run(1).exit_code, 0);
  const std::string expected = final_artefact();
  for (const Fault fault :
       {Fault::kThrow, Fault::kNan, Fault::kCorrupt, Fault::kDie, Fault::kTwice, Fault::kNonsense}) {
    start_anew();
    const RunOutcome outcome = run(3, [fault](const Unit& unit, int attempt) {
      return attempt == 1 && unit.label == "train/2" ? fault : Fault::kNone;
    });
    ASSERT_EQ(outcome.exit_code, 0) << outcome.message;
    EXPECT_EQ(final_artefact(), expected) << "fault " << static_cast<int>(fault);
    const auto failures = read_run(root_).failures;
    ASSERT_EQ(failures.size(), fault == Fault::kTwice ? 0u : 1u) << "fault " << static_cast<int>(fault);
    for (const auto& failure : failures) {
      EXPECT_EQ(failure.label, "train/2");
      EXPECT_EQ(failure.kind, "train");
      EXPECT_NE(failure.problem, "");
      EXPECT_GT(failure.started, 0);
      EXPECT_LE(failure.started, failure.time);
    }
  }
}

TEST_F(CoordinatorTest, RandomFaultsEverywhereChangeNothingInTheResult) {
  ASSERT_EQ(run(1).exit_code, 0);
  const std::string expected = final_artefact();
  for (unsigned seed = 1; seed <= 20; ++seed) {
    start_anew();
    const RunOutcome outcome = run(4, [seed](const Unit& unit, int attempt) {
      static constexpr Fault kFaults[] = {Fault::kNone, Fault::kThrow, Fault::kNan, Fault::kCorrupt, Fault::kTwice};
      return attempt > 2 ? Fault::kNone
                         : kFaults[core::derive_seed(seed, fmt::format("{}/{}", unit.label, attempt)) % 5];
    });
    ASSERT_EQ(outcome.exit_code, 0) << "seed " << seed << ": " << outcome.message;
    ASSERT_EQ(final_artefact(), expected) << "seed " << seed;
  }
}

TEST_F(CoordinatorTest, EndsWithTheFailureOfAUnitThatNeverWorksAndKeepsTheOthers) {
  const RunOutcome outcome =
      run(2, [](const Unit& unit, int) { return unit.label == "train/3" ? Fault::kThrow : Fault::kNone; });
  EXPECT_EQ(outcome.exit_code, core::kExitInternal);
  EXPECT_THAT(outcome.message, HasSubstr("unit train/3 failed 3 times"));
  EXPECT_EQ(read_run(root_).units.size(), 3u);
  EXPECT_EQ(read_run(root_).failures.size(), 3u);
  ASSERT_EQ(run(2).exit_code, 0) << "the next start tries again";
  const RunRecord record = read_run(root_);
  EXPECT_EQ(record.units.size(), 8u);
  EXPECT_EQ(record.units.back().epoch, 2);
}

TEST_F(CoordinatorTest, EndsWhenAllWorkersHaveDied) {
  const RunOutcome outcome = run(2, [](const Unit&, int) { return Fault::kDie; });
  EXPECT_EQ(outcome.exit_code, core::kExitIo);
}

TEST_F(CoordinatorTest, EveryCrashPointLeadsToTheSameResult) {
  ASSERT_EQ(run(2).exit_code, 0);
  const std::string expected = final_artefact();
  for (int crash_at = 1;; ++crash_at) {
    start_anew();
    const bool crashed = run(
                             2, [](const Unit&, int) { return Fault::kNone; }, crash_at)
                             .exit_code == -1;
    if (crashed) {
      ASSERT_EQ(run(2).exit_code, 0) << "after a crash at call " << crash_at;
    }
    ASSERT_EQ(final_artefact(), expected) << "after a crash at call " << crash_at;
    if (!crashed) break;
    ASSERT_LT(crash_at, 1000);
  }
}

TEST_F(CoordinatorTest, CrashAfterCrashStillArrives) {
  ASSERT_EQ(run(2).exit_code, 0);
  const std::string expected = final_artefact();
  for (unsigned seed = 1; seed <= 10; ++seed) {
    start_anew();
    std::mt19937 random(seed);
    int starts = 1;
    while (run(
               2, [](const Unit&, int) { return Fault::kNone; }, 5 + static_cast<int>(random() % 12))
               .exit_code == -1) {
      ASSERT_LT(++starts, 200);
    }
    ASSERT_EQ(final_artefact(), expected) << "seed " << seed;
  }
}

TEST_F(CoordinatorTest, AnyJournalPrefixContinuesToTheSameResult) {
  ASSERT_EQ(run(2).exit_code, 0);
  const std::string expected = final_artefact();
  const auto journal = RunLayout{root_}.journal();
  const std::string whole = core::read_text(journal);
  std::mt19937 random(1);
  for (int trial = 0; trial < 15; ++trial) {
    const size_t bytes = random() % whole.size();
    std::ofstream(journal, std::ios::binary | std::ios::trunc) << whole.substr(0, bytes);
    ASSERT_EQ(run(2).exit_code, 0);
    ASSERT_EQ(final_artefact(), expected) << "journal cut to " << bytes << " bytes";
  }
}

TEST_F(CoordinatorTest, ReusesWhatIsFinishedAndRedoesOnlyDamagedArtefacts) {
  ASSERT_EQ(run(2).exit_code, 0);
  const std::string expected = final_artefact();
  const RunRecord before = read_run(root_);
  std::filesystem::resize_file(before.state->path_of(before.units[1].artefact), 10);
  ASSERT_EQ(run(2).exit_code, 0);
  const RunRecord after = read_run(root_);
  EXPECT_EQ(final_artefact(), expected);
  std::vector<std::string> redone;
  for (const auto& unit : after.units) {
    if (unit.epoch == 2) redone.push_back(unit.label);
  }
  EXPECT_THAT(redone, testing::ElementsAre(before.units[1].label));
}

TEST_F(CoordinatorTest, StopsOnASignalAndContinuesLater) {
  const RunOutcome stopped = run(2, [this](const Unit& unit, int) {
    if (unit.label == "train/1") signals_ = 1;
    return Fault::kNone;
  });
  EXPECT_EQ(stopped.exit_code, core::kExitRequeue) << stopped.message;
  EXPECT_FALSE(stopped.abort_workers);
  EXPECT_EQ(final_artefact(), "");
  signals_ = 0;
  ASSERT_EQ(run(2).exit_code, 0);
  EXPECT_NE(final_artefact(), "");
}

TEST_F(CoordinatorTest, ADiskThatCannotTakeAnArtefactEndsTheRunAndLosesNothing) {
  const auto blocker = root_ / "artefacts";
  const RunOutcome outcome = run(1, [&](const Unit& unit, int) {
    if (unit.label != "train/2") return Fault::kNone;
    std::filesystem::rename(blocker, root_ / "moved");  // a file where the directory should be: every write fails
    std::ofstream(blocker) << "in the way";
    return Fault::kNone;
  });
  EXPECT_EQ(outcome.exit_code, core::kExitIo) << outcome.message;
  EXPECT_THAT(outcome.message, HasSubstr("artefacts"));
  std::filesystem::remove(blocker);
  std::filesystem::rename(root_ / "moved", blocker);
  const size_t kept = read_run(root_).units.size();
  EXPECT_GT(kept, 0u);
  ASSERT_EQ(run(1).exit_code, 0);
  EXPECT_EQ(read_run(root_).units[kept - 1].epoch, 1);
  EXPECT_EQ(read_run(root_).units.back().epoch, 2);
}

TEST_F(CoordinatorTest, APlanThatThrowsStopsTheWorkersAndGivesItsExitCode) {
  plan_ = [](const RunState& state) -> Plan {
    Plan plan = toy_plan(state);
    if (!plan.finished.empty()) throw core::UserError("algorithms/toy: experts do not fit", "choose others");
    return plan;
  };
  const RunOutcome outcome = run(1);
  EXPECT_EQ(outcome.exit_code, core::kExitUser);
  EXPECT_EQ(outcome.message, "algorithms/toy: experts do not fit");
  EXPECT_EQ(outcome.hint, "choose others");
  EXPECT_GE(read_run(root_).units.size(), 1u) << "what came in before the next plan is kept";
}

TEST_F(CoordinatorTest, ALostEffectTakesNoOtherAlong) {
  // Its failure fits no record of the journal; the lease of the next attempt comes behind it.
  plan_ = [](const RunState& state) {
    PlanBuilder plan(state);
    plan.need(toy_unit(std::string(2 * kMaxRecordBody, 'x'), 1, {"no such artefact"}, Place::kCoordinator));
    return plan.finish();
  };
  const RunOutcome outcome = run(2);
  EXPECT_EQ(outcome.exit_code, core::kExitInternal) << outcome.message;
  EXPECT_THAT(outcome.message, HasSubstr("record is too long"));
  EXPECT_FALSE(outcome.abort_workers) << "nobody was waited for in vain";
}

TEST_F(CoordinatorTest, RecordsWhatTheCoordinatorItselfTook) {
  ASSERT_EQ(run(1).exit_code, 0);
  const RunRecord record = read_run(root_);
  EXPECT_GT(record.ends.coordinating_s, 0);
  EXPECT_GT(record.ends.planning_s, 0);
}

TEST_F(CoordinatorTest, ARecordedRunThatCannotBeReadSaysWhatToDo) {
  ASSERT_EQ(run(1).exit_code, 0);
  for (const char* damage : {"{", "null", "{}", "{\"name\": 1}"}) {
    std::ofstream(RunLayout{root_}.recipe_json(), std::ios::trunc) << damage;
    try {
      read_run(root_);
      ADD_FAILURE() << damage;
    } catch (const core::UserError& error) {
      EXPECT_THAT(error.hint(), HasSubstr("moraine run")) << damage;
    }
  }
}

TEST(ReadRun, RefusesADirectoryThatIsNoRun) {
  const TemporaryDirectory directory;
  EXPECT_THROW(read_run(directory.path()), core::UserError);
}

}  // namespace
}  // namespace moraine::coordinator
