// Stands in for comm/nccl/ in builds without NCCL.
#include "comm/nccl/group.h"
#include "core/error.h"

namespace moraine::comm::nccl {

bool available() { return false; }

std::unique_ptr<Group> make_group(std::unique_ptr<Group>, int) {
  throw core::UserError("comm: this build of Moraine has no NCCL, which a group of processes needs to sum on GPUs",
                        "build with -DMORAINE_WITH_NCCL=ON (docs/clusters.md), or set workers.group_size=1");
}

}  // namespace moraine::comm::nccl
