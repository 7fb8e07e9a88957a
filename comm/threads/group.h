#pragma once

#include <memory>
#include <vector>

#include "comm/group.h"

namespace moraine::comm::threads {

/// A group whose members are threads of this process: element i belongs to the thread of member i. Destroying an
/// element is how a member leaves; the others notice at their next or current call.
std::vector<std::unique_ptr<Group>> make_group(int size);

}  // namespace moraine::comm::threads
