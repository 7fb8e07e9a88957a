#include "models/expert_kernels.h"

#include <algorithm>
#include <iterator>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.h"
#include "kernels/ffn_expert.h"
#include "models/mixture.h"

namespace moraine::models {

// Trained tensors of one low-rank expert, in the order the binding takes and returns them.
constexpr size_t kParts = 6;  // gate a, gate b, up a, up b, down a, down b
constexpr size_t kProjections = kParts / 2;

// Slabs of all experts, laid out as the kernels want them. `ranks` [3, E]; an expert of rank 0 has no parts.
struct ExpertSlabs {
  at::Tensor tensors[kParts];  // per projection A [R, in] and B transposed [R, out]
  at::Tensor offsets;          // [3, E + 1] int64
  at::Tensor scale;            // [E] ones: PHLoRA and direct training have no scale of their own
  kernels::FfnExperts view(int64_t d, int64_t h, kernels::DType dtype) const {
    const int64_t experts = scale.numel();
    const auto projection = [&](size_t i, int64_t in, int64_t out) {
      return kernels::RaggedExperts{experts,
                                    in,
                                    out,
                                    dtype,
                                    tensors[2 * i].const_data_ptr(),
                                    tensors[2 * i + 1].const_data_ptr(),
                                    offsets.const_data_ptr<int64_t>() + static_cast<int64_t>(i) * (experts + 1),
                                    nullptr,
                                    scale.const_data_ptr<float>()};
    };
    return {projection(0, d, h), projection(1, d, h), projection(2, h, d)};
  }
};

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

kernels::DType kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return kernels::DType::kF32;
    case at::kBFloat16:
      return kernels::DType::kBF16;
    case at::kDouble:
      return kernels::DType::kF64;
    default:
      MORAINE_CHECK(false, "ragged_ffn computes in float32, bfloat16 or float64: {}", at::toString(type));
      return {};
  }
}

at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor bytes(size_t count) { return at::empty({static_cast<int64_t>(count)}, at::kByte); }
kernels::Workspace workspace(const at::Tensor& storage) {
  return {storage.mutable_data_ptr(), static_cast<size_t>(storage.numel())};
}
// Scratch of this thread, kept from call to call and only grown: tens of megabytes of fresh pages cost as much time as
// the arithmetic of a small layer.
kernels::Workspace scratch(size_t count) {
  thread_local at::Tensor kept;
  if (!kept.defined() || static_cast<size_t>(kept.numel()) < count) {
    kept = at::Tensor();  // before the larger one is there
    kept = bytes(count);
  }
  return {kept.mutable_data_ptr(), count};
}
kernels::ConstRows rows_of(const at::Tensor& matrix) { return {matrix.const_data_ptr(), matrix.size(1)}; }
kernels::Rows mutable_rows_of(const at::Tensor& matrix) { return {matrix.mutable_data_ptr(), matrix.size(1)}; }

// `parts`: kParts tensors per low-rank expert; `has_parts` [E].
ExpertSlabs pack(at::TensorList parts, const std::vector<int64_t>& has_parts, int64_t d, int64_t h,
                 at::ScalarType dtype) {
  const auto experts = static_cast<int64_t>(has_parts.size());
  ExpertSlabs slabs;
  slabs.scale = at::ones({experts}, at::kFloat);
  slabs.offsets = at::empty({static_cast<int64_t>(kProjections), experts + 1}, at::kLong);
  for (size_t i = 0; i < kProjections; ++i) {
    int64_t* offsets = slabs.offsets.mutable_data_ptr<int64_t>() + static_cast<int64_t>(i) * (experts + 1);
    offsets[0] = 0;
    for (int64_t e = 0, at = 0; e < experts; ++e) {
      const int64_t rank = has_parts[e] != 0 ? parts[kParts * at++ + 2 * i].size(0) : 0;
      offsets[e + 1] = offsets[e] + rank;
    }
    slabs.tensors[2 * i] = at::empty({offsets[experts], i < 2 ? d : h}, dtype);
    slabs.tensors[2 * i + 1] = at::empty({offsets[experts], i < 2 ? h : d}, dtype);
    for (int64_t e = 0, at = 0; e < experts; ++e) {
      if (has_parts[e] == 0) continue;
      const int64_t rank = offsets[e + 1] - offsets[e];
      slabs.tensors[2 * i].narrow(0, offsets[e], rank).copy_(parts[kParts * at + 2 * i]);
      slabs.tensors[2 * i + 1].narrow(0, offsets[e], rank).copy_(parts[kParts * at + 2 * i + 1].t());
      ++at;
    }
  }
  return slabs;
}

