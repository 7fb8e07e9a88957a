#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "comm/group.h"
#include "core/error.h"

namespace moraine::comm {

/// Values whose sum depends on the order of adding: sizes differ by up to 2^20 and signs alternate.
inline std::vector<float> member_values(int member, size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    const double wave = std::sin(0.37 * static_cast<double>(i + 1) + 1.7 * member);
    values[i] = static_cast<float>(std::ldexp(wave, static_cast<int>((i * 7 + static_cast<size_t>(member) * 5) % 21)));
  }
  return values;
}

/// What two members of any back end do; returns a digest of every bit they saw, equal for both and for every back end.
inline uint64_t play_script(Group& group) {
  using std::chrono::milliseconds;
  constexpr milliseconds kLong{60'000};
  uint64_t digest = 1469598103934665603u;
  const auto mix = [&](std::span<const std::byte> bytes) {
    for (const std::byte byte : bytes) digest = (digest ^ static_cast<uint64_t>(byte)) * 1099511628211u;
  };
  const auto must = [](const auto& result) { MORAINE_CHECK(result.ok(), "{}", result.error()); };
  MORAINE_CHECK_EQ(group.size(), 2);
  std::vector<std::vector<float>> buffers;
  for (const size_t count : {3, 1000, 0, 700'001, 1}) buffers.push_back(member_values(group.index(), count));
  std::vector<std::unique_ptr<Reduction>> sums;
  for (auto& buffer : buffers) sums.push_back(group.all_reduce(buffer));
  for (size_t i = buffers.size(); i-- > 0;) must(sums[i]->wait(kLong));
  for (const auto& buffer : buffers) mix(std::as_bytes(std::span(buffer)));
  // One member gives up in the middle; both go on.
  std::vector<float> lost(50'000, 1.0f);
  if (group.index() == 0) {
    const auto sum = group.all_reduce(lost);
    MORAINE_CHECK(!sum->wait(kLong).ok(), "a sum without the other member");
  }
  group.renew();
  auto all = group.gather(bytes_of(std::as_bytes(std::span(buffers[0]))), kLong);
  must(all);
  for (const core::Bytes& bytes : all.value()) mix(bytes.span());
  core::Bytes word = group.index() == 0 ? bytes_of(std::as_bytes(std::span(buffers[3]))) : core::Bytes();
  auto came = group.broadcast(word, kLong);
  MORAINE_CHECK(came.ok() && came.value(), "no broadcast");
  mix(word.span());
  must(group.barrier(kLong));
  return digest;
}

/// Of the values and the order above; a change of either changes it.
inline constexpr uint64_t kScriptDigest = 4483477281630728710u;

}  // namespace moraine::comm
