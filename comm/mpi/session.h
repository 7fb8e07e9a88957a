#pragma once

#include <chrono>
#include <memory>
#include <string>

namespace moraine::comm::mpi {

/// Whether this build speaks MPI.
bool available();

/// Whether a launcher (mpirun, srun) started this process, judged by the environment without initialising MPI. A binary
/// that finds false runs alone.
bool launched();

/// MPI for the lifetime of one process; at most one object. The death of any process of the job ends the job, and a
/// process whose launcher dies is killed by the kernel (PR_SET_PDEATHSIG), also when mpirun itself got SIGKILL.
/// Create it on the main thread before other threads, destroy it after the channel. Destroying it finalises, which
/// waits for the other processes; destroying it while an exception passes aborts the job instead of waiting for ever.
class Session {
 public:
  /// Throws UserError if this build has no MPI, CommError if MPI cannot start.
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  int index() const { return index_; }  // process index; 0 is the coordinator
  int size() const { return size_; }
  const std::string& host() const { return host_; }
  /// Place of this process among the working processes of its host, from 0: which of the host's GPUs is its own. The
  /// coordinator does not count (-1), wherever it runs.
  int local_worker() const { return local_worker_; }
  /// The last call of every process that ends in order: waits for the others' leave(). Process 0 has told them to end
  /// and waits `deadline` at most, then ends the job with `exit_code`; the others wait for process 0, which ends it.
  void leave(int exit_code, std::chrono::seconds deadline);
  /// Ends every process of the job at once; mpirun exits with `exit_code`.
  [[noreturn]] void abort(int exit_code);

 private:
  int index_ = 0;
  int size_ = 1;
  int local_worker_ = 0;
  std::string host_;
  [[maybe_unused]] int exceptions_at_start_ = 0;  // unused without MPI
};

}  // namespace moraine::comm::mpi
