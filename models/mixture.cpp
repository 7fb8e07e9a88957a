#include "models/mixture.h"

#include <algorithm>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/full.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "core/error.h"
#include "models/expert_kernels.h"

namespace moraine::models {

/// Which tokens go to which expert, with what weight.
struct MixtureFfn::Routing {
  bool by_kernels = false;
  at::Tensor gates;   // [N, E] in float32 (float64); only selected entries mean anything
  at::Tensor weight;  // the same in x's dtype
  at::Tensor choice;  // [N, k] selected experts; undefined when every token selects all
  // Per expert the rows that selected it, ascending; of those experts only that ATen computes, and empty for
  // everyone().
  std::vector<at::Tensor> tokens;

  bool everyone() const { return !choice.defined(); }
  bool nobody(int64_t expert) const { return !everyone() && tokens[expert].numel() == 0; }
  at::Tensor gather(const at::Tensor& rows, int64_t expert) const {
    return everyone() ? rows : rows.index_select(0, tokens[expert]);
  }
  at::Tensor gate(int64_t expert) const { return gather(weight.slice(1, expert, expert + 1), expert); }
};

namespace {

/// Sums contributions of experts in the order they come, over all rows or over some.
class RowSum {
 public:
  RowSum(int64_t rows, int64_t width, const at::Tensor& like) : rows_(rows), width_(width), like_(like) {}

  /// `tokens`: rows that `value` belongs to; undefined = all.
  void add(const at::Tensor& value, const at::Tensor& tokens) {
    if (!tokens.defined()) {
      sum_ = sum_.defined() ? sum_.add_(value) : value;
    } else {
      if (!sum_.defined()) sum_ = zeros();
      sum_.index_add_(0, tokens, value);
    }
  }
  at::Tensor take() { return sum_.defined() ? sum_ : zeros(); }

