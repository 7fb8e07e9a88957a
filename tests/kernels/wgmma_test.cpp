// The CUDA kernels' two tile classes: who takes which, and what must hold across them. The suites over all targets run
// every expert on wgmma; here both classes meet.
#include <cmath>

#include <gmock/gmock.h>

#include "core/error.h"
#include "tests/kernels/harness.h"
#if defined(MORAINE_CUDA_ON_HOST)
#include "kernels/cuda_wgmma.cuh"
#endif

namespace moraine::kernels::test {
namespace {

struct Case {
  Experts experts;
  Routing routing;
  Vec x, y0, dy;
};

Case make_case(Random& random, DType dtype, int64_t tokens, int64_t slots, const std::vector<int64_t>& ranks,
               int64_t d_in, int64_t d_out) {
  return {random.experts(d_in, d_out, ranks, dtype), random.routing(tokens, slots, static_cast<int64_t>(ranks.size())),
          random.normal(tokens * d_in, dtype), random.normal(tokens * d_out, dtype),
          random.normal(tokens * d_out, dtype)};
}

DeltaResult run_case(const Target& target, const Case& c) {
  return run_delta(target, c.experts, c.routing, c.x, c.y0, c.dy);
}

void expect_same_result(const DeltaResult& a, const DeltaResult& b) {
  expect_same_bits(a.y, b.y, "y");
  expect_same_bits(a.grads.dx, b.grads.dx, "dx");
  expect_same_bits(a.grads.da, b.grads.da, "dA");
  expect_same_bits(a.grads.dbt, b.grads.dbt, "dBt");
  expect_same_bits(a.grads.dgates, b.grads.dgates, "dgates");
}

Exec wgmma_from(int64_t min_rank, int64_t min_pairs) {
  Exec exec = all_by_wgmma();
  exec.wgmma_min_rank = min_rank, exec.wgmma_min_pairs = min_pairs;
  return exec;
}

class Wgmma : public OnTarget {};

TEST_P(Wgmma, ClassesByDefaultThresholdsEqualTheOracle) {
  // Pairs per expert: about 230, 150, 60 and 10; ranks on both sides of 256.
  Case c = make_case(random, GetParam().dtype, 450, 1, {300, 256, 264, 40}, 200, 264);
  for (size_t t = 0; t < 450; ++t) c.routing.index[t] = t % 45 < 23 ? 0 : t % 45 < 38 ? 1 : t % 45 < 44 ? 2 : 3;
  const Exec defaults;
  const Target target{wgmma_from(defaults.wgmma_min_rank, defaults.wgmma_min_pairs), GetParam().dtype};
  const DeltaResult out = run_case(target, c);
  const Tolerance tolerance = output_tolerance(target.dtype);
  expect_close(out.y, delta_forward(c.experts, c.routing, c.x, c.y0), tolerance, "y");
  const DeltaGrads ref = delta_backward(c.experts, c.routing, c.x, c.dy, Vec(c.x.size(), 0.0));
  expect_close(out.grads.dx, ref.dx, tolerance, "dx");
  expect_close_norm(out.grads.da, ref.da, tolerance.relative, "dA");
  expect_close_norm(out.grads.dbt, ref.dbt, tolerance.relative, "dBt");
  expect_close_norm(out.grads.dgates, ref.dgates, gate_tolerance(target.dtype), "dgates");
}

// Above 1024 pairs one block owns all chunks of a sum, below they are split over blocks.
TEST_P(Wgmma, ChunksSumToTheSameBitsInOneBlockAndInSeveral) {
  const int64_t tokens = 1030, d_in = 1096, d_out = 24;
  const Case c = make_case(random, GetParam().dtype, tokens, 1, {16, 9}, d_in, d_out);
  const Vec whole = run_delta_forward(GetParam(), c.experts, c.routing, c.x, c.y0);
  expect_close(whole, delta_forward(c.experts, c.routing, c.x, c.y0), output_tolerance(GetParam().dtype), "y");
  const auto part = [](const auto& rows, int64_t width) {
    return std::decay_t<decltype(rows)>(rows.begin() + 500 * width, rows.begin() + 600 * width);
  };
  const Routing routing{100, 1, part(c.routing.index, 1), part(c.routing.gates, 1)};
  expect_same_bits(run_delta_forward(GetParam(), c.experts, routing, part(c.x, d_in), part(c.y0, d_out)),
                   part(whole, d_out), "y");
}

TEST_P(Wgmma, AClassByRankAloneKeepsTokensIndependentOfTheirBatch) {
  const Target target{wgmma_from(64, 0), GetParam().dtype};
  const int64_t d_in = 120, d_out = 136;
  const Case c = make_case(random, target.dtype, 140, 2, {80, 7, 64, 63, 0}, d_in, d_out);
  const Vec whole = run_delta_forward(target, c.experts, c.routing, c.x, c.y0);
  for (const int64_t t : {0, 71, 139}) {
    const auto part = [&](const auto& rows, int64_t width) {
      return std::decay_t<decltype(rows)>(rows.begin() + t * width, rows.begin() + (t + 1) * width);
    };
    const Routing routing{1, 2, part(c.routing.index, 2), part(c.routing.gates, 2)};
    expect_same_bits(run_delta_forward(target, c.experts, routing, part(c.x, d_in), part(c.y0, d_out)),
                     part(whole, d_out), "y of token " + std::to_string(t));
  }
  // Gradients of an expert nobody chose are written, also in large tiles.
  Case unused = c;
  for (int32_t& e : unused.routing.index) e = 1;
  const DeltaResult out = run_case(target, unused);
  for (size_t i = 0; i < 80u * static_cast<size_t>(d_in); ++i) ASSERT_EQ(out.grads.da[i], 0.0);
}

TEST_P(Wgmma, TheFamilyAutoIsMma) {
  const Case c = make_case(random, GetParam().dtype, 33, 2, {20, 300}, 72, 80);
  Target automatic{{Device::kCuda}, GetParam().dtype}, mma = automatic;
  mma.exec.cuda_family = CudaFamily::kMma;
  expect_same_result(run_case(automatic, c), run_case(mma, c));
}

std::vector<Target> wgmma_targets() { return {{all_by_wgmma(), DType::kBF16}, {all_by_wgmma(), DType::kF16}}; }
const auto kName = [](const testing::TestParamInfo<Target>& tested) { return target_name(tested.param); };
INSTANTIATE_TEST_SUITE_P(Targets, Wgmma, testing::ValuesIn(wgmma_targets()), kName);

TEST(WgmmaRefusal, FloatIsRefused) {
  const Target target{all_by_wgmma(), DType::kF32};
  if (!skip_reason(target).empty()) GTEST_SKIP() << skip_reason(target);
  Random random;
  const Case c = make_case(random, DType::kF32, 4, 1, {3}, 16, 24);
  try {
    run_case(target, c);
    FAIL() << "no error";
  } catch (const core::UserError& error) {
    EXPECT_THAT(std::string(error.what()), testing::HasSubstr("wgmma was asked for with float"));
    EXPECT_THAT(error.hint(), testing::HasSubstr("auto or mma"));
  }
}

#if defined(MORAINE_CUDA_ON_HOST)
TEST(WgmmaRefusal, OtherDevicesAreRefused) {
  Random random;
  const Case c = make_case(random, DType::kBF16, 4, 1, {3}, 16, 24);
  for (const int capability : {80, 89, 100}) {
    device::host_capability = capability;
    try {
      run_case({all_by_wgmma(), DType::kBF16}, c);
      ADD_FAILURE() << "no error";
    } catch (const core::UserError& error) {
      EXPECT_THAT(std::string(error.what()), testing::HasSubstr("needs compute capability 9.0: device 0 has"));
    }
  }
  device::host_capability = 90;
}

TEST(WgmmaGrid, AnyGridSizeGivesTheSameBits) {
  Random random;
  const Case c = make_case(random, DType::kBF16, 150, 2, {40, 3, 130}, 136, 520);
  const Target target{wgmma_from(16, 16), DType::kBF16};
  const int before = device::host_multiprocessors;
  const DeltaResult first = run_case(target, c);
  for (const int multiprocessors : {1, 2, 7}) {
    device::host_multiprocessors = multiprocessors;
    expect_same_result(run_case(target, c), first);
  }
  device::host_multiprocessors = before;
}

// One warpgroup, one 64 x 128 x 16 product of K-major operands; without the fence wgmma must not see what was copied.
void multiply_once(const __half* left, const __half* right, float* out, bool fence) {
  using namespace device;
  MORAINE_DYNAMIC_SHARED(shared);
  __half *l = reinterpret_cast<__half*>(shared), *r = l + kWgmmaBlockElements;
  auto* barrier = reinterpret_cast<uint64_t*>(r + 2 * kWgmmaBlockElements);
  if (threadIdx.x == 0) barrier_init(barrier, 128);
  __syncthreads();
  const StageWriter<__half> writer;
  for (int row = writer.row; row < 64; row += 16) writer.copy(l, row, left + row * 64 + 8 * writer.chunk, 8);
  for (int row = writer.row; row < 128; row += 16) writer.copy(r, row, right + row * 64 + 8 * writer.chunk, 8);
  commit_copies();
  wait_copies<0>();
  if (fence) fence_async_proxy();
  barrier_arrive(barrier);
  barrier_wait(barrier, 0);
  float c[64] = {};
  wgmma_fence();
  wgmma<false, false>(c, wgmma_descriptor(shared_address(l), false), wgmma_descriptor(shared_address(r), false),
                      __half{});
  wgmma_commit();
  wgmma_wait<0>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int i = 0; i < 64; ++i)
    out[(thread / 32 * 16 + lane / 4 + 8 * (i / 2 % 2)) * 128 + i / 4 * 8 + 2 * (lane % 4) + i % 2] = c[i];
}

TEST(WgmmaEmulation, AWriteThatWasNotFencedIsNaN) {
  Random random;
  const Exec exec{Device::kCuda};
  const Vec left = random.normal(64 * 64, DType::kF16), right = random.normal(128 * 64, DType::kF16);
  const auto dev_left = put(exec, left, DType::kF16), dev_right = put(exec, right, DType::kF16);
  for (const bool fence : {true, false}) {
    Memory out(exec, 64 * 128 * sizeof(float));
    device::launch(multiply_once, 1, 128, 1024 + 3 * device::kWgmmaBlockBytes, nullptr,
                   static_cast<const __half*>(dev_left->data()), static_cast<const __half*>(dev_right->data()),
                   static_cast<float*>(out.data()), fence);
    const Vec product = get(out, 64 * 128, DType::kF32);
    for (size_t m = 0; m < 64; ++m)
      for (size_t n = 0; n < 128; ++n) {
        double sum = 0;
        for (size_t k = 0; k < 16; ++k) sum += left[m * 64 + k] * right[n * 64 + k];
        if (fence) {
          ASSERT_NEAR(product[m * 128 + n], sum, 1e-4) << m << ", " << n;
        } else {
          ASSERT_TRUE(std::isnan(product[m * 128 + n])) << m << ", " << n;
        }
      }
  }
}
#endif

}  // namespace
}  // namespace moraine::kernels::test
