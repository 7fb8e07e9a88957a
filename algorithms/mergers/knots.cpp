#include "algorithms/mergers/knots.h"

#include <algorithm>
#include <limits>

#include <ATen/TensorOperators.h>
#include <ATen/ops/block_diag.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>

#include "algorithms/mergers/low_rank.h"
#include "algorithms/mergers/ties.h"

namespace moraine::algorithms::mergers {
namespace {

/// The changes in a common basis: change i is basis * parts[i].
struct Aligned {
  at::Tensor basis;               // [out, k], orthonormal columns
  std::vector<at::Tensor> parts;  // [k, in]
};

/// How many singular values differ from zero in float64.
int64_t numerical_rank(const at::Tensor& s, int64_t size) {
  const double smallest = s[0].item<double>() * static_cast<double>(size) * std::numeric_limits<double>::epsilon();
  return std::max<int64_t>(1, (s > smallest).sum().item<int64_t>());
}

Aligned aligned(std::span<const Contribution> contributions) {
  std::vector<at::Tensor> b, orthonormal, triangular;
  for (const Contribution& contribution : contributions) {
    const Pair pair = pair_of(contribution);
    b.push_back(pair.b * contribution.factors->scale);
    const auto [q, r] = at::linalg_qr(pair.a.t(), "reduced");
    orthonormal.push_back(q);
    triangular.push_back(r.t());
  }
  const auto [qb, rb] = at::linalg_qr(at::cat(b, 1), "reduced");
  const auto [u, s, vt] = at::linalg_svd(at::matmul(rb, at::block_diag(triangular)), /*full_matrices=*/false);
  const int64_t k = numerical_rank(s, rb.size(1));
  Aligned result{at::matmul(qb, u.narrow(1, 0, k)), {}};
  const at::Tensor svt = s.narrow(0, 0, k).unsqueeze(1) * vt.narrow(0, 0, k);
  int64_t first = 0;
  for (const at::Tensor& q : orthonormal) {
    result.parts.push_back(at::matmul(svt.narrow(1, first, q.size(1)), q.t()));
    first += q.size(1);
  }
  return result;
}

class Knots final : public Merger {
 public:
  std::string name() const override { return "knots"; }
  std::string summary() const override { return "ties in the basis of a common SVD (KnOTS, 2410.19735)"; }
  Traits traits() const override { return {.rank = true, .density = true, .sign = true}; }

 protected:
  Merged merge_checked(std::span<const Contribution> contributions, const MergeConfig& config,
                       const std::string&) const override {
    const Aligned common = aligned(contributions);
    Values values{common.parts, {}, std::vector<uint64_t>(contributions.size())};
    for (const Contribution& contribution : contributions) values.weights.push_back(contribution.weight);
    const Decomposition parts = svd_of_product(common.basis, ties_rule(values, config));
    return leading(parts, config.rank.value_or(parts.s.size(0)));
  }
};

}  // namespace

const Merger& knots() {
  static const Knots instance;
  return instance;
}

}  // namespace moraine::algorithms::mergers
