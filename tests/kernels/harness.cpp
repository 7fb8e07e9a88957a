#include "tests/kernels/harness.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/error.h"
#include "kernels/backend.h"
#if defined(MORAINE_TEST_CUDA)
#include MORAINE_TEST_CUDA
#endif

namespace moraine::kernels::test {
namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

template <class To, class From>
To bits_of(From x) {
  To out;
  static_assert(sizeof out == sizeof x);
  std::memcpy(&out, &x, sizeof out);
  return out;
}

// Round to a grid of 2^-mantissa relative spacing by adding and subtracting, which the FPU rounds to nearest even.
double round_mantissa(double x, int mantissa, int min_exponent) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), min_exponent);
  const double spacing = std::ldexp(1.0, exponent - mantissa);
  return std::nearbyint(x / spacing) * spacing;
}

}  // namespace

double rounded(double x, DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return round_mantissa(x, 7, -126);
    case DType::kF16:
      return round_mantissa(x, 10, -14);
    case DType::kF32:
      return static_cast<float>(x);
    default:
      return x;
  }
}

DType accumulate_dtype(DType storage) { return storage == DType::kF64 ? DType::kF64 : DType::kF32; }

std::string target_name(const Target& t) {
  std::string where = t.exec.device == Device::kCuda ? "cuda" : path_name(t.exec.path);
  if (t.exec.cuda_family == CudaFamily::kWgmma) where += "_wgmma";
  return where + "_" + std::string(core::safetensors_name(t.dtype));
}

void PrintTo(const Target& target, std::ostream* out) { *out << target_name(target); }

std::vector<Target> all_targets() {
  std::vector<Target> out{{{Device::kCpu, Path::kScalar}, DType::kF64}};
  for (const Path path : {Path::kScalar, Path::kAvx2, Path::kAvx512, Path::kAvx512Bf16})
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16})
      if (path != Path::kAvx512Bf16 || dtype == DType::kBF16) out.push_back({{Device::kCpu, path}, dtype});
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) out.push_back({{Device::kCuda}, dtype});
  for (const DType dtype : {DType::kBF16, DType::kF16}) out.push_back({all_by_wgmma(), dtype});
  return out;
}

Exec all_by_wgmma() {
  Exec exec{Device::kCuda};
  exec.cuda_family = CudaFamily::kWgmma;
  exec.wgmma_min_rank = exec.wgmma_min_pairs = 1;
  return exec;
}

namespace {
bool device_has_wgmma() {
  int major = 0, minor = 0;
#if defined(MORAINE_TEST_CUDA)
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
#endif
  return major == 9 && minor == 0;
}
}  // namespace

std::string skip_reason(const Target& t) {
  if (t.exec.device == Device::kCuda && !cuda_available()) return "no CUDA device in this build or machine";
  if (t.exec.cuda_family == CudaFamily::kWgmma && !device_has_wgmma()) return "wgmma needs compute capability 9.0";
  if (t.exec.device == Device::kCuda) return "";
  if (path_available(t.exec.path)) return "";
#if defined(MORAINE_CUDA_ON_HOST)
  return fmt::format("this program has no {} kernels; moraine_kernels_tests runs them", path_name(t.exec.path));
#else
  return fmt::format("this processor has no {}", path_name(t.exec.path));
#endif
}

Memory::Memory(const Exec& exec, size_t bytes) : exec_(exec), bytes_((bytes + 255) / 256 * 256) {
  const std::vector<unsigned char> poison(bytes_, 0xff);  // NaN in every type
#if defined(MORAINE_TEST_CUDA)
  if (exec_.device == Device::kCuda) {
    data_ = nullptr;
    if (cudaMalloc(&data_, bytes_ + 256) != cudaSuccess) throw std::bad_alloc();
    upload(poison.data(), bytes_);
    return;
  }
#endif
  data_ = std::aligned_alloc(256, bytes_ + 256);
  upload(poison.data(), bytes_);
}

Memory::~Memory() {
#if defined(MORAINE_TEST_CUDA)
  if (exec_.device == Device::kCuda) {
    cudaFree(data_);
    return;
  }
#endif
  std::free(data_);
}

