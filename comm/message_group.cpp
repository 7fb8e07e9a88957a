#include "comm/message_group.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <tuple>

#include "core/error.h"

namespace moraine::comm {
namespace {

using Clock = std::chrono::steady_clock;
using Kind = GroupMessage::Kind;
using std::chrono::milliseconds;

constexpr milliseconds kNap{50};  // receive() wakes up earlier when something comes

struct Slice {
  size_t first, count;
};

Slice slice_of(size_t total, int member, int size) {
  const auto edge = [&](int m) { return total * static_cast<size_t>(m) / static_cast<size_t>(size); };
  return {edge(member), edge(member + 1) - edge(member)};
}

core::Bytes bytes_of_floats(std::span<const float> values) { return bytes_of(std::as_bytes(values)); }

/// One sum under way.
struct Sum {
  uint32_t sequence = 0;
  std::span<float> buffer;
  bool own_slice_done = false;
  std::vector<bool> slice_done;
};

class MessageGroup final : public Group {
 public:
  explicit MessageGroup(std::unique_ptr<Links> links)
      : links_(std::move(links)),
        ahead_(static_cast<size_t>(links_->size())),
        gone_(static_cast<size_t>(links_->size())) {}

  int index() const override { return links_->index(); }
  int size() const override { return links_->size(); }

  std::unique_ptr<Reduction> all_reduce(std::span<float> buffer) override {
    auto sum =
        std::make_shared<Sum>(Sum{sequence_++, buffer, false, std::vector<bool>(static_cast<size_t>(size()), false)});
    sums_.push_back(sum);
    auto reduction = std::make_unique<Handle>(*this, sum);
    for (int member = 0; member < size(); ++member) {
      if (member == index()) continue;
      const Slice slice = slice_of(buffer.size(), member, size());
      send(member, Kind::kPart, sum->sequence, bytes_of_floats(buffer.subspan(slice.first, slice.count)));
    }
    static_cast<void>(pump(milliseconds(0)));  // a failure here is the failure of wait()
    return reduction;
  }

  core::Result<bool> broadcast(core::Bytes& bytes, milliseconds deadline) override {
    if (index() == 0) {
      const uint32_t sequence = sequence_++;
      for (int member = 1; member < size(); ++member) send(member, Kind::kBroadcast, sequence, bytes);
      if (broken_) return *broken_;
      return true;
    }
    const uint32_t sequence = sequence_;
    const auto missing = [&] {
      return find(0, sequence, Kind::kBroadcast) == nullptr ? std::vector<int>{0} : std::vector<int>{};
    };
    auto came = wait_for(missing, sequence, {Kind::kBroadcast}, deadline);
    if (!came.ok()) return came.because("broadcast");
    if (!came.value()) return false;
    bytes = take(0, sequence, Kind::kBroadcast);
    ++sequence_;
    return true;
  }

  core::Result<std::vector<core::Bytes>> gather(core::Bytes mine, milliseconds deadline) override {
    const uint32_t sequence = sequence_++;
    for (int member = 0; member < size(); ++member) {
      if (member != index()) send(member, Kind::kGather, sequence, mine);
    }
    const auto missing = [&] { return without(sequence, Kind::kGather); };
    if (auto came = wait_for(missing, sequence, {Kind::kGather}, deadline); !came.ok())
      return came.because("gather");
    else if (!came.value())
      return late(missing(), deadline).because("gather");
    std::vector<core::Bytes> all(static_cast<size_t>(size()));
    for (int member = 0; member < size(); ++member) {
      all[static_cast<size_t>(member)] = member == index() ? mine : take(member, sequence, Kind::kGather);
    }
    return all;
  }

  core::Result<void> poll() override {
    if (auto pumped = pump(milliseconds(0)); !pumped.ok()) return pumped;
    for (int member = 0; member < size(); ++member) {
      if (auto present = check_present(member); !present.ok()) return present;
    }
    return {};
  }

