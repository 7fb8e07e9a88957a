#pragma once

#include <cstddef>
#include <memory>

#include "comm/group.h"
#include "comm/mpi/session.h"

namespace moraine::comm::mpi {

/// This process's place in the group of its worker: of the processes 1, 2, ... each `size` consecutive ones are one
/// worker, the first of them member 0. Nothing collective happens here; process 0, which coordinates, has no group.
/// Members are told apart by process index and a tag of their own on MPI_COMM_WORLD, so no sub-communicator is needed
/// and a member that never comes is noticed by a deadline. A dead process ends the job.
std::unique_ptr<Group> make_group(const Session& session, int size);

}  // namespace moraine::comm::mpi