void Memory::upload(const void* from, size_t bytes) {
#if defined(MORAINE_TEST_CUDA)
  if (exec_.device == Device::kCuda) {
    cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice);
    return;
  }
#endif
  std::memcpy(data_, from, bytes);
}

void Memory::download(void* to, size_t bytes) const {
#if defined(MORAINE_TEST_CUDA)
  if (exec_.device == Device::kCuda) {
    cudaDeviceSynchronize();
    cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost);
    return;
  }
#endif
  std::memcpy(to, data_, bytes);
}

std::unique_ptr<Memory> put(const Exec& exec, const Vec& values, DType dtype) {
  const size_t element = core::size_of(dtype);
  std::vector<unsigned char> raw(values.size() * element);
  for (size_t i = 0; i < values.size(); ++i) {
    const float f = static_cast<float>(rounded(values[i], dtype));
    if (dtype == DType::kF64) std::memcpy(&raw[i * 8], &values[i], 8);
    if (dtype == DType::kF32) std::memcpy(&raw[i * 4], &f, 4);
    if (dtype == DType::kBF16) {
      const auto half = static_cast<uint16_t>(bits_of<uint32_t>(f) >> 16);
      std::memcpy(&raw[i * 2], &half, 2);
    }
    if (dtype == DType::kF16) {
      const auto half = static_cast<_Float16>(f);
      std::memcpy(&raw[i * 2], &half, 2);
    }
  }
  auto memory = std::make_unique<Memory>(exec, raw.size());
  memory->upload(raw.data(), raw.size());
  return memory;
}

Vec get(const Memory& memory, int64_t count, DType dtype) {
  const size_t element = core::size_of(dtype);
  std::vector<unsigned char> raw(at(count) * element);
  memory.download(raw.data(), raw.size());
  Vec out(at(count));
  for (size_t i = 0; i < out.size(); ++i) {
    if (dtype == DType::kF64) std::memcpy(&out[i], &raw[i * 8], 8);
    if (dtype == DType::kF32) {
      float f;
      std::memcpy(&f, &raw[i * 4], 4);
      out[i] = f;
    }
    if (dtype == DType::kBF16) {
      uint16_t half;
      std::memcpy(&half, &raw[i * 2], 2);
      out[i] = bits_of<float>(static_cast<uint32_t>(half) << 16);
    }
    if (dtype == DType::kF16) {
      _Float16 half;
      std::memcpy(&half, &raw[i * 2], 2);
      out[i] = static_cast<double>(half);
    }
  }
  return out;
}

Random::Random() {
  const char* given = std::getenv("MORAINE_TEST_SEED");
  seed_ = given != nullptr ? std::strtoull(given, nullptr, 10)
                           : 20260208;  // fixed, so that a change of the code is the only thing that can break a test
  engine_.seed(seed_);
}

Vec Random::normal(int64_t count, DType dtype, double deviation) {
  std::normal_distribution<double> draw(0.0, deviation);
  Vec out(at(count));
  for (double& x : out) x = rounded(draw(engine_), dtype);
  return out;
}

int64_t Random::below(int64_t bound) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(bound)); }

Experts Random::experts(int64_t d_in, int64_t d_out, std::vector<int64_t> ranks, DType dtype, bool dense) {
  Experts x{d_in, d_out, std::move(ranks), dense, {}, {}, {}};
  const std::vector<int64_t> offsets = x.offsets();
  for (int64_t e = 0; e < x.num(); ++e) {
    const int64_t rank = x.ranks[at(e)];
    const Vec a = normal(rank * d_in, dtype, 1 / std::sqrt(static_cast<double>(d_in)));
    x.a.insert(x.a.end(), a.begin(), a.end());
    if (dense) continue;
    const Vec bt = normal(rank * d_out, dtype, 1 / std::sqrt(static_cast<double>(std::max<int64_t>(rank, 1))));
    x.bt.insert(x.bt.end(), bt.begin(), bt.end());
  }
  for (int64_t e = 0; e < x.num(); ++e)
    x.scale.push_back(rounded(0.5 + static_cast<double>(below(100)) / 100, DType::kF32));
  return x;
}

