// Bad input, thread counts and index arithmetic.
#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <omp.h>

#include "core/error.h"
#include "kernels/backend.h"
#include "kernels/layout.h"
#include "kernels/materialise.h"
#include "tests/kernels/harness.h"

namespace moraine::kernels::test {
namespace {

using core::InternalError;
using core::NumericError;
using core::UserError;

template <class E, class F>
void expect_error(F&& f, const std::string& part) {
  try {
    f();
    FAIL() << "no error; expected one that says: " << part;
  } catch (const E& error) {
    EXPECT_THAT(std::string(error.what()), testing::HasSubstr(part));
    EXPECT_FALSE(error.hint().empty());
  }
}

// One small correct call; tests break one thing at a time.
struct SmallCall {
  Target target;
  Random random;
  Experts experts = random.experts(16, 24, {2, 5}, DType::kF32);
  Routing routing = random.routing(6, 2, 2, false);
  DeviceExperts device{target, experts};
  DeviceRoute route{target, routing, 2};
  std::unique_ptr<Memory> x = put(target.exec, random.normal(6 * 16, DType::kF32), DType::kF32);
  Memory y{target.exec, 6 * 24 * 4};
  Memory workspace{target.exec, delta_forward_workspace(device.view, 6, 2, target.exec)};
  DeltaForward args{&device.view, &route.route, route.gates, {x->data(), 16}, {}, {y.data(), 24}, nullptr};
  Workspace space{workspace.data(), workspace.bytes()};
  void run() { delta_forward(args, space, target.exec); }
};

TEST(BadInput, AnIndexOutOfRangeIsRefusedByTokenAndSlot) {
  Random random;
  Routing r = random.routing(4, 2, 3, false);
  r.index[5] = 3;
  expect_error<UserError>([&] { DeviceRoute(Target{}, r, 3); }, "token 2 slot 1 has 3, experts 3");
  r.index[5] = -2;
  expect_error<UserError>([&] { DeviceRoute(Target{}, r, 3); }, "has -2");
}

TEST(BadInput, AGateThatIsNotFiniteIsRefused) {
  for (const float bad : {NAN, INFINITY}) {
    SmallCall call;
    std::vector<float> gates(12, 0.5f);
    gates[7] = bad;
    call.args.gates = gates.data();
    expect_error<NumericError>([&] { call.run(); }, "gate of token 3 slot 1 is not finite");
  }
}

TEST(BadInput, ShapesOffsetsPointersAndWorkspaceAreChecked) {
  expect_error<InternalError>(
      [] {
        SmallCall c;
        c.space.bytes = 1000;
        c.run();
      },
      "workspace too small: have 1000 bytes, need");
  expect_error<InternalError>(
      [] {
        SmallCall c;
        c.space.data = static_cast<char*>(c.space.data) + 4;
        c.run();
      },
      "not aligned");
  expect_error<InternalError>(
      [] {
        SmallCall c;
        c.args.x.data = static_cast<const char*>(c.args.x.data) + 1;
        c.run();
      },
      "x: not aligned");
  expect_error<InternalError>(
      [] {
        SmallCall c;
        c.args.x.data = nullptr;
        c.run();
      },
      "x: missing");
  expect_error<InternalError>(
      [] {
        SmallCall c;
        c.args.x.ld = 15;
        c.run();
      },
      "leading dimension 15 is below the width 16");
  expect_error<InternalError>(
      [] {
        SmallCall c;
        c.args.gates = nullptr;
        c.run();
      },
      "gates missing");
  expect_error<InternalError>(
      [] {
        SmallCall c;
        c.args.route = nullptr;
        c.run();
      },
      "route missing");
  expect_error<InternalError>(
      [] {
        SmallCall c;
        c.device.view.num_experts = 1;
        c.run();
      },
      "route is for 2 experts");
  expect_error<InternalError>(
      [] {
        SmallCall c;
        c.device.view.d_out = 0;
        c.run();
      },
      "bad shape");
  const int64_t decreasing[3] = {0, 5, 2};
  expect_error<InternalError>(
      [&] {
        SmallCall c;
        c.device.view.row_offsets = decreasing;
        c.run();
      },
      "decrease at expert 1");
  expect_error<InternalError>(
      [&] {
        SmallCall c;
        c.device.view.bt = nullptr;
        c.run();
      },
      "dense expert 0 has 2 rows");
  expect_error<UserError>(
      [] {
        SmallCall c;
        c.device.view.dtype = DType::kI32;
        c.run();
      },
      "no kernels for dtype I32");
  expect_error<InternalError>([] { route_build(nullptr, 1, 129, 1, {}, {}); }, "more than 128 slots");
  expect_error<InternalError>([] { route_build(nullptr, 1 << 30, 4, 1, {}, {}); }, "more than 2^31 pairs");
  expect_error<InternalError>(
      [] {
        int32_t index = 0;
        route_build(&index, 1, 1, 1, {}, {});
      },
      "workspace too small");
}

TEST(BadInput, FfnDtypesAndShapesMustAgree) {
  Random random;
  const Target target;
  const Ffn x{random.experts(16, 24, {2}, DType::kF32), random.experts(16, 24, {2}, DType::kF32),
              random.experts(24, 16, {2}, DType::kF32)};
  const DeviceExperts gate(target, x.gate), up(target, x.up), down(target, x.down);
  const DeviceRoute route(target, random.routing(3, 1, 1, false), 1);
  FfnExperts experts{gate.view, up.view, down.view};
  const FfnForward args{&experts, &route.route, route.gates, {}, {}, {}, {}, {}, nullptr};
  experts.up.dtype = DType::kBF16;
  expect_error<InternalError>([&] { ffn_forward(args, {}, {}); }, "dtypes differ: BF16 and F32");
  experts = {gate.view, up.view, gate.view};
  expect_error<InternalError>([&] { ffn_forward(args, {}, {}); }, "shapes differ");
}

TEST(BadInput, MissingInstructionSetsAndDevicesAreRefusedNotReplaced) {
  for (const Path path : {Path::kAvx2, Path::kAvx512, Path::kAvx512Bf16})
    if (!path_available(path))
      expect_error<UserError>([&] { backend_for({Device::kCpu, path}, DType::kF32); }, "cannot run");
  if (!cuda_available())
    expect_error<UserError>([&] { backend_for({Device::kCuda}, DType::kF32); }, "no usable device");
}

TEST(Families, AutomaticStandsForNothingAboveTheLimit) {
  const Path best = best_path();
  for (const Path most : {Path::kScalar, Path::kAvx2, Path::kAvx512}) {
    limit_path(most);
    EXPECT_LE(best_path(), most);
    if (path_available(most)) {
      EXPECT_EQ(best_path(), most);
      EXPECT_EQ(&backend_for({}, DType::kF32), &backend_for({Device::kCpu, most}, DType::kF32));
    }
  }
  limit_path(Path::kAvx512Bf16);
  EXPECT_EQ(best_path(), best);
}

TEST(Strides, RowsMayLieFurtherApartThanTheyAreWide) {
  SmallCall call;
  call.run();
  const Vec packed = get(call.y, 6 * 24, DType::kF32);
  const Vec x = get(*call.x, 6 * 16, DType::kF32);
  Vec wide(6 * 21, std::numeric_limits<double>::quiet_NaN());
  for (size_t t = 0; t < 6; ++t)
    std::copy_n(x.begin() + static_cast<int64_t>(t) * 16, 16, wide.begin() + static_cast<int64_t>(t) * 21);
  const auto spread = put(call.target.exec, wide, DType::kF32);
  Memory y(call.target.exec, 6 * 31 * 4);
  call.args.x = {spread->data(), 21};
  call.args.y = {y.data(), 31};
  call.run();
  const Vec out = get(y, 6 * 31, DType::kF32);
  for (size_t t = 0; t < 6; ++t) {
    for (size_t c = 0; c < 24; ++c) ASSERT_EQ(out[t * 31 + c], packed[t * 24 + c]);
    for (size_t c = 24; c < 31; ++c) ASSERT_TRUE(std::isnan(out[t * 31 + c])) << "wrote between rows";
  }
}

TEST(Inference, TheFfnGivesTheSameBitsWithoutSavingAnything) {
  Random random;
  const Target target;
  const Ffn x{random.experts(16, 40, {2, 0}, DType::kF32), random.experts(16, 40, {3, 0}, DType::kF32),
              random.experts(40, 16, {1, 0}, DType::kF32)};
  const Routing routing = random.routing(7, 2, 2);
  const Vec in = random.normal(7 * 16, DType::kF32), base = random.normal(7 * 40, DType::kF32);
  const FfnOut saved = run_ffn(target, x, routing, in, base, base, in, base).out;
  const DeviceExperts gate(target, x.gate), up(target, x.up), down(target, x.down);
  const FfnExperts experts{gate.view, up.view, down.view};
  const DeviceRoute route(target, routing, 2);
  const auto dev_x = put(target.exec, in, DType::kF32), dev_base = put(target.exec, base, DType::kF32);
  Memory hidden(target.exec, 7 * 40 * 4), y(target.exec, 7 * 16 * 4);
  Memory workspace(target.exec, ffn_forward_workspace(experts, 7, 2, target.exec));
  ffn_forward({&experts,
               &route.route,
               route.gates,
               {dev_x->data(), 16},
               {dev_base->data(), 40},
               {dev_base->data(), 40},
               {hidden.data(), 40},
               {y.data(), 16},
               nullptr},
              {workspace.data(), workspace.bytes()}, target.exec);
  expect_same_bits(get(hidden, 7 * 40, DType::kF32), saved.hidden_sum, "hidden_sum");
  expect_same_bits(get(y, 7 * 16, DType::kF32), saved.y_delta, "y_delta");
}

TEST(Threads, OneAndManyThreadsGiveTheSameBits) {
  const Target target{{Device::kCpu, best_path()}, DType::kF32};
  Random random;
  SCOPED_TRACE(testing::Message() << "MORAINE_TEST_SEED=" << random.seed());
  // Large enough to be spread over a team (more than two MFLOP per step).
  const Experts x = random.experts(264, 200, {16, 0, 65, 3, 130}, DType::kF32);
  const Routing r = random.routing(300, 2, 5);
  const Vec in = random.normal(300 * 264, DType::kF32), y0 = random.normal(300 * 200, DType::kF32),
            dy = random.normal(300 * 200, DType::kF32);
  const Ffn ffn{random.experts(64, 264, {16, 0, 9}, DType::kF32), random.experts(64, 264, {16, 0, 9}, DType::kF32),
                random.experts(264, 64, {16, 0, 9}, DType::kF32)};
  const Routing ffn_route = random.routing(300, 2, 3);
  const Vec base = random.normal(300 * 264, DType::kF32), q = random.normal(300 * 264, DType::kF32),
            narrow = random.normal(300 * 64, DType::kF32);
  const int before = omp_get_max_threads();
  std::vector<DeltaResult> deltas;
  std::vector<FfnResult> ffns;
  for (const int threads : {1, 2, 5}) {
    omp_set_num_threads(threads);
    deltas.push_back(run_delta(target, x, r, in, y0, dy));
    ffns.push_back(run_ffn(target, ffn, ffn_route, narrow, base, base, narrow, q));
  }
  omp_set_num_threads(before);
  for (size_t i = 1; i < deltas.size(); ++i) {
    expect_same_bits(deltas[i].y, deltas[0].y, "y");
    expect_same_bits(deltas[i].grads.dx, deltas[0].grads.dx, "dx");
    expect_same_bits(deltas[i].grads.da, deltas[0].grads.da, "dA");
    expect_same_bits(deltas[i].grads.dbt, deltas[0].grads.dbt, "dBt");
    expect_same_bits(deltas[i].grads.dgates, deltas[0].grads.dgates, "dgates");
    expect_same_bits(ffns[i].out.hidden_sum, ffns[0].out.hidden_sum, "hidden_sum");
    expect_same_bits(ffns[i].grads.dgates, ffns[0].grads.dgates, "dgates of the FFN");
    expect_same_bits(ffns[i].grads.down.da, ffns[0].grads.down.da, "dA of down");
    expect_same_bits(ffns[i].grads.dx_delta, ffns[0].grads.dx_delta, "dx_delta");
  }
}

TEST(Layout, PairOffsetsDoNotWrapAbove2To31) {
  // 2^20 pairs on one expert of rank 16384: 2^34 elements, offsets alone, nothing is allocated.
  EXPECT_EQ(pair_buffer_bound(int64_t{1} << 20, 16384), int64_t{1} << 34);
  const int32_t offsets[3] = {0, 1 << 20, 1 << 20};
  const int64_t rows[3] = {0, 16383, 16400};
  const Route route{1 << 20, 1, 2, nullptr, nullptr, offsets, nullptr};
  int64_t storage[3];
  const Segments s = scalar_backend(DType::kF32)->make_segments(route, rows, 16383, storage, {});
  EXPECT_EQ(s.pair_offsets[1], int64_t{1} << 34);
  EXPECT_EQ(s.pair_offsets[2], int64_t{1} << 34);  // expert 1 has no pairs
}

TEST(Layout, EveryTileBelongsToTheExpertThatCountedIt) {
  Random random;
  SCOPED_TRACE(testing::Message() << "MORAINE_TEST_SEED=" << random.seed());
  for (int draw = 0; draw < 50; ++draw) {
    const int experts = 1 + static_cast<int>(random.below(70));
    std::vector<int32_t> base{0};
    std::vector<int> owner;
    for (int e = 0; e < experts; ++e) {
      const int32_t tiles =
          shrink_tile_count(random.pick<int64_t>({0, 1, 63, 64, 65, 200}), random.pick<int64_t>({0, 1, 64, 100}), 64);
      base.push_back(base.back() + tiles);
      owner.insert(owner.end(), static_cast<size_t>(tiles), e);
    }
    for (int32_t tile = 0; tile < base.back(); ++tile)
      ASSERT_EQ(expert_of_tile(base.data(), experts, tile), owner[static_cast<size_t>(tile)]);
  }
  EXPECT_EQ(shrink_tile_count(65, 64, 64), 2);
  EXPECT_EQ(expand_tile_count(65, 0, 64), 0);
  EXPECT_EQ(expand_tile_count(65, 1, 64), 2);
  EXPECT_EQ(outer_tile_count(129, 64), 3);
}

TEST(Layout, TilesOfAnExpertAreInTheTableOfItsClassOnly) {
  Random random;
  SCOPED_TRACE(testing::Message() << "MORAINE_TEST_SEED=" << random.seed());
  for (const LargeTiles& rule : {LargeTiles{}, LargeTiles{true, 256, 128}, LargeTiles{true, 1, 0}}) {
    const int experts = 40;
    std::vector<int32_t> offsets{0};
    std::vector<int64_t> rows{0};
    for (int e = 0; e < experts; ++e) {
      offsets.push_back(offsets.back() + static_cast<int32_t>(random.pick<int64_t>({0, 1, 127, 128, 129, 300})));
      rows.push_back(rows.back() + random.pick<int64_t>({0, 1, 64, 255, 256, 257}));
    }
    std::vector<int64_t> pair_offsets(experts + 1);
    std::vector<int32_t> tables[6];
    for (auto& table : tables) table.resize(experts + 1);
    fill_tables(offsets.data(), rows.data(), experts, rule, pair_offsets.data(),
                {64, tables[0].data(), tables[1].data(), tables[2].data()},
                {128, tables[3].data(), tables[4].data(), tables[5].data()});
    int64_t elements = 0;
    for (int e = 0; e < experts; ++e) {
      const auto i = static_cast<size_t>(e);
      const int64_t n = offsets[i + 1] - offsets[i], r = rows[i + 1] - rows[i];
      const bool large = rule.enabled && r >= rule.min_rank && n >= rule.min_pairs;
      const int block = large ? 128 : 64;
      const int32_t expected[3] = {shrink_tile_count(n, r, block), expand_tile_count(n, r, block),
                                   outer_tile_count(r, block)};
      for (size_t product = 0; product < 3; ++product) {
        const auto tiles = [&](size_t table) { return tables[table][i + 1] - tables[table][i]; };
        EXPECT_EQ(tiles(product + (large ? 3 : 0)), expected[product]);
        EXPECT_EQ(tiles(product + (large ? 0 : 3)), 0);
      }
      EXPECT_EQ(pair_offsets[i], elements);
      elements += n * padded_rank(r);
    }
    EXPECT_EQ(pair_offsets.back(), elements);
  }
}

}  // namespace
}  // namespace moraine::kernels::test
