#pragma once

#include <optional>
#include <string>

namespace moraine::core {

/// Runs tests/core/peer_formats.py, which reads and writes our formats with the reference Python libraries.
struct PythonPeer {
  /// Why it cannot run here (no interpreter, no module); nullopt when it can.
  static std::optional<std::string> missing(const std::string& module);
  /// Standard output of `peer_formats.py verb path`; a test failure when it does not exit with 0.
  static std::string run(const std::string& verb, const std::string& path);
};

}  // namespace moraine::core
