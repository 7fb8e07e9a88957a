#pragma once

#include <string>
#include <vector>

namespace moraine::kernels {

/// What this processor says it is. Under virtualisation that is what the hypervisor lets it say.
struct Processor {
  std::string vendor;                         // "GenuineIntel", "AuthenticAMD", ...
  int family = 0, model = 0;                  // with the extended parts added, as in /proc/cpuinfo
  std::string name;                           // brand string, for people
  std::vector<std::string> instruction_sets;  // of those that make a difference to arithmetic: "avx2", "avx512f", ...
};

/// Asked once; thread-safe.
const Processor& processor();

}  // namespace moraine::kernels
