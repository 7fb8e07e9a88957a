#include <thread>

#include <ATen/Context.h>
#include <CLI/CLI.hpp>

#include "algorithms/arithmetic.h"
#include "cli/command.h"
#include "cli/output.h"
#include "cli/run_summary.h"
#include "comm/mpi/session.h"
#include "comm/nccl/group.h"
#include "coordinator/report/table.h"

namespace moraine::cli {
namespace {

void print_environment(const std::string& format) {
  core::Json facts = versions();
  facts["mpi"] = comm::mpi::available() ? "built in" : "not built in (MORAINE_WITH_MPI)";
  facts["nccl"] = comm::nccl::available() ? "built in" : "not built in (MORAINE_WITH_NCCL)";
  facts["cuda"] = at::globalContext().hasCUDA() ? "available" : "absent: this build or machine has none";
  facts["cores"] = std::thread::hardware_concurrency();
  facts["blas"] = at::Context::hasMKL() ? "MKL" : "not MKL";
  facts["arithmetic"] = algorithms::arithmetic_facts();
  if (format == "json") {
    print_json(facts);
    return;
  }
  core::Json rows = core::Json::array();
  for (const auto& [key, value] : facts.items())
    if (value.is_object())
      for (const auto& [inner, fact] : value.items())
        rows.push_back({{"what", fmt::format("{}.{}", key, inner)}, {"value", fact}});
    else
      rows.push_back({{"what", key}, {"value", value}});
  print(report::render_table(report::plain_table("Environment", {"what", "value"}, rows), table_style()));
}

}  // namespace

void add_env(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("env", "What this build and machine can do");
  auto format = std::make_shared<std::string>("text");
  add_format_option(*command, *format);
  command->footer("Example: moraine env --format json");
  command->callback([=, &exit_code] {
    print_environment(*format);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
