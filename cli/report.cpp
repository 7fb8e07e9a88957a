#include <cerrno>
#include <cstring>

#include <unistd.h>

#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "cli/output.h"
#include "cli/run_summary.h"
#include "coordinator/report/table.h"
#include "core/log.h"

namespace moraine::cli {
namespace {

void report_run(const std::string& directory, const std::string& format) {
  const coordinator::RunRecord run = coordinator::read_run(directory);
  const core::Json summary = from_stored(run, [&] { return summarize(*restore_method(run), run); });
  if (format == "json") {
    print_json(summary);
    return;
  }
  if (format == "csv" || format == "markdown") {
    for (const auto& table : summary.at("tables")) {
      const std::string text = format == "csv" ? report::render_csv(table) : report::render_markdown(table);
      print(text + "\n");
    }
    return;
  }
  print(report::render_text(summary, table_style()));
  if (access(run.layout.root.c_str(), W_OK) != 0)  // somebody else's run can be read all the same
    return core::log::warn("report.html not written: directory={} reason={}", run.layout.root.string(),
                           std::strerror(errno));
  write_report(summary, run.layout.root);
  print(fmt::format("report: {}\n", (run.layout.root / "report.html").string()));
}

}  // namespace

void add_report(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand(
      "report", "Tables of a run, finished or not; writes RUN/report.html and RUN/summary.json where it may");
  auto directory = std::make_shared<std::string>();
  auto format = std::make_shared<std::string>("text");
  command->add_option("run", *directory, "Run directory")->required();
  command->add_option("--format", *format, "text | markdown | csv | json (all but text only print)")
      ->check(CLI::IsMember({"text", "markdown", "csv", "json"}))
      ->capture_default_str();
  command->footer("Example: moraine report runs/quickstart");
  command->callback([=, &exit_code] {
    report_run(*directory, *format);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
