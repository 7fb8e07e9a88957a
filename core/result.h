#pragma once

#include <optional>
#include <string>
#include <utility>

namespace moraine::core {

/// Why an ordinary operation failed, outermost reason first.
struct Failure {
  std::string message;
};

/// Value or Failure, for code where failure is an ordinary outcome (a peer left, an optional file is missing).
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}              // NOLINT(google-explicit-constructor)
  Result(Failure failure) : failure_(std::move(failure)) {}  // NOLINT(google-explicit-constructor)
  bool ok() const { return value_.has_value(); }
  T& value() { return *value_; }
  const T& value() const { return *value_; }
  const std::string& error() const { return failure_.message; }
  /// Adds an outer reason in front of the failure.
  Failure because(const std::string& context) const { return {context + ": " + failure_.message}; }

 private:
  std::optional<T> value_;
  Failure failure_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Failure failure) : failed_(true), failure_(std::move(failure)) {}  // NOLINT(google-explicit-constructor)
  bool ok() const { return !failed_; }
  const std::string& error() const { return failure_.message; }
  Failure because(const std::string& context) const { return {context + ": " + failure_.message}; }

 private:
  bool failed_ = false;
  Failure failure_;
};

}  // namespace moraine::core
