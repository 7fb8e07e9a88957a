// Aggregation speed: `contributions` mapped files of `megabytes` float32 each into one sum, against the speed of memcpy
// in the same process, one thread. Prints one Markdown table. bench_aggregation [contributions=20] [megabytes=200]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include <unistd.h>

#include "algorithms/federated/weighted_sum.h"
#include "core/safetensors.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kRounds = 5;

// Best of kRounds: the machine's own noise only ever adds time.
double seconds(const std::function<void()>& work) {
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = Clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

// A line of /proc/self/status in MiB.
double status_mib(const char* key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with(key)) return std::atof(line.c_str() + std::strlen(key) + 1) / 1024;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const size_t contributions = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 20;
  const size_t floats = (argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 200) * 1'000'000 / sizeof(float);
  const auto folder = std::filesystem::temp_directory_path() / ("moraine_aggregation_" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);

  std::vector<float> sum(floats);
  const double bytes = static_cast<double>(floats * sizeof(float));
  double copy_seconds = 0;
  {
    std::vector<float> from(floats, 1.5F);
    copy_seconds = seconds([&] { std::memcpy(sum.data(), from.data(), floats * sizeof(float)); });
    for (size_t k = 0; k < contributions; ++k) {
      std::ofstream out(folder / std::to_string(k), std::ios::binary);
      out.write(reinterpret_cast<const char*>(from.data()), static_cast<std::streamsize>(floats * sizeof(float)));
    }
  }
  std::vector<moraine::core::Bytes> files;
  std::vector<std::span<const std::byte>> parts;
  for (size_t k = 0; k < contributions; ++k)
    files.push_back(moraine::core::Bytes::map_file(folder / std::to_string(k)));
  for (const auto& file : files) parts.push_back(file.span());
  const std::vector<double> weights(contributions, 1.0 / static_cast<double>(contributions));
  const double sum_seconds = seconds([&] { moraine::algorithms::federated::weighted_sum(parts, weights, sum); });
  std::filesystem::remove_all(folder);
  if (sum[floats / 2] != 1.5F) return std::fprintf(stderr, "wrong sum: %g\n", static_cast<double>(sum[floats / 2])), 70;

  const double rate = bytes * static_cast<double>(contributions) / sum_seconds / 1e9, copy = bytes / copy_seconds / 1e9;
  std::printf(
      "| contributions | MB each | aggregation, GB/s read | memcpy, GB/s copied | share of memcpy | private memory, MB "
      "| the sum, MB | mapped pages, MB |\n");
  std::printf("|---|---|---|---|---|---|---|---|\n");
  std::printf("| %zu | %.0f | %.2f | %.2f | %.0f %% | %.0f | %.0f | %.0f |\n", contributions, bytes / 1e6, rate, copy,
              100 * rate / copy, status_mib("RssAnon:") * 1.048576, bytes / 1e6, status_mib("RssFile:") * 1.048576);
}
