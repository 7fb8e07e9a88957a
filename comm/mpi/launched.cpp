#include <cstdlib>

#include "comm/mpi/session.h"

namespace moraine::comm::mpi {

bool launched() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (std::getenv(name) != nullptr) return true;
  }
  return false;
}

}  // namespace moraine::comm::mpi
