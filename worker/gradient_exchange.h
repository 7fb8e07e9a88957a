#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "comm/group.h"

namespace moraine::worker {

/// How gradients travel between the members of a group. Never changes bits: sums are made element by element.
struct ExchangeOptions {
  size_t bucket_bytes =
      size_t{8} << 20;  // gradients of about this size travel together; smaller starts sooner, costs more messages
  bool overlap = true;  // false: the first bucket leaves when backward is over
  std::chrono::milliseconds deadline = std::chrono::minutes(10);  // for another member's part of a step
};

/// Replaces the gradients of some leaves by their sums over the members of a group, in buckets of neighbouring leaves
/// from the last leaf to the first (the order in which backward finishes them), each on its way as soon as backward has
/// completed it. Buckets lie in host memory or, when the group sums there, on the leaves' device.
///
///   exchange.watch();               before the backward pass that completes the step's gradients
///   loss.backward(...)              buckets leave
///   exchange.launch();              what has not left leaves now: from here on all members have made the same calls
///   exchange.finish();              sums are waited for and become the leaves' gradients
///
/// A leaf without a gradient counts as zero; if no member has one it stays without. A group of one does nothing.
/// finish() throws GroupFailed. Used by one thread at a time; hooks run where autograd runs, inside backward.
class GradientExchange {
 public:
  GradientExchange(comm::Group& group, const std::vector<at::Tensor>& leaves, const ExchangeOptions& options);
  ~GradientExchange();
  GradientExchange(const GradientExchange&) = delete;
  GradientExchange& operator=(const GradientExchange&) = delete;

  void watch();
  void launch();
  void finish();

 private:
  struct Bucket;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moraine::worker
