#include "python_peer.h"

#include <cstdio>
#include <filesystem>

#include <fmt/format.h>
#include <gtest/gtest.h>

namespace moraine::core {

namespace {

const std::string kPython = MORAINE_SOURCE_DIR "/.venv/bin/python";

int run_shell(const std::string& command, std::string& output) {
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) return -1;
  char buffer[4096];
  while (const size_t count = std::fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, count);
  return ::pclose(pipe);
}

}  // namespace

std::optional<std::string> PythonPeer::missing(const std::string& module) {
  if (!std::filesystem::exists(kPython)) return fmt::format("no {}: run scripts/setup", kPython);
  std::string output;
  if (run_shell(fmt::format("'{}' -c 'import numpy, {}' 2>&1", kPython, module), output) == 0) return std::nullopt;
  return fmt::format("{} lacks numpy or {}: .venv/bin/pip install numpy {}", kPython, module, module);
}

std::string PythonPeer::run(const std::string& verb, const std::string& path) {
  std::string output;
  const int status = run_shell(
      fmt::format("'{}' {}/tests/core/peer_formats.py {} '{}' 2>&1", kPython, MORAINE_SOURCE_DIR, verb, path), output);
  EXPECT_EQ(status, 0) << verb << " failed:\n" << output;
  return output;
}

}  // namespace moraine::core
