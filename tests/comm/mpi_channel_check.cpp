// Run under mpirun with three processes. Every process plays its part of one script; a process that sees something
// wrong says so and aborts the job, so mpirun's exit code is the verdict.
#include <array>
#include <cstdio>
#include <cstdlib>

#include "comm/mpi/channel.h"
#include "comm/mpi/frames.h"
#include "core/error.h"

namespace moraine::comm {
namespace {

using std::chrono::milliseconds;
constexpr milliseconds kLong{60'000};  // a bound for a broken channel, never waited for
constexpr size_t kPayload = 5'000'000;
constexpr size_t kChunk = (size_t{1} << 20) - 1;  // five chunks, the last one short
constexpr int kBurst = 100;

core::Bytes pattern(int seed, size_t size) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>((i * 131 + static_cast<size_t>(seed)) % 251);
  return core::Bytes(std::move(bytes));
}

bool same(const core::Bytes& a, const core::Bytes& b) { return std::ranges::equal(a.span(), b.span()); }

Envelope next(Channel& channel) {
  auto received = channel.receive(kLong);
  MORAINE_CHECK(received.ok(), "{}", received.error());
  MORAINE_CHECK(received.value().has_value(), "nothing came");
  return std::move(*received.value());
}

void must(const core::Result<void>& sent) { MORAINE_CHECK(sent.ok(), "{}", sent.error()); }

/// Both sides send 5 MB before either receives: blocking sends would wait for each other for ever.
void play_coordinator(Channel& channel) {
  MORAINE_CHECK_EQ(channel.peers(), 2);
  for (int worker = 1; worker <= 2; ++worker) {
    must(channel.send(worker, {MessageType::kArtefact, {{"for", worker}}, pattern(worker, kPayload)}));
  }
  std::vector<int> seen(3, 0);
  for (int i = 0; i < 2 * (kBurst + 1); ++i) {
    const Envelope envelope = next(channel);
    int& count = seen.at(static_cast<size_t>(envelope.peer));
    MORAINE_CHECK_EQ(envelope.message.body.at("number").get<int>(), count);
    const size_t size = count == 0 ? kPayload : static_cast<size_t>(count) * 977;
    MORAINE_CHECK(same(envelope.message.payload, pattern(envelope.peer + count, size)),
                  "payload {} of worker {} is damaged", count, envelope.peer);
    ++count;
  }
  for (int worker = 1; worker <= 2; ++worker)
    must(channel.send(worker, {MessageType::kStop, {{"reason", "done"}}, {}}));
  auto nothing = channel.receive(milliseconds(5));
  MORAINE_CHECK(nothing.ok() && !nothing.value(), "a message too many");
}

void play_worker(Channel& channel, int self) {
  must(channel.send(0, {MessageType::kResult, {{"number", 0}}, pattern(self, kPayload)}));
  const Envelope artefact = next(channel);
  MORAINE_CHECK_EQ(artefact.peer, 0);
  MORAINE_CHECK_EQ(artefact.message.body.at("for").get<int>(), self);
  MORAINE_CHECK(same(artefact.message.payload, pattern(self, kPayload)), "artefact is damaged");
  for (int i = 1; i <= kBurst; ++i) {
    must(channel.send(0, {MessageType::kResult, {{"number", i}}, pattern(self + i, static_cast<size_t>(i) * 977)}));
  }
  MORAINE_CHECK(next(channel).message.type == MessageType::kStop, "stop expected");
}

/// Worker 1 announces more than any host has, worker 2 dies away in the middle of a payload, which must neither take
/// memory nor keep process 0 from closing.
void play_liars(int self) {
  constexpr int kTag = 9;
  struct {
    uint16_t type = 1;
    std::array<uint16_t, 3> zero{};
    uint64_t payload_bytes = 0;
  } header;
  const auto say = [&](uint64_t payload_bytes) {
    header.payload_bytes = payload_bytes;
    MPI_Send(&header, sizeof header, MPI_BYTE, 0, kTag, MPI_COMM_WORLD);
  };
  if (self == 1) say(uint64_t{1} << 60);
  if (self == 2) {
    say(kPayload);
    const std::vector<std::byte> piece(1000);
    MPI_Send(piece.data(), static_cast<int>(piece.size()), MPI_BYTE, 0, kTag, MPI_COMM_WORLD);
  }
  if (self != 0) return;
  mpi::Frames liar({1}, {.tag = kTag, .chunk_bytes = kChunk, .max_control = 100});
  const auto refused = liar.receive(kLong);
  MORAINE_CHECK(!refused.ok() && refused.error().find("the limit is the memory of this host") != std::string::npos,
                "an impossible payload is not refused");
  mpi::Frames mute({2}, {.tag = kTag, .chunk_bytes = kChunk, .max_control = 100});
  const auto nothing = mute.receive(milliseconds(300));
  MORAINE_CHECK(nothing.ok() && !nothing.value(), "half a frame is handed on");
}

int run(const std::string& mode) {
  mpi::Session session;
  MORAINE_CHECK_EQ(session.size(), 3);
  MORAINE_CHECK(mpi::launched(), "mpirun was not noticed");
  try {
    if (mode == "liars") {
      play_liars(session.index());
      return 0;
    }
    const auto channel = mpi::open_channel(session, /*members=*/1, kChunk);
    if (mode == "hang") {  // to be killed by hand or by a test
      std::printf("%d\n", session.index());
      std::fflush(stdout);
      for (;;) (void)channel->receive(kLong);
    }
    if (mode == "abort" && session.index() == 0) session.abort(core::kExitRequeue);
    session.index() == 0 ? play_coordinator(*channel) : play_worker(*channel, session.index());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "process %d: %s\n", session.index(), error.what());
    session.abort(1);
  }
  return mode == "code" && session.index() == 0 ? core::kExitRequeue : 0;
}

}  // namespace
}  // namespace moraine::comm

int main(int argc, char** argv) { return moraine::comm::run(argc > 1 ? argv[1] : "play"); }
