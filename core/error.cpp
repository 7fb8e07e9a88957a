#include "core/error.h"

namespace moraine::core {

namespace {

// "core/file.cpp" out of the absolute path the compiler was given.
std::string_view folder_and_file(std::string_view path) {
  size_t slash = path.rfind('/');
  if (slash != std::string_view::npos && slash > 0) slash = path.rfind('/', slash - 1);
  return slash == std::string_view::npos ? path : path.substr(slash + 1);
}

}  // namespace

void throw_check_failed(const char* file, int line, const char* condition, std::string_view message) {
  throw InternalError(fmt::format("{}:{}: check failed: {}: {}", folder_and_file(file), line, condition, message));
}

}  // namespace moraine::core
