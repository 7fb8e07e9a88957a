#include "coordinator/scheduler.h"

#include <algorithm>
#include <functional>

namespace moraine::coordinator {
namespace {

constexpr double kNewestWeight = 0.3;
constexpr double kUnmeasuredSpeed = 1e9;  // FLOP/s; only ratios matter until something was measured

template <typename Key>
void average_in(std::map<Key, double>& averages, const Key& key, double value) {
  const auto [entry, first] = averages.try_emplace(key, value);
  if (!first) entry->second += kNewestWeight * (value - entry->second);
}

}  // namespace

void Scheduler::measured(const std::string& kind, int worker, double cost, double seconds) {
  if (!(cost > 0) || !(seconds > 0)) return;
  const double speed = cost / seconds;
  const auto known = kind_speed_.find(kind);
  average_in(worker_speed_, worker, known == kind_speed_.end() ? 1.0 : speed / known->second);
  average_in(kind_speed_, kind, speed);
}

double Scheduler::predicted_seconds(const std::string& kind, double cost) const {
  if (const auto known = kind_speed_.find(kind); known != kind_speed_.end()) return cost / known->second;
  double sum = 0;
  for (const auto& [name, speed] : kind_speed_) sum += speed;
  return cost / (kind_speed_.empty() ? kUnmeasuredSpeed : sum / static_cast<double>(kind_speed_.size()));
}

double Scheduler::relative_speed(int worker) const {
  const auto known = worker_speed_.find(worker);
  return known == worker_speed_.end() ? 1.0 : known->second;
}

void Scheduler::sort(std::vector<int>& workers) const {
  std::sort(workers.begin(), workers.end(), [this](int a, int b) {
    const double speed_a = relative_speed(a), speed_b = relative_speed(b);
    return speed_a != speed_b ? speed_a > speed_b : a < b;
  });
}

void ReadyQueue::erase(const Candidate& unit) {
  const auto kind = kinds_.find(unit.kind);
  if (kind == kinds_.end()) return;
  kind->second.erase({-unit.cost, unit.id});
  if (kind->second.empty()) kinds_.erase(kind);
}

size_t ReadyQueue::size() const {
  size_t size = 0;
  for (const auto& [kind, units] : kinds_) size += units.size();
  return size;
}

void ReadyQueue::visit(const Scheduler& scheduler, const std::function<bool(std::string_view)>& visit) const {
  struct Head {
    const std::string* kind;
    std::set<std::pair<double, std::string_view>>::const_iterator next, end;
    double seconds;
  };
  std::vector<Head> heads;
  const auto predict = [&](Head& head) { head.seconds = scheduler.predicted_seconds(*head.kind, -head.next->first); };
  for (const auto& [kind, units] : kinds_) predict(heads.emplace_back(Head{&kind, units.begin(), units.end(), 0}));
  while (!heads.empty()) {
    const auto first = std::ranges::min_element(heads, [](const Head& a, const Head& b) {
      return a.seconds != b.seconds ? a.seconds > b.seconds : a.next->second < b.next->second;
    });
    if (!visit(first->next->second)) return;
    if (++first->next == first->end)
      heads.erase(first);
    else
      predict(*first);
  }
}

double seconds_to_finish(std::vector<double> busy, std::vector<double> units) {
  std::ranges::sort(units, std::greater<>());
  for (const double seconds : units) *std::ranges::min_element(busy) += seconds;
  return *std::ranges::max_element(busy);
}

}  // namespace moraine::coordinator
