#include "worker/gradient_exchange.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "core/error.h"
#include "worker/members.h"

namespace moraine::worker {

/// Leaves that travel together: their gradients one after another, then for each leaf 1 if it has a gradient and 0 if
/// not, so that the sum says how many members have one.
struct GradientExchange::Bucket {
  std::vector<size_t> leaves;
  std::vector<int64_t> offsets;  // of each leaf's gradient
  int64_t flags = 0;             // offset of the first flag
  std::vector<bool> filled;
  size_t missing = 0;
  at::Tensor memory;
  std::unique_ptr<comm::Reduction> sum;
};

struct GradientExchange::State {
  comm::Group& group;
  std::vector<at::Tensor> leaves;
  ExchangeOptions options;
  std::vector<Bucket> buckets;
  std::vector<std::pair<size_t, size_t>> place;  // of each leaf: bucket, position in it
  bool watching = false;
  size_t launched = 0;  // buckets leave in order, or members would sum different things

  class Hook final : public torch::autograd::PostAccumulateGradHook {
   public:
    Hook(State& state, size_t leaf) : state_(state), leaf_(leaf) {}
    void operator()(const torch::autograd::Variable&) override {
      if (!state_.watching) return;
      const at::NoGradGuard no_grad;
      state_.fill(leaf_);
      state_.launch_complete();
      static_cast<void>(state_.group.poll());  // lets transfers go on; a failure is found by finish()
    }

   private:
    State& state_;
    size_t leaf_;
  };

  void make_buckets() {
    place.resize(leaves.size());
    const auto limit = static_cast<int64_t>(options.bucket_bytes / sizeof(float));
    int64_t size = 0;
    for (size_t leaf = leaves.size(); leaf-- > 0;) {
      const int64_t count = leaves[leaf].numel();
      if (buckets.empty() || size + count > limit) {
        buckets.emplace_back();
        size = 0;
      }
      Bucket& bucket = buckets.back();
      place[leaf] = {buckets.size() - 1, bucket.leaves.size()};
      bucket.leaves.push_back(leaf);
      bucket.offsets.push_back(size);
      size += count;
      bucket.flags = size;
    }
    for (Bucket& bucket : buckets) {
      bucket.filled.resize(bucket.leaves.size());
      const at::Device device = group.on_device() ? leaves[bucket.leaves.front()].device() : at::Device(at::kCPU);
      bucket.memory = at::empty({bucket.flags + static_cast<int64_t>(bucket.leaves.size())},
                                at::TensorOptions().dtype(at::kFloat).device(device));
    }
  }

  void start() {
    launched = 0;
    for (Bucket& bucket : buckets) {
      bucket.filled.assign(bucket.leaves.size(), false);
      bucket.missing = bucket.leaves.size();
      bucket.sum.reset();
    }
  }

  void fill(size_t leaf) {
    const auto [number, position] = place[leaf];
    Bucket& bucket = buckets[number];
    if (bucket.filled[position]) return;
    const at::Tensor& gradient = leaves[leaf].grad();
    const at::Tensor target = bucket.memory.narrow(0, bucket.offsets[position], leaves[leaf].numel());
    if (gradient.defined())
      target.view(gradient.sizes()).copy_(gradient);
    else
      target.zero_();
    bucket.memory.narrow(0, bucket.flags + static_cast<int64_t>(position), 1).fill_(gradient.defined() ? 1 : 0);
    bucket.filled[position] = true;
    --bucket.missing;
  }

  void launch_complete() {
    for (; launched < buckets.size() && buckets[launched].missing == 0; ++launched) {
      const at::Tensor& memory = buckets[launched].memory;
      buckets[launched].sum = group.all_reduce({memory.data_ptr<float>(), static_cast<size_t>(memory.numel())});
    }
  }

  /// Sums become the gradients, as views of the bucket: it is filled again only after the optimiser has used them.
  void take_over(Bucket& bucket) {
    const auto waited = bucket.sum->wait(options.deadline);
    if (!waited.ok()) throw GroupFailed(waited.error());
    const at::Tensor flags =
        bucket.memory.narrow(0, bucket.flags, static_cast<int64_t>(bucket.leaves.size())).to(at::kCPU);
    for (size_t i = 0; i < bucket.leaves.size(); ++i) {
      const at::Tensor& leaf = leaves[bucket.leaves[i]];
      if (flags.data_ptr<float>()[i] == 0) {
        leaf.mutable_grad().reset();
        continue;
      }
      leaf.mutable_grad() =
          bucket.memory.narrow(0, bucket.offsets[i], leaf.numel()).view(leaf.sizes()).to(leaf.device());
    }
  }
};

GradientExchange::GradientExchange(comm::Group& group, const std::vector<at::Tensor>& leaves,
                                   const ExchangeOptions& options)
    : state_(new State{group, leaves, options, {}, {}}) {
  if (group.size() == 1) return;
  state_->make_buckets();
  if (!options.overlap) return;
  for (size_t leaf = 0; leaf < leaves.size(); ++leaf)
    torch::autograd::impl::set_post_acc_grad_hooks(leaves[leaf], std::make_unique<State::Hook>(*state_, leaf));
}

GradientExchange::~GradientExchange() {
  if (state_->buckets.empty() || !state_->options.overlap) return;
  for (const at::Tensor& leaf : state_->leaves) torch::autograd::impl::set_post_acc_grad_hooks(leaf, nullptr);
}

void GradientExchange::watch() {
  if (state_->group.size() == 1) return;
  state_->start();
  state_->watching = true;
}

void GradientExchange::launch() {
  if (state_->group.size() == 1) return;
  const at::NoGradGuard no_grad;
  state_->watching = false;
  for (size_t leaf = state_->leaves.size(); leaf-- > 0;) state_->fill(leaf);
  state_->launch_complete();
}

void GradientExchange::finish() {
  if (state_->group.size() == 1) return;
  const at::NoGradGuard no_grad;
  for (Bucket& bucket : state_->buckets) state_->take_over(bucket);
}

}  // namespace moraine::worker
