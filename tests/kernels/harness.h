#pragma once

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/ffn_expert.h"
#include "kernels/ragged_delta.h"
#include "kernels/rankwise.h"
#include "tests/kernels/oracle.h"

/// Runs the kernels on double data rounded to a storage type and gives doubles back; outputs and workspaces start as
/// NaN.
namespace moraine::kernels::test {

/// A processor family (or CUDA) and a storage type.
struct Target {
  Exec exec;
  DType dtype = DType::kF32;
};
std::string target_name(const Target& target);
/// How GoogleTest prints a parameter.
void PrintTo(const Target& target, std::ostream* out);
/// All combinations that exist anywhere; tests skip the ones this machine lacks (skip_reason).
std::vector<Target> all_targets();
/// CUDA with every expert that has a rank and a pair on wgmma, whatever its size.
Exec all_by_wgmma();
/// Empty, or why the target cannot run here.
std::string skip_reason(const Target& target);

/// Bytes in the memory of the target's device, NaN-filled, with typed transfer from and to doubles.
class Memory {
 public:
  Memory(const Exec& exec, size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void upload(const void* from, size_t bytes);
  void download(void* to, size_t bytes) const;

 private:
  Exec exec_;
  size_t bytes_;
  void* data_;
};

/// `values` in the given type, on the device.
std::unique_ptr<Memory> put(const Exec& exec, const Vec& values, DType dtype);
Vec get(const Memory& memory, int64_t count, DType dtype);
DType accumulate_dtype(DType storage);
/// Nearest value of the type (ties to even).
double rounded(double x, DType dtype);

/// Random values rounded to the type.
class Random {
 public:
  Random();  // a fixed seed; MORAINE_TEST_SEED chooses another
  uint64_t seed() const { return seed_; }
  Vec normal(int64_t count, DType dtype, double deviation = 1.0);
  int64_t below(int64_t bound);
  template <class T>
  T pick(const std::vector<T>& from) {
    return from[static_cast<size_t>(below(static_cast<int64_t>(from.size())))];
  }
  /// Weights are scaled by 1/sqrt of what they are summed over, so that outputs are of order 1.
  Experts experts(int64_t d_in, int64_t d_out, std::vector<int64_t> ranks, DType dtype, bool dense = false);
  /// Every slot a random expert; about one in eight empty when `holes`.
  Routing routing(int64_t tokens, int64_t slots, int64_t experts, bool holes = true);

 private:
  uint64_t seed_;
  std::mt19937_64 engine_;
};

/// Weights and route of one call on the device; keep alive while `view` is used.
class DeviceExperts {
 public:
  DeviceExperts(const Target& target, const Experts& experts);
  RaggedExperts view;

 private:
  std::vector<int64_t> offsets_;
  std::vector<std::unique_ptr<Memory>> held_;
};
class DeviceRoute {
 public:
  DeviceRoute(const Target& target, const Routing& routing, int64_t experts);
  Route route;
  const void* gates;

 private:
  std::vector<std::unique_ptr<Memory>> held_;
};

struct DeltaResult {
  Vec y;
  DeltaGrads grads;
};
/// Forward and backward. `onto`: what da and dbt hold before; backward then adds to it unless told otherwise.
DeltaResult run_delta(const Target& target, const Experts& experts, const Routing& routing, const Vec& x, const Vec& y0,
                      const Vec& dy, const DeltaGrads* onto = nullptr,
                      WeightGrads grads_onto = WeightGrads::kAccumulate);
Vec run_delta_forward(const Target& target, const Experts& experts, const Routing& routing, const Vec& x,
                      const Vec& y0);

struct FfnResult {
  FfnOut out;
  FfnGrads grads;
};
FfnResult run_ffn(const Target& target, const Ffn& experts, const Routing& routing, const Vec& x, const Vec& gate_base,
                  const Vec& up_base, const Vec& dy, const Vec& q);

/// Allowed deviation: ||out - ref|| <= relative (||ref|| + 0.1 sqrt(n)), and |out - ref| <= element |ref| + rms_share
/// rms(ref) everywhere, rms at least 0.1. Random operands make results of order 1 and more; the floor is for the rare
/// case of one or two numbers (one token, rank 1) that all but cancel. Relative 0 means exact. The numbers are measured
/// rounding errors of a simulation that rounds where the kernels do, times about 1.7.
struct Tolerance {
  double relative, element, rms_share;
};
Tolerance output_tolerance(DType dtype);
double gate_tolerance(DType dtype);  // on the vector over all pairs: single entries cancel
void expect_close(const Vec& out, const Vec& ref, const Tolerance& tolerance, const std::string& what);
/// Bound by condition, for sums whose terms may cancel and whose terms have heavy tails (products of normal variables:
/// with two pairs of an expert an element can be 0.036 rms off by correct rounding alone, above rms_share):
///
///   |out - ref| <= roundings u stored + depth u' summed
///
/// u, u': unit roundoffs of the storage and accumulate types; roundings: times a factor of each product was stored;
/// depth: longest chain of additions behind an element. First order, rigorous for any order of summation.
void expect_close_terms(const Vec& out, const Vec& ref, const Vec& stored, const Vec& summed, int roundings,
                        int64_t depth, DType dtype, const std::string& what);
void expect_close_norm(const Vec& out, const Vec& ref, double relative, const std::string& what);
void expect_same_bits(const Vec& a, const Vec& b, const std::string& what);

/// Suites over all targets derive from this: skips with the reason, prints the seed on failure.
class OnTarget : public testing::TestWithParam<Target> {
 protected:
  void SetUp() override;
  Random random;
  std::unique_ptr<testing::ScopedTrace> trace_;
};

}  // namespace moraine::kernels::test
