#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace moraine::fuzz {

/// What a command of the `moraine` program came to.
struct Outcome {
  int exit_code = 0;
  std::string output, errors;  // standard output and standard error
};

/// Runs `moraine ARGUMENTS...` inside this process, which saves the quarter of a second that a start costs. Standard
/// output and error go to files meanwhile. Not thread-safe.
Outcome moraine(const std::vector<std::string>& arguments);

/// Keeps whatever asks for much more memory than a spoilt file can be worth from getting it: address space from now on
/// may grow by this many bytes. Without effect under a sanitizer, which reserves terabytes.
void limit_memory(uint64_t bytes);

/// How many mutations a test feeds: `usual`, times MORAINE_TEST_FUZZ_FACTOR (default 1).
uint64_t rounds(uint64_t usual);
/// The first seed: MORAINE_TEST_FUZZ_SEED, or 1. Seed s of a test is the same mutation whatever the rounds.
uint64_t first_seed();

/// Names what is going on for the message of a crash or of `seconds` without an end, after which the process aborts.
void watch(const std::string& what, unsigned seconds = 120);

/// The judge of one test: every command on a spoilt file has to end with 0, 2 or 3 (eval also with 4: weights
/// may be NaN), and say something unless it is 0.
/// What does not is reported with its seed, and its files are kept; after ten findings (MORAINE_TEST_FUZZ_FINDINGS) a
/// test gives up.
class Judge {
 public:
  explicit Judge(std::string test) : test_(std::move(test)) {}

  /// Runs the command and judges it. `spoilt` is the file or directory to keep. Returns the exit code.
  int command(uint64_t seed, const std::filesystem::path& spoilt, const std::vector<std::string>& arguments);
  /// Notes a finding of another kind.
  void find(uint64_t seed, const std::filesystem::path& spoilt, const std::string& what);
  bool has_enough() const;

 private:
  std::string test_;
  uint64_t findings_ = 0;
};

}  // namespace moraine::fuzz