Routing Random::routing(int64_t tokens, int64_t slots, int64_t experts, bool holes) {
  Routing r{tokens, slots, {}, {}};
  for (int64_t p = 0; p < tokens * slots; ++p) {
    const bool empty = experts == 0 || (holes && below(8) == 0);
    r.index.push_back(empty ? -1 : static_cast<int32_t>(below(experts)));
    r.gates.push_back(rounded(static_cast<double>(below(1000)) / 1000, DType::kF32));
  }
  return r;
}

DeviceExperts::DeviceExperts(const Target& target, const Experts& x) : offsets_(x.offsets()) {
  Vec offsets(offsets_.begin(), offsets_.end());
  held_.push_back(put(target.exec, x.a, target.dtype));
  held_.push_back(put(target.exec, x.bt, target.dtype));
  held_.push_back(put(target.exec, x.scale, DType::kF32));
  held_.push_back(std::make_unique<Memory>(target.exec, offsets_.size() * 8));
  held_.back()->upload(offsets_.data(), offsets_.size() * 8);
  view = {x.num(),
          x.d_in,
          x.d_out,
          target.dtype,
          held_[0]->data(),
          x.dense ? nullptr : held_[1]->data(),
          offsets_.data(),
          static_cast<const int64_t*>(held_[3]->data()),
          static_cast<const float*>(held_[2]->data())};
}

DeviceRoute::DeviceRoute(const Target& target, const Routing& r, int64_t experts) {
  held_.push_back(std::make_unique<Memory>(target.exec, r.index.size() * 4));
  held_.back()->upload(r.index.data(), r.index.size() * 4);
  const auto* index = static_cast<const int32_t*>(held_.back()->data());
  held_.push_back(std::make_unique<Memory>(target.exec, route_bytes(r.tokens, r.slots, experts, target.exec.device)));
  route = route_build(index, r.tokens, r.slots, experts, {held_.back()->data(), held_.back()->bytes()}, target.exec);
  held_.push_back(put(target.exec, r.gates, accumulate_dtype(target.dtype)));
  gates = held_.back()->data();
}

Vec run_delta_forward(const Target& t, const Experts& x, const Routing& r, const Vec& in, const Vec& y0) {
  const DeviceExperts experts(t, x);
  const DeviceRoute route(t, r, x.num());
  const auto dev_x = put(t.exec, in, t.dtype), dev_y0 = put(t.exec, y0, t.dtype);
  Memory y(t.exec, y0.size() * core::size_of(t.dtype));
  Memory workspace(t.exec, delta_forward_workspace(experts.view, r.tokens, r.slots, t.exec));
  delta_forward({&experts.view,
                 &route.route,
                 route.gates,
                 {dev_x->data(), x.d_in},
                 {dev_y0->data(), x.d_out},
                 {y.data(), x.d_out},
                 nullptr},
                {workspace.data(), workspace.bytes()}, t.exec);
  return get(y, r.tokens * x.d_out, t.dtype);
}

DeltaResult run_delta(const Target& t, const Experts& x, const Routing& r, const Vec& in, const Vec& y0, const Vec& dy,
                      const DeltaGrads* onto, WeightGrads grads_onto) {
  const WeightGrads grads = onto != nullptr ? grads_onto : WeightGrads::kOverwrite;
  const DType accumulate = accumulate_dtype(t.dtype);
  const DeviceExperts experts(t, x);
  const DeviceRoute route(t, r, x.num());
  const auto dev_x = put(t.exec, in, t.dtype), dev_y0 = put(t.exec, y0, t.dtype), dev_dy = put(t.exec, dy, t.dtype);
  Memory y(t.exec, y0.size() * core::size_of(t.dtype)), dx(t.exec, in.size() * core::size_of(t.dtype));
  Memory u(t.exec, delta_saved_bytes(experts.view, r.tokens * r.slots, t.exec.device));
  Memory dgates(t.exec, r.gates.size() * core::size_of(accumulate));
  const auto da = onto != nullptr ? put(t.exec, onto->da, accumulate)
                                  : std::make_unique<Memory>(t.exec, x.a.size() * core::size_of(accumulate));
  const auto dbt = onto != nullptr ? put(t.exec, onto->dbt, accumulate)
                                   : std::make_unique<Memory>(t.exec, x.bt.size() * core::size_of(accumulate));
  Memory forward_space(t.exec, delta_forward_workspace(experts.view, r.tokens, r.slots, t.exec));
  Memory backward_space(t.exec, delta_backward_workspace(experts.view, r.tokens, r.slots, t.exec));
  delta_forward({&experts.view,
                 &route.route,
                 route.gates,
                 {dev_x->data(), x.d_in},
                 {dev_y0->data(), x.d_out},
                 {y.data(), x.d_out},
                 u.data()},
                {forward_space.data(), forward_space.bytes()}, t.exec);
  delta_backward({&experts.view,
                  &route.route,
                  route.gates,
                  {dev_x->data(), x.d_in},
                  {dev_dy->data(), x.d_out},
                  {},
                  u.data(),
                  {dx.data(), x.d_in},
                  dgates.data(),
                  da->data(),
                  x.dense ? nullptr : dbt->data(),
                  grads},
                 {backward_space.data(), backward_space.bytes()}, t.exec);
  return {get(y, r.tokens * x.d_out, t.dtype),
          {get(dx, r.tokens * x.d_in, t.dtype), get(*da, static_cast<int64_t>(x.a.size()), accumulate),
           x.dense ? Vec{} : get(*dbt, static_cast<int64_t>(x.bt.size()), accumulate),
           get(dgates, r.tokens * r.slots, accumulate)}};
}

