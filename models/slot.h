#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace moraine::models {

/// linear: one nn.Linear; ffn: a whole gate/up/down triple; block: the residual stream behind a whole layer.
enum class SlotKind { kLinear, kFfn, kBlock };

/// A named place of a backbone where one function may sit. `path` is the Hugging Face module path,
/// "model.layers.3.mlp.down_proj" or "model.layers.3.mlp".
struct Slot {
  std::string path;
  SlotKind kind;
  int64_t in, out;    // features; block: both the model's width
  int64_t inner = 0;  // ffn only: intermediate size
};

/// The frozen weights at a slot, as stored (Hugging Face orientation [out, in]); a block slot has none.
struct SlotBase {
  at::Tensor weight{}, bias{};                     // linear; bias may be undefined
  at::Tensor gate{}, up{}, down{};                 // ffn: [h, d], [h, d], [d, h]
  at::Tensor gate_bias{}, up_bias{}, down_bias{};  // ffn: Llama with mlp_bias only, else undefined

  /// The frozen function itself: x W^T (+ b), or down(silu(gate x) * up x), or of a block slot x.
  at::Tensor forward(const at::Tensor& x) const;
};

/// What one forward pass knows, the same for all slots (Backbone::pass()). Whatever is drawn in it is pure in (seed,
/// step, first example, slot path), so a resumed run draws the same.
struct Pass {
  bool training = false;  // dropout and sampled ranks are on
  int64_t step = 0;       // optimiser step
  int64_t first = 0;      // position of the first example in the step's batch
  uint64_t seed = 0;
  bool recompute = false;  // of every layer only the input is kept for gradients (gradient checkpointing)
};

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;  // sorted by name

/// What replaces a slot's function while attached. forward() sees the slot's input [..., in], the frozen base and the
/// pass, and returns [..., out]. Differentiable through ATen's autograd.
class SlotFunction {
 public:
  virtual ~SlotFunction() = default;
  virtual at::Tensor forward(const at::Tensor& x, const SlotBase& base, const Pass& pass) = 0;
  /// Trainable tensors under names relative to the slot ("lora_A.weight").
  virtual NamedTensors parameters() const = 0;
};

/// `weight` in x's dtype: trained float32 masters inside a bfloat16 model are cast at use. Undefined stays undefined.
at::Tensor as_type_of(const at::Tensor& weight, const at::Tensor& x);

/// x W^T (+ bias), weights cast to x's dtype at use.
at::Tensor apply_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

/// SwiGLU feed-forward: down(silu(gate x) * up x), weights cast to x's dtype at use.
at::Tensor swiglu(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down);

}  // namespace moraine::models
