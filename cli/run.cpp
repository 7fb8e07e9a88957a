#include <unistd.h>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <thread>

#include <ATen/Parallel.h>
#include <CLI/CLI.hpp>

#include "algorithms/register.h"
#include "cli/command.h"
#include "cli/output.h"
#include "cli/published.h"
#include "cli/run_summary.h"
#include "cli/version.h"
#include "comm/local/channel.h"
#include "comm/mpi/channel.h"
#include "comm/mpi/group.h"
#include "comm/mpi/session.h"
#include "comm/nccl/group.h"
#include "comm/threads/group.h"
#include "coordinator/coordinator.h"
#include "coordinator/report/table.h"
#include "core/config.h"
#include "core/error.h"
#include "core/file.h"
#include "core/log.h"
#include "core/terminal.h"
#include "worker/members.h"
#include "worker/serve.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;

constexpr std::chrono::seconds kLongestLeave{120};  // for workers that were told to end
constexpr size_t kLongestReason = 4096;

struct RunArguments : RecipeArguments {
  std::string run_dir;
  bool accept_changes = false;
};

fs::path run_directory_of(const RunArguments& arguments, const algorithms::RunConfig& run) {
  if (!arguments.run_dir.empty()) return fs::absolute(arguments.run_dir);
  return fs::absolute(run.run_dir.empty() ? fs::path("runs") / run.name : fs::path(run.run_dir));
}

worker::WorkerOptions worker_options(const algorithms::RunConfig& run, const fs::path& directory,
                                     const std::string& name, int on_host) {
  worker::WorkerOptions options;
  options.name = name;
  options.version = build_version();
  options.threads = static_cast<int>(run.workers.threads);
  options.arithmetic = run.workers.arithmetic;
  options.workers_on_host = on_host;
  options.device = run.workers.device;
  options.exchange.bucket_bytes = static_cast<size_t>(run.workers.bucket_mib) << 20;
  options.exchange.overlap = run.workers.overlap;
  options.exchange.deadline = options.group_deadline;
  options.checkpoint_directory = coordinator::RunLayout{directory}.root / "checkpoints";
  return options;
}

// The run is done and kept whether or not its tables can be written; if not, the outcome says so.
void print_result(const core::Json& summary, const fs::path& directory, coordinator::RunOutcome& outcome) {
  std::string text = report::render_text(summary, table_style());
  if (const auto hash = summary.at("hash").get<std::string>(); !hash.empty()) text += "merged artefact: " + hash + "\n";
  text += fmt::format("report: {}\n", (directory / "report.html").string());
  try {
    print(text);
  } catch (const core::IoError& error) {
    outcome.exit_code = error.exit_code();
    outcome.message = error.what();
    outcome.hint =
        fmt::format("the run is finished and kept: `moraine report {}` prints its tables", directory.string());
  } catch (const ReaderGone&) {
    core::log::warn("nobody reads standard output any more: report={}", (directory / "report.html").string());
  }
}

void finish_run(const algorithms::Method& method, const fs::path& directory, coordinator::RunOutcome& outcome) {
  const bool complete = outcome.exit_code == core::kExitOk;
  const coordinator::RunRecord run = coordinator::read_run(directory);
  if (complete) {
    method.publish(*run.state, directory);
    record_published(directory);
  }
  const core::Json summary = summarize(method, run);
  write_report(summary, directory);
  if (complete) print_result(summary, directory, outcome);
}

int report_outcome(const coordinator::RunOutcome& outcome) {
  if (outcome.exit_code != core::kExitOk) {
    std::fprintf(stderr, "moraine: %s\n", outcome.message.c_str());
    if (!outcome.hint.empty()) std::fprintf(stderr, "  hint: %s\n", outcome.hint.c_str());
  }
  return outcome.exit_code;
}

coordinator::Coordinator::Options coordinator_options(const algorithms::ParsedRecipe& recipe) {
  const algorithms::Method& method = *recipe.method;
  coordinator::Coordinator::Options options;
  options.max_attempts = static_cast<int>(recipe.run.workers.retries);
  options.version = build_version();
  options.recipe = algorithms::recipe_identity(recipe);
  options.device = recipe.run.workers.device;
  options.threads = recipe.run.workers.threads;
  options.check_result = [&](const algorithms::Unit& unit, const core::Artefact& artefact) {
    method.check_result(unit, artefact);
  };
  options.missing_result = [&](const algorithms::RunState& state) { return method.missing_result(state); };
  options.terminal = core::is_terminal(STDERR_FILENO);
  return options;
}

