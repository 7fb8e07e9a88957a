#include "comm/nccl/group.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>

#include <cuda_runtime_api.h>
#include <nccl.h>

#include "core/error.h"
#include "core/log.h"

namespace moraine::comm::nccl {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr std::chrono::minutes kStartDeadline{2};
constexpr std::chrono::microseconds kNap{50};

core::Result<void> check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return {};
  return core::Failure{fmt::format("comm/nccl: {}: {}", what, cudaGetErrorString(code))};
}

core::Result<void> check(ncclResult_t code, const char* what) {
  if (code == ncclSuccess || code == ncclInProgress) return {};
  return core::Failure{fmt::format("comm/nccl: {}: {}", what, ncclGetErrorString(code))};
}

class NcclGroup final : public Group {
 public:
  NcclGroup(std::unique_ptr<Group> control, int device) : control_(std::move(control)), device_(device) {
    setenv("NCCL_ALGO", "Ring", /*overwrite=*/0);
  }

  ~NcclGroup() override {
    abort();
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  int index() const override { return control_->index(); }
  int size() const override { return control_->size(); }
  bool on_device() const override { return true; }

  std::unique_ptr<Reduction> all_reduce(std::span<float> buffer) override {
    auto sum = std::make_unique<Sum>(*this);
    sum->started = start(*sum, buffer);
    return sum;
  }

  core::Result<bool> broadcast(core::Bytes& bytes, milliseconds deadline) override {
    return control_->broadcast(bytes, deadline);
  }
  core::Result<std::vector<core::Bytes>> gather(core::Bytes mine, milliseconds deadline) override {
    return control_->gather(std::move(mine), deadline);
  }
  core::Result<void> poll() override { return control_->poll(); }

  void renew() override {
    abort();
    control_->renew();
  }

 private:
  /// One sum; `done` is recorded behind it on the group's stream.
  struct Sum final : Reduction {
    explicit Sum(NcclGroup& of) : group(of) {}
    ~Sum() override {
      // Kernels that wait for other members must not write to the buffer later.
      if (done != nullptr && !finished) group.abort();
      if (done != nullptr) cudaEventDestroy(done);
    }
    core::Result<void> wait(milliseconds deadline) override {
      if (!started.ok()) return started;
      auto waited = group.wait_for(*this, Clock::now() + deadline);
      finished = waited.ok();
      return waited;
    }

    NcclGroup& group;
    cudaEvent_t done = nullptr;
    core::Result<void> started;
    bool finished = false;
  };

  core::Result<void> start(Sum& sum, std::span<float> buffer) {
    if (auto ready = open(); !ready.ok()) return ready;
    cudaEvent_t before = nullptr;
    if (auto made = check(cudaEventCreateWithFlags(&before, cudaEventDisableTiming), "event"); !made.ok()) return made;
    auto ordered = check(cudaEventRecord(before, cudaStreamLegacy), "event");
    if (ordered.ok()) ordered = check(cudaStreamWaitEvent(stream_, before, 0), "order of streams");
    cudaEventDestroy(before);  // after what was recorded has happened
    if (!ordered.ok()) return ordered;
    const ncclResult_t code =
        ncclAllReduce(buffer.data(), buffer.data(), buffer.size(), ncclFloat32, ncclSum, communicator_, stream_);
    if (auto launched = check(code, "sum"); !launched.ok()) return launched;
    if (auto launched = settle(Clock::now() + kStartDeadline); !launched.ok()) return launched;
    if (auto made = check(cudaEventCreateWithFlags(&sum.done, cudaEventDisableTiming), "event"); !made.ok())
      return made;
    return check(cudaEventRecord(sum.done, stream_), "event");
  }

  /// Makes the communicator if there is none.
  core::Result<void> open() {
    if (communicator_ != nullptr) return {};
    if (auto set = check(cudaSetDevice(device_), "device"); !set.ok()) return set;
    if (stream_ == nullptr) {
      if (auto made = check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); !made.ok())
        return made;
    }
    ncclUniqueId id{};
    if (index() == 0) {
      if (auto made = check(ncclGetUniqueId(&id), "id"); !made.ok()) return made;
    }
    core::Bytes bytes = bytes_of(std::as_bytes(std::span(&id, 1)));
    auto came = control_->broadcast(bytes, kStartDeadline);
    if (!came.ok()) return core::Failure{came.error()};
    if (!came.value() || bytes.size() != sizeof id) return core::Failure{"comm/nccl: no id from member 0"};
    std::memcpy(&id, bytes.span().data(), sizeof id);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    if (auto made = check(ncclCommInitRankConfig(&communicator_, size(), id, index(), &config), "start"); !made.ok())
      return made;
    auto ready = settle(Clock::now() + kStartDeadline);
    if (ready.ok()) core::log::debug("NCCL communicator made: member={} of={} device={}", index(), size(), device_);
    return ready;
  }

  /// Calls of a nonblocking communicator return early: waits until the last one has ended.
  core::Result<void> settle(Clock::time_point end) {
    for (;;) {
      ncclResult_t state = ncclSuccess;
      if (auto asked = check(ncclCommGetAsyncError(communicator_, &state), "state"); !asked.ok()) return asked;
      if (auto healthy = check(state, "communicator"); !healthy.ok()) return healthy;
      if (state == ncclSuccess) return {};
      if (auto others = others_present(end); !others.ok()) return others;
      std::this_thread::sleep_for(kNap);
    }
  }

  core::Result<void> wait_for(Sum& sum, Clock::time_point end) {
    if (communicator_ == nullptr) return core::Failure{"comm/nccl: the communicator was aborted"};
    for (;;) {
      const cudaError_t state = cudaEventQuery(sum.done);
      if (state == cudaSuccess) return {};
      if (state != cudaErrorNotReady) return check(state, "sum");
      ncclResult_t health = ncclSuccess;
      if (auto asked = check(ncclCommGetAsyncError(communicator_, &health), "state"); !asked.ok()) return asked;
      if (auto healthy = check(health, "communicator"); !healthy.ok()) return healthy;
      if (auto others = others_present(end); !others.ok()) return others;
      std::this_thread::sleep_for(kNap);
    }
  }

  core::Result<void> others_present(Clock::time_point end) {
    if (auto others = control_->poll(); !others.ok()) return others;
    if (Clock::now() >= end) return core::Failure{"comm/nccl: the other members said nothing until the deadline"};
    return {};
  }

  void abort() {
    if (communicator_ == nullptr) return;
    ncclCommAbort(communicator_);
    communicator_ = nullptr;
  }

  std::unique_ptr<Group> control_;
  int device_;
  cudaStream_t stream_ = nullptr;
  ncclComm_t communicator_ = nullptr;
};

}  // namespace

bool available() { return true; }

std::unique_ptr<Group> make_group(std::unique_ptr<Group> control, int device) {
  if (control->size() == 1) return control;
  return std::make_unique<NcclGroup>(std::move(control), device);
}

}  // namespace moraine::comm::nccl
