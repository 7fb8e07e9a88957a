#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "core/log.h"

namespace CLI {
class App;
}

namespace moraine::cli {

/// 1 after the first SIGINT or SIGTERM, which asks for a checkpoint and exit 75; a second SIGINT ends at once with 130.
extern std::atomic<int> g_signals;
void install_signal_handlers();

/// From MORAINE_LOG, or debug with --verbose.
extern core::log::Level g_log_level;

/// What several sub-commands share: the recipe and `key.sub=value` overrides.
struct RecipeArguments {
  std::string recipe;
  std::vector<std::string> overrides;
};
void add_recipe_arguments(CLI::App& command, RecipeArguments& arguments);

/// `--format text|json` of commands that list.
void add_format_option(CLI::App& command, std::string& format);

// Each registers one sub-command; its callback returns through `exit_code` or throws core::Error.
void add_run(CLI::App& app, int& exit_code);
void add_validate(CLI::App& app, int& exit_code);
void add_params(CLI::App& app, int& exit_code);
void add_report(CLI::App& app, int& exit_code);
void add_ls(CLI::App& app, int& exit_code);
void add_env(CLI::App& app, int& exit_code);
void add_inspect(CLI::App& app, int& exit_code);
void add_cat(CLI::App& app, int& exit_code);
void add_cp(CLI::App& app, int& exit_code);
void add_compare(CLI::App& app, int& exit_code);
void add_config_schema(CLI::App& app, int& exit_code);
void add_completion(CLI::App& app, int& exit_code);
void add_export(CLI::App& app, int& exit_code);
void add_import(CLI::App& app, int& exit_code);
void add_merge(CLI::App& app, int& exit_code);
void add_eval(CLI::App& app, int& exit_code);

}  // namespace moraine::cli
