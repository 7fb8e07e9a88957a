#include "coordinator/core.h"

#include <gmock/gmock.h>

#include "core/error.h"
#include "toy.h"

namespace moraine::coordinator {
namespace {

using algorithms::Place;
using algorithms::Plan;
using algorithms::PlanBuilder;
using algorithms::RunState;
using algorithms::Unit;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

template <typename... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <typename... F>
Overloaded(F...) -> Overloaded<F...>;

/// Drives a Core by hand and writes down what it wants done, one line per effect. Accept is carried out at once, in
/// memory.
class Script {
 public:
  Script(int workers, std::vector<Unit> units, std::optional<Unit> merge = std::nullopt)
      : Script(workers, [units, merge](const RunState& done) { return fan_out(done, units, merge); }) {}
  Script(int workers, Core::Planner plan) : Script(workers, std::move(plan), Core::Options()) {}
  Script(int workers, Core::Planner plan, Core::Options options)
      : core_(workers, with_version(std::move(options)), std::move(plan), state) {}

  /// All units, then the merge of their results.
  static Plan fan_out(const RunState& done, const std::vector<Unit>& units, std::optional<Unit> merge) {
    PlanBuilder plan(done);
    std::vector<std::string> inputs;
    for (const Unit& unit : units) {
      if (const auto result = plan.need(unit)) inputs.push_back(*result);
    }
    if (merge && inputs.size() == units.size()) {
      merge->inputs = inputs;
      plan.need(*merge);
    }
    return plan.finish();
  }

  std::vector<std::string> feed(const Event& event) {
    std::vector<std::string> lines;
    for (const Effect& effect : core_.step(now, event))
      std::visit([&](const auto& what) { note(what, lines); }, effect);
    return lines;
  }
  std::vector<std::string> start() { return feed(event::Start{}); }
  std::vector<std::string> join(int worker) {
    auto lines = feed(event::Hello{worker, {"host", 1, 1, "cpu", "1"}});
    for (auto& line : feed(event::Poll{worker})) lines.push_back(line);
    return lines;
  }
  std::vector<std::string> poll(int worker) { return feed(event::Poll{worker}); }
  std::vector<std::string> finish(int worker, const std::string& label, int attempt = 1) {
    return feed(event::Finished{worker, ids.at(label), attempt, toy_artefact(label), 1, {}});
  }
  std::vector<std::string> fail(int worker, const std::string& label, int attempt, const std::string& kind = "io") {
    return feed(event::Failed{worker, ids.at(label), attempt, {kind, "it broke", "mend it"}});
  }

  ToyState state;
  double now = 0;
  std::map<std::string, std::string> ids;  // label -> unit id, of leased units
  std::string logged;
  RunOutcome outcome;
  Core& core() { return core_; }

 private:
  static Core::Options with_version(Core::Options options) {
    options.version = "1";
    return options;
  }
  void note(const effect::Lease& lease, std::vector<std::string>& lines) {
    ids[lease.unit.label] = lease.unit.id();
    lines.push_back(fmt::format("lease {} {} {}", lease.worker, lease.unit.label, lease.attempt));
  }
  void note(const effect::Accept& accept, std::vector<std::string>& lines) {
    lines.push_back("accept " + accept.unit.label);
    state.artefacts[accept.result.artefact->id()] = accept.result.artefact;
    state.results[accept.result.unit] = accept.result.artefact->id();
    for (auto& line : feed(event::Accepted{accept.result.unit})) lines.push_back(line);
  }
  void note(const effect::RecordFailure& failure, std::vector<std::string>& lines) {
    lines.push_back(
        fmt::format("failure {} {} {} {}", failure.worker, failure.unit.label, failure.attempt, failure.problem.kind));
  }
  void note(const effect::Refuse& refuse, std::vector<std::string>& lines) {
    lines.push_back(fmt::format("refuse {} {}", refuse.worker, refuse.code));
  }
  void note(const effect::StopWorkers& stop, std::vector<std::string>& lines) {
    lines.push_back("stop " + stop.reason);
  }
  void note(const effect::Log& line, std::vector<std::string>&) { logged += line.text + "\n"; }
  void note(const effect::Finish& end, std::vector<std::string>& lines) {
    outcome = end.outcome;
    lines.push_back(fmt::format("finish {}{}", outcome.exit_code, outcome.abort_workers ? " abort" : ""));
  }

