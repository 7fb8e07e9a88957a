#include "coordinator/report/axis.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

namespace moraine::report {
namespace {

// Ranges come from computed numbers: a tick this close to an end (in steps) counts as on it.
constexpr double kSlack = 1e-9;

std::string scaled_tick(double value, double step) {
  const double size = std::max(std::abs(value), step);
  if (size >= 1e12) return fmt::format("{:g}", value);
  for (const auto& [unit, suffix] : {std::pair{1e9, "G"}, std::pair{1e6, "M"}, std::pair{1e3, "k"}})
    if (step >= unit || (size >= 10 * unit && size >= 1e4))
      return fmt::format("{:g}{}", value / unit, value == 0 ? "" : suffix);
  const int digits = std::max(0, static_cast<int>(-std::floor(std::log10(step) + kSlack)));
  return digits > 5 ? fmt::format("{:g}", value) : fmt::format("{:.{}f}", value, digits);
}

std::string decade_tick(double value) {
  const int exponent = static_cast<int>(std::floor(std::log10(value) + kSlack));
  if (exponent >= -3 && exponent <= 4) return fmt::format("{:g}", value);
  static constexpr const char* kDigits[] = {"⁰", "¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹"};
  std::string superscript = exponent < 0 ? "⁻" : "";
  for (const char digit : std::to_string(std::abs(exponent))) superscript += kDigits[digit - '0'];
  const int mantissa = static_cast<int>(std::lround(value / std::pow(10.0, exponent)));
  return mantissa == 1 ? "10" + superscript : fmt::format("{}·10{}", mantissa, superscript);
}

}  // namespace

double Axis::at(double value) const {
  return log ? std::log(value / lo) / std::log(hi / lo) : (value - lo) / (hi - lo);
}

void Axis::clip(double from, double to) {
  lo = std::max(lo, from);
  hi = std::min(hi, to);
  for (size_t i = ticks.size(); i-- > 0;) {
    if (ticks[i] >= lo && ticks[i] <= hi) continue;
    ticks.erase(ticks.begin() + static_cast<int64_t>(i));
    labels.erase(labels.begin() + static_cast<int64_t>(i));
  }
}

Axis linear_axis(double lo, double hi, int max_ticks) {
  if (lo > 0 && lo < 0.3 * hi) lo = 0;
  if (hi < 0 && hi > 0.3 * lo) hi = 0;
  if (!(hi > lo)) {
    const double half = lo == 0 ? 1 : std::abs(lo) * 0.1;
    lo -= half;
    hi += half;
  }
  for (double power = std::pow(10.0, std::floor(std::log10((hi - lo) / max_ticks)));; power *= 10) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double step = factor * power;
      const double first = std::floor(lo / step + kSlack), last = std::ceil(hi / step - kSlack);
      if (last - first + 1 > max_ticks) continue;
      Axis axis{first * step, last * step, false, {}, {}};
      for (double i = first; i <= last; ++i) {
        axis.ticks.push_back(i * step);
        axis.labels.push_back(scaled_tick(i * step, step));
      }
      return axis;
    }
  }
}

Axis log_axis(double lo, double hi, int max_ticks) {
  if (!(hi > lo)) {
    lo /= 2;
    hi *= 2;
  }
  Axis axis{lo, hi, true, {}, {}};
  const int first = static_cast<int>(std::floor(std::log10(lo) + kSlack)),
            last = static_cast<int>(std::ceil(std::log10(hi) - kSlack));
  const auto fill = [&](std::initializer_list<double> mantissas, int every) {
    axis.ticks.clear();
    for (int exponent = first; exponent <= last; ++exponent)
      for (const double mantissa : mantissas) {
        const double tick = mantissa * std::pow(10.0, exponent);
        if (exponent % every == 0 && tick >= lo * (1 - kSlack) && tick <= hi * (1 + kSlack)) axis.ticks.push_back(tick);
      }
  };
  fill({1}, 1);
  if (axis.ticks.size() < 3) fill({1, 2, 5}, 1);
  if (axis.ticks.size() < 3) fill({1, 2, 3, 4, 5, 6, 7, 8, 9}, 1);
  for (int every = 2; axis.ticks.size() > static_cast<size_t>(max_ticks); ++every) fill({1}, every);
  for (const double tick : axis.ticks) axis.labels.push_back(decade_tick(tick));
  return axis;
}

Axis power_of_two_axis(double lo, double hi, int max_ticks) {
  if (!(hi > lo)) {
    lo /= 2;
    hi *= 2;
  }
  Axis axis{lo, hi, true, {}, {}};
  const double first = std::ceil(std::log2(lo) - kSlack), last = std::floor(std::log2(hi) + kSlack);
  const double every = std::floor((last - first) / max_ticks) + 1;
  for (double exponent = first; exponent <= last; exponent += every) {
    axis.ticks.push_back(std::exp2(exponent));
    axis.labels.push_back(fmt::format("{:g}", axis.ticks.back()));
  }
  return axis;
}

Axis time_axis(double seconds, int max_ticks) {
  constexpr double kSteps[] = {0.1, 0.2, 0.5,  1,    2,    5,     10,    15,    30,    60,     120,   300,
                               600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800};
  double step = kSteps[0];
  for (const double candidate : kSteps) {
    step = candidate;
    if (seconds / step <= max_ticks) break;
  }
  while (seconds / step > max_ticks) step *= 2;
  Axis axis;
  axis.hi = std::max(seconds, step);
  for (int i = 0; i * step <= axis.hi * (1 + kSlack); ++i) {
    const double tick = i * step;
    const auto whole = std::llround(tick);
    axis.ticks.push_back(tick);
    if (axis.hi < 120) {
      axis.labels.push_back(fmt::format("{:g} s", tick));
    } else if (axis.hi < 7200) {
      axis.labels.push_back(fmt::format("{}:{:02}", whole / 60, whole % 60));
    } else {
      axis.labels.push_back(fmt::format("{}:{:02} h", whole / 3600, whole / 60 % 60));
    }
  }
  return axis;
}

std::string format_fixed(double value, int digits) {
  std::string text = fmt::format("{:.{}f}", value, digits);
  if (text.find_first_not_of("-0.") == std::string::npos && text.front() == '-') text.erase(0, 1);
  const size_t begin = text.front() == '-' ? 1 : 0;
  for (size_t end = std::min(text.find('.'), text.size()); end > begin + 3; end -= 3) text.insert(end - 3, ",");
  return text;
}

std::string format_number(double value, int digits) {
  const std::string text = format_fixed(value, digits);
  return value != 0 && text.find_first_not_of("0.") == std::string::npos ? fmt::format("{:.2g}", value) : text;
}

int choose_digits(const std::vector<double>& values) {
  double largest = 0;
  bool integers = true;
  for (const double value : values) {
    if (!std::isfinite(value)) continue;
    integers = integers && value == std::round(value);
    largest = std::max(largest, std::abs(value));
  }
  if (integers) return 0;
  return std::clamp(3 - static_cast<int>(std::floor(std::log10(largest))), 0, 6);
}

std::string format_duration(double seconds) {
  if (seconds < 9.95) return fmt::format("{:.1f} s", seconds);
  const auto whole = std::llround(seconds);
  if (whole < 120) return fmt::format("{} s", whole);
  if (whole < 7200) return fmt::format("{} min {:02} s", whole / 60, whole % 60);
  return fmt::format("{} h {:02} min", whole / 3600, whole / 60 % 60);
}

}  // namespace moraine::report
