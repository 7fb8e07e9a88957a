#include "data/task_stream.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <utility>

#include "core/error.h"
#include "core/hash.h"
#include "data/permutation.h"

namespace moraine::data {
namespace {

// Rows of every class in file order.
std::map<int64_t, std::vector<int64_t>> rows_by_class(const std::vector<int64_t>& labels) {
  std::map<int64_t, std::vector<int64_t>> rows;
  for (size_t row = 0; row < labels.size(); ++row) rows[labels[row]].push_back(static_cast<int64_t>(row));
  return rows;
}

// `count` (0 = all the rest) of `rows` from position `first` of a permutation that seed and class choose.
std::vector<int64_t> draw(const std::vector<int64_t>& rows, uint64_t seed, const std::string& purpose, int64_t first,
                          int64_t count) {
  const auto size = static_cast<int64_t>(rows.size());
  if (size == 0) return {};
  const Permutation order(size, core::derive_seed(seed, purpose));
  std::vector<int64_t> out;
  for (int64_t i = first; i < (count ? std::min(size, first + count) : size); ++i)
    out.push_back(rows[static_cast<size_t>(order(i))]);
  return out;
}

std::vector<std::vector<int64_t>> class_lists(const TaskStreamSpec& spec, int64_t num_classes) {
  if (!spec.tasks.empty()) {
    if (spec.order < 0) return spec.tasks;
    std::vector<std::vector<int64_t>> lists;
    for (const int64_t task : class_order(static_cast<int64_t>(spec.tasks.size()), static_cast<uint32_t>(spec.order)))
      lists.push_back(spec.tasks[static_cast<size_t>(task)]);
    return lists;
  }
  std::vector<int64_t> kept;
  for (int64_t label = 0; label < num_classes; ++label)
    if (std::find(spec.leave_out.begin(), spec.leave_out.end(), label) == spec.leave_out.end()) kept.push_back(label);
  std::vector<int64_t> order(kept.size());
  std::iota(order.begin(), order.end(), 0);
  if (spec.order >= 0) order = class_order(static_cast<int64_t>(kept.size()), static_cast<uint32_t>(spec.order));
  std::vector<std::vector<int64_t>> lists;
  for (size_t next = 0; next < order.size();) {
    const int64_t size = lists.empty() && spec.base_classes ? spec.base_classes : spec.increment;
    auto& list = lists.emplace_back();
    for (int64_t i = 0; i < size && next < order.size(); ++i) list.push_back(kept[static_cast<size_t>(order[next++])]);
  }
  return lists;
}

}  // namespace

std::vector<int64_t> class_order(int64_t num_classes, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<int64_t> order(static_cast<size_t>(num_classes));
  std::iota(order.begin(), order.end(), 0);
  for (uint32_t i = static_cast<uint32_t>(order.size()); i-- > 1;) {
    uint32_t mask = i;
    for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
    uint32_t other = 0;
    do other = static_cast<uint32_t>(generator()) & mask;
    while (other > i);
    std::swap(order[i], order[other]);
  }
  return order;
}

std::optional<std::string> problem_of(const TaskStreamSpec& spec, int64_t num_classes) {
  std::map<int64_t, std::string> place;
  const auto enter = [&](int64_t label, const std::string& where) -> std::optional<std::string> {
    if (label < 0 || label >= num_classes)
      return fmt::format("class {} of {} is outside the data set's 0..{}", label, where, num_classes - 1);
    const auto [at, inserted] = place.emplace(label, where);
    if (!inserted) return fmt::format("class {} stands twice: in {} and in {}", label, at->second, where);
    return std::nullopt;
  };
  for (const int64_t label : spec.leave_out)
    if (auto problem = enter(label, "leave_out")) return problem;
  if (spec.tasks.empty()) {
    const int64_t left = num_classes - static_cast<int64_t>(spec.leave_out.size());
    if (left < 2) return fmt::format("leave_out leaves {} of {} classes", left, num_classes);
    if (spec.base_classes > left)
      return fmt::format("base_classes {} is more than the {} classes there are", spec.base_classes, left);
    return std::nullopt;
  }
  for (size_t task = 0; task < spec.tasks.size(); ++task) {
    if (spec.tasks[task].empty()) return fmt::format("task {} has no class", task);
    for (const int64_t label : spec.tasks[task])
      if (auto problem = enter(label, fmt::format("task {}", task))) return problem;
  }
  for (int64_t label = 0; label < num_classes; ++label)
    if (!place.count(label)) return fmt::format("class {} is in no task; name it in leave_out if that is meant", label);
  return std::nullopt;
}

TaskStream TaskStream::make(const ImageDataset& dataset, const TaskStreamSpec& spec) {
  const ImageSetInfo& info = dataset.info();
  return make(LabelledSet{info.fingerprint, info.class_names, dataset.labels("train"), dataset.labels("test"),
                          dataset.path().string(), "image"},
              spec);
}

TaskStream TaskStream::make(const LabelledSet& set, const TaskStreamSpec& spec) {
  const auto num_classes = static_cast<int64_t>(set.class_names.size());
  if (const auto problem = problem_of(spec, num_classes))
    throw core::UserError(fmt::format("data: task stream over {}: {}", set.path, *problem),
                          "every class stands in one task or in leave_out");
  const auto train = rows_by_class(set.train), test = rows_by_class(set.test);
  const auto rows_of = [](const auto& rows, int64_t label) {
    const auto at = rows.find(label);
    return at == rows.end() ? std::vector<int64_t>() : at->second;
  };
  TaskStream stream;
  stream.evaluated_split = spec.evaluate_validation ? "train" : "test";
  core::Json described = {{"format", 1},
                          {"scenario", "class_incremental"},
                          {"fingerprint", set.fingerprint},
                          {"evaluated", stream.evaluated_split},
                          {"tasks", core::Json::array()}};
  for (auto& classes : class_lists(spec, num_classes)) {
    Task task{std::move(classes), {}, {}};
    for (const int64_t label : task.classes) {
      const std::string purpose = fmt::format("stream/class{}", label);
      const auto own = rows_of(train, label);
      const auto trained = draw(own, spec.seed, purpose, spec.validation_per_class, spec.train_per_class);
      const auto tested = spec.evaluate_validation
                              ? draw(own, spec.seed, purpose, 0, std::max<int64_t>(1, spec.validation_per_class))
                              : draw(rows_of(test, label), spec.seed, purpose + "/test", 0, spec.test_per_class);
      if (trained.empty() || tested.empty())
        throw core::UserError(fmt::format("data: class {} ({}) has no {} left to {} on: {}", label,
                                          set.class_names[static_cast<size_t>(label)], set.noun,
                                          trained.empty() ? "train" : "test", set.path),
                              "leave the class out, or lower validation_per_class");
      task.train.insert(task.train.end(), trained.begin(), trained.end());
      task.test.insert(task.test.end(), tested.begin(), tested.end());
    }
    std::sort(task.train.begin(), task.train.end());
    std::sort(task.test.begin(), task.test.end());
    described["tasks"].push_back({{"classes", task.classes}, {"train", task.train}, {"test", task.test}});
    stream.tasks.push_back(std::move(task));
  }
  stream.hash = core::sha256(described.dump());
  return stream;
}

std::vector<int64_t> TaskStream::classes_until(int64_t last) const {
  std::vector<int64_t> classes;
  for (int64_t task = 0; task <= last; ++task) {
    const auto& own = tasks[static_cast<size_t>(task)].classes;
    classes.insert(classes.end(), own.begin(), own.end());
  }
  return classes;
}

}  // namespace moraine::data
