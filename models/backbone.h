#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "models/slot.h"
#include "models/weights.h"

namespace moraine::models {

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
  /// both be taken, InternalError if the slot is taken.
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

 protected:
  explicit Backbone(Weights weights);
  Backbone(Backbone&&) = default;
  Backbone& operator=(Backbone&&) = default;

  /// Fetches weights into the members that forward passes use: slot_base() of every slot and the model's own.
  virtual void refer_to_weights() = 0;
  /// Undefined when there is none of that name.
  at::Tensor weight(const std::string& name) const;
  /// Slots are numbered in the order they are added.
  void add_slot(Slot slot);
  SlotBase& slot_base(size_t slot) { return bases_[slot]; }
  bool taken(size_t slot) const { return functions_[slot] != nullptr; }
  void set_function(size_t slot, std::shared_ptr<SlotFunction> function) { functions_[slot] = std::move(function); }
  at::Tensor apply(size_t slot, const at::Tensor& x) const;

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
