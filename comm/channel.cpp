#include "comm/channel.h"

#include "core/error.h"

namespace moraine::comm {

std::string control_text(const Message& message) {
  // Texts of failures may hold any bytes.
  std::string text = message.body.dump(-1, ' ', false, core::Json::error_handler_t::replace);
  MORAINE_CHECK(text.size() <= kMaxControlBytes, "comm: control part is too long: type={} bytes={} limit={}",
                static_cast<int>(message.type), text.size(), kMaxControlBytes);
  return text;
}

}  // namespace moraine::comm