FfnResult run_ffn(const Target& t, const Ffn& x, const Routing& r, const Vec& in, const Vec& gate_base,
                  const Vec& up_base, const Vec& dy, const Vec& q) {
  const DType accumulate = accumulate_dtype(t.dtype);
  const size_t element = core::size_of(t.dtype), wide = core::size_of(accumulate);
  const DeviceExperts gate(t, x.gate), up(t, x.up), down(t, x.down);
  const FfnExperts experts{gate.view, up.view, down.view};
  const DeviceRoute route(t, r, x.gate.num());
  const int64_t d = x.gate.d_in, f = x.gate.d_out, pairs = r.tokens * r.slots;
  const auto dev_x = put(t.exec, in, t.dtype), dev_gate = put(t.exec, gate_base, t.dtype),
             dev_up = put(t.exec, up_base, t.dtype);
  const auto dev_dy = put(t.exec, dy, t.dtype), dev_q = put(t.exec, q, t.dtype);
  const FfnSavedSizes sizes = ffn_saved_sizes(experts, pairs, t.exec.device);
  Memory a(t.exec, sizes.a), b(t.exec, sizes.b), ug(t.exec, sizes.u_gate), uu(t.exec, sizes.u_up),
      ud(t.exec, sizes.u_down);
  const FfnSaved saved{a.data(), b.data(), ug.data(), uu.data(), ud.data()};
  Memory hidden(t.exec, at(r.tokens * f) * element), y(t.exec, at(r.tokens * d) * element);
  Memory forward_space(t.exec, ffn_forward_workspace(experts, r.tokens, r.slots, t.exec));
  ffn_forward({&experts,
               &route.route,
               route.gates,
               {dev_x->data(), d},
               {dev_gate->data(), f},
               {dev_up->data(), f},
               {hidden.data(), f},
               {y.data(), d},
               &saved},
              {forward_space.data(), forward_space.bytes()}, t.exec);
  Memory dgate(t.exec, at(r.tokens * f) * element), dup(t.exec, at(r.tokens * f) * element),
      dx(t.exec, at(r.tokens * d) * element);
  Memory dgates(t.exec, at(pairs) * wide);
  std::vector<std::unique_ptr<Memory>> grads;
  for (const Experts* part : {&x.gate, &x.up, &x.down})
    for (const Vec* weight : {&part->a, &part->bt})
      grads.push_back(std::make_unique<Memory>(t.exec, weight->size() * wide));
  Memory backward_space(t.exec, ffn_backward_workspace(experts, r.tokens, r.slots, t.exec));
  ffn_backward({&experts,
                &route.route,
                route.gates,
                {dev_x->data(), d},
                {dev_dy->data(), d},
                {dev_q->data(), f},
                &saved,
                {dgate.data(), f},
                {dup.data(), f},
                {dx.data(), d},
                dgates.data(),
                grads[0]->data(),
                grads[1]->data(),
                grads[2]->data(),
                grads[3]->data(),
                grads[4]->data(),
                grads[5]->data()},
               {backward_space.data(), backward_space.bytes()}, t.exec);
  const auto grads_of = [&](const Experts& part, size_t i) {
    return DeltaGrads{{},
                      get(*grads[i], static_cast<int64_t>(part.a.size()), accumulate),
                      get(*grads[i + 1], static_cast<int64_t>(part.bt.size()), accumulate),
                      {}};
  };
  return {{get(hidden, r.tokens * f, t.dtype), get(y, r.tokens * d, t.dtype)},
          {get(dgate, r.tokens * f, t.dtype), get(dup, r.tokens * f, t.dtype), get(dx, r.tokens * d, t.dtype),
           get(dgates, pairs, accumulate), grads_of(x.gate, 0), grads_of(x.up, 2), grads_of(x.down, 4)}};
}

