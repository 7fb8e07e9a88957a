// Run under mpirun with a coordinator and one process per GPU of a machine with at least two: sums of CUDA memory, a
// member that gives up, sums again. Exit code 77: fewer than two GPUs here (prints it).
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime_api.h>

#include "comm/mpi/group.h"
#include "comm/nccl/group.h"
#include "core/error.h"
#include "tests/comm/group_script.h"

namespace moraine::comm {
namespace {

constexpr size_t kCount = 1'000'003;
constexpr std::chrono::minutes kLong{1};

void must(cudaError_t code) { MORAINE_CHECK(code == cudaSuccess, "CUDA: {}", cudaGetErrorString(code)); }

std::vector<float> summed(Group& group, float* device) {
  const auto mine = member_values(group.index(), kCount);
  must(cudaMemcpy(device, mine.data(), kCount * sizeof(float), cudaMemcpyHostToDevice));
  const auto sum = group.all_reduce({device, kCount});
  const auto waited = sum->wait(kLong);
  MORAINE_CHECK(waited.ok(), "{}", waited.error());
  std::vector<float> result(kCount);
  must(cudaMemcpy(result.data(), device, kCount * sizeof(float), cudaMemcpyDeviceToHost));
  return result;
}

void play(Group& group) {
  float* device = nullptr;
  must(cudaMalloc(reinterpret_cast<void**>(&device), kCount * sizeof(float)));
  const auto first = summed(group, device);
  std::vector<double> expected(kCount), size(kCount);
  for (int member = 0; member < group.size(); ++member) {
    const auto values = member_values(member, kCount);
    for (size_t i = 0; i < kCount; ++i) {
      expected[i] += values[i];
      size[i] += std::abs(values[i]);
    }
  }
  for (size_t i = 0; i < kCount; ++i) {
    // n - 1 additions, each rounded to float32.
    MORAINE_CHECK(std::abs(first[i] - expected[i]) <= 6e-8 * group.size() * size[i], "sum {} is {}", i, first[i]);
  }
  MORAINE_CHECK(first == summed(group, device), "another sum of the same values has other bits");
  if (group.index() == 0) {
    const auto sum = group.all_reduce({device, kCount});
    MORAINE_CHECK(!sum->wait(kLong).ok(), "a sum without the others");
  }
  group.renew();
  MORAINE_CHECK(group.barrier(kLong).ok(), "the group does not work again");
  MORAINE_CHECK(first == summed(group, device), "sums after renew() have other bits");
  must(cudaFree(device));
}

int run() {
  mpi::Session session;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices < 2 || devices < session.size() - 1) {
    if (session.index() == 0) std::printf("skipped: %d CUDA devices for %d members\n", devices, session.size() - 1);
    return 77;
  }
  try {
    if (session.index() > 0) {
      must(cudaSetDevice(session.local_worker()));
      play(*nccl::make_group(mpi::make_group(session, session.size() - 1), session.local_worker()));
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
