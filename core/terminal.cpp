#include "core/terminal.h"

#include <cstdlib>
#include <string_view>

#include <sys/ioctl.h>
#include <unistd.h>

namespace moraine::core {

namespace {

bool g_distrusted = false;

std::string_view environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

void distrust_terminals() { g_distrusted = true; }

bool is_terminal(int descriptor) {
  const std::string_view term = environment("TERM");
  return !g_distrusted && !term.empty() && term != "dumb" && ::isatty(descriptor) == 1;
}

bool color_wanted(int descriptor) {
  if (!environment("NO_COLOR").empty()) return false;
  if (const auto force = environment("CLICOLOR_FORCE"); !force.empty() && force != "0") return true;
  return environment("CLICOLOR") != "0" && is_terminal(descriptor);
}

size_t terminal_width(int descriptor, size_t otherwise) {
  winsize size{};
  if (g_distrusted || ::isatty(descriptor) != 1 || ::ioctl(descriptor, TIOCGWINSZ, &size) != 0 || size.ws_col == 0)
    return otherwise;
  return size.ws_col;
}

}  // namespace moraine::core
