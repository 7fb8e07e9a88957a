#include "comm/local/channel.h"

#include <condition_variable>
#include <deque>
#include <mutex>

#include "core/error.h"

namespace moraine::comm::local {
namespace {

/// What waits for one endpoint. Thread-safe.
class Inbox {
 public:
  bool push(Envelope envelope) {
    {
      const std::lock_guard lock(mutex_);
      if (closed_) return false;
      queue_.push_back(std::move(envelope));
    }
    changed_.notify_one();
    return true;
  }

  /// No sender is left: receive() fails once the queue is empty.
  void orphan() {
    const std::lock_guard lock(mutex_);
    orphaned_ = true;
    changed_.notify_one();
  }

  /// The receiver left: push() fails from now on.
  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    queue_.clear();
  }

  core::Result<std::optional<Envelope>> pop(std::chrono::milliseconds deadline) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, deadline, [&] { return !queue_.empty() || orphaned_; });
    if (queue_.empty()) {
      if (orphaned_) return core::Failure{"comm/local: the coordinator is gone"};
      return std::optional<Envelope>();
    }
    std::optional<Envelope> front(std::move(queue_.front()));
    queue_.pop_front();
    return front;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Envelope> queue_;
  bool closed_ = false;
  bool orphaned_ = false;
};

using Hub = std::vector<Inbox>;  // [0] is the coordinator's

class Endpoint final : public Channel {
 public:
  Endpoint(std::shared_ptr<Hub> hub, int self) : hub_(std::move(hub)), self_(self) {}

  ~Endpoint() override {
    inbox(self_).close();
    if (self_ != 0) {
      inbox(0).push({self_, {MessageType::kGone, {{"reason", "its thread ended"}}, {}}});
    } else {
      for (int worker = 1; worker <= peers(); ++worker) inbox(worker).orphan();
    }
  }

  int peers() const override { return self_ == 0 ? static_cast<int>(hub_->size()) - 1 : 1; }

  core::Result<void> send(int peer, Message message) override {
    MORAINE_CHECK(self_ == 0 ? peer >= 1 && peer <= peers() : peer == 0, "comm/local: no such peer: {}", peer);
    control_text(message);  // for its length check: what runs in one process must also run over mpi
    if (!inbox(peer).push({self_, std::move(message)}))
      return core::Failure{fmt::format("comm/local: peer {} is gone", peer)};
    return {};
  }

  core::Result<std::optional<Envelope>> receive(std::chrono::milliseconds deadline) override {
    return inbox(self_).pop(deadline);
  }

 private:
  Inbox& inbox(int index) { return (*hub_)[static_cast<size_t>(index)]; }

  std::shared_ptr<Hub> hub_;
  int self_;
};

}  // namespace

Star make_star(int num_workers) {
  MORAINE_CHECK(num_workers >= 0, "comm/local: negative number of workers: {}", num_workers);
  auto hub = std::make_shared<Hub>(static_cast<size_t>(num_workers) + 1);
  Star star;
  star.coordinator = std::make_unique<Endpoint>(hub, 0);
  for (int worker = 1; worker <= num_workers; ++worker) star.workers.push_back(std::make_unique<Endpoint>(hub, worker));
  return star;
}

}  // namespace moraine::comm::local
