#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/json.h"
#include "models/slot.h"
#include "models/weights.h"

namespace moraine::models {

/// What a forward pass reads; undefined is what the model has no use for.
struct Input {
  at::Tensor tokens = {};    // [B, T] int64
  at::Tensor mask = {};      // [B, T] bool, true on real tokens, which come first in a row; undefined = no padding
  at::Tensor segments = {};  // [B, T] int64: tokens see those of their own segment alone; undefined = one per row
  at::Tensor images = {};    // [B, C, H, W] of the model's size and dtype
};

/// A sum (not a mean) of next-token cross entropy in nats, and counts.
struct TokenLoss {
  at::Tensor sum;       // [] float32, differentiable
  int64_t count = 0;    // targets >= 0
  int64_t correct = 0;  // argmax == target; only when asked for
  at::Tensor rows;      // [B] float32, the sum of each row; only when asked for
};

/// What token_loss() gives beside the sum.
struct TokenLossOptions {
  bool correct = false, rows = false;
  bool few_targets = false;    // most are -1: their logits are not computed
  double label_smoothing = 0;  // share of a target that is spread over the vocabulary
};

/// A network whose weights are frozen and whose slots can be taken over. Weights never change; training touches only
/// what attached slot functions own, or everything after make_trainable(). Not thread-safe while slots change nor for
/// two forward passes at once; forward passes of distinct backbones that share weights may run concurrently.
class Backbone {
 public:
  virtual ~Backbone() = default;
  Backbone(const Backbone&) = delete;  // two models would train one set of slot functions: share weights instead
  Backbone& operator=(const Backbone&) = delete;

  const std::vector<Slot>& slots() const { return slots_; }
  /// Throws UserError with the nearest slot paths if `path` is no slot.
  const SlotBase& base(const std::string& path) const { return bases_[slot_index(path)]; }
  /// At most one function per slot. Throws UserError on an unknown path or when an FFN and a matrix inside it would
  /// both be taken (a block may hold taken slots: it comes behind them), InternalError if the slot is taken.
  void attach(const std::string& path, std::shared_ptr<SlotFunction> function);
  /// Restores the frozen function bit-exactly (a mixture's mlp slot: expert 0 alone). No effect on an empty slot.
  void detach(const std::string& path);
  /// nullptr when empty.
  std::shared_ptr<SlotFunction> attached(const std::string& path) const { return functions_[slot_index(path)]; }

  /// The pass that forward passes are in; an evaluation unless a PassScope says otherwise.
  const Pass& pass() const { return pass_; }

  /// Makes every weight a trainable leaf of its own (base pre-training, joint training) and returns them by name.
  /// Leaves of a bfloat16 model are float32 masters, cast at use. Functions the model made itself (a mixture's) are
  /// rebuilt over the leaves.
  NamedTensors make_trainable();
  /// Weights by Hugging Face name, sorted.
  const std::map<std::string, at::Tensor>& weights() const { return weights_; }
  at::Device device() const { return weights_.begin()->second.device(); }
  /// What the model computes in.
  at::ScalarType dtype() const { return dtype_; }

  /// One vector for each example, [B, width()] in the model's dtype: of a decoder the last real token's state after the
  /// last norm, of an encoder its pooler's output or, without one, the mean over real tokens, of a vision transformer
  /// the CLS token after the last norm.
  virtual at::Tensor features(const Input& input) = 0;
  virtual int64_t width() const = 0;
  /// Next-token cross entropy; targets [B, T] int64 belong to the positions of input.tokens, -1 is ignored. Throws
  /// UserError when the model predicts no tokens.
  virtual TokenLoss token_loss(const Input& input, const at::Tensor& targets, const TokenLossOptions& options);
  /// A config.json that transformers reads.
  virtual core::Json config_json() const = 0;

  /// A second model with this one's weights, frozen; slots start empty.
  std::unique_ptr<Backbone> shared_on(at::Device device) const { return with_weights(frozen_weights(device)); }
  /// The same with some weights changed: W + delta, in W's dtype. Throws UserError on a name that is no weight of this
  /// model or a delta of another shape.
  std::unique_ptr<Backbone> changed_by(const NamedTensors& deltas) const { return with_weights(weights_plus(deltas)); }
  /// The same architecture with other weights, which must be all of them: errors as match_weights().
  std::unique_ptr<Backbone> with_tensors(const std::vector<core::TensorView>& tensors, const std::string& origin,
                                         const std::shared_ptr<const void>& owner) const;

 protected:
  explicit Backbone(Weights weights);
  Backbone(Backbone&&) = default;
  Backbone& operator=(Backbone&&) = default;

  /// Fetches weights into the members that forward passes use: slot_base() of every slot and the model's own.
  virtual void refer_to_weights() = 0;
  /// A model of this architecture with these weights.
  virtual std::unique_ptr<Backbone> with_weights(Weights weights) const = 0;
  /// Undefined when there is none of that name.
  at::Tensor weight(const std::string& name) const;
  /// Slots are numbered in the order they are added.
  void add_slot(Slot slot);
  SlotBase& slot_base(size_t slot) { return bases_[slot]; }
  bool taken(size_t slot) const { return functions_[slot] != nullptr; }
  void set_function(size_t slot, std::shared_ptr<SlotFunction> function) { functions_[slot] = std::move(function); }
  at::Tensor apply(size_t slot, const at::Tensor& x) const;
  /// layer(x), of which only x is kept where Pass::recompute asks for that. What `layer` refers to must live until
  /// gradients were taken.
  at::Tensor through(const at::Tensor& x, const std::function<at::Tensor(const at::Tensor&)>& layer);

  /// Weights for a second model: shared when they are on `device` already.
  Weights frozen_weights(at::Device device) const;
  /// The same with W + delta, computed in at least float32 and stored in W's dtype, for every name in `deltas`.
  Weights weights_plus(const NamedTensors& deltas) const;

 private:
  friend class PassScope;
  size_t slot_index(const std::string& path) const;

  std::map<std::string, at::Tensor> weights_;
  at::ScalarType dtype_;
  std::vector<Slot> slots_;  // parallel: slots_, bases_, functions_
  std::vector<SlotBase> bases_;
  std::vector<std::shared_ptr<SlotFunction>> functions_;
  std::map<std::string, size_t> index_;
  Pass pass_;
};

/// Forward passes of a backbone know this pass until the end of the scope.
class PassScope {
 public:
  PassScope(Backbone& backbone, const Pass& pass) : backbone_(backbone), before_(backbone.pass_) {
    backbone.pass_ = pass;
  }
  ~PassScope() { backbone_.pass_ = before_; }
  PassScope(const PassScope&) = delete;
  PassScope& operator=(const PassScope&) = delete;

 private:
  Backbone& backbone_;
  Pass before_;
};

}  // namespace moraine::models
