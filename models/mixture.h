#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "models/expert_kernels.h"
#include "models/slot.h"

namespace moraine::models {

/// One low-rank correction: delta = B A, A [r, in], B [out, r]; no further scaling.
struct LowRank {
  at::Tensor a, b;
};

/// One non-public expert of one FFN slot: full-size matrices, a low-rank correction of each public matrix, or any
/// functions on the public matrices, which is how experts of other parametrisations are trained.
struct FfnExpert {
  struct Functions {
    std::shared_ptr<SlotFunction> gate, up, down;  // of linear slots
  };
  at::Tensor gate, up, down;                 // full size: [h, d], [h, d], [d, h]; undefined when low-rank
  LowRank gate_delta, up_delta, down_delta;  // low rank; undefined otherwise
  Functions functions = {};                  // null otherwise
  bool full() const { return gate.defined(); }
  /// Nothing of the public expert's computation is shared.
  bool by_itself() const { return full() || functions.gate != nullptr; }
  int64_t rank() const { return full() ? 0 : gate_delta.a.size(0); }
};

/// How a mixture layer is computed. kFactored pays for the dense public FFN once per token whatever k; kPerExpert runs
/// every selected expert by itself (its oracle).
enum class MixtureForward { kFactored, kPerExpert };

/// Who computes the factored form. kReference: ATen operators. kAuto: the ragged-rank kernels (models/expert_kernels.h)
/// where they cover device and dtype (ragged_ffn_covers: the CPU, where they were faster at every rank and number of
/// experts, bench/mixture.cpp), the reference elsewhere, since the CUDA kernels have not been run on a GPU. Both agree
/// within rounding; their bits differ.
enum class MixtureKernels { kAuto, kReference };

/// Experts of any rank behind a softmax router on one FFN slot; expert 0 is the slot's frozen base.
///
///   p = softmax_fp32(x Wr^T + min(bias, 0));  K = top-k of p;  y = sum_{e in K} p_e F_e(x)      (p is not renormalised
///   unless norm_topk_prob)
///   factored: h_e = silu(g0 + B_g(A_g x)) * (u0 + B_u(A_u x));  y = W_d (sum p_e h_e) + sum p_e B_d (A_d h_e) + full
///   experts' terms
///
/// Shapes: x [..., d]; router: blocks of rows [n_i, d] that together are Wr [E, d], so that frozen and trained rows are
/// different tensors; bias [E - 1] (expert 0 has none) or undefined; experts: 1 .. E - 1.
/// dtype: computes in x's (float32, bfloat16, float64); tensors of another dtype (float32 masters) are cast at use.
/// Contributions are added in a fixed order, so equal input gives equal bits. Gradients flow to whatever requires them.
/// Throws UserError on a bad top_k or expert shapes that disagree with the base. Not thread-safe (routing statistics,
/// packed weights). Source: FlexOlmo (arXiv 2507.07024), forward and training router; FlexMoRE (arXiv 2602.08818),
/// "Exact factored evaluation" (inferred: the algebra is ours). Ties in top-k go to whichever ATen's topk picks.
class MixtureFfn : public SlotFunction {
 public:
  struct Options {
    int64_t top_k = 2;
    bool norm_topk_prob = false;
    MixtureForward forward = MixtureForward::kFactored;
    MixtureKernels kernels = MixtureKernels::kAuto;
  };
  MixtureFfn(std::vector<at::Tensor> router, at::Tensor bias, std::vector<FfnExpert> experts, Options options);

  at::Tensor forward(const at::Tensor& x, const SlotBase& base, const Pass& pass = {}) override;
  /// Those that require gradients: "router.<first row>", "bias", "experts.<e>.{gate,up,down}_proj[_a|_b].weight", of
  /// functions "experts.<e>.{gate,up,down}_proj.<name>".
  NamedTensors parameters() const override;

  /// 1 <= top_k <= num_experts(), else UserError.
  void set_top_k(int64_t top_k);
  void set_forward(MixtureForward forward) { options_.forward = forward; }
  void set_kernels(MixtureKernels kernels) { options_.kernels = kernels; }
  int64_t num_experts() const { return static_cast<int64_t>(experts_.size()) + 1; }  // public expert included

  /// Router mass and selections since record_load(true): per expert, sum of p_e and number of tokens that selected it.
  struct Load {
    std::vector<double> probability;
    std::vector<int64_t> selected;
    int64_t tokens = 0;
  };
  /// Turning it on resets the counts.
  void record_load(bool on);
  const Load& load() const { return load_; }

 private:
  struct Routing;
  bool factors() const;
  bool by_kernels(const at::Tensor& x) const;
  Routing route(const at::Tensor& x);
  at::Tensor factored(const at::Tensor& x, const SlotBase& base, const Routing& routing, const Pass& pass) const;
  at::Tensor factored_by_kernels(const at::Tensor& x, const SlotBase& base, const Routing& routing,
                                 const Pass& pass) const;
  at::Tensor per_expert(const at::Tensor& x, const SlotBase& base, const Routing& routing, const Pass& pass) const;

  std::vector<at::Tensor> router_;
  at::Tensor bias_;
  std::vector<FfnExpert> experts_;
  Options options_;
  mutable PackedExperts packed_;
  bool record_ = false;
  Load load_;
};

}  // namespace moraine::models
