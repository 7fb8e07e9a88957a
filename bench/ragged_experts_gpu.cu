// Ragged-rank expert kernels on a GPU: median time by graph replay against the floor max(FLOP / peak, bytes / copy
// speed). Copy speed is measured here; the bf16 peak is given in TFLOP/s on the command line (default 790, an H200's
// 8192^3 product). The second argument is the instruction family, mma (default) or wgmma. Routing, forward and backward
// are captured together; inputs are random. Peers: scripts/gpu_peers.py.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/ragged_delta.h"

namespace {

namespace mk = moraine::kernels;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* allocate(size_t count) {
  void* p = nullptr;
  check(cudaMalloc(&p, count * sizeof(T) + 256), "cudaMalloc");
  return static_cast<T*>(p);
}
template <class T>
T* upload(const std::vector<T>& values) {
  T* p = allocate<T>(values.size());
  check(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return p;
}

__global__ void fill(__nv_bfloat16* x, int64_t n, unsigned seed) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const unsigned hash = (static_cast<unsigned>(i) ^ seed) * 2654435761u;
    x[i] = __float2bfloat16_rn((static_cast<float>(hash >> 8) / 8388608.0f - 1.0f) * 0.05f);
  }
}
__nv_bfloat16* random_rows(int64_t n, unsigned seed) {
  auto* p = allocate<__nv_bfloat16>(static_cast<size_t>(n));
  fill<<<1024, 256>>>(p, n, seed);
  check(cudaGetLastError(), "fill");
  return p;
}

template <class Work>
double median_ms(cudaStream_t stream, Work work) {
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  work();  // warm-up
  check(cudaStreamSynchronize(stream), "warm-up");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  work();
  check(cudaStreamEndCapture(stream, &graph), "end of capture");
  check(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<double> ms;
  for (int i = 0; i < 25; ++i) {
    cudaEventRecord(begin, stream);
    check(cudaGraphLaunch(replay, stream), "replay");
    cudaEventRecord(end, stream);
    check(cudaEventSynchronize(end), "replay");
    float once = 0;
    cudaEventElapsedTime(&once, begin, end);
    ms.push_back(once);
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2];
}

double copy_tbps(cudaStream_t stream) {
  const size_t bytes = size_t{2} << 30;
  char *from = allocate<char>(bytes), *to = allocate<char>(bytes);
  const double ms = median_ms(stream, [&] { cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream); });
  cudaFree(from);
  cudaFree(to);
  return 2.0 * static_cast<double>(bytes) / ms / 1e9;
}

