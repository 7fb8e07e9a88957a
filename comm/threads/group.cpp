#include "comm/threads/group.h"

#include <condition_variable>
#include <deque>
#include <mutex>

#include "comm/local/group.h"
#include "comm/message_group.h"
#include "core/error.h"

namespace moraine::comm::threads {
namespace {

using Arrival = std::pair<int, GroupMessage>;

/// What waits for one member. Thread-safe.
class Mailbox {
 public:
  void push(Arrival arrival) {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(arrival));
    }
    changed_.notify_one();
  }

  std::optional<Arrival> pop(std::chrono::milliseconds deadline) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, deadline, [&] { return !queue_.empty(); })) return std::nullopt;
    std::optional<Arrival> front(std::move(queue_.front()));
    queue_.pop_front();
    return front;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Arrival> queue_;
};

class ThreadLinks final : public Links {
 public:
  ThreadLinks(std::shared_ptr<std::vector<Mailbox>> boxes, int self) : boxes_(std::move(boxes)), self_(self) {}

  ~ThreadLinks() override {
    for (int member = 0; member < size(); ++member) {
      if (member != self_) box(member).push({self_, GroupMessage{}});
    }
  }

  int index() const override { return self_; }
  int size() const override { return static_cast<int>(boxes_->size()); }

  core::Result<void> send(int member, GroupMessage message) override {
    box(member).push({self_, std::move(message)});
    return {};
  }

  core::Result<std::optional<Arrival>> receive(std::chrono::milliseconds deadline) override {
    return box(self_).pop(deadline);
  }

 private:
  Mailbox& box(int member) { return (*boxes_)[static_cast<size_t>(member)]; }

  std::shared_ptr<std::vector<Mailbox>> boxes_;
  int self_;
};

}  // namespace

std::vector<std::unique_ptr<Group>> make_group(int size) {
  MORAINE_CHECK(size >= 1, "comm/threads: a group needs a member: {}", size);
  if (size == 1) {
    std::vector<std::unique_ptr<Group>> alone;
    alone.push_back(local::make_group());
    return alone;
  }
  const auto boxes = std::make_shared<std::vector<Mailbox>>(static_cast<size_t>(size));
  std::vector<std::unique_ptr<Group>> members;
  for (int member = 0; member < size; ++member)
    members.push_back(make_message_group(std::make_unique<ThreadLinks>(boxes, member)));
  return members;
}

}  // namespace moraine::comm::threads
