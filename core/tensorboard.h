#pragma once

#include <filesystem>
#include <memory>

#include "core/metrics.h"

namespace moraine::core::metrics {

/// Writes what TensorBoard reads: DIRECTORY/<unit>/events.out.tfevents.<seconds>.moraine, one directory per unit, which
/// TensorBoard shows as a run; one scalar per record, its tag is the metric's key. A new start appends new files, so
/// TensorBoard shows the steps a resumed unit repeated. Characters of a unit's label that are awkward in file names
/// become '_'. Values are rounded to float32, the format's type. Thread-safe. Throws IoError when writing fails.
///
/// Format: TFRecord frames {length u64, masked CRC-32C u32, bytes, masked CRC-32C u32} around protobuf messages Event
/// {1: wall_time double, 2: step int64, 3: file_version text, 5: Summary}, Summary {1: {1: tag text, 2: simple_value
/// float}}. Source: tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto.
std::unique_ptr<Sink> open_tensorboard(const std::filesystem::path& directory);

}  // namespace moraine::core::metrics