Tolerance output_tolerance(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return {4e-3, 1e-2, 0.025};
    case DType::kF16:
      return {6e-4, 1.3e-3, 3.5e-3};
    case DType::kF32:
      return {3e-6, 1e-5, 3e-5};
    default:
      return {1e-13, 1e-12, 1e-12};
  }
}

double gate_tolerance(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return 4e-3;
    case DType::kF16:
      return 6e-4;
    case DType::kF32:
      return 1e-5;
    default:
      return 1e-12;
  }
}

void expect_close_norm(const Vec& out, const Vec& ref, double relative, const std::string& what) {
  ASSERT_EQ(out.size(), ref.size()) << what;
  double error = 0, norm = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    ASSERT_TRUE(std::isfinite(out[i])) << what << "[" << i << "] = " << out[i] << ", expected " << ref[i];
    error += (out[i] - ref[i]) * (out[i] - ref[i]);
    norm += ref[i] * ref[i];
  }
  const double floor = 0.1 * std::sqrt(static_cast<double>(ref.size()));
  EXPECT_LE(std::sqrt(error), relative * (std::sqrt(norm) + floor))
      << what << ": relative error " << std::sqrt(error / norm);
}

void expect_close(const Vec& out, const Vec& ref, const Tolerance& tolerance, const std::string& what) {
  expect_close_norm(out, ref, tolerance.relative, what);
  double norm = 0;
  for (const double x : ref) norm += x * x;
  const double rms = std::max(0.1, ref.empty() ? 0 : std::sqrt(norm / static_cast<double>(ref.size())));
  for (size_t i = 0; i < ref.size(); ++i)
    ASSERT_LE(std::abs(out[i] - ref[i]), tolerance.element * std::abs(ref[i]) + tolerance.rms_share * rms)
        << what << "[" << i << "] = " << out[i] << ", expected " << ref[i];
}

namespace {
double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return std::ldexp(1.0, -8);
    case DType::kF16:
      return std::ldexp(1.0, -11);
    case DType::kF32:
      return std::ldexp(1.0, -24);
    default:
      return std::ldexp(1.0, -53);
  }
}
}  // namespace

void expect_close_terms(const Vec& out, const Vec& ref, const Vec& stored, const Vec& summed, int roundings,
                        int64_t depth, DType dtype, const std::string& what) {
  ASSERT_EQ(out.size(), ref.size()) << what;
  const double u = roundings * unit_roundoff(dtype),
               wide = static_cast<double>(depth) * unit_roundoff(accumulate_dtype(dtype));
  for (size_t i = 0; i < ref.size(); ++i)
    ASSERT_LE(std::abs(out[i] - ref[i]), u * stored[i] + wide * summed[i])
        << what << "[" << i << "] = " << out[i] << ", expected " << ref[i];
}

void expect_same_bits(const Vec& a, const Vec& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (size_t i = 0; i < a.size(); ++i)
    ASSERT_EQ(bits_of<uint64_t>(a[i]), bits_of<uint64_t>(b[i])) << what << "[" << i << "]: " << a[i] << " and " << b[i];
}

void OnTarget::SetUp() {
  const std::string reason = skip_reason(GetParam());
  if (!reason.empty()) GTEST_SKIP() << reason;
  trace_ =
      std::make_unique<testing::ScopedTrace>(__FILE__, __LINE__, "MORAINE_TEST_SEED=" + std::to_string(random.seed()));
}

}  // namespace moraine::kernels::test