// pack, or what was packed before. Weights that are trained change with every step and are not kept.
std::shared_ptr<const ExpertSlabs> packed(const std::vector<at::Tensor>& parts, const std::vector<int64_t>& has_parts,
                                          int64_t d, int64_t h, at::ScalarType dtype, PackedExperts* kept) {
  const auto fresh = [&] { return std::make_shared<const ExpertSlabs>(pack(parts, has_parts, d, h, dtype)); };
  const auto changes = [](const at::Tensor& part) {
    return part.requires_grad() || part.is_inference();
  };  // the latter count no versions
  if (kept == nullptr || std::any_of(parts.begin(), parts.end(), changes)) return fresh();
  bool same = kept->slabs != nullptr && kept->has_parts == has_parts && kept->slabs->tensors[0].scalar_type() == dtype;
  for (size_t i = 0; same && i < parts.size(); ++i)
    same = kept->parts[i].is_same(parts[i]) && kept->versions[i] == parts[i]._version();
  if (same) return kept->slabs;
  *kept = {};  // before the new slabs are there
  *kept = {fresh(), parts, {}, has_parts};
  for (const at::Tensor& part : parts) kept->versions.push_back(static_cast<uint32_t>(part._version()));
  return kept->slabs;
}

kernels::Route route(const at::Tensor& index, int64_t experts, const at::Tensor& storage) {
  return kernels::route_build(index.const_data_ptr<int32_t>(), index.size(0), index.size(1), experts,
                              workspace(storage), {});
}
at::Tensor route_storage(const at::Tensor& index, int64_t experts) {
  return bytes(kernels::route_bytes(index.size(0), index.size(1), experts, kernels::Device::kCpu));
}

struct Forward {
  at::Tensor hidden_sum, y_delta;
};

Forward run_forward(const ExpertSlabs& slabs, const at::Tensor& x, const at::Tensor& gate_base,
                    const at::Tensor& up_base, const at::Tensor& gates, const at::Tensor& index,
                    const kernels::FfnSaved* saved) {
  const kernels::FfnExperts experts = slabs.view(x.size(1), gate_base.size(1), kernel_dtype(x.scalar_type()));
  const at::Tensor storage = route_storage(index, experts.gate.num_experts);
  const kernels::Route routed = route(index, experts.gate.num_experts, storage);
  const kernels::Workspace space = scratch(kernels::ffn_forward_workspace(experts, index.size(0), index.size(1), {}));
  Forward out{at::empty_like(gate_base), at::empty_like(x)};
  kernels::ffn_forward({&experts, &routed, gates.const_data_ptr(), rows_of(x), rows_of(gate_base), rows_of(up_base),
                        mutable_rows_of(out.hidden_sum), mutable_rows_of(out.y_delta), saved},
                       space, {});
  return out;
}

class RaggedFfn : public torch::autograd::Function<RaggedFfn> {
 public:
  enum Input : size_t { kX, kGateBase, kUpBase, kGates, kIndex, kFirstPart };
  // What backward reads, in the order it is saved.
  enum Saved : size_t {
    kSavedX,
    kSavedGates,
    kSavedIndex,
    kSavedA,
    kSavedB,
    kSavedU,
    kSavedOffsets = kSavedU + 3,
    kSavedScale,
    kSavedSlabs
  };