  void renew() override {
    ++epoch_;
    sequence_ = 0;
    sums_.clear();
    inbox_.clear();
    ahead_.assign(ahead_.size(), false);
    std::vector<std::pair<int, GroupMessage>> early = std::move(early_);
    early_.clear();
    for (auto& [member, message] : early) sort_in(member, std::move(message));
  }

 private:
  using Key = std::tuple<int, uint32_t, Kind>;  // member, sequence, kind

  class Handle final : public Reduction {
   public:
    Handle(MessageGroup& group, std::shared_ptr<Sum> sum) : group_(group), sum_(std::move(sum)) {}
    ~Handle() override { group_.sums_.remove(sum_); }
    core::Result<void> wait(milliseconds deadline) override { return group_.finish(*sum_, deadline); }

   private:
    MessageGroup& group_;
    std::shared_ptr<Sum> sum_;
  };

  void send(int member, Kind kind, uint32_t sequence, core::Bytes payload) {
    auto sent = links_->send(member, {kind, epoch_, sequence, std::move(payload)});
    if (!sent.ok() && !broken_) broken_ = sent.because(fmt::format("to member {}", member));
  }

  const core::Bytes* find(int member, uint32_t sequence, Kind kind) const {
    const auto found = inbox_.find({member, sequence, kind});
    return found == inbox_.end() ? nullptr : &found->second;
  }

  core::Bytes take(int member, uint32_t sequence, Kind kind) {
    const auto found = inbox_.find({member, sequence, kind});
    core::Bytes bytes = std::move(found->second);
    inbox_.erase(found);
    return bytes;
  }

  /// The other members whose message of this kind has not come.
  std::vector<int> without(uint32_t sequence, Kind kind) const {
    std::vector<int> members;
    for (int member = 0; member < size(); ++member) {
      if (member != index() && find(member, sequence, kind) == nullptr) members.push_back(member);
    }
    return members;
  }

  core::Result<void> check_present(int member) const {
    if (gone_[static_cast<size_t>(member)])
      return core::Failure{fmt::format("comm: member {} of the group is gone", member)};
    if (ahead_[static_cast<size_t>(member)])
      return core::Failure{fmt::format("comm: member {} of the group has given up what was under way", member)};
    return {};
  }

  static core::Result<void> late(const std::vector<int>& members, milliseconds deadline) {
    return core::Failure{fmt::format("comm: member {} of the group said nothing for {} ms",
                                     members.empty() ? 0 : members.front(), deadline.count())};
  }

  /// Waits until missing() names nobody; false after the deadline. `kinds` are what the collective may consist of.
  core::Result<bool> wait_for(const std::function<std::vector<int>()>& missing, uint32_t sequence,
                              std::initializer_list<Kind> kinds, milliseconds deadline) {
    const auto end = Clock::now() + deadline;
    for (;;) {
      if (auto pumped = pump(milliseconds(0)); !pumped.ok()) return pumped.because("comm");
      const std::vector<int> members = missing();
      if (members.empty()) return true;
      for (const int member : members) {
        const auto other = inbox_.lower_bound({member, sequence, Kind{}});
        if (other != inbox_.end() && std::get<0>(other->first) == member && std::get<1>(other->first) == sequence &&
            std::ranges::find(kinds, std::get<2>(other->first)) == kinds.end()) {
          return core::Failure{
              fmt::format("comm: the members of the group are out of step: member {} makes another call", member)};
        }
        if (auto present = check_present(member); !present.ok()) return core::Failure{present.error()};
      }
      const auto now = Clock::now();
      if (now >= end) return false;
      const auto left = std::chrono::ceil<milliseconds>(end - now);
      if (auto pumped = pump(std::min(left, kNap)); !pumped.ok()) return pumped.because("comm");
    }
  }

  /// Takes in what has come, waiting at most `nap` for the first message, and lets every sum go on.
  core::Result<void> pump(milliseconds nap) {
    while (!broken_) {
      auto received = links_->receive(nap);
      if (!received.ok()) {
        broken_ = core::Failure{received.error()};
      } else if (received.value()) {
        sort_in(received.value()->first, std::move(received.value()->second));
        nap = milliseconds(0);
        continue;
      }
      break;
    }
    for (const auto& sum : sums_) advance(*sum);
    if (broken_) return *broken_;
    return {};
  }

