#include "worker/fault.h"

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <new>

#include "core/error.h"
#include "core/log.h"

namespace moraine::worker {

Faults Faults::parse(std::string_view text) {
  Faults faults;
  while (!text.empty()) {
    const std::string_view item = text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), item.size() + 1));
    const size_t at = item.find('@'), colon = item.rfind(':');
    int64_t number = 0;
    const bool shaped = at != std::string_view::npos && colon != std::string_view::npos && at < colon;
    if (shaped) std::from_chars(item.data() + colon + 1, item.data() + item.size(), number);
    const std::string kind(item.substr(0, shaped ? at : 0));
    if (number < 1 || (kind != "throw" && kind != "memory" && kind != "nan" && kind != "exit" && kind != "member")) {
      throw core::UserError(
          fmt::format("worker: MORAINE_FAULT has an item that cannot be read: '{}'", item),
          "write throw@LABEL:N, memory@LABEL:N, nan@LABEL:N, exit@LABEL:N or member@LABEL:N, separated by commas");
    }
    faults.faults_.push_back({kind, std::string(item.substr(at + 1, colon - at - 1)), number});
  }
  return faults;
}

Faults Faults::from_environment() {
  const char* text = std::getenv("MORAINE_FAULT");
  if (text == nullptr || *text == '\0') return {};
  core::log::warn("failures will be injected: MORAINE_FAULT={}", text);
  return parse(text);
}

void Faults::at_start(const std::string& label, int64_t attempt) const {
  for (const Fault& fault : faults_) {
    if (fault.label != label || attempt > fault.number) continue;
    if (fault.kind == "throw")
      throw core::IoError(fmt::format("injected failure of unit {} in attempt {}", label, attempt));
    if (fault.kind == "memory") throw std::bad_alloc();
  }
}

bool Faults::nan_loss(const std::string& label, int64_t attempt) const {
  for (const Fault& fault : faults_) {
    if (fault.kind == "nan" && fault.label == label && attempt <= fault.number) return true;
  }
  return false;
}

void Faults::after_step(const std::string& label, int64_t step, bool leads) const {
  for (const Fault& fault : faults_) {
    const bool dies = fault.kind == "exit" || (fault.kind == "member" && !leads);
    if (dies && fault.label == label && step == fault.number) std::raise(SIGKILL);
  }
}

}  // namespace moraine::worker
