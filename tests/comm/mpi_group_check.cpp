// Run under mpirun with five processes: a coordinator and two groups of two. Every member plays the script of
// group_script.h; mpirun's exit code is the verdict.
#include <cstdio>

#include "comm/mpi/channel.h"
#include "comm/mpi/group.h"
#include "core/error.h"
#include "tests/comm/group_script.h"

namespace moraine::comm {
namespace {

int run() {
  mpi::Session session;
  try {
    MORAINE_CHECK_EQ(session.size(), 5);
    const auto channel = mpi::open_channel(session, /*members=*/2);
    if (session.index() == 0) {
      MORAINE_CHECK_EQ(channel->peers(), 2);
      for (int i = 0; i < 2; ++i) {
        auto received = channel->receive(std::chrono::minutes(2));
        MORAINE_CHECK(received.ok() && received.value(), "no word of a leader");
        MORAINE_CHECK_EQ(received.value()->message.body.at("digest").get<uint64_t>(), kScriptDigest);
        MORAINE_CHECK_EQ(received.value()->message.body.at("process").get<int>(), 2 * received.value()->peer - 1);
      }
      return 0;
    }
    const auto group = mpi::make_group(session, 2);
    MORAINE_CHECK_EQ(group->index(), (session.index() - 1) % 2);
    const uint64_t digest = play_script(*group);
    MORAINE_CHECK_EQ(digest, kScriptDigest);
    if (group->index() == 0) {
      const auto sent = channel->send(0, {MessageType::kHello, {{"digest", digest}, {"process", session.index()}}, {}});
      MORAINE_CHECK(sent.ok(), "{}", sent.error());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "process %d: %s\n", session.index(), error.what());
    session.abort(1);
  }
  return 0;
}

}  // namespace
}  // namespace moraine::comm

int main() { return moraine::comm::run(); }
