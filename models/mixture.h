#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "models/slot.h"

namespace moraine::models {

/// One low-rank correction: delta = B A, A [r, in], B [out, r]; no further scaling.
struct LowRank {
  at::Tensor a, b;
};

/// One non-public expert of one FFN slot: full-size matrices, or a correction of each public matrix.
struct FfnExpert {
  at::Tensor gate, up, down;                 // full size: [h, d], [h, d], [d, h]; undefined when low-rank
  LowRank gate_delta, up_delta, down_delta;  // low rank; undefined when full-size
  bool full() const { return gate.defined(); }
  int64_t rank() const { return full() ? 0 : gate_delta.a.size(0); }
};

/// How a mixture layer is computed. kFactored pays for the dense public FFN once per token whatever k; kPerExpert runs
/// every selected expert by itself (its oracle).
enum class MixtureForward { kFactored, kPerExpert };

/// Experts of any rank behind a softmax router on one FFN slot; expert 0 is the slot's frozen base.
///
///   p = softmax_fp32(x Wr^T + min(bias, 0));  K = top-k of p;  y = sum_{e in K} p_e F_e(x)      (p is not renormalised
///   unless norm_topk_prob)
///   factored: h_e = silu(g0 + B_g(A_g x)) * (u0 + B_u(A_u x));  y = W_d (sum p_e h_e) + sum p_e B_d (A_d h_e) + full experts' terms
///
/// Shapes: x [N, d] or [B, T, d], router [E, d], bias [E] (entry 0 is always 0) or undefined.
/// top_k may be changed between calls. Accumulates routing statistics when asked.
/// Source: FlexOlmo, section "forward"; FlexMoRE, "Exact factored evaluation". The bias is added before the softmax.
class MixtureFfn : public SlotFunction {
 public:
  struct Options {
    int64_t top_k = 2;
    bool norm_topk_prob = false;
    MixtureForward forward = MixtureForward::kFactored;
  };
  MixtureFfn(at::Tensor router, at::Tensor bias, std::vector<FfnExpert> experts, Options options);

  at::Tensor forward(const at::Tensor& x, const SlotBase& base) override;
  NamedTensors parameters() const override;   // those that require gradients

  void set_top_k(int64_t top_k);
  int64_t num_experts() const;                // public expert included
  /// Router mass and selections since the last reset: per expert, sum of p_e and number of tokens that selected it.
  struct Load {
    std::vector<double> probability;
    std::vector<int64_t> selected;
    int64_t tokens = 0;
  };
  void record_load(bool on);
  const Load& load() const { return load_; }

 private:
  at::Tensor router_, bias_;
  std::vector<FfnExpert> experts_;
  Options options_;
  bool record_ = false;
  Load load_;
};

}  // namespace moraine::models
