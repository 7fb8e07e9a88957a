#include "algorithms/arithmetic.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <dlfcn.h>

#include "core/error.h"
#include "kernels/processor.h"
#include "kernels/types.h"

namespace moraine::algorithms {
namespace {

std::atomic<bool> one_mkl_for_all{false};

}  // namespace
}  // namespace moraine::algorithms

/// MKL asks this of itself, and gives its AVX2 branch only to processors it takes for Intel's; the instructions are the
/// same on all. Defined in the program, it comes before MKL's own. Where LibTorch's MKL does not ask, nobody calls it,
/// and use_arithmetic() says that the branch cannot be had.
extern "C" __attribute__((visibility("default"))) int mkl_serv_intel_cpu_true() {
  using namespace moraine;
  return algorithms::one_mkl_for_all || kernels::processor().vendor == "GenuineIntel" ? 1 : 0;
}

namespace moraine::algorithms {
namespace {

constexpr int kMklAvx2 = 10;  // MKL_CBWR_AVX2 of mkl_service.h
constexpr const char* kNativeHint = "set workers.arithmetic=native; results are then those of this model of processor";

// What narrows the libraries' own choice.
constexpr std::array kNarrowing = {"ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA",        "MKL_CBWR",
                                   "MKL_DEBUG_CPU_TYPE",  "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA"};

using MklFunction = int (*)(int);

// By name, because a LibTorch without MKL has no such functions.
MklFunction mkl_function(const char* name) { return reinterpret_cast<MklFunction>(dlsym(RTLD_DEFAULT, name)); }

[[noreturn]] void cannot(const std::string& why) {
  throw core::UserError("arithmetic: portable arithmetic cannot be had: " + why, kNativeHint);
}

void check_portable() {
  if (!kernels::path_available(kernels::Path::kAvx2)) cannot("this processor has no AVX2, FMA and F16C");
  if (!at::Context::hasMKL() || mkl_function("mkl_serv_cbwr_set") == nullptr)
    cannot("this LibTorch does not have the MKL of the PyPI wheels");
}

void use_portable() {
  check_portable();
  for (const char* name : kNarrowing) unsetenv(name);
  setenv("ATEN_CPU_CAPABILITY", "avx2", /*overwrite=*/1);  // ATen reads it at its first operation
  if (at::get_cpu_capability() != "AVX2")
    cannot("the process has computed with " + at::get_cpu_capability() + " already");
  one_mkl_for_all = true;
  const MklFunction get = mkl_function("mkl_serv_cbwr_get");
  if (mkl_function("mkl_serv_cbwr_set")(kMklAvx2) != 0 || get == nullptr || get(-1) != kMklAvx2)
    cannot("MKL refuses its AVX2 branch, on this processor or because it has computed already");
  at::globalContext().setUserEnabledMkldnn(false);
  kernels::limit_path(kernels::Path::kAvx2);
}

void use_native(const std::string& name) {
  if (name == native_arithmetic()) return;
  throw core::UserError(
      fmt::format("arithmetic: this machine's arithmetic is another: here '{}', wanted '{}'", native_arithmetic(),
                  name),
      "set workers.arithmetic=portable to compute alike on different processors, or use machines of one kind");
}

std::string mkl_branch() {
  const MklFunction get = mkl_function("mkl_serv_cbwr_get");
  if (!at::Context::hasMKL() || get == nullptr) return "absent";
  const int branch = get(1);
  if (branch == kMklAvx2) return "AVX2, reproducible";
  return branch <= 2 ? "its own choice" : fmt::format("branch {} by MKL_CBWR", branch);
}

std::string portable_here() {
  try {
    check_portable();
    return "available: AVX2 everywhere";
  } catch (const core::UserError& error) {
    return error.what();
  }
}

}  // namespace

std::string native_arithmetic() {
  const kernels::Processor& p = kernels::processor();
  std::string name =
      fmt::format("{} {}-{}-{} {}", kNative, p.vendor, p.family, p.model, kernels::path_name(kernels::best_path()));
  for (const char* variable : kNarrowing)
    if (const char* value = std::getenv(variable); value != nullptr && *value != '\0')
      name += fmt::format(" {}={}", variable, value);
  return name;
}

bool names_arithmetic(std::string_view value) {
  return value == kPortable || value == kNative || value.starts_with(std::string(kNative) + " ");
}

void name_arithmetic(core::ConfigNode& recipe, core::Problems& problems) {
  const auto member = [](core::ConfigNode& map, const char* key, core::ConfigNode::Kind kind) -> core::ConfigNode& {
    for (auto& [name, node] : map.members)
      if (name == key) return node;
    map.member_origins.push_back("default");
    return map.members.emplace_back(key, core::ConfigNode{.kind = kind}).second;
  };
  if (recipe.kind != core::ConfigNode::Kind::kMap) return;
  core::ConfigNode& workers = member(recipe, "workers", core::ConfigNode::Kind::kMap);
  if (workers.kind != core::ConfigNode::Kind::kMap) return;
  core::ConfigNode& value = member(workers, "arithmetic", core::ConfigNode::Kind::kScalar);
  if (value.kind != core::ConfigNode::Kind::kScalar) return;
  const std::string here = native_arithmetic();
  if (value.text.empty() || value.text == kNative) {
    value.text = here;
    value.quoted = true;
  } else if (value.text != kPortable && names_arithmetic(value.text) && value.text != here) {
    problems.add(value.origin, "workers.arithmetic", fmt::format("this machine's is '{}'", here),
                 "portable computes alike on different processors");
  }
}

void use_arithmetic(const std::string& name) {
  static std::mutex mutex;
  static std::string in_use;
  const std::lock_guard lock(mutex);
  const std::string wanted = name == kNative && in_use.empty() ? native_arithmetic() : name;
  if (wanted == in_use || (wanted == kNative && in_use != kPortable)) return;
  if (!in_use.empty())
    throw core::UserError(
        fmt::format("arithmetic: this process computes with '{}' and cannot change to '{}'", in_use, wanted),
        "start another process for it");
  if (wanted == kPortable)
    use_portable();
  else
    use_native(wanted);
  in_use = wanted;
}

core::Json arithmetic_facts() {
  const kernels::Processor& p = kernels::processor();
  return {
      {"processor", p.name},
      {"instruction_sets", fmt::format("{}", fmt::join(p.instruction_sets, " "))},
      {"aten", at::get_cpu_capability()},
      {"kernels", kernels::path_name(kernels::best_path())},
      {"mkl", mkl_branch()},
      {"onednn", at::globalContext().userEnabledMkldnn() && at::Context::hasMKLDNN() ? "its own choice" : "not used"},
      {"native", native_arithmetic()},
      {"portable", portable_here()}};
}

}  // namespace moraine::algorithms
