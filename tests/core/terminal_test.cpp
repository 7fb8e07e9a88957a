#include "core/terminal.h"

#include <cstdlib>
#include <map>
#include <string>

#include <fcntl.h>
#include <unistd.h>

#include <gtest/gtest.h>

namespace moraine::core {
namespace {

// A pseudo terminal, whose descriptor is_terminal() and color_wanted() are asked about.
class TerminalTest : public testing::Test {
 protected:
  void SetUp() override {
    master_ = ::posix_openpt(O_RDWR | O_NOCTTY);
    if (master_ < 0 || ::grantpt(master_) != 0 || ::unlockpt(master_) != 0) GTEST_SKIP() << "no pseudo terminals here";
    terminal_ = ::open(::ptsname(master_), O_RDWR | O_NOCTTY);
    if (terminal_ < 0) GTEST_SKIP() << "no pseudo terminals here";
    file_ = ::open("/dev/null", O_WRONLY);
    for (const char* name : {"TERM", "NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"}) ::unsetenv(name);
  }
  void TearDown() override {
    for (const int descriptor : {terminal_, master_, file_}) ::close(descriptor);
  }
  bool colored(int descriptor, const std::map<std::string, std::string>& environment) {
    for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
    const bool wanted = color_wanted(descriptor);
    for (const auto& entry : environment) ::unsetenv(entry.first.c_str());
    return wanted;
  }
  int master_ = -1, terminal_ = -1, file_ = -1;
};

TEST_F(TerminalTest, ColoursFollowTheTerminalAndTheEnvironment) {
  EXPECT_TRUE(colored(terminal_, {{"TERM", "xterm"}}));
  EXPECT_FALSE(colored(file_, {{"TERM", "xterm"}}));
  EXPECT_FALSE(colored(terminal_, {{"TERM", "dumb"}}));
  EXPECT_FALSE(colored(terminal_, {}));
  EXPECT_FALSE(colored(terminal_, {{"TERM", "xterm"}, {"NO_COLOR", "1"}}));
  EXPECT_TRUE(colored(terminal_, {{"TERM", "xterm"}, {"NO_COLOR", ""}}));
  EXPECT_FALSE(colored(terminal_, {{"TERM", "xterm"}, {"CLICOLOR", "0"}}));
  EXPECT_TRUE(colored(file_, {{"CLICOLOR_FORCE", "1"}}));
  EXPECT_FALSE(colored(file_, {{"CLICOLOR_FORCE", "0"}}));
  EXPECT_FALSE(colored(file_, {{"CLICOLOR_FORCE", "1"}, {"NO_COLOR", "1"}}));
}

TEST_F(TerminalTest, BehindALauncherNothingIsATerminal) {
  ::setenv("TERM", "xterm", 1);
  EXPECT_TRUE(is_terminal(terminal_));
  EXPECT_EXIT(
      {
        distrust_terminals();
        std::exit(is_terminal(terminal_) || terminal_width(terminal_, 77) != 77 ? 1 : 0);
      },
      testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace moraine::core
