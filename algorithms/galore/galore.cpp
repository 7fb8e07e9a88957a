#include "algorithms/galore/galore.h"

#include <map>
#include <optional>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include "algorithms/adapters/config.h"
#include "core/error.h"

namespace moraine::algorithms::galore {
namespace {

/// One weight's subspace. A side that is not projected has no vectors.
struct Subspace {
  at::Tensor left, right;      // P [m, r], Q [r, n]
  at::Tensor updates;          // so far; a float32 scalar, as optimisers count
  std::vector<int64_t> shape;  // of what moves
};

/// Whether the left and the right side of a weight [m, n] are projected.
std::pair<bool, bool> sides(const std::string& type, int64_t m, int64_t n) {
  if (type == "full") return {true, true};
  const bool right = type == "std" || type == "reverse_std" ? (m >= n) == (type == "std") : type == "right";
  return {!right, right};
}

class GaLoreSpace final : public UpdateSpace {
 public:
  GaLoreSpace(const GaLoreConfig& config, std::span<const models::Slot> slots, const models::NamedTensors& parameters)
      : config_(config) {
    std::map<std::string, at::Tensor> by_name(parameters.begin(), parameters.end());
    for (const std::string& path : targets_of(config, slots)) {
      const auto found = by_name.find(path + ".weight");
      MORAINE_CHECK(found != by_name.end(), "no trained weight of {}", path);
      const int64_t m = found->second.size(0), n = found->second.size(1);
      const auto [left, right] = sides(config.proj_type, m, n);
      const auto options = at::TensorOptions(at::kFloat).device(found->second.device());
      Subspace& own = subspaces_[found->first];
      if (left) own.left = at::zeros({m, config.rank}, options);
      if (right) own.right = at::zeros({config.rank, n}, options);
      own.updates = at::zeros(at::IntArrayRef{}, options);
      own.shape = {left ? config.rank : m, right ? config.rank : n};
    }
  }

  std::optional<std::vector<int64_t>> shape(const std::string& parameter) const override {
    const auto found = subspaces_.find(parameter);
    return found == subspaces_.end() ? std::nullopt : std::optional(found->second.shape);
  }

  at::Tensor project(const std::string& parameter, const at::Tensor& gradient) override {
    Subspace& own = subspaces_.at(parameter);
    if (own.updates.item<int64_t>() % config_.update_proj_gap == 0) refresh(own, gradient);
    own.updates.add_(1);
    at::Tensor moving = own.left.defined() ? at::matmul(own.left.t(), gradient) : gradient;
    if (own.right.defined()) moving = at::matmul(moving, own.right.t());
    return moving;
  }

  at::Tensor project_back(const std::string& parameter, const at::Tensor& change) const override {
    const Subspace& own = subspaces_.at(parameter);
    at::Tensor moved = own.left.defined() ? at::matmul(own.left, change) : change;
    if (own.right.defined()) moved = at::matmul(moved, own.right);
    return moved.mul(config_.scale);
  }

  models::NamedTensors state() const override {
    models::NamedTensors all;
    for (const auto& [name, own] : subspaces_) {
      if (own.left.defined()) all.emplace_back(name + "/left", own.left);
      if (own.right.defined()) all.emplace_back(name + "/right", own.right);
      all.emplace_back(name + "/updates", own.updates);
    }
    return all;
  }

 private:
  void refresh(Subspace& own, const at::Tensor& gradient) const {
    const auto [u, s, vh] = at::linalg_svd(gradient.to(at::kCPU, at::kFloat), /*full_matrices=*/false);
    if (own.left.defined()) own.left.copy_(u.narrow(1, 0, config_.rank));
    if (own.right.defined()) own.right.copy_(vh.narrow(0, 0, config_.rank));
  }

  const GaLoreConfig config_;
  std::map<std::string, Subspace> subspaces_;  // by parameter
};

}  // namespace

const core::Schema<GaLoreConfig>& galore_schema() {
  using C = GaLoreConfig;
  static const auto schema =
      core::Schema<C>()
          .field("rank", &C::rank)
          .min(1)
          .doc("Rank of the subspaces; memory of moments and projections grows linearly")
          .field("update_proj_gap", &C::update_proj_gap)
          .min(1)
          .unit("steps")
          .doc("Steps between two subspaces, each a singular value decomposition of every selected gradient")
          .field("scale", &C::scale)
          .above(0)
          .doc("Of what the optimiser moves in the subspace")
          .field("proj_type", &C::proj_type)
          .choices({"std", "reverse_std", "left", "right", "full"})
          .doc(
              "Side that is projected: std the shorter one; reverse_std the longer one; full both, so that moments "
              "have "
              "rank x rank numbers")
          .field("target_modules", &C::target_modules)
          .doc(
              "Modules whose weights are projected, by whole path or last segments; all-linear = every linear but "
              "lm_head");
  return schema;
}

std::vector<std::string> targets_of(const GaLoreConfig& config, std::span<const models::Slot> slots) {
  adapters::AdapterConfig selection;
  selection.rank = config.rank;
  selection.target_modules = config.target_modules;
  std::vector<std::string> paths;
  for (const adapters::Target& target : adapters::targets_of(selection, slots)) paths.push_back(target.slot.path);
  return paths;
}

std::shared_ptr<UpdateSpace> make_space(const GaLoreConfig& config, std::span<const models::Slot> slots,
                                        const models::NamedTensors& parameters) {
  return std::make_shared<GaLoreSpace>(config, slots, parameters);
}

}  // namespace moraine::algorithms::galore
