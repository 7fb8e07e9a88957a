#include "algorithms/continual/metrics.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "core/error.h"
#include "core/registry.h"

namespace moraine::algorithms::continual {
namespace {

using Value = std::optional<double>;

// Sums optional terms: one missing term makes the whole sum missing.
class Mean {
 public:
  void add(Value term, double weight = 1) {
    if (!term) complete_ = false;
    sum_ += weight * term.value_or(0);
    weights_ += weight;
  }
  Value value() const { return complete_ && weights_ > 0 ? Value(sum_ / weights_) : std::nullopt; }

 private:
  double sum_ = 0, weights_ = 0;
  bool complete_ = true;
};

Value minus(Value a, Value b) { return a && b ? Value(*a - *b) : std::nullopt; }

Value cell(const AccuracyMatrix& m, int64_t i, int64_t j) {
  return m.r[static_cast<size_t>(i)][static_cast<size_t>(j)];
}

// The largest accuracy on task j after tasks first..last.
Value best(const AccuracyMatrix& m, int64_t j, int64_t first, int64_t last) {
  Value most;
  for (int64_t i = first; i <= last; ++i) {
    const Value value = cell(m, i, j);
    if (!value) return std::nullopt;
    most = std::max(most.value_or(*value), *value);
  }
  return most;
}

using Term = std::function<Value(int64_t)>;
Value mean_over(int64_t first, int64_t end, const Term& term) {
  Mean mean;
  for (int64_t j = first; j < end; ++j) mean.add(term(j));
  return mean.value();
}

Value bwt_continuum(const AccuracyMatrix& m) {
  Mean mean;
  for (int64_t i = 1; i < m.tasks(); ++i)
    for (int64_t j = 0; j < i; ++j) mean.add(minus(cell(m, i, j), cell(m, j, j)));
  return mean.value();
}

Value compute(const std::string& name, const AccuracyMatrix& m) {
  const int64_t tasks = m.tasks(), last = tasks - 1;
  const auto over_old = [&](const Term& term) { return mean_over(0, last, term); };  // tasks 0..T-2
  const auto over_later = [&](const Term& term) { return mean_over(1, tasks, term); };
  if (name == "average_pooled") return mean_over(0, tasks, [&](int64_t i) { return pooled_accuracy(m, i); });
  if (name == "average_taskmean") return mean_over(0, tasks, [&](int64_t i) { return taskmean_accuracy(m, i); });
  if (name == "last_pooled") return pooled_accuracy(m, last);
  if (name == "last_taskmean") return taskmean_accuracy(m, last);
  if (name == "forgetting_chaudhry")
    return over_old([&](int64_t j) { return minus(best(m, j, j, last - 1), cell(m, last, j)); });
  if (name == "forgetting_pycil")
    return over_old([&](int64_t j) { return minus(best(m, j, j, last), cell(m, last, j)); });
  if (name == "forgetting_first") return over_old([&](int64_t j) { return minus(cell(m, j, j), cell(m, last, j)); });
  if (name == "bwt") return over_old([&](int64_t j) { return minus(cell(m, last, j), cell(m, j, j)); });
  if (name == "bwt_continuum") return bwt_continuum(m);
  if (name == "bwt_positive") {
    const Value value = bwt_continuum(m);
    return value ? Value(std::max(*value, 0.0)) : std::nullopt;
  }
  if (name == "remembering") {
    const Value value = bwt_continuum(m);
    return value ? Value(100 - std::abs(std::min(*value, 0.0))) : std::nullopt;
  }
  if (name == "fwt")
    return over_later([&](int64_t j) { return minus(cell(m, j - 1, j), m.before[static_cast<size_t>(j)]); });
  if (name == "fwt_continuum") return over_later([&](int64_t j) { return cell(m, j - 1, j); });
  if (name == "learning_accuracy") return mean_over(0, tasks, [&](int64_t j) { return cell(m, j, j); });
  if (name == "stability") return over_old([&](int64_t j) { return cell(m, last, j); });
  if (name == "newest") return cell(m, last, last);
  if (name == "transfer")
    return over_later([&](int64_t j) { return mean_over(0, j, [&](int64_t i) { return cell(m, i, j); }); });
  if (name == "average_mtil" && tasks < 2) return std::nullopt;  // as transfer, which it goes with
  if (name == "average_mtil")
    return mean_over(0, tasks,
                     [&](int64_t j) { return mean_over(0, tasks, [&](int64_t i) { return cell(m, i, j); }); });
  if (name == "last_mtil") return mean_over(0, tasks, [&](int64_t j) { return cell(m, last, j); });
  if (name == "accuracy_diaz") {
    Mean mean;
    for (int64_t i = 0; i < tasks; ++i)
      for (int64_t j = 0; j <= i; ++j) mean.add(cell(m, i, j));
    return mean.value();
  }
  MORAINE_CHECK(name == "intransigence", "metric '{}' has no formula", name);
  if (m.joint.empty()) return std::nullopt;
  return mean_over(0, tasks, [&](int64_t k) { return minus(m.joint[static_cast<size_t>(k)], cell(m, k, k)); });
}

}  // namespace

const std::vector<MetricInfo>& metric_table() {
  static const std::vector<MetricInfo> table = {
      {"average_pooled", "average, pooled", "mean over i of correct / total after task i (iCaRL; PyCIL, PILOT, MOS)",
       Needs::kSeen, true},
      {"last_pooled", "last, pooled", "correct / total after the last task (PyCIL, PILOT, Mammoth)", Needs::kSeen,
       true},
      {"last_taskmean", "last, task mean", "mean over j of R[T-1][j] (Chaudhry, Avalanche)", Needs::kSeen, true},
      {"forgetting_chaudhry", "forgetting, Chaudhry",
       "mean over j < T-1 of max over i in j..T-2 of R[i][j], minus R[T-1][j]; negative = gain", Needs::kTwoTasks,
       true},
      {"forgetting_pycil", "forgetting, PyCIL",
       "the same with the last row inside the maximum, so never negative (PyCIL, PILOT, MOS, EASE, Mammoth)",
       Needs::kTwoTasks, true},
      {"forgetting_first", "forgetting, first - last", "mean over j < T-1 of R[j][j] - R[T-1][j] (Avalanche; TRACE)",
       Needs::kTwoTasks, true},
      {"bwt", "backward transfer", "mean over j < T-1 of R[T-1][j] - R[j][j] (GEM, Mammoth, Avalanche)",
       Needs::kTwoTasks, true},
      {"fwt", "forward transfer", "mean over j >= 1 of R[j-1][j] - b_j, b at initial values (GEM, Mammoth, Avalanche)",
       Needs::kNextBefore, true},
      {"learning_accuracy", "learning accuracy", "mean over j of R[j][j]", Needs::kSeen, true},
      {"transfer", "transfer", "mean over j >= 1 of the mean over i < j of R[i][j] (ZSCL, MTIL)", Needs::kAll, true},
      {"average_mtil", "average, MTIL", "mean over all cells (ZSCL, MTIL)", Needs::kAll, true},
      {"last_mtil", "last, MTIL", "mean over j of R[T-1][j] (ZSCL, MTIL); the same as last_taskmean", Needs::kSeen,
       true},
      {"average_taskmean", "average, task mean", "mean over i of the mean over j <= i of R[i][j]", Needs::kSeen, false},
      {"accuracy_diaz", "accuracy, Diaz-Rodriguez", "mean of all cells on and below the diagonal (Continuum)",
       Needs::kSeen, false},
      {"bwt_continuum", "backward transfer, Continuum",
       "mean over all i > j of R[i][j] - R[j][j] (Continuum, LibContinual)", Needs::kTwoTasks, false},
      {"bwt_positive", "positive backward transfer", "max(bwt_continuum, 0) (Continuum)", Needs::kTwoTasks, false},
      {"remembering", "remembering", "100 - |min(bwt_continuum, 0)| (Continuum)", Needs::kTwoTasks, false},
      {"fwt_continuum", "forward transfer, no baseline", "mean over j >= 1 of R[j-1][j] (Continuum)", Needs::kNext,
       false},
      {"stability", "old tasks", "mean over j < T-1 of R[T-1][j] (PyCIL: old)", Needs::kTwoTasks, false},
      {"newest", "newest task", "R[T-1][T-1] (PyCIL: new)", Needs::kSeen, false},
      {"intransigence", "intransigence", "mean over k of the joint model's accuracy on task k minus R[k][k] (Chaudhry)",
       Needs::kJoint, false},
  };
  return table;
}

const MetricInfo& find_metric(const std::string& name) {
  std::vector<std::string> known;
  for (const auto& info : metric_table()) {
    if (info.name == name) return info;
    known.push_back(info.name);
  }
  throw core::UserError(fmt::format("algorithms/continual: no metric '{}'", name), core::name_hint(name, known));
}

Value metric(const std::string& name, const AccuracyMatrix& matrix) {
  const auto tasks = static_cast<size_t>(matrix.tasks());
  MORAINE_CHECK(tasks > 0 && matrix.before.size() == tasks && matrix.images.size() == tasks &&
                    (matrix.joint.empty() || matrix.joint.size() == tasks),
                "an accuracy matrix of {} rows has other sizes beside it", tasks);
  return compute(find_metric(name).name, matrix);
}

Value pooled_accuracy(const AccuracyMatrix& matrix, int64_t i) {
  Mean mean;
  for (int64_t j = 0; j <= i; ++j)
    mean.add(cell(matrix, i, j), static_cast<double>(matrix.images[static_cast<size_t>(j)]));
  return mean.value();
}

Value taskmean_accuracy(const AccuracyMatrix& matrix, int64_t i) {
  return mean_over(0, i + 1, [&](int64_t j) { return cell(matrix, i, j); });
}

std::optional<std::string> why_missing(const MetricInfo& metric, const CellsOffered& offered) {
  const bool two = metric.needs != Needs::kSeen && metric.needs != Needs::kJoint;
  if (two && offered.tasks < 2) return "it compares tasks, and the stream has one";
  const bool ahead = metric.needs == Needs::kNext || metric.needs == Needs::kNextBefore || metric.needs == Needs::kAll;
  if (ahead && !offered.ahead) return "it needs accuracies on tasks before they are trained";
  if (metric.needs == Needs::kJoint && !offered.joint) return "it needs the method joint in the same run";
  return std::nullopt;
}

}  // namespace moraine::algorithms::continual