  static variable_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& gate_base,
                               const at::Tensor& up_base, const at::Tensor& gates, const at::Tensor& index,
                               at::TensorList parts, const std::vector<int64_t>& has_parts,
                               const std::shared_ptr<const ExpertSlabs>& shared_slabs) {
    const int64_t d = x.size(1), h = gate_base.size(1);
    const ExpertSlabs& slabs = *shared_slabs;
    const kernels::FfnSavedSizes sizes =
        kernels::ffn_saved_sizes(slabs.view(d, h, kernel_dtype(x.scalar_type())), index.numel(), kernels::Device::kCpu);
    const at::Tensor a = bytes(sizes.a), b = bytes(sizes.b), u_gate = bytes(sizes.u_gate), u_up = bytes(sizes.u_up),
                     u_down = bytes(sizes.u_down);
    const kernels::FfnSaved saved{a.mutable_data_ptr(), b.mutable_data_ptr(), u_gate.mutable_data_ptr(),
                                  u_up.mutable_data_ptr(), u_down.mutable_data_ptr()};
    const Forward out = run_forward(slabs, x, gate_base, up_base, gates, index, &saved);
    variable_list keep{x, gates, index, a, b, u_gate, u_up, u_down, slabs.offsets, slabs.scale};
    keep.insert(keep.end(), std::begin(slabs.tensors), std::end(slabs.tensors));
    for (const at::Tensor& part : parts) keep.push_back(part);  // for their dtypes; no copies
    context->save_for_backward(std::move(keep));
    context->saved_data["has_parts"] = has_parts;
    return {out.hidden_sum, out.y_delta};
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const variable_list saved = context->get_saved_variables();
    const std::vector<int64_t> has_parts = context->saved_data["has_parts"].toIntVector();
    const at::Tensor &x = saved[kSavedX], &gates = saved[kSavedGates], &index = saved[kSavedIndex];
    const at::Tensor q = upstream[0].contiguous(), dy = upstream[1].contiguous();
    ExpertSlabs slabs{{}, saved[kSavedOffsets], saved[kSavedScale]};
    std::copy_n(saved.begin() + kSavedSlabs, kParts, slabs.tensors);
    const size_t first_part = kSavedSlabs + kParts, parts = saved.size() - first_part;
    const kernels::FfnExperts experts = slabs.view(x.size(1), q.size(1), kernel_dtype(x.scalar_type()));
    const at::Tensor storage = route_storage(index, experts.gate.num_experts);
    const kernels::Route routed = route(index, experts.gate.num_experts, storage);
    const kernels::Workspace space =
        scratch(kernels::ffn_backward_workspace(experts, index.size(0), index.size(1), {}));

    // Gradients of whole slabs, of those projections any expert of which is trained.
    at::Tensor grads[kParts];
    for (size_t i = 0; i < parts; ++i)
      if (context->needs_input_grad(kFirstPart + i) && !grads[i % kParts].defined())
        grads[i % kParts] = at::empty(slabs.tensors[i % kParts].sizes(), accumulate_type(x));
    const auto grad = [&](size_t i) { return grads[i].defined() ? grads[i].mutable_data_ptr() : nullptr; };
    const at::Tensor dgate_base = at::empty_like(q), dup_base = at::empty_like(q), dgates = at::empty_like(gates);
    const at::Tensor dx = context->needs_input_grad(kX) ? at::empty_like(x) : at::Tensor();
    const kernels::FfnSaved kept{saved[kSavedA].mutable_data_ptr(), saved[kSavedB].mutable_data_ptr(),
                                 saved[kSavedU].mutable_data_ptr(), saved[kSavedU + 1].mutable_data_ptr(),
                                 saved[kSavedU + 2].mutable_data_ptr()};
    kernels::ffn_backward({&experts, &routed, gates.const_data_ptr(), rows_of(x), rows_of(dy), rows_of(q), &kept,
                           mutable_rows_of(dgate_base), mutable_rows_of(dup_base),
                           dx.defined() ? mutable_rows_of(dx) : kernels::Rows{}, dgates.mutable_data_ptr(), grad(0),
                           grad(1), grad(2), grad(3), grad(4), grad(5), kernels::WeightGrads::kChosenOnly},
                          space, {});

    variable_list out{dx, dgate_base, dup_base, dgates, at::Tensor()};
    for (int64_t e = 0, i = 0; e < static_cast<int64_t>(has_parts.size()); ++e) {
      if (has_parts[e] == 0) continue;
      const bool chosen = routed.offsets[e + 1] > routed.offsets[e];
      for (size_t part = 0; part < kParts; ++part, ++i) {
        if (!chosen || !context->needs_input_grad(kFirstPart + i)) {
          out.emplace_back();
          continue;
        }
        const int64_t* offsets = slabs.offsets[static_cast<int64_t>(part / 2)].const_data_ptr<int64_t>();
        const at::Tensor slab = grads[part].narrow(0, offsets[e], offsets[e + 1] - offsets[e]);
        out.push_back((part % 2 == 0 ? slab : slab.t()).to(saved[first_part + i].scalar_type()));
      }
    }
    out.resize(out.size() + 2);  // has_parts, slabs
    return out;
  }
};

}  // namespace

