#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "algorithms/continual/training.h"

namespace moraine::algorithms::continual {

struct ErOptions : TrainingOptions {
  int64_t buffer_size = 200;  // examples of all classes seen
};
const core::Schema<ErOptions>& er_schema();

/// `size` of `rows` (fewer where there are none left), the same number of each of their labels, give or take one; which
/// ones is drawn by `seed`, and what is drawn of more classes is a part of what is drawn of fewer. Sorted.
/// `label_of[row]` is a row's class.
std::vector<int64_t> balanced_buffer(const std::vector<int64_t>& rows, const std::vector<int64_t>& label_of,
                                     int64_t size, uint64_t seed);

/// Experience replay: a buffer of old examples, as many of each class; every step of a later task sees as many rows of
/// it as new ones, in one cross entropy over all classes seen. Trained: an adapter or all weights, and head rows. Kept:
/// the buffer, as rows of the training split; its examples' bytes are counted with the state. A worker sends what it
/// trained and these rows. Seeds: as fine-tuning, and of the buffer. Source: ER (arXiv 1902.10486), with a balanced
/// buffer instead of a reservoir, and passes over the buffer in permutations instead of draws with replacement
/// (inferred: both make a step a pure function of seed and step).
class Er final : public TrainedLearner {
 public:
  std::string name() const override { return "er"; }
  std::string title() const override { return "replay of a buffer of examples"; }
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override;
  TrainingOptions options(const ContinualConfig& config) const override;
};

}  // namespace moraine::algorithms::continual
