#pragma once

#include <memory>

#include "comm/group.h"

namespace moraine::comm::local {

/// A group of one: every collective is done at once.
std::unique_ptr<Group> make_group();

}  // namespace moraine::comm::local
