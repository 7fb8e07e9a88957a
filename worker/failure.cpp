#include "worker/failure.h"

#include <new>
#include <system_error>

#include <c10/util/Exception.h>

#include "core/error.h"

namespace moraine::worker {
namespace {

constexpr size_t kMaxFailureText = 4096;

std::string first_line(const std::string& text) { return text.substr(0, std::min(text.find('\n'), kMaxFailureText)); }

}  // namespace

FailureReport describe_current_exception() {
  const char* memory_hint = "lower train.micro_batch_size, or run fewer workers on this host";
  try {
    throw;
  } catch (const core::Error& error) {
    const char* kind = error.exit_code() == core::kExitUser      ? "user"
                       : error.exit_code() == core::kExitIo      ? "io"
                       : error.exit_code() == core::kExitNumeric ? "numeric"
                                                                 : "internal";
    return {kind, std::string(error.what()).substr(0, kMaxFailureText), error.hint()};
  } catch (const std::bad_alloc&) {
    return {"memory", "out of memory", memory_hint};
  } catch (const c10::Error& error) {
    // The CPU allocator reports exhaustion as a plain Error.
    const std::string text = first_line(error.what_without_backtrace());
    const bool memory = dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr ||
                        text.find("DefaultCPUAllocator") != std::string::npos;
    if (memory) return {"memory", text, memory_hint};
    return {"internal", text, "this is a bug in Moraine: please report it with this message"};
  } catch (const std::system_error& error) {
    return {"io", first_line(error.what()), "check disk, permissions and limits of this host"};
  } catch (const std::exception& error) {
    return {"internal", first_line(error.what()), "this is a bug in Moraine: please report it with this message"};
  } catch (...) {
    return {"internal", "something that is no std::exception was thrown",
            "this is a bug in Moraine: please report it with this message"};
  }
}

}  // namespace moraine::worker
