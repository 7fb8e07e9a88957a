#pragma once

#include <string>
#include <vector>

// Axes with round ticks, and numbers as people read them.
namespace moraine::report {

/// A scale from data values to 0..1 with its ticks and their labels.
struct Axis {
  double lo = 0, hi = 1;
  bool log = false;
  std::vector<double> ticks;
  std::vector<std::string> labels;  // parallel to ticks

  /// Position in [0, 1] for lo <= value <= hi; on a log axis value > 0.
  double at(double value) const;
  /// Narrows the range to [from, to] and forgets the ticks outside it.
  void clip(double from, double to);
};

/// Linear axis around [lo, hi]: ticks are multiples of 1, 2 or 5 times a power of ten, at most `max_ticks` of them, and
/// the axis begins and ends on a tick. An empty range is widened; zero is included when the data come near it.
Axis linear_axis(double lo, double hi, int max_ticks);

/// Logarithmic axis over exactly [lo, hi], 0 < lo: ticks at decades; 1-2-5 steps where there are fewer than three
/// decades; every k-th decade where there are more than `max_ticks`.
Axis log_axis(double lo, double hi, int max_ticks);

/// Logarithmic axis with ticks at powers of two, for ranks and sizes.
Axis power_of_two_axis(double lo, double hi, int max_ticks);

/// Time from 0 to `seconds`, ticks at whole 1, 2, 5, 10, 15, 30 s, min or h, labelled "30 s", "2:30", "1:05 h".
Axis time_axis(double seconds, int max_ticks);

/// "33,270,665,216", "-0.120".
std::string format_fixed(double value, int digits);
/// The same, but "1e-09" where fixed decimals would show a number as zero.
std::string format_number(double value, int digits);
/// Decimals that show the largest of these numbers with four significant digits; 0 if all are integers.
int choose_digits(const std::vector<double>& values);
/// "0.4 s", "43 s", "2 min 41 s", "1 h 04 min".
std::string format_duration(double seconds);

}  // namespace moraine::report
