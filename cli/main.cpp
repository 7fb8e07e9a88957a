#include <unistd.h>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "core/error.h"
#include "core/log.h"

namespace moraine::cli {

std::atomic<int> g_signals{0};
core::log::Level g_log_level = core::log::Level::kInfo;

void install_signal_handlers() {
  const auto handler = [](int signal) {
    int none = 0;
    if (g_signals.compare_exchange_strong(none, 1)) return;
    // Launchers often send SIGTERM to a process and again to its group: only a second Ctrl-C means "at once".
    if (signal == SIGINT) _exit(core::kExitInterrupted);
  };
  struct sigaction action = {};
  action.sa_handler = handler;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit then fails the write, with a message
}

bool color_wanted() { return isatty(STDOUT_FILENO) == 1 && std::getenv("NO_COLOR") == nullptr; }

void add_recipe_arguments(CLI::App& command, RecipeArguments& arguments) {
  command.add_option("recipe", arguments.recipe, "Recipe (YAML)")->required();
  command.add_option("overrides", arguments.overrides, "key.sub=value ...: change values of the recipe");
}

void add_format_option(CLI::App& command, std::string& format) {
  command.add_option("--format", format, "text | json")->check(CLI::IsMember({"text", "json"}))->capture_default_str();
}

namespace {

int report_error(const core::Error& error) {
  std::fprintf(stderr, "moraine: %s\n", error.what());
  if (!error.hint().empty()) std::fprintf(stderr, "  hint: %s\n", error.hint().c_str());
  return error.exit_code();
}

int run_main(int argc, char** argv) {
  CLI::App app("Moraine trains many small experts apart and lets them flow together.", "moraine");
  app.require_subcommand(1);
  app.set_help_all_flag("--help-all", "Help of all commands");
  bool verbose = false;
  app.add_flag("-v,--verbose", verbose, "Debug messages in the log");
  app.footer(
      "Exit codes: 0 done, 2 the recipe or data need a change, 3 disk or peer failed, 4 numbers went bad,\n"
      "70 a bug in Moraine, 75 stopped by a signal after a good checkpoint (run the same line again), 130 interrupted "
      "at once.\n"
      "Example: mpirun -n 5 moraine run recipes/flexmore/domains.yaml train.steps=500");
  int exit_code = 0;
  add_run(app, exit_code);
  add_validate(app, exit_code);
  add_params(app, exit_code);
  add_report(app, exit_code);
  add_ls(app, exit_code);
  add_compare(app, exit_code);
  add_inspect(app, exit_code);
  add_cat(app, exit_code);
  add_cp(app, exit_code);
  add_config_schema(app, exit_code);
  add_export(app, exit_code);
  add_import(app, exit_code);
  add_merge(app, exit_code);
  add_eval(app, exit_code);
  add_completion(app, exit_code);
  add_env(app, exit_code);
  app.parse_complete_callback([&] {
    g_log_level = verbose ? core::log::Level::kDebug : core::log::level_from_environment();
    core::log::configure(g_log_level, "");
  });
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? core::kExitOk : core::kExitUser;
  }
  return exit_code;
}

}  // namespace
}  // namespace moraine::cli

int main(int argc, char** argv) {
  using namespace moraine;
  try {
    return cli::run_main(argc, argv);
  } catch (const core::Error& error) {
    return cli::report_error(error);
  } catch (const std::bad_alloc&) {
    return cli::report_error(
        core::IoError("out of memory", "fewer workers per machine, or a smaller micro_batch_size"));
  } catch (const std::exception& error) {
    return cli::report_error(core::InternalError(error.what()));
  }
}
