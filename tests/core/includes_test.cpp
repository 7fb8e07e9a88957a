// Reads the includes of the whole repository: dependencies between folders point one way (docs/architecture.md).
#include <filesystem>
#include <map>
#include <optional>
#include <regex>
#include <set>
#include <sstream>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/file.h"

namespace moraine::core {
namespace {

namespace fs = std::filesystem;

// What each folder may include besides itself. cli may include all of them; tests and bench are not listed.
const std::map<std::string, std::set<std::string>> kAllowed = {
    {"core", {}},
    {"kernels", {"core"}},
    {"models", {"core", "kernels"}},
    {"data", {"core"}},
    {"algorithms", {"core", "kernels", "models", "data"}},
    {"comm", {"core"}},
    {"worker", {"core", "kernels", "models", "data", "algorithms", "comm"}},
    {"coordinator", {"core", "comm", "algorithms"}},
    {"cli", {"core", "kernels", "models", "data", "algorithms", "comm", "worker", "coordinator"}},
};
const std::set<std::string> kWithoutTorch = {"core", "comm", "coordinator"};

// The one way out: the tests' stand-in for the device, taken only when they compile the CUDA kernels for the host.
const std::string kHostStandIn = "tests/kernels/cuda_on_host.h";

struct SourceFile {
  std::string folder;
  std::vector<std::string> quoted, angled;
};
using Sources = std::map<std::string, SourceFile>;  // by path from the repository's root

SourceFile scan(const std::string& folder, const std::string& text) {
  static const std::regex include(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"])");
  SourceFile file{.folder = folder, .quoted = {}, .angled = {}};
  std::istringstream lines(text);
  std::smatch match;
  for (std::string line; std::getline(lines, line);)
    if (std::regex_search(line, match, include)) (match[1] == "\"" ? file.quoted : file.angled).push_back(match[2]);
  return file;
}

const Sources& repository() {
  static const Sources sources = [] {
    Sources found;
    const fs::path root = MORAINE_SOURCE_DIR;
    for (const auto& [folder, allowed] : kAllowed) {
      if (!fs::is_directory(root / folder)) continue;
      for (const auto& entry : fs::recursive_directory_iterator(root / folder)) {
        const std::string extension = entry.path().extension().string();
        if (extension == ".h" || extension == ".cpp" || extension == ".cu" || extension == ".cuh")
          found.emplace(entry.path().lexically_relative(root).string(), scan(folder, read_text(entry.path())));
      }
    }
    return found;
  }();
  return sources;
}

std::vector<std::string> back_edges(const Sources& sources) {
  std::vector<std::string> edges;
  for (const auto& [path, file] : sources)
    for (const auto& target : file.quoted) {
      const std::string folder = target.substr(0, target.find('/'));
      if (path == "kernels/cuda_device.cuh" && target == kHostStandIn) continue;
      if (!kAllowed.contains(folder))
        edges.push_back(fmt::format("{} includes \"{}\": not a path from the repository's root", path, target));
      else if (folder != file.folder && !kAllowed.at(file.folder).contains(folder))
        edges.push_back(fmt::format("{} includes \"{}\"", path, target));
    }
  return edges;
}

// The chain of includes from `path` to a LibTorch header, if there is one.
std::optional<std::string> torch_chain(const Sources& sources, const std::string& path, std::set<std::string>& seen) {
  const auto at = sources.find(path);
  if (at == sources.end() || !seen.insert(path).second) return std::nullopt;
  for (const auto& header : at->second.angled)
    if (header.rfind("torch/", 0) == 0 || header.rfind("ATen/", 0) == 0 || header.rfind("c10/", 0) == 0)
      return path + " -> <" + header + ">";
  for (const auto& target : at->second.quoted)
    if (const auto chain = torch_chain(sources, target, seen)) return path + " -> " + *chain;
  return std::nullopt;
}

std::vector<std::string> torch_chains(const Sources& sources) {
  std::vector<std::string> chains;
  for (const auto& [path, file] : sources) {
    std::set<std::string> seen;
    if (!kWithoutTorch.contains(file.folder)) continue;
    if (const auto chain = torch_chain(sources, path, seen)) chains.push_back(*chain);
  }
  return chains;
}

TEST(Includes, PointOneWayBetweenFolders) {
  ASSERT_GT(repository().size(), 20U) << "the repository was not found at " << MORAINE_SOURCE_DIR;
  for (const auto& edge : back_edges(repository())) ADD_FAILURE() << edge;
}

TEST(Includes, NeverReachTorchFromCoreCommAndCoordinator) {
  for (const auto& chain : torch_chains(repository())) ADD_FAILURE() << chain;
}

TEST(Includes, YamlIsReadInOnePlaceOnly) {
  for (const auto& [path, file] : repository())
    for (const auto& header : file.angled)
      EXPECT_TRUE(header.rfind("yaml-cpp/", 0) != 0 || path == "core/config_yaml.cpp") << path;
}

TEST(Includes, TheCheckItselfFindsWhatIsForbidden) {
  Sources sources;
  sources["core/a.h"] = scan("core", "#include <vector>\n  # include \"models/m.h\"\n");
  sources["models/m.h"] = scan("models", "#include \"core/b.h\"\n#include <ATen/core/Tensor.h>\n");
  sources["algorithms/x.h"] = scan("algorithms", "#include \"local.h\"\n// #include \"comm/channel.h\"\n");
  EXPECT_EQ(back_edges(sources),
            (std::vector<std::string>{"algorithms/x.h includes \"local.h\": not a path from the repository's root",
                                      "core/a.h includes \"models/m.h\""}));
  EXPECT_EQ(torch_chains(sources), (std::vector<std::string>{"core/a.h -> models/m.h -> <ATen/core/Tensor.h>"}));
}

}  // namespace
}  // namespace moraine::core
