#pragma once

#include <cstdint>
#include <vector>

/// What the kernels must compute, in double, by plain loops over tokens, slots and ranks straight from the definitions
/// in the headers. No blocking, no sorting, no shared code with kernels/.
namespace moraine::kernels::test {

using Vec = std::vector<double>;

struct Experts {
  int64_t d_in = 0, d_out = 0;
  std::vector<int64_t> ranks;
  bool dense = false;
  Vec a, bt;  // [R, d_in], [R, d_out]
  Vec scale;  // [E]

  int64_t num() const { return static_cast<int64_t>(ranks.size()); }
  std::vector<int64_t> offsets() const;
  int64_t total_rank() const { return offsets().back(); }
};

struct Routing {
  int64_t tokens = 0, slots = 1;
  std::vector<int32_t> index;  // [T k]
  Vec gates;                   // [T k]
};

struct DeltaGrads {
  Vec dx, da, dbt, dgates;
};

/// One expert's map of one input row and its backward; shared by all oracles below.
Vec apply_expert(const Experts& x, int64_t e, const double* in);
/// grads.da and grads.dbt += upstream-weighted outer products; returns A^T v.
Vec expert_backward(const Experts& x, int64_t e, const double* in, const double* dout, double weight,
                    DeltaGrads& grads);

Vec delta_forward(const Experts& x, const Routing& r, const Vec& in, const Vec& y0);
DeltaGrads delta_backward(const Experts& x, const Routing& r, const Vec& in, const Vec& dy, const Vec& dx0);

/// What rounding errors of the weight and gate gradients are in proportion to (first order): `stored` sums the absolute
/// products whose factor u or v is rounded to the storage type, `summed` those with u or v replaced by the sum of the
/// absolute products it is made of, which errors of the accumulate type follow.
struct GradMagnitudes {
  DeltaGrads stored, summed;  // dx stays empty
};
GradMagnitudes delta_backward_magnitudes(const Experts& x, const Routing& r, const Vec& in, const Vec& dy);

struct Ffn {
  Experts gate, up, down;
};
struct FfnOut {
  Vec hidden_sum, y_delta;
};
struct FfnGrads {
  Vec dgate_base, dup_base, dx_delta, dgates;
  DeltaGrads gate, up, down;  // da and dbt
};
FfnOut ffn_forward(const Ffn& x, const Routing& r, const Vec& in, const Vec& gate_base, const Vec& up_base);
FfnGrads ffn_backward(const Ffn& x, const Routing& r, const Vec& in, const Vec& gate_base, const Vec& up_base,
                      const Vec& dy, const Vec& q);

struct RankwiseGrads {
  Vec dx, da, dbt, dmask;
};
Vec rankwise_forward(const Vec& a, const Vec& bt, int64_t tokens, int64_t rank, int64_t d_in, int64_t d_out,
                     double scale, const Vec& in, const Vec& mask, const Vec& y0);
RankwiseGrads rankwise_backward(const Vec& a, const Vec& bt, int64_t tokens, int64_t rank, int64_t d_in, int64_t d_out,
                                double scale, const Vec& in, const Vec& mask, const Vec& dy);

}  // namespace moraine::kernels::test
