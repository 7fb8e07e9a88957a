#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace moraine::algorithms::continual {

/// Accuracies of one run of one learner, in %. nullopt = not evaluated; a true zero is a zero.
struct AccuracyMatrix {
  std::vector<std::vector<std::optional<double>>> r;  // r[i][j]: on task j's test images after task i; T x T
  std::vector<std::optional<double>> before;          // before[j]: at initial values ("row -1"); T
  std::vector<int64_t> images;                        // test images of task j; T
  std::vector<std::optional<double>> joint;           // joint[k]: on task k of a model trained jointly on tasks 0..k; T

  int64_t tasks() const { return static_cast<int64_t>(r.size()); }
};

/// Which cells of a matrix a metric reads.
enum class Needs {
  kSeen,        // on and below the diagonal
  kTwoTasks,    // the same, and a second task
  kNext,        // r[j-1][j] too
  kNextBefore,  // r[j-1][j] and before[j]
  kAll,         // every cell
  kJoint,       // the joint model's diagonal
};

/// One metric under the convention that names it; "forgetting" alone means four things in the literature.
struct MetricInfo {
  const char* name;
  const char* label;    // for tables
  const char* formula;  // and who uses it
  Needs needs;
  bool canonical;  // reported when a recipe does not choose
};

/// All metrics, canonical ones first. Source of every formula: the papers and code bases named in `formula`. In double,
/// without rounding (PyCIL and PILOT round to two decimals before they subtract).
const std::vector<MetricInfo>& metric_table();
/// Throws UserError with the nearest name.
const MetricInfo& find_metric(const std::string& name);

/// The metric's value in %, nullopt when a cell it needs was not evaluated. Throws UserError on an unknown name.
std::optional<double> metric(const std::string& name, const AccuracyMatrix& matrix);

/// Accuracy over all test images of tasks 0..i, weighted by their numbers (PyCIL, PILOT, Mammoth: "total").
std::optional<double> pooled_accuracy(const AccuracyMatrix& matrix, int64_t i);
/// Mean over tasks 0..i of their accuracies (Chaudhry, Avalanche).
std::optional<double> taskmean_accuracy(const AccuracyMatrix& matrix, int64_t i);

/// What a stream and its evaluation offer, in one setting.
struct CellsOffered {
  int64_t tasks = 0;
  bool ahead = false;  // cells above the diagonal and `before`
  bool joint = false;
};
/// Why the metric cannot be had, nullopt when it can.
std::optional<std::string> why_missing(const MetricInfo& metric, const CellsOffered& offered);

}  // namespace moraine::algorithms::continual
