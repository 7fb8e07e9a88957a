#pragma once

#include <memory>
#include <vector>

#include "comm/channel.h"

namespace moraine::comm::local {

/// The endpoints of one coordinator and its workers in one process, each for a thread of its own. Payloads are shared,
/// not copied. Destroying an endpoint is how a peer leaves.
struct Star {
  std::unique_ptr<Channel> coordinator;
  std::vector<std::unique_ptr<Channel>> workers;  // workers[i] is the coordinator's peer i + 1
};
Star make_star(int num_workers);

}  // namespace moraine::comm::local
