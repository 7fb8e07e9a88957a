#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/image_dataset.h"

namespace moraine::data {

/// The permutation of 0..num_classes-1 that `np.random.seed(seed); np.random.permutation(num_classes)` gives: the class
/// orders of iCaRL, PyCIL and PILOT (seed 1993; 100 classes start 68 56 78 8 23 84 90 65 74 76). Same on every
/// platform.
std::vector<int64_t> class_order(int64_t num_classes, uint32_t seed);

/// What cuts a data set into a class-incremental stream. Classes are labels.
struct TaskStreamSpec {
  std::vector<std::vector<int64_t>> tasks = {};  // explicit class lists; empty = base_classes and increment
  int64_t base_classes = 0;                      // B{m}: classes of the first task; 0 = increment
  int64_t increment = 2;                         // Inc{n}: new classes per task; the last task takes what is left
  std::vector<int64_t> leave_out = {};           // classes that are in no task
  int64_t train_per_class = 0;                   // examples of each class; 0 = all
  int64_t test_per_class = 0;
  int64_t validation_per_class = 0;  // training examples of each class that are never trained on
  bool evaluate_validation = false;  // `test` rows are these instead of the test split's
  uint64_t seed = 0;                 // chooses the examples when there is a limit
  int64_t order = -1;                // -1 = as the labels (or lists) stand; else seed of class_order()
};

/// A problem of a spec on a data set of so many classes, found without its examples: a class twice, missing or unknown,
/// nothing left for a task. nullopt when there is none.
std::optional<std::string> problem_of(const TaskStreamSpec& spec, int64_t num_classes);

/// What a stream is cut from: labels alone, whatever they are labels of.
struct LabelledSet {
  std::string fingerprint;               // of the prepared file
  std::vector<std::string> class_names;  // by label
  std::vector<int64_t> train, test;      // labels by row
  std::string path, noun = "example";    // for messages
};

/// A stream of tasks with disjoint classes (scenarios class-incremental and task-incremental: they differ in the
/// evaluation only). A pure function of data set and spec, the same for every method of a run.
///
/// Order: with increments the classes are permuted and then cut; explicit lists keep their members, and the lists are
/// permuted. Examples of a class are drawn by a permutation keyed by (seed, class), so they do not depend on the order.
struct TaskStream {
  struct Task {
    std::vector<int64_t> classes;  // labels, in stream order
    std::vector<int64_t> train;    // rows of split "train", ascending
    std::vector<int64_t> test;     // rows of `evaluated_split`, ascending
  };
  std::vector<Task> tasks;
  std::string evaluated_split = "test";
  std::string hash;  // SHA-256 over fingerprint, classes and rows of every task

  /// Throws UserError: problem_of(), or a class without examples to train or to test on.
  static TaskStream make(const LabelledSet& set, const TaskStreamSpec& spec);
  static TaskStream make(const ImageDataset& dataset, const TaskStreamSpec& spec);
  /// Classes of tasks 0..last, in stream order.
  std::vector<int64_t> classes_until(int64_t last) const;
};

}  // namespace moraine::data