bool ragged_ffn_covers(const at::Tensor& x) {
  return x.is_cpu() &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kDouble);
}

std::pair<at::Tensor, at::Tensor> ragged_ffn(const at::Tensor& x, const at::Tensor& gate_base,
                                             const at::Tensor& up_base, const at::Tensor& gates,
                                             const at::Tensor& index, const std::vector<const FfnExpert*>& experts,
                                             PackedExperts* kept) {
  MORAINE_CHECK(ragged_ffn_covers(x), "ragged_ffn computes on the CPU in float32, bfloat16 or float64: {} on {}",
                at::toString(x.scalar_type()), x.device().str());
  MORAINE_CHECK(gate_base.scalar_type() == x.scalar_type() && up_base.scalar_type() == x.scalar_type() &&
                    gates.scalar_type() == accumulate_type(x) && index.scalar_type() == at::kInt,
                "ragged_ffn: dtypes differ");
  MORAINE_CHECK(x.dim() == 2 && gate_base.dim() == 2 && gate_base.sizes() == up_base.sizes() &&
                    gate_base.size(0) == x.size(0) && index.dim() == 2 && index.sizes() == gates.sizes() &&
                    index.size(0) == x.size(0),
                "ragged_ffn: shapes differ");
  std::vector<at::Tensor> parts;
  std::vector<int64_t> has_parts;
  for (const FfnExpert* expert : experts) {
    has_parts.push_back(expert != nullptr);
    if (expert == nullptr) continue;
    for (const LowRank* pair : {&expert->gate_delta, &expert->up_delta, &expert->down_delta}) {
      parts.push_back(pair->a);
      parts.push_back(pair->b);
    }
  }
  const auto wants = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  const bool training = at::GradMode::is_enabled() && (wants(x) || wants(gate_base) || wants(up_base) || wants(gates) ||
                                                       std::any_of(parts.begin(), parts.end(), wants));
  const auto slabs = packed(parts, has_parts, x.size(1), gate_base.size(1), x.scalar_type(), kept);
  if (!training) {
    const Forward out = run_forward(*slabs, x.contiguous(), gate_base.contiguous(), up_base.contiguous(),
                                    gates.contiguous(), index.contiguous(), nullptr);
    return {out.hidden_sum, out.y_delta};
  }
  const variable_list out =
      RaggedFfn::apply(x.contiguous(), gate_base.contiguous(), up_base.contiguous(), gates.contiguous(),
                       index.contiguous(), at::TensorList(parts), has_parts, slabs);
  return {out[0], out[1]};
}

}  // namespace moraine::models
