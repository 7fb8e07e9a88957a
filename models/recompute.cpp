#include "models/recompute.h"

#include <memory>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "core/error.h"

namespace moraine::models {
namespace {

using torch::autograd::variable_list;

/// Stands in the graph for all of part(x). Gradients of what `part` trains are added up by the second pass itself.
struct SecondPass : public torch::autograd::Node {
  std::function<at::Tensor(const at::Tensor&)> part;
  at::Tensor x;

  variable_list apply(variable_list&& gradients) override {
    MORAINE_CHECK(x.defined(), "models: a gradient was asked for twice");
    const at::AutoGradMode recording(true);
    const bool wanted = task_should_compute_output(0);
    const at::Tensor input = x.detach().set_requires_grad(wanted);
    const at::Tensor y = part(input);
    if (y.requires_grad()) y.backward(gradients[0]);
    return {wanted ? input.grad() : at::Tensor()};
  }
  void release_variables() override {
    x.reset();
    part = nullptr;
  }
};

}  // namespace

at::Tensor recomputed(const std::function<at::Tensor(const at::Tensor&)>& part, const at::Tensor& x) {
  if (!at::GradMode::is_enabled()) return part(x);
  at::Tensor y;
  {
    const at::NoGradGuard no_grad;
    y = part(x);
  }
  const std::shared_ptr<SecondPass> node(new SecondPass, torch::autograd::deleteNode);
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  node->part = part;
  node->x = x.detach();
  torch::autograd::set_history(y, node);
  return y;
}

}  // namespace moraine::models
