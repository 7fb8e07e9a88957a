#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

/// Ragged-rank expert kernels: plain pointers and structs, no tensor library.
///
/// Symbols used in this folder: T tokens, k slots per token, P = T k pairs p = t k + j, E experts, rank r_e >= 0 of
/// expert e, R = sum r_e, index[t,j] in {-1, 0, .., E-1} (-1: empty slot), gate g[t,j], scale s_e, weight w_p = g_p
/// s_e. "Accumulate type" is float for kBF16, kF16 and kF32 and double for kF64; gates, gate gradients and weight
/// gradients have it.
namespace moraine::kernels {

using core::DType;

enum class Device { kCpu, kCuda };

/// Instruction family of the CPU kernels, ascending. kAuto takes the best one this processor has; a named one is used
/// or refused. Results of two families differ in rounding; within one family they do not depend on thread count or on
/// other tokens.
enum class Path { kAuto, kScalar, kAvx2, kAvx512, kAvx512Bf16 };

/// Tensor-core instructions of the CUDA kernels, for 16-bit types. kMma: mma.sync in 64 x 64 tiles. kWgmma: wgmma in
/// tiles of 128 x 128 and 128 x 256 for the experts Exec::wgmma_min_rank and wgmma_min_pairs name, mma.sync for the
/// others; refused with a UserError where the device is not of compute capability 9.0, the build has no sm_90a code or
/// the type is float. kAuto is kMma on every device: wgmma wins by a third for high ranks and thousands of tokens alone
/// (docs/results/gpu.md), and then a token's bits depend on how many others chose its expert (wgmma_min_pairs).
enum class CudaFamily { kAuto, kMma, kWgmma };

/// Where and how an operation runs.
struct Exec {
  Device device = Device::kCpu;
  Path path = Path::kAuto;
  /// cudaStream_t; ignored on the CPU. Nothing here synchronises with it unless check_inputs is set.
  void* stream = nullptr;
  /// Read indices and gates before use and throw UserError on the first bad one. On CUDA this waits for the stream, so
  /// it must be off under graph capture; then a bad index makes the whole output NaN.
  bool check_inputs = true;
  /// Ignored on the CPU.
  CudaFamily cuda_family = CudaFamily::kAuto;
  /// Under kWgmma: least rank and least pairs of an expert that takes wgmma. The two instructions round differently, so
  /// with min_pairs > 0 the bits of a token depend on how many others chose its expert; 0 lets the rank alone decide
  /// and keeps a token's output independent of its batch, at the price of mostly empty tiles. Smaller experts are bound
  /// by memory and gain nothing.
  int64_t wgmma_min_rank = 256;
  int64_t wgmma_min_pairs = 128;
};

/// How gradients of weights are written. kOverwrite writes zeros for experts without a pair, kAccumulate adds,
/// kChosenOnly overwrites the rows of experts that have a pair and leaves the others alone: their gradient is zero, and
/// filling it costs a pass over it.
enum class WeightGrads { kOverwrite, kAccumulate, kChosenOnly };

/// Caller-owned scratch memory, aligned to 64 bytes (256 on CUDA). Contents before and after a call are unspecified.
struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
};

/// E low-rank experts of one linear map, slabs back to back without rank padding.
///
/// a [R, d_in] and bt [R, d_out] row-major: expert e owns rows row_offsets[e] .. row_offsets[e+1] of both. bt is B
/// transposed
/// ("rank-major"), so growing, slicing and sending an expert touch two contiguous blocks.
/// A dense expert has bt == nullptr and r_e in {0, d_out}: its slab of `a` is the weight difference [d_out, d_in]
/// itself. CUDA wants a, bt and all activations 16-byte aligned with d_in, d_out and leading dimensions multiples of 8;
/// the CPU wants element alignment only.
struct RaggedExperts {
  int64_t num_experts = 0, d_in = 0, d_out = 0;
  DType dtype = DType::kF32;
  const void* a = nullptr;
  const void* bt = nullptr;
  const int64_t* row_offsets = nullptr;         // [E+1], host memory
  const int64_t* row_offsets_device = nullptr;  // [E+1], device memory; CUDA only
  const float* scale = nullptr;                 // [E], on the device of the operation
  bool dense() const { return bt == nullptr; }
};

/// A row-major matrix of activations: `ld` elements from one row to the next.
struct ConstRows {
  const void* data = nullptr;
  int64_t ld = 0;
};
struct Rows {
  void* data = nullptr;
  int64_t ld = 0;
};

/// Bytes of one element of the accumulate type that belongs to a storage type.
inline size_t accumulate_size(DType storage) { return storage == DType::kF64 ? 8 : 4; }

/// True when this processor (and this build) can run the family. kAuto and kScalar always can.
bool path_available(Path path);
/// The family kAuto stands for here.
Path best_path();
/// Makes kAuto stand for nothing above `most` in this process from now on. Call it before other threads compute.
void limit_path(Path most);
const char* path_name(Path path);

}  // namespace moraine::kernels
