#pragma once

#include <string>
#include <string_view>

#include "core/config.h"
#include "core/json.h"

/// Which instructions compute. Together with the thread count and the size of the group that is what the bits of a
/// result depend on: vectors of another width, or another library's way through a product, sum in another order.
///
/// `portable`: one arithmetic for every x86-64 processor with AVX2, FMA and F16C, whoever made it. ATen's AVX2 kernels,
/// MKL's AVX2 branch under its conditional numerical reproducibility, our AVX2 kernels, no oneDNN (which blocks its
/// sums by the sizes of caches). What it costs where there is more than AVX2: docs/results/arithmetic.md.
///
/// `native`: every library takes what it takes for the best on this processor. Bits are then those of a model of
/// processor, and a run records which: "native GenuineIntel-6-207 avx512_bf16".
namespace moraine::algorithms {

inline constexpr std::string_view kPortable = "portable", kNative = "native";

/// The name of native arithmetic here: vendor, family and model of the processor, our kernels' instruction family and
/// every environment variable by which the user narrows the libraries' choice.
std::string native_arithmetic();

/// Whether `value` can stand in workers.arithmetic: portable, native, or a name that native_arithmetic() gave
/// somewhere.
bool names_arithmetic(std::string_view value);

/// Puts the name of native arithmetic where workers.arithmetic is `native` or missing, so that plans and the records of
/// a run hold what computes. A name of another machine's native arithmetic is a problem.
void name_arithmetic(core::ConfigNode& recipe, core::Problems& problems);

/// Makes the whole process compute that way, for good. `name` is portable, native or this machine's native name. Call
/// it before the first tensor operation and before other threads start; again only with the same arithmetic. Throws
/// UserError when this processor, its LibTorch or what the process has computed already does not allow it. Thread-safe.
void use_arithmetic(const std::string& name);

/// What this machine has and what each library chose: {"processor", "instruction_sets", "aten", "kernels", "mkl",
/// "onednn", "native", "portable"}, all texts, for people and tools. Settles ATen's choice, so use_arithmetic() comes
/// before it.
core::Json arithmetic_facts();

}  // namespace moraine::algorithms
