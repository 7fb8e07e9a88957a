#include "cli/output.h"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include "coordinator/report/text.h"
#include "core/terminal.h"

namespace moraine::cli {
namespace {

[[noreturn]] void fail(int error) {
  if (error == EPIPE) throw ReaderGone{};
  throw core::IoError(fmt::format("cli: standard output cannot be written: {}", std::strerror(error)),
                      "free space where it is redirected to, or redirect it elsewhere, and run the same command again");
}

}  // namespace

void prepare_output() {
  for (const int descriptor : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    // Read-only: writing a result there still fails. The lowest free number is the closed one.
    if (::fcntl(descriptor, F_GETFD) < 0 && errno == EBADF && ::open("/dev/null", O_RDONLY) < 0) _exit(core::kExitIo);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit then fails the write, with a message
}

void print(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(STDOUT_FILENO, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<size_t>(written));
    } else if (errno == EAGAIN) {  // whoever shares the terminal or pipe made it non-blocking
      pollfd ready{STDOUT_FILENO, POLLOUT, 0};
      ::poll(&ready, 1, -1);
    } else if (errno != EINTR) {
      fail(errno);
    }
  }
}

void print_json(const core::Json& document) {
  print(document.dump(2, ' ', false, core::Json::error_handler_t::replace) + "\n");
}

void close_output() {
  if (::close(STDOUT_FILENO) != 0 && errno != EBADF && errno != EINTR) fail(errno);
}

report::TableStyle table_style(size_t otherwise) {
  return {.width = core::terminal_width(STDOUT_FILENO, otherwise), .color = core::color_wanted(STDOUT_FILENO)};
}

int report_error(const core::Error& error, bool json) {
  std::string text;
  if (json) {
    const core::Json facts = {{"code", error.exit_code()}, {"message", error.what()}, {"hint", error.hint()}};
    text = core::Json{{"error", facts}}.dump(-1, ' ', false, core::Json::error_handler_t::replace) + "\n";
  } else {
    text = "moraine: " + report::printable(error.what(), true) + "\n";
    if (!error.hint().empty()) text += "  hint: " + report::printable(error.hint(), true) + "\n";
  }
  std::fputs(text.c_str(), stderr);
  return error.exit_code();
}

}  // namespace moraine::cli
