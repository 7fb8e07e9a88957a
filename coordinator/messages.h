#pragma once

#include <string>
#include <vector>

#include "comm/channel.h"
#include "coordinator/core.h"
#include "core/metrics.h"

namespace moraine::coordinator {

/// What a worker's message means to the state machine. A result whose bytes are damaged or whose numbers are not finite
/// becomes a failure of its attempt. Throws core::Json::exception or UserError if the message is malformed.
Event event_from(const comm::Envelope& envelope);

/// The records of a kMetrics message; values that are not finite (null in JSON) are left out.
std::vector<core::metrics::Record> metrics_from(const core::Json& body);

}  // namespace moraine::coordinator
