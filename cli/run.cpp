#include <unistd.h>
#include <cstdio>
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
  options.threads = static_cast<int>(run.workers.threads);
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

// The coordinator's part, over whatever channel. Returns the exit code; errors of set-up are thrown.
coordinator::RunOutcome coordinate(const algorithms::ParsedRecipe& recipe, const RunArguments& arguments,
                                   const fs::path& directory, comm::Channel& channel) {
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
  coordinator::Coordinator::Options how;
  how.max_attempts = static_cast<int>(recipe.run.workers.retries);
  how.version = MORAINE_VERSION;
  how.terminal = core::is_terminal(STDERR_FILENO);
  coordinator::Coordinator run(
      run_directory, channel, [&](const algorithms::RunState& state) { return recipe.method->plan(state); }, execute,
      how, g_signals);
  running = &run;
  coordinator::RunOutcome outcome = run.run();
  finish_run(*recipe.method, directory, outcome);
  return outcome;
}

int report_outcome(const coordinator::RunOutcome& outcome) {
  if (outcome.exit_code != core::kExitOk) {
    std::fprintf(stderr, "moraine: %s\n", outcome.message.c_str());
    if (!outcome.hint.empty()) std::fprintf(stderr, "  hint: %s\n", outcome.hint.c_str());
  }
  return outcome.exit_code;
}

algorithms::ParsedRecipe load(const RunArguments& arguments) {
  auto recipe = algorithms::load_recipe(arguments.recipe, arguments.overrides);
  worker::check_options(worker_options(recipe.run, run_directory_of(arguments, recipe.run), "worker", 1));
  recipe.method->open_inputs();
  return recipe;
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
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t fitting = std::max<int64_t>(1, cores / how.threads / how.group_size) * how.group_size;
  const int64_t members = how.local ? how.local : fitting;
  const int count = algorithms::num_workers(how, members);
  auto star = comm::local::make_star(count);
  static const std::atomic<int> no_signals{0};  // the coordinator passes stop requests on
  std::atomic<bool> leaving{false};             // after an error of the coordinator, which speaks for all
  // One public model and one reader per data set for all. Members of a group load in step with each other, so they
  // cannot share: one would wait for another's load, which waits for the first.
  const auto objects = std::make_shared<worker::ObjectCache>(32);
  std::vector<std::thread> threads;
  const auto start = [&](int worker, std::shared_ptr<comm::Group> group, std::unique_ptr<comm::Channel> channel) {
    threads.emplace_back([&, worker, group = std::move(group), channel = std::move(channel)]() mutable {
      const std::string name = fmt::format("worker {}", worker + 1);
      try {
        auto options = worker_options(recipe.run, directory, name, static_cast<int>(members));
        if (group->size() == 1) options.objects = objects;
        if (group->index() > 0) options.checkpoint_directory.clear();
        options.group = std::move(group);
        if (channel)
          worker::serve(*channel, *recipe.method, options, no_signals);
        else
          worker::serve_member(*recipe.method, options, no_signals);
      } catch (const core::Error& error) {
        if (!leaving) core::log::error("worker lost: worker={} reason={}", worker + 1, error.what());
      }
      channel.reset();
    });
  };
  for (int worker = 0; worker < count; ++worker) {
    auto group = comm::threads::make_group(static_cast<int>(how.group_size));
    for (size_t member = 0; member < group.size(); ++member)
      start(worker, std::move(group[member]),
            member == 0 ? std::move(star.workers[static_cast<size_t>(worker)]) : nullptr);
  }
  const auto join = [&] {
    star.coordinator.reset();
    for (auto& thread : threads) thread.join();
  };
  try {
    const coordinator::RunOutcome outcome = coordinate(recipe, arguments, directory, *star.coordinator);
    join();
    return report_outcome(outcome);
  } catch (...) {
    leaving = true;
    join();
    throw;
  }
}

// A working process of an MPI job, alone or as a member of a group.
int work_in_job(comm::mpi::Session& session, const algorithms::ParsedRecipe& recipe, const fs::path& directory,
                int members, comm::Channel& channel) {
  auto options =
      worker_options(recipe.run, directory, fmt::format("worker {}", 1 + (session.index() - 1) / members), 1);
  options.device_index = session.local_worker();
  auto group = comm::mpi::make_group(session, members);
  if (members > 1 && options.device == "cuda") group = comm::nccl::make_group(std::move(group), options.device_index);
  options.group = std::move(group);
  try {
    if (options.group->index() == 0) return worker::serve(channel, *recipe.method, options, g_signals);
    options.checkpoint_directory.clear();
    return worker::serve_member(*recipe.method, options, g_signals);
  } catch (const core::Error& error) {
    if (members == 1) throw;
    // The others of the group wait for this process and MPI cannot go on without them: the job ends.
    std::fprintf(stderr, "moraine: process %d: %s\n  hint: %s\n", session.index(), error.what(), error.hint().c_str());
    session.abort(error.exit_code());
  }
}

// A process of an MPI job: 0 coordinates, the others work.
int run_in_job(const RunArguments& arguments) {
  comm::mpi::Session session;
  auto channel = comm::mpi::open_channel(session);
  const bool coordinates = session.index() == 0;
  core::log::configure(g_log_level,
                       coordinates ? "coordinator" : fmt::format("{}/worker{}", session.host(), session.index()));
  try {
    if (coordinates && session.size() < 2)
      throw core::UserError("cli: mpirun started one process: process 0 coordinates and nobody works",
                            "mpirun -n 2 or more; or leave mpirun out to run everything in one process");
    const auto recipe = load(arguments);
    const fs::path directory = run_directory_of(arguments, recipe.run);
    const int members = static_cast<int>(recipe.run.workers.group_size);
    algorithms::num_workers(recipe.run.workers, session.size() - 1);
    channel.reset();
    channel = comm::mpi::open_channel(session, members);  // leaders speak for their groups
    if (!coordinates) return work_in_job(session, recipe, directory, members, *channel);
    const coordinator::RunOutcome outcome = coordinate(recipe, arguments, directory, *channel);
    const int code = report_outcome(outcome);
    if (outcome.abort_workers) session.abort(code);
    return code;
  } catch (const core::Error& error) {
    // One process speaks for all: workers that fail the same way as the coordinator stay silent.
    if (coordinates) {
      for (int peer = 1; peer <= channel->peers(); ++peer)
        if (const auto sent = channel->send(
                peer, {comm::MessageType::kRefuse, {{"code", error.exit_code()}, {"text", error.what()}}, {}});
            !sent.ok())
          core::log::warn("worker not told: worker={} reason={}", peer, sent.error());
    } else {
      using namespace std::chrono_literals;
      const auto heard = channel->receive(10s);
      if (heard.ok() && heard.value() && heard.value()->message.type == comm::MessageType::kRefuse)
        return error.exit_code();
    }
    std::fprintf(stderr, "moraine: %s\n", error.what());
    if (!error.hint().empty()) std::fprintf(stderr, "  hint: %s\n", error.hint().c_str());
    return error.exit_code();
  }
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
