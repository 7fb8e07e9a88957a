#include "kernels/processor.h"

#include <array>
#include <cstring>

#include <cpuid.h>

namespace moraine::kernels {
namespace {

using Registers = std::array<unsigned, 4>;  // eax, ebx, ecx, edx

Registers cpuid(unsigned leaf) {
  Registers r{};
  __get_cpuid(leaf, &r[0], &r[1], &r[2], &r[3]);  // leaves zeros where the leaf does not exist
  return r;
}

std::string text_of(const unsigned* words, size_t count) {
  std::string text(count * sizeof(unsigned), '\0');
  std::memcpy(text.data(), words, text.size());
  return text.c_str();  // up to the first zero
}

std::string brand() {
  std::string name;
  for (const unsigned leaf : {0x80000002u, 0x80000003u, 0x80000004u}) name += text_of(cpuid(leaf).data(), 4);
  const size_t first = name.find_first_not_of(' ');
  return first == std::string::npos ? "unknown" : name.substr(first, name.find_last_not_of(' ') - first + 1);
}

std::vector<std::string> instruction_sets() {
  __builtin_cpu_init();
  std::vector<std::string> sets;
  const auto note = [&](const char* name, int there) {
    if (there != 0) sets.emplace_back(name);
  };
  note("sse4.2", __builtin_cpu_supports("sse4.2"));
  note("avx", __builtin_cpu_supports("avx"));
  note("avx2", __builtin_cpu_supports("avx2"));
  note("fma", __builtin_cpu_supports("fma"));
  note("f16c", __builtin_cpu_supports("f16c"));
  note("avx512f", __builtin_cpu_supports("avx512f"));
  note("avx512bw", __builtin_cpu_supports("avx512bw"));
  note("avx512vl", __builtin_cpu_supports("avx512vl"));
  note("avx512dq", __builtin_cpu_supports("avx512dq"));
  note("avx512vnni", __builtin_cpu_supports("avx512vnni"));
  note("avx512bf16", __builtin_cpu_supports("avx512bf16"));
  return sets;
}

Processor ask() {
  Processor p;
  const Registers first = cpuid(0);
  const unsigned letters[] = {first[1], first[3], first[2]};
  p.vendor = text_of(letters, 3);
  const unsigned signature = cpuid(1)[0];
  p.family = static_cast<int>((signature >> 8) & 0xf);
  p.model = static_cast<int>((signature >> 4) & 0xf);
  if (p.family == 6 || p.family == 15) p.model += static_cast<int>((signature >> 16) & 0xf) << 4;
  if (p.family == 15) p.family += static_cast<int>((signature >> 20) & 0xff);
  p.name = brand();
  p.instruction_sets = instruction_sets();
  return p;
}

}  // namespace

const Processor& processor() {
  static const Processor known = ask();
  return known;
}

}  // namespace moraine::kernels
