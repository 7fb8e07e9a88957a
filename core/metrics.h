#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace moraine::core::metrics {

/// One measured value of one unit at one step.
struct Record {
  std::string unit;  // unit label, "train/german"
  std::string key;   // "train_loss", "learning_rate", "tokens_per_s"
  int64_t step = 0;
  double value = 0;
};

/// Where metrics go. Thread-safe.
class Sink {
 public:
  virtual ~Sink() = default;
  virtual void record(const Record& record) = 0;
};

/// Appends one JSON object per line, {"key","step","unit","value"}, value null when it is not finite; a torn last line
/// after a crash is cut when the file is opened again. Creates parent directories. Throws IoError when writing fails.
std::unique_ptr<Sink> open_jsonl(const std::filesystem::path& path);

}  // namespace moraine::core::metrics
