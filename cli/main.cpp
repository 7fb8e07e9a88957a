#include <unistd.h>
#include <algorithm>
#include <csignal>
#include <exception>
#include <filesystem>
#include <sstream>
#include <system_error>

#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "cli/output.h"
#include "cli/version.h"
#include "comm/mpi/session.h"
#include "core/error.h"
#include "core/log.h"
#include "core/registry.h"
#include "core/terminal.h"

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
}

void add_recipe_arguments(CLI::App& command, RecipeArguments& arguments) {
  command.add_option("recipe", arguments.recipe, "Recipe (YAML)")->required();
  command.add_option("overrides", arguments.overrides, "key.sub=value ...: change values of the recipe");
}

void add_format_option(CLI::App& command, std::string& format) {
  command.add_option("--format", format, "text | json")->check(CLI::IsMember({"text", "json"}))->capture_default_str();
}

namespace {

using Words = std::vector<std::string>;

// `moraine help` and `moraine help run`, as people type them.
Words words_of(int argc, char** argv) {
  Words words(argv + std::min(argc, 1), argv + argc);
  if (words.empty() || words[0] != "help") return words;
  words.erase(words.begin());
  words.resize(std::min<size_t>(words.size(), 1));
  words.push_back("--help");
  return words;
}

bool wants_json(const Words& words) {
  for (size_t i = 0; i < words.size(); ++i)
    if (words[i] == "--format=json" || (words[i] == "--format" && i + 1 < words.size() && words[i + 1] == "json"))
      return true;
  return false;
}

const std::string* command_in(const Words& words) {
  const auto found = std::find_if(words.begin(), words.end(), [](const auto& word) { return !word.starts_with('-'); });
  return found == words.end() ? nullptr : &*found;
}

Words names_of_commands(const CLI::App& app) {
  Words names{"help"};
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(command->get_name());
  return names;
}

// The first word that looks like an option of the command and is none, without its value.
std::string unknown_option(const CLI::App& command, const Words& words, Words& known) {
  known = {"--help", "--help-all", "--verbose", "--version"};
  for (const CLI::Option* option : command.get_options())
    for (const auto& name : option->get_lnames()) known.push_back("--" + name);
  for (const auto& word : words) {
    const std::string name = word.substr(0, word.find('='));
    if (name.starts_with("--") && name.size() > 2 && std::find(known.begin(), known.end(), name) == known.end())
      return name;
  }
  return "";
}

// What CLI11 says, with the word it is about and the nearest one that exists.
core::UserError usage_error(const CLI::App& app, const Words& words, const CLI::ParseError& error) {
  const std::string* name = command_in(words);
  const Words commands = names_of_commands(app);
  if (name == nullptr) return core::UserError("cli: a command is missing", core::name_hint("", commands));
  if (std::find(commands.begin(), commands.end(), *name) == commands.end())
    return core::UserError(fmt::format("cli: no command '{}'", *name), core::name_hint(*name, commands));
  Words known;
  const CLI::App& command = *app.get_subcommand(*name);
  if (const std::string option = unknown_option(command, words, known); !option.empty())
    return core::UserError(fmt::format("cli: {}: no option '{}'", *name, option),
                           option.find('.') == std::string::npos
                               ? core::name_hint(option, known)
                               : "keys of a recipe are written without dashes: " + option.substr(2) + "=value");
  std::string what = error.what();  // one line per problem
  std::replace(what.begin(), what.end(), '\n', ' ');
  return core::UserError(fmt::format("cli: {}: {}", *name, what),
                         fmt::format("`moraine {} --help` shows how it is used", *name));
}

core::Error file_error(const std::filesystem::filesystem_error& error) {
  const std::string what = fmt::format("cli: {}: {}", error.path1().string(), error.code().message());
  for (const auto code : {std::errc::no_such_file_or_directory, std::errc::not_a_directory, std::errc::file_exists,
                          std::errc::filename_too_long, std::errc::too_many_symbolic_link_levels})
    if (error.code() == code) return core::UserError(what, "check the path");
  return core::IoError(what, "check the permissions of the path and the disk, then run the same command again");
}

// Inside a handler: what libraries throw for something a user did or the world does. The rest is a bug of ours.
int report_current_exception(bool json) {
  try {
    throw;
  } catch (const core::Error& error) {
    return report_error(error, json);
  } catch (const std::bad_alloc&) {
    return report_error(core::IoError("out of memory", "fewer workers per machine, or a smaller micro_batch_size"),
                        json);
  } catch (const std::filesystem::filesystem_error& error) {
    return report_error(file_error(error), json);
  } catch (const std::system_error& error) {
    return report_error(core::IoError(error.what(), "check the limits of the system (ulimit -a)"), json);
  } catch (const core::Json::exception& error) {
    constexpr int kNotUtf8 = 316;
    const bool bytes = error.id == kNotUtf8;
    return report_error(
        core::UserError(fmt::format("cli: {}: {}", bytes ? "a name or path cannot be stored" : "a file has an odd form",
                                    error.what()),
                        bytes ? "names in recipes and files, and paths that are stored, must be UTF-8"
                              : "look at JSON files that were edited or come from elsewhere; if there are none, please "
                                "report this as a bug"),
        json);
  } catch (const std::exception& error) {
    if (std::string_view(error.what()).find("can't allocate memory") != std::string_view::npos)  // LibTorch's own
      return report_error(core::IoError("out of memory", "a smaller batch, or a machine with more memory"), json);
    return report_error(core::InternalError(error.what()), json);
  }
}

int run_main(Words words) {
  CLI::App app("Moraine trains many small experts apart and lets them flow together.", "moraine");
  app.require_subcommand(1);
  app.set_help_all_flag("--help-all", "Help of all commands");
  app.set_version_flag("--version", "moraine " MORAINE_VERSION " (" MORAINE_BUILD ", torch " MORAINE_TORCH_VERSION ")");
  bool verbose = false;
  app.add_flag("-v,--verbose", verbose, "Debug messages in the log");
  app.footer(
      "Exit codes: 0 done, 2 the recipe or data need a change, 3 disk or peer failed, 4 numbers went bad,\n"
      "70 a bug in Moraine, 75 stopped by a signal after a good checkpoint (run the same line again), 130 interrupted "
      "at once,\n141 nobody reads the output any more.\n"
      "`moraine help COMMAND` explains a command.\n"
      "Example: moraine run recipes/quickstart.yaml train.steps=500");
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
    app.parse(Words(words.rbegin(), words.rend()));  // CLI11 takes them from the back
  } catch (const CLI::ParseError& error) {
    std::ostringstream text;
    if (app.exit(error, text, text) != 0) throw usage_error(app, words, error);
    print(text.str());
  }
  close_output();
  return exit_code;
}

}  // namespace
}  // namespace moraine::cli

int main(int argc, char** argv) {
  using namespace moraine;
  cli::prepare_output();
  if (comm::mpi::launched()) core::distrust_terminals();
  const std::vector<std::string> words = cli::words_of(argc, argv);
  try {
    return cli::run_main(words);
  } catch (const cli::ReaderGone&) {
    return cli::kExitReaderGone;
  } catch (...) {
    return cli::report_current_exception(cli::wants_json(words));
  }
}
