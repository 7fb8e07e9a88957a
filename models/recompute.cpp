#include "models/recompute.h"

#include <memory>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "core/error.h"

namespace moraine::models {
namespace {

using torch::autograd::variable_list;

/// Stands in the graph for all of part(x), with x and the leaves as its inputs.
struct SecondPass : public torch::autograd::Node {
  std::function<at::Tensor(const at::Tensor&)> part;
  at::Tensor x;
  std::vector<at::Tensor> leaves;

  variable_list apply(variable_list&& gradients) override {
    MORAINE_CHECK(x.defined(), "models: a gradient was asked for twice");
    const at::AutoGradMode recording(true);
    const at::Tensor input = x.detach().set_requires_grad(task_should_compute_output(0));
    const at::Tensor y = part(input);
    variable_list wanted, out(1 + leaves.size());
    std::vector<size_t> places;
    for (size_t i = 0; i < out.size(); ++i) {
      if (!task_should_compute_output(i)) continue;
      wanted.push_back(i == 0 ? input : leaves[i - 1]);
      places.push_back(i);
    }
    if (!y.requires_grad() || wanted.empty()) return out;
    const variable_list found =
        torch::autograd::grad({y}, wanted, {gradients[0]}, std::nullopt, /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < places.size(); ++i) out[places[i]] = found[i];
    return out;
  }
  void release_variables() override {
    x.reset();
    part = nullptr;
    leaves.clear();
  }
};

}  // namespace

at::Tensor recomputed(const std::function<at::Tensor(const at::Tensor&)>& part, const at::Tensor& x,
                      const std::vector<at::Tensor>& leaves) {
  if (!at::GradMode::is_enabled()) return part(x);
  at::Tensor y;
  {
    const at::NoGradGuard no_grad;
    y = part(x);
  }
  const std::shared_ptr<SecondPass> node(new SecondPass, torch::autograd::deleteNode);
  variable_list inputs = {x};
  inputs.insert(inputs.end(), leaves.begin(), leaves.end());
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  node->part = part;
  node->x = x.detach();
  node->leaves = leaves;
  torch::autograd::set_history(y, node);
  return y;
}

}  // namespace moraine::models