 private:
  at::Tensor zeros() const { return at::zeros({rows_, width_}, like_.options().requires_grad(false)); }
  int64_t rows_, width_;
  at::Tensor like_, sum_;
};

// start + (x A^T) B^T
at::Tensor add_low_rank(const at::Tensor& start, const at::Tensor& x, const LowRank& delta) {
  return at::addmm(start, apply_linear(x, delta.a), as_type_of(delta.b, x).t());
}

void check_shape(const char* what, size_t expert, const at::Tensor& tensor, int64_t rows, int64_t columns) {
  if (tensor.defined() && tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns) return;
  throw core::UserError(
      fmt::format("models: expert {} does not fit the mixture: {} is {}, expected [{}, {}]", expert, what,
                  tensor.defined() ? fmt::format("[{}]", fmt::join(tensor.sizes().vec(), ", ")) : "absent", rows,
                  columns),
      "all experts of a mixture must come from one public base");
}

void check_pair(const char* what, size_t expert, const LowRank& delta, int64_t rows, int64_t columns) {
  const int64_t rank = delta.a.defined() && delta.a.dim() == 2 ? delta.a.size(0) : 0;
  check_shape(what, expert, delta.a, rank, columns);
  check_shape(what, expert, delta.b, rows, rank);
}

void check_experts(const std::vector<FfnExpert>& experts, const SlotBase& base, int64_t width) {
  const int64_t h = base.gate.size(0), d = base.gate.size(1);
  MORAINE_CHECK_EQ(width, d);
  for (size_t i = 0; i < experts.size(); ++i) {
    const FfnExpert& expert = experts[i];
    if (expert.full()) {
      check_shape("gate_proj", i + 1, expert.gate, h, d);
      check_shape("up_proj", i + 1, expert.up, h, d);
      check_shape("down_proj", i + 1, expert.down, d, h);
    } else if (!expert.by_itself()) {
      check_pair("the gate_proj pair", i + 1, expert.gate_delta, h, d);
      check_pair("the up_proj pair", i + 1, expert.up_delta, h, d);
      check_pair("the down_proj pair", i + 1, expert.down_delta, d, h);
    }
  }
}

// One expert by itself, the way a mixture of separate FFNs runs it.
at::Tensor run_expert(const FfnExpert& expert, const at::Tensor& x, const SlotBase& base, const Pass& pass) {
  if (expert.full()) return swiglu(x, expert.gate, expert.up, expert.down);
  if (const auto& on = expert.functions; on.gate != nullptr) {
    const at::Tensor gate = on.gate->forward(x, {.weight = base.gate}, pass);
    const at::Tensor inner = at::silu(gate) * on.up->forward(x, {.weight = base.up}, pass);
    return on.down->forward(inner, {.weight = base.down}, pass);
  }
  const at::Tensor gate = add_low_rank(apply_linear(x, base.gate), x, expert.gate_delta);
  const at::Tensor up = add_low_rank(apply_linear(x, base.up), x, expert.up_delta);
  const at::Tensor hidden = at::silu(gate) * up;
  return add_low_rank(apply_linear(hidden, base.down), hidden, expert.down_delta);
}

}  // namespace

MixtureFfn::MixtureFfn(std::vector<at::Tensor> router, at::Tensor bias, std::vector<FfnExpert> experts, Options options)
    : router_(std::move(router)), bias_(std::move(bias)), experts_(std::move(experts)), options_(options) {
  int64_t rows = 0;
  for (const at::Tensor& block : router_) {
    MORAINE_CHECK(block.defined() && block.dim() == 2 && block.size(1) == router_[0].size(1),
                  "router blocks must be [n, d] with one d");
    rows += block.size(0);
  }
  if (rows != num_experts()) {
    throw core::UserError(
        fmt::format("models: a mixture of {} experts needs as many router rows: {}", num_experts(), rows));
  }
  MORAINE_CHECK(!bias_.defined() || (bias_.dim() == 1 && bias_.size(0) == num_experts() - 1),
                "router bias must be [E - 1]: expert 0 has none");
  set_top_k(options_.top_k);
}

void MixtureFfn::set_top_k(int64_t top_k) {
  if (top_k < 1 || top_k > num_experts()) {
    throw core::UserError(
        fmt::format("models: top_k must be in 1..{} (the number of experts): {}", num_experts(), top_k));
  }
  options_.top_k = top_k;
}

void MixtureFfn::record_load(bool on) {
  record_ = on;
  if (on) load_ = {std::vector<double>(experts_.size() + 1, 0.0), std::vector<int64_t>(experts_.size() + 1, 0), 0};
}

NamedTensors MixtureFfn::parameters() const {
  NamedTensors all;
  int64_t row = 0;
  for (const at::Tensor& block : router_) {
    all.emplace_back(fmt::format("router.{}", row), block);
    row += block.size(0);
  }
  all.emplace_back("bias", bias_);
  for (size_t i = 0; i < experts_.size(); ++i) {
    const FfnExpert& e = experts_[i];
    const std::string path = fmt::format("experts.{}.", i + 1);
    const std::pair<const char*, const at::Tensor*> parts[] = {
        {"gate_proj.weight", &e.gate},           {"up_proj.weight", &e.up},
        {"down_proj.weight", &e.down},           {"gate_proj_a.weight", &e.gate_delta.a},
        {"up_proj_a.weight", &e.up_delta.a},     {"down_proj_a.weight", &e.down_delta.a},
        {"gate_proj_b.weight", &e.gate_delta.b}, {"up_proj_b.weight", &e.up_delta.b},
        {"down_proj_b.weight", &e.down_delta.b}};
    for (const auto& [name, tensor] : parts) all.emplace_back(path + name, *tensor);
    const std::pair<const char*, const SlotFunction*> functions[] = {{"gate_proj.", e.functions.gate.get()},
                                                                     {"up_proj.", e.functions.up.get()},
                                                                     {"down_proj.", e.functions.down.get()}};
    for (const auto& [name, function] : functions)
      if (function != nullptr)
        for (const auto& [own, tensor] : function->parameters()) all.emplace_back(path + name + own, tensor);
  }
  std::erase_if(all, [](const auto& entry) { return !entry.second.defined() || !entry.second.requires_grad(); });
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return all;
}

MixtureFfn::Routing MixtureFfn::route(const at::Tensor& x) {
  std::vector<at::Tensor> blocks;
  for (const at::Tensor& block : router_) blocks.push_back(as_type_of(block, x));
  const at::ScalarType wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor logits = apply_linear(x, blocks.size() == 1 ? blocks[0] : at::cat(blocks)).to(wide);
  if (bias_.defined()) {
    const at::Tensor none = at::zeros({1}, logits.options().requires_grad(false));
    logits = logits + at::cat({none, at::clamp_max(bias_, 0).to(wide)});
  }
  const at::Tensor p = at::softmax(logits, -1);
  Routing routing;
  routing.by_kernels = by_kernels(x);
  at::Tensor selected;  // [N, E] bool; undefined = all
  if (options_.top_k < num_experts()) {
    routing.choice = std::get<1>(at::topk(p.detach(), options_.top_k));
    selected =
        at::scatter(at::zeros_like(p, p.options().dtype(at::kBool).requires_grad(false)), 1, routing.choice, true);
    for (int64_t expert = 0; expert < num_experts(); ++expert) {
      const bool by_itself = expert > 0 && experts_[expert - 1].by_itself();
      routing.tokens.push_back(routing.by_kernels && !by_itself ? at::Tensor()
                                                                : at::nonzero(selected.select(1, expert)).squeeze(1));
    }
  }
  routing.gates = p;
  if (options_.norm_topk_prob) routing.gates = p / (selected.defined() ? p * selected : p).sum(-1, /*keepdim=*/true);
  routing.weight = routing.gates.to(x.scalar_type());
  if (record_) {
    const at::Tensor mass = p.detach().sum(0, /*keepdim=*/false, at::kDouble);
    for (int64_t expert = 0; expert < num_experts(); ++expert) {
      load_.probability[expert] += mass[expert].item<double>();
      load_.selected[expert] += routing.everyone() ? x.size(0) : selected.select(1, expert).sum().item<int64_t>();
    }
    load_.tokens += x.size(0);
  }
  return routing;
}

at::Tensor MixtureFfn::forward(const at::Tensor& x, const SlotBase& base, const Pass& pass) {
  MORAINE_CHECK(base.gate.defined(), "a mixture sits on an FFN slot");
  if (base.gate_bias.defined() || base.up_bias.defined() || base.down_bias.defined()) {
    throw core::UserError("models: mixtures on FFNs with biases are not supported", "use a base with mlp_bias = false");
  }
  const at::Tensor rows = x.reshape({-1, x.size(-1)});
  check_experts(experts_, base, rows.size(1));
  const Routing routing = route(rows);
  if (routing.by_kernels) return factored_by_kernels(rows, base, routing, pass).view_as(x);
  return (factors() ? factored(rows, base, routing, pass) : per_expert(rows, base, routing, pass)).view_as(x);
}

// Without a low-rank expert nothing is shared, and the factored form is the per-expert form.
bool MixtureFfn::factors() const {
  const bool shares = std::any_of(experts_.begin(), experts_.end(), [](const FfnExpert& e) { return !e.by_itself(); });
  return options_.forward == MixtureForward::kFactored && shares;
}

bool MixtureFfn::by_kernels(const at::Tensor& x) const {
  return options_.kernels == MixtureKernels::kAuto && factors() && ragged_ffn_covers(x);
}

at::Tensor MixtureFfn::per_expert(const at::Tensor& x, const SlotBase& base, const Routing& routing,
                                  const Pass& pass) const {
  RowSum sum(x.size(0), base.down.size(0), x);
  for (int64_t expert = 0; expert < num_experts(); ++expert) {
    if (routing.nobody(expert)) continue;
    const at::Tensor rows = routing.gather(x, expert);
    const at::Tensor y = expert == 0 ? base.forward(rows) : run_expert(experts_[expert - 1], rows, base, pass);
    sum.add(y * routing.gate(expert), routing.everyone() ? at::Tensor() : routing.tokens[expert]);
  }
  return sum.take();
}

at::Tensor MixtureFfn::factored(const at::Tensor& x, const SlotBase& base, const Routing& routing,
                                const Pass& pass) const {
  const at::Tensor public_gate = apply_linear(x, base.gate), public_up = apply_linear(x, base.up);
  RowSum hidden_sum(x.size(0), base.gate.size(0), x);  // sum p_e h_e over the public and the low-rank experts
  RowSum sum(x.size(0), base.down.size(0), x);         // everything that does not go through the public down matrix
  for (int64_t expert = 0; expert < num_experts(); ++expert) {
    if (routing.nobody(expert)) continue;
    const at::Tensor tokens = routing.everyone() ? at::Tensor() : routing.tokens[expert];
    const FfnExpert* own = expert == 0 ? nullptr : &experts_[expert - 1];
    if (own != nullptr && own->by_itself()) {
      sum.add(run_expert(*own, routing.gather(x, expert), base, pass) * routing.gate(expert), tokens);
      continue;
    }
    at::Tensor gate = routing.gather(public_gate, expert), up = routing.gather(public_up, expert);
    if (own != nullptr) {
      const at::Tensor rows = routing.gather(x, expert);
      gate = add_low_rank(gate, rows, own->gate_delta);
      up = add_low_rank(up, rows, own->up_delta);
    }
    const at::Tensor hidden = at::silu(gate) * up * routing.gate(expert);
    if (own != nullptr) sum.add(apply_linear(apply_linear(hidden, own->down_delta.a), own->down_delta.b), tokens);
    hidden_sum.add(hidden, tokens);
  }
  return apply_linear(hidden_sum.take(), base.down) + sum.take();
}

at::Tensor MixtureFfn::factored_by_kernels(const at::Tensor& x, const SlotBase& base, const Routing& routing,
                                           const Pass& pass) const {
  std::vector<const FfnExpert*> own = {nullptr};  // the public expert, then those of low rank
  const at::Tensor number =
      at::full({num_experts()}, -1, at::kInt);  // of an expert among them; those by themselves have none
  number.mutable_data_ptr<int32_t>()[0] = 0;
  RowSum sum(x.size(0), base.down.size(0), x);
  for (int64_t expert = 1; expert < num_experts(); ++expert) {
    const FfnExpert& e = experts_[expert - 1];
    if (!e.by_itself()) {
      number.mutable_data_ptr<int32_t>()[expert] = static_cast<int32_t>(own.size());
      own.push_back(&e);
    } else if (!routing.nobody(expert)) {
      sum.add(run_expert(e, routing.gather(x, expert), base, pass) * routing.gate(expert),
              routing.everyone() ? at::Tensor() : routing.tokens[expert]);
    }
  }
  const at::Tensor index = routing.everyone()
                               ? number.expand({x.size(0), -1})
                               : number.index_select(0, routing.choice.flatten()).view_as(routing.choice);
  const at::Tensor gates = routing.everyone() ? routing.gates : routing.gates.gather(1, routing.choice);
  const auto [hidden, delta] =
      ragged_ffn(x, apply_linear(x, base.gate), apply_linear(x, base.up), gates, index, own, &packed_);
  const at::Tensor y = apply_linear(hidden, base.down) + delta;
  return own.size() == experts_.size() + 1 ? y : y + sum.take();
}

}  // namespace moraine::models