/// Ends the process, or all of a job, without waiting for what hangs.
using EndAtOnce = std::function<void(int exit_code)>;

// The coordinator's part, over whatever channel. Returns the exit code; errors of set-up are thrown.
int coordinate(const algorithms::ParsedRecipe& recipe, const RunArguments& arguments, const fs::path& directory,
               comm::Channel& channel, const EndAtOnce& end_at_once) {
  const coordinator::Recipe identity{core::read_text(arguments.recipe), core::resolved_yaml(recipe.resolved),
                                     recipe.values, algorithms::find_method(recipe.run.method).identity};
  const auto run_directory = coordinator::RunDirectory::open(directory, identity, arguments.accept_changes);
  write_plan_file(recipe, directory);
  worker::WorkerOptions options = worker_options(recipe.run, directory, "coordinator", 1);
  options.device = "cpu";  // merges are light and need every artefact, which the coordinator has
  const coordinator::Coordinator* running = nullptr;
  const auto execute = [&](const algorithms::Unit& unit) {
    at::set_num_threads(options.threads);
    worker::DirectContext context(unit, 1, options, g_signals,
                                  {.artefact = [&](const std::string& id) { return running->state().artefact(id); },
                                   .metric = [](const core::metrics::Record&) {},
                                   .progress = [](double, double) {}});
    return recipe.method->execute(unit, context);
  };
  coordinator::Coordinator run(
      run_directory, channel, [&](const algorithms::RunState& state) { return recipe.method->plan(state); }, execute,
      coordinator_options(recipe), g_signals);
  running = &run;
  coordinator::RunOutcome outcome = run.run();
  try {
    finish_run(*recipe.method, directory, outcome);
  } catch (const std::exception& error) {
    const coordinator::RunOutcome failed = coordinator::outcome_of(error);
    if (outcome.exit_code == core::kExitOk)
      outcome = {failed.exit_code, failed.message, failed.hint, outcome.abort_workers};
    else  // how the run ended is the news, not that its report is missing
      core::log::error("the report was not written: {}", error.what());
  }
  const int code = report_outcome(outcome);
  if (outcome.abort_workers) end_at_once(code);
  return code;
}

algorithms::ParsedRecipe load(const RunArguments& arguments) {
  auto recipe = algorithms::load_recipe(arguments.recipe, arguments.overrides);
  worker::check_options(worker_options(recipe.run, run_directory_of(arguments, recipe.run), "worker", 1));
  recipe.method->open_inputs();
  return recipe;
}

/// The threads of a run in one process.
class Crew {
 public:
  void start(std::function<void()> work) {
    {
      const std::lock_guard lock(mutex_);
      ++working_;
    }
    try {
      threads_.emplace_back([this, work = std::move(work)]() mutable {
        work();
        work = nullptr;  // what it held is gone before the thread counts as ended
        const std::lock_guard lock(mutex_);
        --working_;
        changed_.notify_all();
      });
    } catch (...) {
      const std::lock_guard lock(mutex_);
      --working_;
      throw;
    }
  }

