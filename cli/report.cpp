#include <cstdio>

#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "cli/run_summary.h"
#include "coordinator/report/table.h"

namespace moraine::cli {
namespace {

void report_run(const std::string& directory, const std::string& format) {
  const coordinator::RunRecord run = coordinator::read_run(directory);
  const core::Json summary = summarize(*restore_method(run), run);
  if (format == "json") {
    std::fputs((summary.dump(2) + "\n").c_str(), stdout);
    return;
  }
  if (format == "csv" || format == "markdown") {
    for (const auto& table : summary.at("tables")) {
      const std::string text = format == "csv" ? report::render_csv(table) : report::render_markdown(table);
      std::fputs((text + "\n").c_str(), stdout);
    }
    return;
  }
  write_report(summary, run.layout.root);
  std::fputs(report::render_text(summary, {.color = color_wanted()}).c_str(), stdout);
  std::printf("report: %s\n", (run.layout.root / "report.html").c_str());
}

}  // namespace

void add_report(CLI::App& app, int& exit_code) {
  auto* command =
      app.add_subcommand("report", "Tables of a run, finished or not; writes RUN/report.html and RUN/summary.json");
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