void run_case(const std::string& name, const std::vector<int64_t>& ranks, int64_t tokens, int64_t slots, int64_t d,
              double tflops, double tbps, mk::CudaFamily family, cudaStream_t stream) {
  const auto experts = static_cast<int64_t>(ranks.size()), pairs = tokens * slots;
  std::vector<int64_t> offsets{0};
  for (const int64_t r : ranks) offsets.push_back(offsets.back() + r);
  std::mt19937 engine(7);
  std::vector<int32_t> index;
  std::vector<char> active(ranks.size(), 0);
  double work = 0, active_rank = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    index.push_back(static_cast<int32_t>(engine() % static_cast<unsigned>(experts)));
    work += static_cast<double>(ranks[static_cast<size_t>(index.back())]);
    active[static_cast<size_t>(index.back())] = 1;
  }
  for (size_t e = 0; e < ranks.size(); ++e) active_rank += active[e] ? static_cast<double>(ranks[e]) : 0.0;
  std::vector<void*> held;
  const auto hold = [&](auto* p) { return held.push_back(p), p; };
  const auto* dev_index = hold(upload(index));
  const auto* gates = hold(upload(std::vector<float>(static_cast<size_t>(pairs), 0.5f)));
  const auto* scale = hold(upload(std::vector<float>(ranks.size(), 1.0f)));
  const auto* dev_offsets = hold(upload(offsets));
  auto *x = hold(random_rows(tokens * d, 1)), *y = hold(random_rows(tokens * d, 2)),
       *dy = hold(random_rows(tokens * d, 3));
  auto* dx = hold(random_rows(tokens * d, 4));
  const mk::RaggedExperts weights{experts,
                                  d,
                                  d,
                                  mk::DType::kBF16,
                                  hold(random_rows(offsets.back() * d, 5)),
                                  hold(random_rows(offsets.back() * d, 6)),
                                  offsets.data(),
                                  dev_offsets,
                                  scale};
  mk::Exec exec;
  exec.device = mk::Device::kCuda, exec.stream = stream, exec.check_inputs = false, exec.cuda_family = family;
  const auto space_of = [&](size_t bytes) { return mk::Workspace{hold(allocate<char>(bytes)), bytes}; };
  const mk::Workspace route_space = space_of(mk::route_bytes(tokens, slots, experts, exec.device));
  const mk::Workspace space = space_of(std::max(mk::delta_forward_workspace(weights, tokens, slots, exec),
                                                mk::delta_backward_workspace(weights, tokens, slots, exec)));
  void* saved = hold(allocate<char>(mk::delta_saved_bytes(weights, pairs, exec.device)));
  auto *da = hold(allocate<float>(static_cast<size_t>(offsets.back() * d))),
       *dbt = hold(allocate<float>(static_cast<size_t>(offsets.back() * d)));
  auto* dgates = hold(allocate<float>(static_cast<size_t>(pairs)));
  for (const bool backward : {false, true}) {
    const double ms = median_ms(stream, [&] {
      const mk::Route route = mk::route_build(dev_index, tokens, slots, experts, route_space, exec);
      mk::delta_forward({&weights, &route, gates, {x, d}, {y, d}, {y, d}, saved}, space, exec);
      if (backward)
        mk::delta_backward({&weights,
                            &route,
                            gates,
                            {x, d},
                            {dy, d},
                            {},
                            saved,
                            {dx, d},
                            dgates,
                            da,
                            dbt,
                            mk::WeightGrads::kChosenOnly},
                           space, exec);
    });
    const double passes = backward ? 3 : 1, flops = 4.0 * static_cast<double>(d) * work * passes;
    const double bytes =
        2.0 * passes * (2.0 * static_cast<double>(d) * active_rank + 3.0 * static_cast<double>(tokens * d));
    const double compute = flops / tflops / 1e9, memory = bytes / tbps / 1e9, floor = std::max(compute, memory);
    std::printf(
        "%-7s O1 %ldx%ld T=%-5ld E=%ld k=%ld %-8s bf16 | %8.4f ms | %7.1f TFLOP/s | %6.3f TB/s | floor %.4f %c | %3.0f "
        "%%\n",
        backward ? "fwd+bwd" : "fwd", static_cast<long>(d), static_cast<long>(d), static_cast<long>(tokens),
        static_cast<long>(experts), static_cast<long>(slots), name.c_str(), ms, flops / ms / 1e9, bytes / ms / 1e9,
        floor, compute > memory ? 'C' : 'M', 100 * floor / ms);
  }
  for (void* p : held) cudaFree(p);
}

}  // namespace

int main(int argc, char** argv) {
  const double tflops = argc > 1 ? std::atof(argv[1]) : 790.0;
  const std::string family_name = argc > 2 ? argv[2] : "mma";
  if (family_name != "mma" && family_name != "wgmma") {
    std::fprintf(stderr, "the family is mma or wgmma: %s\n", family_name.c_str());
    return 2;
  }
  const mk::CudaFamily family = family_name == "mma" ? mk::CudaFamily::kMma : mk::CudaFamily::kWgmma;
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  const double before = copy_tbps(stream);
  std::printf("copy %.2f TB/s, bf16 peak %.0f TFLOP/s (given), family %s\n", before, tflops, family_name.c_str());
  for (const int64_t tokens : {1, 16, 64, 256, 4096, 8192}) {
    run_case("mix8", {1, 4, 16, 32, 64, 256, 1024, 2048}, tokens, 2, 4096, tflops, before, family, stream);
    run_case("small8", {1, 2, 4, 8, 8, 16, 16, 32}, tokens, 2, 4096, tflops, before, family, stream);
    run_case("uniform16", std::vector<int64_t>(8, 16), tokens, 2, 4096, tflops, before, family, stream);
  }
  std::printf("copy after %.2f TB/s\n", copy_tbps(stream));
  return 0;
}
