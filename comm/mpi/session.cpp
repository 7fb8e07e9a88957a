#include "comm/mpi/session.h"

#include <csignal>
#include <cstdlib>
#include <exception>
#include <thread>

#include <sys/prctl.h>
#include <unistd.h>

#include <mpi.h>

#include "core/error.h"
#include "core/log.h"

namespace moraine::comm::mpi {

namespace {

constexpr std::chrono::milliseconds kNap{10};

// MPI orders the processes of a host by their index in the job, so the coordinator is the first of its host.
int place_on_host(int index) {
  MPI_Comm host = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, index, MPI_INFO_NULL, &host);
  int place = 0, first = index;
  MPI_Comm_rank(host, &place);
  MPI_Bcast(&first, 1, MPI_INT, 0, host);
  MPI_Comm_free(&host);
  return first == 0 ? place - 1 : place;
}

}  // namespace

bool available() { return true; }

Session::Session() : exceptions_at_start_(std::uncaught_exceptions()) {
  if (launched()) {
    // Open MPI notices a dead launcher by itself only while its own threads get to run. The signal is for deaths from
    // now on; a launcher that died before this line makes MPI_Init fail.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
  }
  int provided = MPI_THREAD_SINGLE;
  if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS) {
    throw core::CommError("comm/mpi: MPI cannot start", "run without mpirun, or check the launcher's messages above");
  }
  if (provided < MPI_THREAD_SERIALIZED) {
    throw core::CommError(
        fmt::format("comm/mpi: MPI offers thread level {}, needed is {}", provided, MPI_THREAD_SERIALIZED),
        "use an Open MPI built with thread support");
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_rank(MPI_COMM_WORLD, &index_);
  MPI_Comm_size(MPI_COMM_WORLD, &size_);
  local_worker_ = place_on_host(index_);
  char name[MPI_MAX_PROCESSOR_NAME] = {};
  int length = 0;
  MPI_Get_processor_name(name, &length);
  host_.assign(name, static_cast<size_t>(length));
}

Session::~Session() {
  if (std::uncaught_exceptions() > exceptions_at_start_) MPI_Abort(MPI_COMM_WORLD, core::kExitInternal);
  MPI_Finalize();
}

void Session::leave(int exit_code, std::chrono::seconds deadline) {
  const auto end = std::chrono::steady_clock::now() + deadline;
  MPI_Request others = MPI_REQUEST_NULL;
  if (MPI_Ibarrier(MPI_COMM_WORLD, &others) != MPI_SUCCESS) return;
  for (int there = 0; MPI_Test(&others, &there, MPI_STATUS_IGNORE) == MPI_SUCCESS && there == 0;) {
    if (index_ == 0 && std::chrono::steady_clock::now() >= end) {
      core::log::error("some processes do not end, the job is aborted: waited_s={}", deadline.count());
      abort(exit_code);
    }
    std::this_thread::sleep_for(kNap);
  }
}

void Session::abort(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace moraine::comm::mpi
