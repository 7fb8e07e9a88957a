#include <cstdio>

#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "cli/find_artefact.h"
#include "coordinator/run_record.h"
#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/safetensors.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;

struct CpArguments {
  std::string run, what, destination;
  bool force = false;
};

void copy_file(const fs::path& from, const fs::path& to, bool force) {
  if (fs::exists(to) && !force)
    throw core::UserError(fmt::format("cli: {} exists", to.string()),
                          "name another file, or use --force to replace it");
  const auto bytes = core::Bytes::map_file(from);
  core::write_atomically(to, bytes.span());
  std::printf("%s  %s\n", core::sha256(bytes.span()).c_str(), to.c_str());
}

std::string file_name_of(std::string what) {
  for (char& c : what)
    if (c == '/') c = '-';
  return what + ".safetensors";
}

// `what` may also be a directory that the run has published: mixture, public_model.
void copy_out(const CpArguments& arguments) {
  const auto run = coordinator::read_run(arguments.run);
  const fs::path published = run.layout.root / arguments.what, to = arguments.destination;
  if (arguments.what.find('/') == std::string::npos && arguments.what.find('.') == std::string::npos &&
      fs::exists(published / "config.json")) {
    if (fs::exists(to) && !fs::is_empty(to) && !arguments.force)
      throw core::UserError(fmt::format("cli: {} exists and is not empty", to.string()),
                            "name another directory, or use --force");
    for (const auto& entry : fs::directory_iterator(published))
      if (entry.is_regular_file()) copy_file(entry.path(), to / entry.path().filename(), arguments.force);
    return;
  }
  const std::string id = find_artefact(run, arguments.what);
  run.state->artefact(id);  // checks the hash
  copy_file(run.state->path_of(id), fs::is_directory(to) ? to / file_name_of(arguments.what) : to, arguments.force);
}

}  // namespace

void add_cp(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand(
      "cp", "Copies an artefact, or the published mixture, out of a run; prints SHA-256 and file as sha256sum does");
  auto arguments = std::make_shared<CpArguments>();
  command->add_option("run", arguments->run, "Run directory")->required();
  command->add_option("what", arguments->what, "Unit label, artefact id or its beginning; or mixture, public_model")
      ->required();
  command->add_option("destination", arguments->destination, "File, or directory")->required();
  command->add_flag("--force", arguments->force, "Replace what is there");
  command->footer(
      "Examples: moraine cp runs/quickstart train/german german.safetensors\n          moraine cp runs/quickstart "
      "mixture models/quickstart");
  command->callback([=, &exit_code] {
    copy_out(*arguments);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
