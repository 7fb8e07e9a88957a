#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "cli/find_artefact.h"
#include "cli/output.h"
#include "cli/published.h"
#include "coordinator/run_record.h"
#include "core/error.h"
#include "core/file.h"
#include "core/safetensors.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;

struct CpArguments {
  std::string run, what, destination;
  bool force = false;
};

void store(const core::Bytes& bytes, const std::string& hash, const fs::path& to) {
  core::write_atomically(to, bytes.span());
  print(fmt::format("{}  {}\n", hash, to.string()));
}

// As cp does: a misspelt directory is not made, nor one above it.
void require_parent(const fs::path& to) {
  const fs::path parent = fs::absolute(to).lexically_normal().parent_path();
  if (!fs::is_directory(parent))
    throw core::UserError(fmt::format("cli: no directory {}", parent.string()),
                          fmt::format("mkdir -p {}", parent.string()));
}

std::string file_name_of(std::string what) {
  for (char& c : what)
    if (c == '/') c = '-';
  return what + ".safetensors";
}

void copy_directory(const fs::path& root, const CpArguments& arguments) {
  const fs::path to = arguments.destination;
  if (fs::exists(to) && !(fs::is_directory(to) && (fs::is_empty(to) || arguments.force)))
    throw core::UserError(fmt::format("cli: {} exists and is not empty", to.string()),
                          "name another directory, or use --force to replace files in it");
  const auto files = verified_files(root, arguments.what);
  const auto target = [&](const PublishedFile& file) {
    return to / file.path.lexically_relative(root / arguments.what);
  };
  require_parent(to);
  for (const auto& file : files) core::refuse_replacing(target(file), {root});
  for (const auto& file : files) store(core::Bytes::map_file(file.path), file.sha256, target(file));
}

void copy_artefact(const coordinator::RunRecord& run, const CpArguments& arguments) {
  const std::string id = find_artefact(run, arguments.what);
  const fs::path given = arguments.destination;
  const fs::path to = fs::is_directory(given) ? given / file_name_of(arguments.what) : given;
  if (fs::exists(to) && !arguments.force)
    throw core::UserError(fmt::format("cli: {} exists", to.string()),
                          "name another file, or use --force to replace it");
  require_parent(to);
  core::refuse_replacing(to, {run.layout.root});
  store(run.state->artefact(id)->bytes(), id, to);  // its hash was checked when it was opened
}

// `what` may also be a directory that the run has published: mixture, public_model.
void copy_out(const CpArguments& arguments) {
  const auto run = coordinator::read_run(arguments.run);
  const bool one_name = arguments.what.find('/') == std::string::npos && arguments.what.find('.') == std::string::npos;
  if (one_name && fs::exists(run.layout.root / arguments.what / "config.json"))
    copy_directory(run.layout.root, arguments);
  else
    copy_artefact(run, arguments);
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
