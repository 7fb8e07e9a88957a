#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels/types.h"

/// What the benchmarks of the ragged-rank kernels share: clocks, peaks, rank sets, routes, interleaved timing, one
/// table.
namespace bench {

/// With one thread, time is this thread's processor time: on a shared machine the wall clock counts the neighbours'
/// work.
void use_cpu_time(bool on);
bool uses_cpu_time();
double now_s();
inline double seconds_since(double start) { return now_s() - start; }

struct Peaks {
  double gflops = 0, gbps = 0;
};
/// Measures and prints a line: FMA, read and copy speed.
Peaks measure_peaks(const char* when, int threads);

struct RankSet {
  std::string name;
  std::vector<int64_t> ranks;
};
const std::vector<RankSet>& rank_sets();
std::vector<int64_t> repeat_to(const std::vector<int64_t>& ranks, int64_t experts);

/// index [tokens, slots]: distinct experts within a token. kind: uniform, zipf (exponent 1.2), one (all tokens the
/// same).
std::vector<int32_t> draw_route(const std::string& kind, int64_t tokens, int64_t slots, int64_t experts,
                                std::mt19937& engine);

/// The pairs of one expert that some token chose and that has a rank.
struct Segment {
  int64_t expert;
  at::Tensor tokens, pairs;  // long
};
std::vector<Segment> segments_of(const std::vector<int32_t>& index, int64_t slots, const std::vector<int64_t>& ranks,
                                 bool rank_zero_too = false);

at::Tensor bytes_for(size_t count);
moraine::kernels::Workspace view(const at::Tensor& bytes);
moraine::kernels::DType kernel_dtype(at::ScalarType type);

struct Contender {
  std::string name;
  std::function<at::Tensor(size_t)> run;  // which of the rotated inputs
  std::vector<double> ms;
};
double median(std::vector<double> values);
/// A warm-up, then rounds of all contenders in turn.
void time_interleaved(std::vector<Contender>& all, double budget_s);

/// One line of the table; the first contender is ours.
struct Cell {
  std::string what, ranks;
  int64_t tokens, experts, slots;
  at::ScalarType dtype;
  double flops, bytes, error;
};
void print_header();
void print_cell(const Cell& cell, const std::vector<Contender>& all, const Peaks& peaks);

/// How the command line asks for cells.
struct Request {
  int64_t tokens, experts, slots, d_in, d_out;
  RankSet ranks;
  std::string routing;
  at::ScalarType dtype;
  bool backward, few;  // few: only B1, B3 and B7
  double budget_s;
};
void run_delta(const Request& request, const Peaks& peaks);
void run_ffn(const Request& request, const Peaks& peaks);
/// Rank set and routing do not matter: one adapter of rank 64 of which 8 are selected per token.
void run_rankwise(const Request& request, const Peaks& peaks);
/// Every expert a full d_out x d_in matrix; the rank set does not matter.
void run_dense(const Request& request, const Peaks& peaks);
/// Factors of all experts multiplied out; tokens, slots and routing do not matter.
void run_materialise(const Request& request, const Peaks& peaks);

}  // namespace bench
