#pragma once

#include <memory>

#include "comm/group.h"

namespace moraine::comm::nccl {

/// Whether this build speaks NCCL.
bool available();

/// `control`'s group with sums of CUDA memory of device `device` over NCCL; everything else goes over `control`. The
/// communicator is made at the first sum: member 0 makes its id and broadcasts it over `control`. renew() aborts it and
/// the next sum makes a new one. A member that gives up or is gone is noticed through `control` while a sum is waited
/// for, and the communicator is aborted then, so no kernel waits for ever.
///
/// The order of adding is NCCL's, the same for one machine, group size and NCCL version: its ring is asked for
/// (NCCL_ALGO, unless the environment says otherwise), and its bits are not those of mpi/ and threads/. Throws
/// UserError if this build has no NCCL.
std::unique_ptr<Group> make_group(std::unique_ptr<Group> control, int device);

}  // namespace moraine::comm::nccl
