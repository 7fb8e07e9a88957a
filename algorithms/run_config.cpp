#include "algorithms/run_config.h"

#include <algorithm>

#include "algorithms/arithmetic.h"
#include "core/error.h"

namespace moraine::algorithms {

const core::Schema<WorkersConfig>& workers_schema() {
  static const auto schema = [] {
    core::Schema<WorkersConfig> s;
    s.field("threads", &WorkersConfig::threads)
        .min(1)
        .max(1024)
        .doc("CPU threads of one process; part of every unit's identity, because sums depend on it")
        .field("local", &WorkersConfig::local)
        .min(0)
        .max(1024)
        .changes_nothing()
        .doc(
            "Working threads when not started by mpirun; 0 = as many whole groups as fit cores / threads, at least one")
        .field("group_size", &WorkersConfig::group_size)
        .min(1)
        .max(1024)
        .doc(
            "Processes that train one unit together, each a share of every batch; divides the working processes; part "
            "of every unit's identity, because sums depend on it")
        .field("bucket_mib", &WorkersConfig::bucket_mib)
        .min(0)
        .max(1024)
        .changes_nothing()
        .doc(
            "MiB of gradients that travel together within a group: smaller starts sooner, larger costs fewer messages; "
            "0 = each tensor alone")
        .field("overlap", &WorkersConfig::overlap)
        .changes_nothing()
        .doc("Send gradients while backward still runs; false only to measure what that gains")
        .field("device", &WorkersConfig::device)
        .choices({"cpu", "cuda"})
        .doc("Where workers compute, never falls back; part of every unit's identity, because sums depend on it")
        .field("arithmetic", &WorkersConfig::arithmetic)
        .joined_later()
        .doc(
            "portable: the same bits on every processor with AVX2, at about half the speed where there is AVX-512; "
            "native: the fastest of this processor, named in every unit's identity, so that other processors cannot "
            "join or continue the run")
        .field("retries", &WorkersConfig::retries)
        .min(1)
        .max(10)
        .changes_nothing()
        .doc("Attempts per unit before the run gives up")
        .check([](const WorkersConfig& workers) -> std::optional<std::string> {
          if (names_arithmetic(workers.arithmetic)) return std::nullopt;
          return fmt::format("arithmetic must be portable or native: '{}'", workers.arithmetic);
        });
    return s;
  }();
  return schema;
}

std::optional<std::string> run_name_problem(const std::string& name) {
  const bool plain =
      std::all_of(name.begin(), name.end(), [](unsigned char c) { return c >= 0x20 && c != '/' && c != 0x7f; });
  if (plain && !name.empty() && name[0] != '.' && name[0] != '-' && name.size() <= 200) return std::nullopt;
  return fmt::format(
      "name '{}' must be able to name a directory below runs/: up to 200 bytes without '/' and control characters, not "
      "beginning with '.' or '-'",
      name.substr(0, 200));
}

core::Json compute_identity(const WorkersConfig& workers) {
  core::Json identity = {{"threads", workers.threads}, {"device", workers.device}};
  if (workers.group_size > 1) identity["group_size"] = workers.group_size;
  if (workers.arithmetic != kNative) identity["arithmetic"] = workers.arithmetic;
  return identity;
}

int num_workers(const WorkersConfig& workers, int64_t processes) {
  if (processes % workers.group_size != 0) {
    const int64_t fewer = processes / workers.group_size * workers.group_size, more = fewer + workers.group_size;
    throw core::UserError(
        fmt::format("algorithms: {} working processes cannot be divided into groups of {} (workers.group_size)",
                    processes, workers.group_size),
        fewer > 0 ? fmt::format("use {} or {} working processes (mpirun -n {} or {}, with the coordinator; "
                                "workers.local without mpirun), or another workers.group_size",
                                fewer, more, fewer + 1, more + 1)
                  : fmt::format("use {} working processes (mpirun -n {}, with the coordinator; workers.local without "
                                "mpirun), or a smaller workers.group_size",
                                more, more + 1));
  }
  return static_cast<int>(processes / workers.group_size);
}

}  // namespace moraine::algorithms