  Core core_;
};

TEST(Core, LeasesTheLongestUnitFirstThenMergesAndFinishes) {
  Script script(1, {toy_unit("short", 1), toy_unit("long", 9)}, toy_unit("merge", 1, {}, Place::kCoordinator));
  EXPECT_THAT(script.start(), IsEmpty());
  EXPECT_THAT(script.join(1), ElementsAre("lease 1 long 1"));
  EXPECT_THAT(script.finish(1, "long"), ElementsAre("accept long"));
  EXPECT_THAT(script.poll(1), ElementsAre("lease 1 short 1"));
  EXPECT_THAT(script.finish(1, "short"), ElementsAre("accept short", "lease 0 merge 1"));
  EXPECT_THAT(script.poll(1), IsEmpty());
  EXPECT_THAT(script.finish(0, "merge"), ElementsAre("accept merge", "stop done", "finish 0"));
  EXPECT_THAT(script.poll(1), IsEmpty()) << "nothing happens after the end";
}

TEST(Core, LeasesWhatOthersWaitForBeforeALongerUnit) {
  algorithms::Unit link = toy_unit("link", 2);
  link.follows = 8e9;
  Script script(1, {toy_unit("evaluation", 9), link});
  script.start();
  EXPECT_THAT(script.join(1), ElementsAre("lease 1 link 1"));
}

TEST(Core, LeasesAUnitThatBecomesReadyToAWorkerThatAlreadyWaits) {
  Script script(2, {toy_unit("base")}, toy_unit("after"));
  script.start();
  EXPECT_THAT(script.join(1), ElementsAre("lease 1 base 1"));
  EXPECT_THAT(script.join(2), IsEmpty());
  EXPECT_THAT(script.finish(1, "base"), ElementsAre("accept base", "lease 2 after 1"));
}

TEST(Core, FinishesAtOnceWhenEverythingIsDoneAlready) {
  Script script(1, {toy_unit("a")});
  script.state.results[toy_unit("a").id()] = toy_artefact("a")->id();
  EXPECT_THAT(script.start(), ElementsAre("stop done", "finish 0"));
}

TEST(Core, RefusesToRunWithoutWorkers) {
  Script script(0, {toy_unit("a")});
  EXPECT_THAT(script.start(), ElementsAre("stop failed", "finish 2"));
}

TEST(Core, RetriesAFailedUnitOnAnotherWorkerFirst) {
  Script script(2, {toy_unit("a", 5)});
  script.start();
  script.join(1);
  EXPECT_THAT(script.fail(1, "a", 1), ElementsAre("failure 1 a 1 io"));
  EXPECT_THAT(script.poll(1), IsEmpty()) << "worker 2 has not tried it yet";
  EXPECT_THAT(script.join(2), ElementsAre("lease 2 a 2"));
  EXPECT_THAT(script.fail(2, "a", 2), ElementsAre("failure 2 a 2 io", "lease 1 a 3"))
      << "everybody has tried: anyone may";
  EXPECT_THAT(script.finish(1, "a", 3), ElementsAre("accept a", "stop done", "finish 0"));
}

TEST(Core, GivesUpAfterThreeAttemptsWithTheReasonOfTheLast) {
  Script script(1, {toy_unit("bad", 9), toy_unit("never started", 1)});
  script.start();
  script.join(1);
  for (int attempt = 1; attempt <= 2; ++attempt) {
    EXPECT_THAT(script.fail(1, "bad", attempt, "io"), ElementsAre(fmt::format("failure 1 bad {} io", attempt)));
    EXPECT_THAT(script.poll(1), ElementsAre(fmt::format("lease 1 bad {}", attempt + 1))) << "nobody else could try it";
  }
  EXPECT_THAT(script.fail(1, "bad", 3, "numeric"), ElementsAre("failure 1 bad 3 numeric", "stop failed", "finish 4"));
  EXPECT_THAT(script.outcome.message, HasSubstr("unit bad failed 3 times, last on worker 1 (host): it broke"));
  EXPECT_EQ(script.outcome.hint, "mend it");
}

TEST(Core, WaitsForRunningUnitsBeforeItEndsAFailedRun) {
  Script script(4, {toy_unit("bad", 9), toy_unit("slow", 5), toy_unit("next", 1)});
  script.start();
  script.join(1);
  EXPECT_THAT(script.join(2), ElementsAre("lease 2 slow 1"));
  script.fail(1, "bad", 1);
  EXPECT_THAT(script.join(3), ElementsAre("lease 3 bad 2"));
  script.fail(3, "bad", 2);
  EXPECT_THAT(script.join(4), ElementsAre("lease 4 bad 3"));
  EXPECT_THAT(script.fail(4, "bad", 3), ElementsAre("failure 4 bad 3 io")) << "slow is still running";
  EXPECT_THAT(script.poll(1), IsEmpty()) << "nothing new starts";
  EXPECT_THAT(script.finish(2, "slow"), ElementsAre("accept slow", "stop failed", "finish 3"));
}

TEST(Core, MapsTheKindOfTheLastFailureToTheExitCode) {
  for (const auto& [kind, code] : std::map<std::string, int>{{"user", 2},
                                                             {"io", 3},
                                                             {"memory", 3},
                                                             {"artefact", 3},
                                                             {"gone", 3},
                                                             {"numeric", 4},
                                                             {"internal", 70},
                                                             {"something new", 70}}) {
    EXPECT_EQ(exit_code_of(kind), code) << kind;
  }
}

TEST(Core, RetriesOnTheCoordinatorButNotWhatTheUserMustMend) {
  for (const auto& [kind, lines] : std::map<std::string, std::vector<std::string>>{
           {"io", {"failure 0 merge 1 io", "lease 0 merge 2"}},
           {"user", {"failure 0 merge 1 user", "stop failed", "finish 2"}}}) {
    Script script(1, {toy_unit("merge", 1, {}, Place::kCoordinator)});
    EXPECT_THAT(script.start(), ElementsAre("lease 0 merge 1"));
    EXPECT_EQ(script.fail(0, "merge", 1, kind), lines);
  }
}

TEST(Core, RunsOneUnitAtATimeOnTheCoordinator) {
  Script script(1, {toy_unit("x", 1, {}, Place::kCoordinator), toy_unit("y", 2, {}, Place::kCoordinator)});
  EXPECT_THAT(script.start(), ElementsAre("lease 0 y 1"));
  EXPECT_THAT(script.finish(0, "y"), ElementsAre("accept y", "lease 0 x 1"));
}

TEST(Core, RefusesResultsThatAreNotLeasedAndIgnoresDuplicates) {
  Script script(2, {toy_unit("a", 9), toy_unit("b", 5)});
  script.start();
  script.join(1);
  script.join(2);
  EXPECT_THAT(script.finish(2, "a"), IsEmpty()) << "leased to worker 1";
  EXPECT_THAT(script.finish(1, "a", 2), IsEmpty()) << "no such attempt";
  EXPECT_THAT(script.logged, HasSubstr("result refused"));
  EXPECT_THAT(script.finish(1, "a"), ElementsAre("accept a"));
  script.logged.clear();
  EXPECT_THAT(script.finish(1, "a"), IsEmpty());
  EXPECT_THAT(script.logged, HasSubstr("duplicate"));
  EXPECT_THAT(script.fail(1, "a", 1), IsEmpty());
}

TEST(Core, KeepsOneLeasePerWorkerWhenAPollComesTwice) {
  Script script(1, {toy_unit("a"), toy_unit("b")});
  script.start();
  EXPECT_EQ(script.join(1).size(), 1u);
  EXPECT_THAT(script.poll(1), IsEmpty());
}

TEST(Core, LeasesTheUnitOfALostWorkerToAnother) {
  Script script(2, {toy_unit("a")});
  script.start();
  script.join(1);
  script.join(2);
  EXPECT_THAT(script.feed(event::Gone{1, "connection lost"}), ElementsAre("failure 1 a 1 gone", "lease 2 a 2"));
  EXPECT_THAT(script.feed(event::Gone{2, "connection lost"}),
              ElementsAre("failure 2 a 2 gone", "stop stop", "finish 3"));
}

TEST(Core, WithdrawsTheUnitOfASilentWorkerAndTakesTheWorkerBackWhenItSpeaks) {
  Script script(2, {toy_unit("a")});
  script.start();
  script.join(1);
  script.join(2);
  script.now = 1800;
  EXPECT_THAT(script.feed(event::Tick{}), IsEmpty());
  script.feed(event::Progress{1, script.ids.at("a"), 1, 2});
  script.now = 3600;
  EXPECT_THAT(script.feed(event::Tick{}), IsEmpty()) << "progress is a sign of life";
  script.now = 3601;
  EXPECT_THAT(script.feed(event::Tick{}), ElementsAre("failure 1 a 1 gone", "lease 2 a 2"));
  EXPECT_THAT(script.finish(1, "a"), IsEmpty()) << "too late";
  script.poll(1);
  EXPECT_THAT(script.fail(2, "a", 2), ElementsAre("failure 2 a 2 io", "lease 1 a 3"));
}

TEST(Core, StopsAfterEveryWorkerHasAnswered) {
  Script script(3, {toy_unit("a", 4), toy_unit("b", 3), toy_unit("c", 2), toy_unit("d", 1)});
  script.start();
  script.join(1);
  script.join(2);  // worker 3 never came up
  EXPECT_THAT(script.feed(event::StopRequested{}), ElementsAre("stop stop"));
  EXPECT_THAT(script.finish(1, "a"), ElementsAre("accept a")) << "a result on its way still counts";
  EXPECT_THAT(script.poll(1), IsEmpty());
  EXPECT_THAT(script.feed(event::Stopped{1}), IsEmpty());
  EXPECT_THAT(script.feed(event::Stopped{2}), ElementsAre("finish 75"));
}

TEST(Core, EndsTheJobWhenAWorkerDoesNotStopInTime) {
  Script script(1, {toy_unit("a")});
  script.start();
  script.join(1);
  script.feed(event::StopRequested{});
  script.now = 59;
  EXPECT_THAT(script.feed(event::Tick{}), IsEmpty());
  script.now = 60;
  EXPECT_THAT(script.feed(event::Tick{}), ElementsAre("finish 75 abort"));
}

TEST(Core, GivesAUnitBackWithoutBlameWhenItsWorkerStopsByItself) {
  Script script(2, {toy_unit("a")});
  script.start();
  script.join(1);
  script.join(2);
  EXPECT_THAT(script.feed(event::Stopped{1}), ElementsAre("lease 2 a 1"));
  EXPECT_THAT(script.feed(event::Stopped{2}), ElementsAre("stop stop", "finish 75"));
}

TEST(Core, StopsWorkersWhenSomethingElseBreaksAndEndsWithThatCode) {
  Script script(1, {toy_unit("a")});
  script.start();
  script.join(1);
  EXPECT_THAT(script.feed(event::Broken{{core::kExitIo, "disk full", "free space"}}), ElementsAre("stop stop"));
  EXPECT_THAT(script.feed(event::StopRequested{}), IsEmpty());
  EXPECT_THAT(script.feed(event::Stopped{1}), ElementsAre("finish 3"));
  EXPECT_EQ(script.outcome.message, "disk full");
}

TEST(Core, RefusesWorkersOfAnotherVersion) {
  Script script(2, {toy_unit("a")});
  script.start();
  EXPECT_THAT(script.feed(event::Hello{1, {"host", 1, 1, "cpu", "2"}}), ElementsAre("refuse 1 2"));
  EXPECT_THAT(script.poll(1), IsEmpty());
  EXPECT_THAT(script.feed(event::Poll{2}), ElementsAre("refuse 2 70", "stop stop", "finish 2"))
      << "the cause of the first's leaving";
}

TEST(Core, RefusesWorkersOfAnotherRecipeDeviceOrThreadCountAndEndsWithTheCause) {
  const std::map<std::string, WorkerInfo> others = {
      {"another recipe", {"host", 1, 2, "cpu", "1", "other"}},
      {"another device", {"host", 1, 2, "cuda", "1", "ours"}},
      {"another number of threads", {"host", 1, 4, "cpu", "1", "ours"}},
      {"another build", {"host", 1, 2, "cpu", "2", "ours"}},
  };
  for (const auto& [what, info] : others) {
    Core::Options options;
    options.recipe = "ours";
    options.device = "cpu";
    options.threads = 2;
    Script script(
        1, [](const RunState& done) { return Script::fan_out(done, {toy_unit("a")}, {}); }, options);
    script.start();
    EXPECT_THAT(script.feed(event::Hello{1, info}), ElementsAre("refuse 1 2", "stop stop", "finish 2")) << what;
    EXPECT_THAT(script.outcome.message, HasSubstr(what));
    EXPECT_NE(script.outcome.hint, "") << what;
    EXPECT_FALSE(script.outcome.abort_workers);
  }
}

TEST(Core, EndsWithTheReasonOfWorkersThatFailBeforeTheyGreet) {
  Script script(2, {toy_unit("a")});
  script.start();
  EXPECT_THAT(script.feed(event::Gone{1, "no such file: recipe.yaml", core::kExitUser, "check the path"}), IsEmpty());
  EXPECT_THAT(script.feed(event::Gone{2, "no such file: recipe.yaml", core::kExitUser, "check the path"}),
              ElementsAre("stop stop", "finish 2"));
  EXPECT_THAT(script.outcome.message, HasSubstr("no such file: recipe.yaml"));
  EXPECT_EQ(script.outcome.hint, "check the path");
}

TEST(Core, DoesNotWaitForEverForWorkersThatNeverGreet) {
  Script script(2, {toy_unit("a")});
  script.start();
  script.now = 600;
  EXPECT_THAT(script.feed(event::Tick{}), IsEmpty());
  script.now = 601;
  EXPECT_THAT(script.feed(event::Tick{}), ElementsAre("stop stop", "finish 3 abort"))
      << "they may hang for ever, so the job is ended";
}

TEST(Core, AWorkerThatNeverGreetedKeepsNoFailedUnit) {
  Script script(2, {toy_unit("a")});
  script.start();
  script.join(1);
  script.fail(1, "a", 1);
  EXPECT_THAT(script.poll(1), IsEmpty()) << "worker 2 may still come and try it";
  script.now = 601;
  EXPECT_THAT(script.feed(event::Tick{}), ElementsAre("lease 1 a 2"));
  EXPECT_THAT(script.join(2), IsEmpty()) << "late, but welcome";
  EXPECT_THAT(script.fail(1, "a", 2), ElementsAre("failure 1 a 2 io", "lease 2 a 3"));
}

TEST(Core, AWorkerThatFallsSilentBetweenUnitsKeepsNoFailedUnit) {
  Script script(2, {toy_unit("a", 2), toy_unit("b", 1)});
  script.start();
  script.join(1);
  script.join(2);
  script.finish(2, "b");  // and never asks again
  script.now = 1000;
  script.fail(1, "a", 1);
  script.poll(1);
  script.now = 1801;
  EXPECT_THAT(script.feed(event::Tick{}), ElementsAre("lease 1 a 2"));
}

TEST(Core, AResultThatTheMethodRefusesFailsItsAttemptAndNotTheRun) {
  Core::Options options;
  int checks = 0;
  options.check_result = [&](const Unit& unit, const core::Artefact&) {
    if (++checks == 1) throw core::UserError("tensor w of " + unit.label + " has another shape", "look at the site");
    if (checks == 2) throw std::out_of_range("map::at");
  };
  Script script(
      1, [](const RunState& done) { return Script::fan_out(done, {toy_unit("a")}, {}); }, options);
  script.start();
  script.join(1);
  EXPECT_THAT(script.finish(1, "a"), ElementsAre("failure 1 a 1 artefact"));
  script.poll(1);
  EXPECT_THAT(script.finish(1, "a", 2), ElementsAre("failure 1 a 2 artefact"));
  script.poll(1);
  EXPECT_THAT(script.finish(1, "a", 3), ElementsAre("accept a", "stop done", "finish 0"));
}

TEST(Core, ARunWhoseResultIsAbsentDoesNotEndWithZero) {
  Core::Options options;
  options.missing_result = [](const RunState&) { return std::optional<std::string>("there is no mixture"); };
  Script script(
      1, [](const RunState& done) { return Script::fan_out(done, {toy_unit("a")}, {}); }, options);
  script.start();
  script.join(1);
  EXPECT_THAT(script.finish(1, "a"), ElementsAre("accept a", "stop failed", "finish 2"));
  EXPECT_EQ(script.outcome.message, "there is no mixture");
}

TEST(Core, APlanThatThrowsStopsTheWorkersAndEndsWithItsCode) {
  bool broken = false;
  Script script(1, [&](const RunState& done) {
    if (broken) throw core::UserError("experts do not fit");
    return Script::fan_out(done, {toy_unit("a", 2), toy_unit("b")}, {});
  });
  script.start();
  script.join(1);
  broken = true;
  EXPECT_THAT(script.finish(1, "a"), ElementsAre("accept a", "stop stop"));
  EXPECT_THAT(script.feed(event::Stopped{1}), ElementsAre("finish 2"));
}

/// A plan of `units` units that takes one second of a clock, and workers whose units take no time.
struct PlanCounter {
  explicit PlanCounter(int units) {
    for (int i = 0; i < units; ++i)
      all.push_back(toy_unit(fmt::format("{:04}", i), units - i));  // leased in this order
  }
  Core::Planner planner() {
    return [this](const RunState& done) {
      ++plans;
      clock += 1;
      return Script::fan_out(done, all, toy_unit("merge"));
    };
  }
  Core::Options options() {
    Core::Options options;
    options.clock = [this] { return clock; };
    return options;
  }
  std::vector<Unit> all;
  int plans = 0;
  double clock = 0;
};

TEST(Core, PlansFollowTheTimeTheyTakeNotTheNumberOfResults) {
  PlanCounter counter(200);
  Script script(1, counter.planner(), counter.options());
  script.start();
  script.join(1);
  for (int i = 0; i < 200; ++i) {
    script.now += 0.1;
    script.finish(1, fmt::format("{:04}", i));
    const auto next = script.poll(1);
    ASSERT_EQ(next.size(), 1u) << "no worker waits while a unit is ready: " << i;
  }
  EXPECT_LE(counter.plans, 4) << "20 s of results, each plan takes a second";
  EXPECT_THAT(script.finish(1, "merge"), ElementsAre("accept merge", "stop done", "finish 0"));
}

TEST(Core, AWorkerWaitsForAPlanNoLongerThanTwiceWhatOneTakes) {
  PlanCounter counter(2);
  Script script(3, counter.planner(), counter.options());
  script.start();
  script.join(1);
  script.join(2);
  script.join(3);
  script.finish(1, "0000");
  EXPECT_EQ(counter.plans, 1) << "the first plan has just been made";
  script.now = 3;
  script.feed(event::Tick{});
  EXPECT_EQ(counter.plans, 2);
}

TEST(Core, SaysOnceWhichWorkersHaveNothingToDo) {
  Script script(3, {toy_unit("a", 2), toy_unit("b", 1)});
  script.start();
  for (int worker = 1; worker <= 3; ++worker) script.join(worker);
  EXPECT_THAT(script.logged, HasSubstr("nothing to do yet for workers=3 units=2"));
  script.logged.clear();
  script.poll(3);
  EXPECT_EQ(script.logged, "");
  script.finish(1, "a");
  script.finish(2, "b");
  EXPECT_THAT(script.logged, HasSubstr("never had a unit: workers=3 most_units_at_once=2"));
}

TEST(Core, CatchesAPlanThatAsksForAFinishedUnit) {
  Script script(1, [](const RunState&) {
    return Plan{.pending = {toy_unit("again")}, .finished = {}, .pending_ids = {toy_unit("again").id()}};
  });
  script.start();
  script.join(1);
  EXPECT_THAT(script.finish(1, "again"), ElementsAre("accept again", "stop stop"));
  EXPECT_THAT(script.feed(event::Stopped{1}), ElementsAre("finish 70"));
}

TEST(Core, MeasuresWorkInPredictedSecondsIncludingEarlierStarts) {
  Script script(1, {toy_unit("done", 4), toy_unit("half", 2), toy_unit("waiting", 1)});
  script.state.results[toy_unit("done").id()] = toy_artefact("done")->id();
  script.start();
  script.join(1);
  script.feed(event::Progress{1, script.ids.at("half"), 5, 10});
  script.feed(event::Progress{1, "unknown", 5, 10});
  const Core::Work work = script.core().work();
  EXPECT_DOUBLE_EQ(work.done, 5);
  EXPECT_DOUBLE_EQ(work.total, 7);
  EXPECT_EQ(work.running, "half");
}

TEST(Core, KnowsNoRemainingTimeBeforeAnythingWasMeasured) {
  Script script(1, {toy_unit("a", 4)});
  script.start();
  script.join(1);
  EXPECT_FALSE(std::isfinite(script.core().work().remaining_s));
  script.finish(1, "a");
  EXPECT_DOUBLE_EQ(script.core().work().remaining_s, 0);
}

TEST(Core, CorrectsTheRemainingTimeByTheSpeedOfRunningUnits) {
  Script script(2, {toy_unit("a", 4), toy_unit("b", 3), toy_unit("c", 2)});
  script.start();
  script.join(1);
  script.join(2);
  script.now = 100;
  script.feed(event::Progress{1, script.ids.at("a"), 1, 10});
  script.now = 110;
  script.feed(event::Progress{1, script.ids.at("a"), 2, 10});
  // A tenth of a took 10 s: a takes 100 s (4 were predicted) and has 80 left; b should have ended, c waits for it.
  EXPECT_DOUBLE_EQ(script.core().work().remaining_s, 80);
  script.now = 115;
  script.feed(event::Tick{});
  EXPECT_DOUBLE_EQ(script.core().work().remaining_s, 75);
  script.now = 1000;
  script.feed(event::Tick{});
  EXPECT_DOUBLE_EQ(script.core().work().remaining_s, 150) << "a and b are overdue by 1000 / 10 s, c takes 50";
}

TEST(Core, CountsTheSpeedOfAResumedUnitFromItsFirstReport) {
  Script script(1, {toy_unit("a", 4)});
  script.start();
  script.join(1);
  script.now = 1;
  script.feed(event::Progress{1, script.ids.at("a"), 80, 100});
  script.now = 11;
  script.feed(event::Progress{1, script.ids.at("a"), 90, 100});
  EXPECT_NEAR(script.core().work().remaining_s, 10, 1e-9) << "a tenth in 10 s; counting the first 80 would say 1 s";
}

}  // namespace
}  // namespace moraine::coordinator
