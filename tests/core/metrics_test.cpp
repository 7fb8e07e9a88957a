#include "core/metrics.h"

#include <limits>
#include <sstream>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/json.h"
#include "tests/temporary_directory.h"

namespace moraine::core::metrics {
namespace {

TEST(MetricsJsonl, WritesOneObjectPerLine) {
  const TemporaryDirectory directory;
  const auto path = directory / "run/metrics.jsonl";
  open_jsonl(path)->record({.unit = "train/german", .key = "train_loss", .step = 3, .value = 0.1});
  open_jsonl(path)->record({.unit = "u", .key = "k", .step = 4, .value = std::numeric_limits<double>::quiet_NaN()});
  EXPECT_EQ(read_text(path),
            "{\"key\":\"train_loss\",\"step\":3,\"unit\":\"train/german\",\"value\":0.1}\n"
            "{\"key\":\"k\",\"step\":4,\"unit\":\"u\",\"value\":null}\n");
}

TEST(MetricsJsonl, CutsATornLastLine) {
  const TemporaryDirectory directory;
  const std::string whole = "{\"key\":\"" + std::string(10000, 'k') + "\"}\n";  // longer than one block of the search
  const auto path = directory.write("torn.jsonl", whole + "{\"key\":\"torn" + std::string(5000, 't'));
  open_jsonl(path);
  EXPECT_EQ(read_text(path), whole);
  const auto only_torn = directory.write("only_torn.jsonl", "{\"ke");
  open_jsonl(only_torn);
  EXPECT_EQ(read_text(only_torn), "");
}

TEST(MetricsJsonl, ThreadsDoNotMixTheirLines) {
  const TemporaryDirectory directory;
  const auto sink = open_jsonl(directory / "metrics.jsonl");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int64_t step = 0; step < 100; ++step) sink->record({.unit = "unit", .key = "key", .step = step, .value = 1});
    });
  for (auto& thread : threads) thread.join();
  std::istringstream lines(read_text(directory / "metrics.jsonl"));
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) EXPECT_NO_THROW(parse_json(line, "line")) << line;
  EXPECT_EQ(count, 400);
}

TEST(MetricsJsonl, UnwritableFileIsAnIoError) { EXPECT_THROW(open_jsonl("/dev/full/metrics.jsonl"), IoError); }

}  // namespace
}  // namespace moraine::core::metrics