  /// Whether all have ended before the deadline; they are joined then.
  bool join(std::chrono::seconds deadline) {
    {
      std::unique_lock lock(mutex_);
      if (!changed_.wait_for(lock, deadline, [&] { return working_ == 0; })) return false;
    }
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    return true;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int working_ = 0;
  std::vector<std::thread> threads_;
};

void say_gone(comm::Channel& channel, const coordinator::RunOutcome& why) {
  const auto said =
      channel.send(0, {comm::MessageType::kGone,
                       {{"reason", why.message.substr(0, kLongestReason)}, {"code", why.exit_code}, {"hint", why.hint}},
                       {}});
  if (!said.ok()) core::log::debug("the coordinator has left: {}", said.error());
}

int64_t local_members(const algorithms::WorkersConfig& how) {
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t fitting = std::max<int64_t>(1, cores / how.threads / how.group_size) * how.group_size;
  return how.local ? how.local : fitting;
}

// Everything in one process: the members of workers are threads, each with its own thread count.
int run_alone(const RunArguments& arguments) {
  core::log::configure(g_log_level, "coordinator");
  const auto recipe = load(arguments);
  const fs::path directory = run_directory_of(arguments, recipe.run);
  const algorithms::WorkersConfig& how = recipe.run.workers;
  if (how.group_size > 1 && how.device == "cuda")
    throw core::UserError("cli: a group on GPUs needs a process for each of its members",
                          "start the run with mpirun, or set workers.group_size=1");
  const int64_t members = local_members(how);
  const int count = algorithms::num_workers(how, members);
  static const std::atomic<int> no_signals{0};  // the coordinator passes stop requests on
  std::atomic<bool> leaving{false};             // after an error of the coordinator, which speaks for all
  // One public model and one reader per data set for all. Members of a group load in step with each other, so they
  // cannot share: one would wait for another's load, which waits for the first.
  const auto objects = std::make_shared<worker::ObjectCache>(32);
  const std::string identity = algorithms::recipe_identity(recipe);
  const auto work = [&](int worker, std::shared_ptr<comm::Group> group, comm::Channel* channel) {
    try {
      auto options =
          worker_options(recipe.run, directory, fmt::format("worker {}", worker + 1), static_cast<int>(members));
      options.recipe = identity;
      if (group->size() == 1) options.objects = objects;
      if (group->index() > 0) options.checkpoint_directory.clear();
      options.group = std::move(group);
      if (channel)
        worker::serve(*channel, *recipe.method, options, no_signals);
      else
        worker::serve_member(*recipe.method, options, no_signals);
    } catch (const std::exception& error) {
      if (channel) say_gone(*channel, coordinator::outcome_of(error));
      if (!leaving) core::log::error("worker lost: worker={} reason={}", worker + 1, error.what());
    }
  };
  auto star = comm::local::make_star(count);
  Crew crew;
  const auto end_at_once = [](int code) {
    std::fflush(nullptr);
    std::_Exit(code);
  };
  const auto dismiss = [&](int code) {
    star.coordinator.reset();
    star.workers.clear();
    if (crew.join(kLongestLeave)) return;
    core::log::error("a worker does not end: waited_s={}", kLongestLeave.count());
    end_at_once(code);
  };
  try {
    for (int worker = 0; worker < count; ++worker) {
      auto group = comm::threads::make_group(static_cast<int>(how.group_size));
      for (size_t member = 0; member < group.size(); ++member) {
        // std::function wants to be copied: one owner for what the thread takes along.
        const std::shared_ptr<comm::Group> own = std::move(group[member]);
        const std::shared_ptr<comm::Channel> channel =
            member == 0 ? std::move(star.workers[static_cast<size_t>(worker)]) : nullptr;
        crew.start([&work, worker, own, channel] { work(worker, own, channel.get()); });
      }
    }
    const int code = coordinate(recipe, arguments, directory, *star.coordinator, end_at_once);
    dismiss(code);
    return code;
  } catch (const std::exception& error) {
    leaving = true;
    dismiss(coordinator::outcome_of(error).exit_code);
    throw;
  }
}

// A working process of an MPI job, alone or as a member of a group.
int work(comm::mpi::Session& session, const algorithms::ParsedRecipe& recipe, const fs::path& directory, int members,
         comm::Channel& channel) {
  auto options =
      worker_options(recipe.run, directory, fmt::format("worker {}", 1 + (session.index() - 1) / members), 1);
  options.device_index = session.local_worker();
  options.recipe = algorithms::recipe_identity(recipe);
  auto group = comm::mpi::make_group(session, members);
  if (members > 1 && options.device == "cuda") group = comm::nccl::make_group(std::move(group), options.device_index);
  options.group = std::move(group);
  try {
    if (options.group->index() == 0) return worker::serve(channel, *recipe.method, options, g_signals);
    options.checkpoint_directory.clear();
    return worker::serve_member(*recipe.method, options, g_signals);
  } catch (const std::exception& error) {
    if (members == 1) throw;
    // The others of the group wait for this process and MPI cannot go on without them: the job ends.
    const coordinator::RunOutcome outcome = coordinator::outcome_of(error);
    core::log::error("process {} ends the job, its group cannot go on without it", session.index());
    session.abort(report_outcome(outcome));
  }
}

// One process speaks for all: a worker tells the coordinator why it ends, and says it itself only if that does not end.
int work_in_job(comm::mpi::Session& session, const RunArguments& arguments) {
  using namespace std::chrono_literals;
  const auto channel = comm::mpi::open_channel(session);
  try {
    const auto recipe = load(arguments);
    const int members = static_cast<int>(recipe.run.workers.group_size);
    algorithms::num_workers(recipe.run.workers, session.size() - 1);
    return work(session, recipe, run_directory_of(arguments, recipe.run), members, *channel);
  } catch (const std::exception& error) {
    const coordinator::RunOutcome outcome = coordinator::outcome_of(error);
    say_gone(*channel, outcome);
    const auto heard = channel->receive(10s);
    const bool spoken_for = heard.ok() && heard.value() &&
                            (heard.value()->message.type == comm::MessageType::kRefuse ||
                             heard.value()->message.type == comm::MessageType::kStop);
    return spoken_for ? outcome.exit_code : report_outcome(outcome);
  }
}

int coordinate_job(comm::mpi::Session& session, const RunArguments& arguments) {
  auto channel = comm::mpi::open_channel(session);
  try {
    if (session.size() < 2)
      throw core::UserError("cli: mpirun started one process: process 0 coordinates and nobody works",
                            "mpirun -n 2 or more; or leave mpirun out to run everything in one process");
    const auto recipe = load(arguments);
    algorithms::num_workers(recipe.run.workers, session.size() - 1);
    channel.reset();
    channel = comm::mpi::open_channel(session, static_cast<int>(recipe.run.workers.group_size));  // leaders speak
    return coordinate(recipe, arguments, run_directory_of(arguments, recipe.run), *channel,
                      [&](int code) { session.abort(code); });
  } catch (const std::exception& error) {
    const coordinator::RunOutcome outcome = coordinator::outcome_of(error);
    for (int peer = 1; channel && peer <= channel->peers(); ++peer) {
      const auto sent = channel->send(
          peer,
          {comm::MessageType::kRefuse,
           {{"code", outcome.exit_code}, {"text", outcome.message.substr(0, kLongestReason)}, {"hint", outcome.hint}},
           {}});
      if (!sent.ok()) core::log::warn("worker not told: worker={} reason={}", peer, sent.error());
    }
    return report_outcome(outcome);
  }
}

// A process of an MPI job: 0 coordinates, the others work.
int run_in_job(const RunArguments& arguments) {
  comm::mpi::Session session;
  const bool coordinates = session.index() == 0;
  core::log::configure(g_log_level,
                       coordinates ? "coordinator" : fmt::format("{}/worker{}", session.host(), session.index()));
  const int code = coordinates ? coordinate_job(session, arguments) : work_in_job(session, arguments);
  session.leave(code, kLongestLeave);
  return code;
}

}  // namespace

void add_run(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand(
      "run", "Run a recipe: alone, or as one process of an mpirun job; continues what is unfinished");
  auto arguments = std::make_shared<RunArguments>();
  add_recipe_arguments(*command, *arguments);
  command->add_option("--run-dir", arguments->run_dir, "Run directory (default: the recipe's run_dir, or runs/<name>)");
  command->add_flag("--accept-changes", arguments->accept_changes,
                    "Keep a run directory whose recipe changed; unchanged units are reused");
  std::string known = "Methods:";
  for (const auto& entry : algorithms::methods()) known += fmt::format("\n  {}: {}", entry.name, entry.summary);
  command->footer(known +
                  "\nExamples:\n  moraine run recipes/quickstart.yaml\n  mpirun -n 5 moraine run "
                  "recipes/flexmore/domains.yaml train.steps=500 top_k=3\n"
                  "Stopped or killed? Type the same line again.");
  command->callback([=, &exit_code] {
    install_signal_handlers();
    exit_code = comm::mpi::launched() ? run_in_job(*arguments) : run_alone(*arguments);
  });
}

}  // namespace moraine::cli