  void sort_in(int member, GroupMessage message) {
    if (message.kind == Kind::kGone) {
      gone_[static_cast<size_t>(member)] = true;
    } else if (message.epoch == epoch_) {
      inbox_.emplace(Key{member, message.sequence, message.kind}, std::move(message.payload));
    } else if (message.epoch > epoch_) {
      ahead_[static_cast<size_t>(member)] = true;
      early_.emplace_back(member, std::move(message));
    }  // older: said before this member gave up
  }

  /// Adds and copies what has come for one sum.
  void advance(Sum& sum) {
    const Slice own = slice_of(sum.buffer.size(), index(), size());
    if (!sum.own_slice_done && without(sum.sequence, Kind::kPart).empty()) {
      std::vector<float> total(own.count);
      for (int member = 0; member < size(); ++member) {
        std::vector<float> part(own.count);
        if (member == index()) {
          std::ranges::copy(sum.buffer.subspan(own.first, own.count), part.begin());
        } else if (!copy_floats(take(member, sum.sequence, Kind::kPart), part, member)) {
          return;
        }
        if (member == 0)
          total.swap(part);
        else
          for (size_t i = 0; i < total.size(); ++i) total[i] += part[i];
      }
      std::ranges::copy(total, sum.buffer.begin() + static_cast<std::ptrdiff_t>(own.first));
      const core::Bytes bytes = bytes_of_floats(total);
      for (int member = 0; member < size(); ++member) {
        if (member != index()) send(member, Kind::kSum, sum.sequence, bytes);
      }
      sum.own_slice_done = sum.slice_done[static_cast<size_t>(index())] = true;
    }
    for (int member = 0; member < size(); ++member) {
      if (sum.slice_done[static_cast<size_t>(member)] || find(member, sum.sequence, Kind::kSum) == nullptr) continue;
      const Slice slice = slice_of(sum.buffer.size(), member, size());
      if (!copy_floats(take(member, sum.sequence, Kind::kSum), sum.buffer.subspan(slice.first, slice.count), member))
        return;
      sum.slice_done[static_cast<size_t>(member)] = true;
    }
  }

  bool copy_floats(const core::Bytes& bytes, std::span<float> target, int member) {
    if (bytes.size() != target.size_bytes()) {
      broken_ = core::Failure{
          fmt::format("comm: the members of the group are out of step: member {} sums {} bytes, this one expects {}",
                      member, bytes.size(), target.size_bytes())};
      return false;
    }
    if (!target.empty()) std::memcpy(target.data(), bytes.span().data(), bytes.size());
    return true;
  }

  core::Result<void> finish(Sum& sum, milliseconds deadline) {
    const auto missing = [&] {
      if (!sum.own_slice_done) return without(sum.sequence, Kind::kPart);
      std::vector<int> members;
      for (int member = 0; member < size(); ++member) {
        if (!sum.slice_done[static_cast<size_t>(member)]) members.push_back(member);
      }
      return members;
    };
    auto came = wait_for(missing, sum.sequence, {Kind::kPart, Kind::kSum}, deadline);
    if (!came.ok()) return came.because("sum");
    if (!came.value()) return late(missing(), deadline).because("sum");
    return {};
  }

  std::unique_ptr<Links> links_;
  uint32_t epoch_ = 0, sequence_ = 0;
  std::map<Key, core::Bytes> inbox_;                 // of this epoch
  std::vector<std::pair<int, GroupMessage>> early_;  // of later epochs
  std::vector<bool> ahead_, gone_;                   // by member
  std::list<std::shared_ptr<Sum>> sums_;
  std::optional<core::Failure> broken_;  // for good: the links failed
};

}  // namespace

std::unique_ptr<Group> make_message_group(std::unique_ptr<Links> links) {
  return std::make_unique<MessageGroup>(std::move(links));
}

}  // namespace moraine::comm
