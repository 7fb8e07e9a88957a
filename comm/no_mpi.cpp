// Stands in for comm/mpi/ in builds without MPI.
#include <cstdlib>

#include "comm/mpi/channel.h"
#include "comm/mpi/group.h"
#include "core/error.h"

namespace moraine::comm::mpi {

bool available() { return false; }

Session::Session() {
  throw core::UserError(
      "comm: this build of Moraine has no MPI",
      "install Open MPI's development files and build with -DMORAINE_WITH_MPI=ON, or run without mpirun");
}

Session::~Session() = default;

void Session::leave(int, std::chrono::seconds) {}

void Session::abort(int exit_code) { std::_Exit(exit_code); }

std::unique_ptr<Channel> open_channel(const Session&, int, size_t) {
  throw core::InternalError("comm: a channel was asked for without a session");
}

std::unique_ptr<Group> make_group(const Session&, int) {
  throw core::InternalError("comm: a group was asked for without a session");
}

}  // namespace moraine::comm::mpi
