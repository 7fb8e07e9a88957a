#include <gtest/gtest.h>

#include <cstdlib>

#include "comm/mpi/session.h"
#include "core/error.h"

namespace moraine::comm {
namespace {

TEST(NoMpi, SaysHowToGetMpiInsteadOfRunningAlone) {
  EXPECT_FALSE(mpi::available());
  ASSERT_EQ(setenv("OMPI_COMM_WORLD_SIZE", "3", 1), 0);
  EXPECT_TRUE(mpi::launched());
  unsetenv("OMPI_COMM_WORLD_SIZE");
  try {
    mpi::Session session;
    FAIL() << "a session without MPI";
  } catch (const core::UserError& error) {
    EXPECT_NE(error.hint().find("MORAINE_WITH_MPI"), std::string::npos) << error.hint();
  }
}

}  // namespace
}  // namespace moraine::comm
