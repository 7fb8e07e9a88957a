#include "tests/fuzz/command.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "cli/command.h"
#include "core/error.h"

// cli/main.cpp, compiled under this name.
int moraine_main(int argc, char** argv);

namespace moraine::fuzz {
namespace {

namespace fs = std::filesystem;

std::array<char, 1024> watched{};
int true_errors = STDERR_FILENO;  // standard error while a command has it redirected

void speak_and_die(int signal) {
  const auto say = [](const char* text) {
    if (::write(true_errors, text, std::strlen(text)) < 0) return;
  };
  say(signal == SIGALRM ? "\nfuzz: without an end: " : "\nfuzz: crashed: ");
  say(watched.data());
  say("\n");
  std::signal(signal, SIG_DFL);
  std::raise(signal == SIGALRM ? SIGABRT : signal);
}

// Standard output or error as a file, until the end of the scope.
class Redirected {
 public:
  Redirected(int descriptor, std::FILE* stream) : descriptor_(descriptor), stream_(stream), file_(std::tmpfile()) {
    MORAINE_CHECK(file_ != nullptr, "no temporary file");
    std::fflush(stream_);
    kept_ = ::fcntl(descriptor_, F_DUPFD_CLOEXEC, 3);
    ::dup2(::fileno(file_), descriptor_);
  }
  ~Redirected() {
    std::fclose(file_);
    ::close(kept_);
  }
  Redirected(const Redirected&) = delete;
  Redirected& operator=(const Redirected&) = delete;

  int kept() const { return kept_; }
  std::string take() {
    std::fflush(stream_);
    ::dup2(kept_, descriptor_);
    std::string text(static_cast<size_t>(::lseek(::fileno(file_), 0, SEEK_END)), '\0');
    const ssize_t read = ::pread(::fileno(file_), text.data(), text.size(), 0);
    text.resize(read < 0 ? 0 : static_cast<size_t>(read));
    return text;
  }

 private:
  int descriptor_;
  std::FILE* stream_;
  std::FILE* file_;
  int kept_;
};

uint64_t number_from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

fs::path keep(const fs::path& spoilt, const std::string& test, uint64_t seed) {
  const fs::path kept = fs::path(MORAINE_FINDINGS) / fmt::format("{}-{}", test, seed) / spoilt.filename();
  fs::remove_all(kept.parent_path());
  fs::create_directories(kept.parent_path());
  if (fs::exists(spoilt)) fs::copy(spoilt, kept, fs::copy_options::recursive);
  return kept;
}

}  // namespace

Outcome moraine(const std::vector<std::string>& arguments) {
  std::vector<std::string> words = {"moraine"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> pointers;
  for (auto& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  cli::g_signals = 0;
  Redirected output(STDOUT_FILENO, stdout), errors(STDERR_FILENO, stderr);
  true_errors = errors.kept();
  Outcome outcome;
  outcome.exit_code = moraine_main(static_cast<int>(words.size()), pointers.data());
  outcome.errors = errors.take();
  outcome.output = output.take();
  true_errors = STDERR_FILENO;
  return outcome;
}

void limit_memory(uint64_t bytes) {
#ifndef __SANITIZE_ADDRESS__
  uint64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  const rlim_t most = pages * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)) + bytes;
  const rlimit limit{most, RLIM_INFINITY};
  MORAINE_CHECK_EQ(::setrlimit(RLIMIT_AS, &limit), 0);
#else
  static_cast<void>(bytes);
#endif
}

uint64_t rounds(uint64_t usual) { return usual * number_from_environment("MORAINE_TEST_FUZZ_FACTOR", 1); }

uint64_t first_seed() { return number_from_environment("MORAINE_TEST_FUZZ_SEED", 1); }

void watch(const std::string& what, unsigned seconds) {
  std::strncpy(watched.data(), what.c_str(), watched.size() - 1);
  static std::array<char, 1 << 16> stack;  // of the handler's own: a crash may be an overflow of the usual one
  const stack_t own = {stack.data(), 0, stack.size()};
  ::sigaltstack(&own, nullptr);
  struct sigaction action = {};
  action.sa_handler = speak_and_die;
  action.sa_flags = SA_ONSTACK;
  for (const int signal : {SIGALRM, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) ::sigaction(signal, &action, nullptr);
  ::alarm(seconds);
}

int Judge::command(uint64_t seed, const fs::path& spoilt, const std::vector<std::string>& arguments) {
  watch(fmt::format("{}, seed {}: moraine {}", test_, seed, fmt::join(arguments, " ")));
  const Outcome outcome = moraine(arguments);
  ::alarm(0);
  const bool not_finite = outcome.exit_code == core::kExitNumeric && arguments.front() == "eval";
  const bool allowed = outcome.exit_code == core::kExitOk || outcome.exit_code == core::kExitUser ||
                       outcome.exit_code == core::kExitIo || not_finite;
  const bool out_of_memory = outcome.errors.find("out of memory") != std::string::npos;
  if (!allowed || out_of_memory ||
      (outcome.exit_code != core::kExitOk && outcome.errors.empty() && outcome.output.empty()))
    find(seed, spoilt,
         fmt::format("moraine {}: exit code {}\n{}", fmt::join(arguments, " "), outcome.exit_code,
                     outcome.errors.substr(0, 2000)));
  return outcome.exit_code;
}

bool Judge::has_enough() const { return findings_ >= number_from_environment("MORAINE_TEST_FUZZ_FINDINGS", 10); }

void Judge::find(uint64_t seed, const fs::path& spoilt, const std::string& what) {
  ++findings_;
  ADD_FAILURE() << test_ << ", seed " << seed << ": " << what << "\nkept: " << keep(spoilt, test_, seed).string();
}

}  // namespace moraine::fuzz
