// What the coordinator itself costs per unit: runs of 100, 1,000 and 10,000 units of a scripted method whose workers
// take no time. Prints one Markdown table. bench_planning [directory of the runs = the system's temporary directory]
//
// Shapes: `fan-out` = all units at once, then one merge; `rounds` = 20 rounds, each of its clients and a merge, each
// round over the one before; `chains` = 10 chains side by side, each link over the one before. Workers: 8.
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include <unistd.h>

#include <fmt/format.h>

#include "coordinator/coordinator.h"
#include "core/log.h"

namespace moraine {
namespace {

using algorithms::Plan;
using algorithms::PlanBuilder;
using algorithms::RunState;
using algorithms::Unit;

constexpr int kWorkers = 8, kRounds = 20, kChains = 10;

double thread_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double rss_bytes() {
  std::ifstream statm("/proc/self/statm");
  double pages = 0, resident = 0;
  statm >> pages >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGE_SIZE));
}

/// Needs a unit with a spec of the size of real ones.
std::optional<std::string> need(PlanBuilder& plan, const std::string& kind, const std::string& label,
                                std::vector<std::string> inputs) {
  return plan.need(label, [&]() -> Unit {
    return {.kind = kind,
            .label = label,
            .spec = {{"label", label},
                     {"seed", 1},
                     {"data", std::string(64, 'a')},
                     {"model", std::string(64, 'b')},
                     {"train",
                      {{"steps", 100},
                       {"batch_size", 16},
                       {"optimizer", "adamw"},
                       {"learning_rate", 1e-3},
                       {"dtype", "float32"}}},
                     {"compute", {{"threads", 1}, {"device", "cpu"}}}},
            .inputs = std::move(inputs),
            .cost = 1e9};
  });
}

Plan fan_out(const RunState& state, int units) {
  PlanBuilder plan(state);
  std::vector<std::string> results;
  for (int i = 0; i + 1 < units; ++i) {
    if (auto result = need(plan, "train", fmt::format("train/{}", i), {})) results.push_back(*result);
  }
  if (static_cast<int>(results.size()) == units - 1) need(plan, "merge", "merge", {results.front()});
  return plan.finish();
}

Plan rounds(const RunState& state, int units) {
  PlanBuilder plan(state);
  std::vector<std::string> before;
  for (int round = 0; round < kRounds; ++round) {
    std::string last;
    int done = 0;
    const int clients = units / kRounds - 1;
    for (int i = 0; i < clients; ++i) {
      const auto result = need(plan, "train", fmt::format("round {}/{}", round, i), before);
      done += result ? 1 : 0;
      if (result) last = *result;
    }
    if (done < clients) break;
    const auto merged = need(plan, "merge", fmt::format("merge {}", round), {last});
    if (!merged) break;
    before = {*merged};
  }
  return plan.finish();
}

Plan chains(const RunState& state, int units) {
  PlanBuilder plan(state);
  for (int chain = 0; chain < kChains; ++chain) {
    std::vector<std::string> before;
    for (int link = 0; link < units / kChains; ++link) {
      const auto result = need(plan, "link", fmt::format("chain {}/{}", chain, link), before);
      if (!result) break;
      before = {*result};
    }
  }
  return plan.finish();
}

/// Workers that answer at once. What making their artefacts costs is not the coordinator's.
class InstantWorkers final : public comm::Channel {
 public:
  InstantWorkers() {
    for (int worker = 1; worker <= kWorkers; ++worker) {
      say(worker, comm::MessageType::kHello,
          {{"host", "here"}, {"pid", 1}, {"threads", 1}, {"device", "cpu"}, {"version", ""}});
      say(worker, comm::MessageType::kPoll, core::Json::object());
    }
  }
  int peers() const override { return kWorkers; }
  core::Result<void> send(int peer, comm::Message message) override {
    const double begin = thread_seconds();
    if (message.type == comm::MessageType::kLease) {
      const Unit unit = Unit::from_json(message.body.at("unit"));
      const auto artefact = core::Artefact::create("bench", {{"label", unit.label}}, {});
      said_.push_back({peer,
                       {comm::MessageType::kResult,
                        {{"unit", unit.id()}, {"attempt", 1}, {"artefact", artefact->id()}, {"seconds", 0.001}},
                        artefact->bytes()}});
      say(peer, comm::MessageType::kPoll, core::Json::object());
    }
    seconds_ += thread_seconds() - begin;
    return {};
  }
  core::Result<std::optional<comm::Envelope>> receive(std::chrono::milliseconds) override {
    if (said_.empty()) return std::optional<comm::Envelope>();
    std::optional<comm::Envelope> first(std::move(said_.front()));
    said_.pop_front();
    return first;
  }
  double seconds() const { return seconds_; }

 private:
  void say(int worker, comm::MessageType type, core::Json body) {
    said_.push_back({worker, {type, std::move(body), {}}});
  }
  std::deque<comm::Envelope> said_;
  double seconds_ = 0;
};

using Shape = Plan (*)(const RunState&, int units);

void measure(const std::string& name, Shape shape, int units, const std::filesystem::path& directory) {
  std::filesystem::remove_all(directory);
  const auto run_directory = coordinator::RunDirectory::open(directory, {"", "", core::Json::object()}, false);
  const std::atomic<int> signals{0};
  const double memory = rss_bytes(), begin = thread_seconds();
  double planning = 0;
  int plans = 0;
  InstantWorkers channel;
  coordinator::Coordinator run(
      run_directory, channel,
      [&](const RunState& state) {
        const double start = thread_seconds();
        Plan plan = shape(state, units);
        planning += thread_seconds() - start;
        ++plans;
        return plan;
      },
      [](const Unit&) { return core::ArtefactPtr(); }, {}, signals);
  const auto outcome = run.run();
  const double seconds = thread_seconds() - begin - channel.seconds();
  if (outcome.exit_code != 0) throw std::runtime_error(outcome.message);
  std::printf("| %s | %d | %.2f | %.3f | %d | %.0f %% | %.1f |\n", name.c_str(), units, seconds, 1000 * seconds / units,
              plans, 100 * planning / seconds, (rss_bytes() - memory) / 1024 / units);
  std::fflush(stdout);
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace moraine

int main(int argc, char** argv) {
  using namespace moraine;
  core::log::configure(core::log::Level::kWarn, "");
  const std::filesystem::path parent =
      argc > 1 ? std::filesystem::path(argv[1]) : std::filesystem::temp_directory_path();
  std::printf(
      "| shape | units | coordinator, s of CPU | ms per unit | plans | of it planning | memory, KiB per unit |\n");
  std::printf("|---|---|---|---|---|---|---|\n");
  for (const int units : {100, 1000, 10'000}) {
    measure("fan-out", fan_out, units, parent / fmt::format("moraine_planning_{}", getpid()));
    measure("rounds", rounds, units, parent / fmt::format("moraine_planning_{}", getpid()));
    measure("chains", chains, units, parent / fmt::format("moraine_planning_{}", getpid()));
  }
}
