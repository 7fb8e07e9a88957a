#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include <fmt/format.h>

namespace moraine::core {

/// Process exit codes; part of the command line's interface (docs/formats.md).
enum ExitCode : int {
  kExitOk = 0,
  kExitUser = 2,       // the user can fix it: recipe, data, paths
  kExitIo = 3,         // the outside world failed: disk, peer, time-out
  kExitNumeric = 4,    // numbers went bad
  kExitInternal = 70,  // our bug
  kExitRequeue = 75,   // stopped by a signal after a good checkpoint: run the same line again
  kExitInterrupted = 130,
};

/// Base of every error Moraine throws: a message (what and where) and a hint (what to do next).
class Error : public std::runtime_error {
 public:
  Error(const std::string& message, std::string hint, ExitCode code)
      : std::runtime_error(message), hint_(std::move(hint)), code_(code) {}
  const std::string& hint() const { return hint_; }
  ExitCode exit_code() const { return code_; }

 private:
  std::string hint_;
  ExitCode code_;
};

/// The user can fix it: configuration, data, paths. Exit code 2.
struct UserError : Error {
  explicit UserError(const std::string& message, std::string hint = "") : Error(message, std::move(hint), kExitUser) {}
};
/// The outside world failed: disk full, file vanished. Exit code 3.
struct IoError : Error {
  explicit IoError(const std::string& message, std::string hint = "") : Error(message, std::move(hint), kExitIo) {}
};
/// A peer is gone or spoke nonsense. Exit code 3.
struct CommError : Error {
  explicit CommError(const std::string& message, std::string hint = "") : Error(message, std::move(hint), kExitIo) {}
};
/// A deadline passed. Exit code 3.
struct TimeoutError : Error {
  explicit TimeoutError(const std::string& message, std::string hint = "") : Error(message, std::move(hint), kExitIo) {}
};
/// Numbers went bad: NaN or Inf in a loss, a gradient, a contribution. Exit code 4.
struct NumericError : Error {
  explicit NumericError(const std::string& message, std::string hint = "")
      : Error(message, std::move(hint), kExitNumeric) {}
};
/// A good checkpoint was written because a signal asked to stop. Exit code 75.
struct StopRequested : Error {
  explicit StopRequested(const std::string& message)
      : Error(message, "run the same command again to continue", kExitRequeue) {}
};
/// Our bug. Exit code 70. Thrown by MORAINE_CHECK*.
struct InternalError : Error {
  explicit InternalError(const std::string& message)
      : Error(message, "this is a bug in Moraine: please report it with this message", kExitInternal) {}
};

[[noreturn]] void throw_check_failed(const char* file, int line, const char* condition, std::string_view message);

}  // namespace moraine::core

#define MORAINE_CHECK(condition, ...)                                                                                \
  do {                                                                                                               \
    if (!(condition)) ::moraine::core::throw_check_failed(__FILE__, __LINE__, #condition, fmt::format(__VA_ARGS__)); \
  } while (0)
#define MORAINE_CHECK_EQ(a, b)                                                                        \
  do {                                                                                                \
    const auto& moraine_check_a = (a);                                                                \
    const auto& moraine_check_b = (b);                                                                \
    if (!(moraine_check_a == moraine_check_b))                                                        \
      ::moraine::core::throw_check_failed(__FILE__, __LINE__, #a " == " #b,                           \
                                          fmt::format("{} vs {}", moraine_check_a, moraine_check_b)); \
  } while (0)
