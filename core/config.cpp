#include "core/config.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>

#include <unistd.h>

#include "core/config_yaml.h"
#include "core/error.h"
#include "core/file.h"
#include "core/registry.h"
#include "core/utf8.h"

namespace moraine::core {

namespace {

namespace fs = std::filesystem;
using Kind = ConfigNode::Kind;
using config_detail::child_path;

constexpr std::string_view kPrefix = "MORAINE_";
// Variables of the scripts, the build, the log and fault injection (worker/fault.h); tests/scripts holds every variable
// that a script reads against this list.
const std::set<std::string, std::less<>> kNotRecipeKeys = {
    "MORAINE_BENCH",    "MORAINE_BUILD_DIR", "MORAINE_CMAKE_FLAGS", "MORAINE_FAULT",           "MORAINE_KERNEL_BENCH",
    "MORAINE_LOG",      "MORAINE_MACHINE",   "MORAINE_NCCL_DIR",    "MORAINE_PYTHON",          "MORAINE_RESULTS",
    "MORAINE_SKIP_APT", "MORAINE_THREADS",   "MORAINE_TORCH_DIR",   "MORAINE_WORKERS_PER_NODE"};
constexpr std::string_view kTestPrefix = "MORAINE_TEST_";

std::vector<std::string> split_path(std::string_view path) {
  std::vector<std::string> parts(1);
  for (char c : path) {
    if (c == '.')
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

// The index a path segment means in a list of `size` items.
std::optional<size_t> list_index(const std::string& segment, size_t size) {
  if (segment.empty() || segment.size() > 9 ||
      !std::all_of(segment.begin(), segment.end(), [](unsigned char c) { return std::isdigit(c); }))
    return std::nullopt;
  const size_t index = std::stoul(segment);
  return index < size ? std::optional(index) : std::nullopt;
}

ConfigNode* find_member(ConfigNode& node, const std::string& key) {
  for (auto& [name, value] : node.members)
    if (name == key) return &value;
  return nullptr;
}

ConfigNode& add_member(ConfigNode& node, const std::string& key, ConfigNode value, const Origin& origin) {
  node.members.emplace_back(key, std::move(value));
  node.member_origins.push_back(origin);
  return node.members.back().second;
}

// Lays `over` on `base`: maps key by key, anything else is replaced.
void merge(ConfigNode& base, ConfigNode over) {
  if (base.kind != Kind::kMap || over.kind != Kind::kMap) {
    base = std::move(over);
    return;
  }
  base.origin = over.origin;
  base.broken = base.broken || over.broken;
  for (size_t i = 0; i < over.members.size(); ++i) {
    auto& [key, value] = over.members[i];
    const auto known =
        std::find_if(base.members.begin(), base.members.end(), [&](const auto& member) { return member.first == key; });
    if (known == base.members.end()) {
      add_member(base, key, std::move(value), over.member_origins[i]);
    } else {
      base.member_origins[static_cast<size_t>(known - base.members.begin())] = over.member_origins[i];
      merge(known->second, std::move(value));
    }
  }
}

// Sets one value by path, as the command line and the environment do.
void set_value(ConfigNode& root, const std::string& path, ConfigNode value, const Origin& origin, Problems& problems) {
  ConfigNode* node = &root;
  std::string walked;
  for (const auto& segment : split_path(path)) {
    if (node->kind == Kind::kList) {
      const auto index = list_index(segment, node->items.size());
      if (!index)
        return problems.add(origin, path, fmt::format("'{}' is not an index into {}", segment, walked),
                            fmt::format("{} has {} items, counted from 0", walked, node->items.size()));
      node = &node->items[*index];
    } else if (node->kind == Kind::kScalar) {
      return problems.add(origin, path, fmt::format("{} is '{}' and has no keys below it", walked, node->text),
                          "check the path");
    } else {
      node->kind = Kind::kMap;
      if (node->origin == "default") node->origin = origin;
      ConfigNode* member = find_member(*node, segment);
      node = member ? member : &add_member(*node, segment, ConfigNode{}, origin);
    }
    walked = child_path(walked, segment);
  }
  merge(*node, std::move(value));
}

void set_from_text(ConfigNode& root, const std::string& path, const std::string& text, const Origin& origin,
                   Problems& problems) {
  if (!is_utf8(path) || !is_utf8(text))
    return problems.add(as_utf8(origin), as_utf8(path), fmt::format("not UTF-8: '{}'", as_utf8(text)),
                        "type it in a terminal whose encoding is UTF-8");
  for (const auto& segment : split_path(path))
    if (segment.empty()) return problems.add(origin, path, "a path has an empty part", "write key.sub=value");
  try {
    set_value(root, path,
              parse_yaml(
                  text, [&](int, int) { return origin; }, problems),
              origin, problems);
  } catch (const UserError& error) {
    problems.add(origin, path, fmt::format("the value is not YAML: '{}'", text), "quote it, as in key='\"value\"'");
  }
}

void set_directory(ConfigNode& node, const fs::path& directory) {
  node.directory = directory;
  for (auto& item : node.items) set_directory(item, directory);
  for (auto& [key, member] : node.members) set_directory(member, directory);
}

class Loader {
 public:
  explicit Loader(Problems& problems) : problems_(problems) {}

  ConfigNode load(const fs::path& path) {
    const std::string name = as_utf8(path.string());  // as an origin it is stored with every value
    open_.push_back(fs::weakly_canonical(path));
    ConfigNode own = parse_yaml(
        read_text(path), [&](int line, int column) { return fmt::format("{}:{}:{}", name, line, column); }, problems_);
    set_directory(own, fs::absolute(path).parent_path());
    if (own.kind == Kind::kNull) own.kind = Kind::kMap;
    if (own.kind != Kind::kMap) {
      problems_.add(own.origin, "", "a recipe is a map of keys", "start with key: value");
      own = ConfigNode{.kind = Kind::kMap, .origin = own.origin};
    }
    ConfigNode tree{.kind = Kind::kMap, .origin = own.origin};
    for (const auto& file : take_defaults(own)) load_default(tree, path, file);
    merge(tree, std::move(own));
    open_.pop_back();
    return tree;
  }

 private:
  std::vector<ConfigNode> take_defaults(ConfigNode& node) {
    for (size_t i = 0; i < node.members.size(); ++i) {
      if (node.members[i].first != "defaults") continue;
      const ConfigNode list = std::move(node.members[i].second);
      node.members.erase(node.members.begin() + static_cast<ptrdiff_t>(i));
      node.member_origins.erase(node.member_origins.begin() + static_cast<ptrdiff_t>(i));
      if (list.kind == Kind::kList) return list.items;
      problems_.add(list.origin, "defaults", "must be a list of recipe files", "write defaults: [file.yaml]");
    }
    return {};
  }

  void load_default(ConfigNode& tree, const fs::path& from, const ConfigNode& file) {
    if (file.kind != Kind::kScalar || file.text.empty())
      return problems_.add(file.origin, "defaults", "must be a list of recipe files", "write defaults: [file.yaml]");
    const fs::path path = (from.parent_path() / file.text).lexically_normal();
    if (!fs::is_regular_file(path))
      return problems_.add(file.origin, "defaults", fmt::format("no such file: {}", path.string()),
                           "the path is relative to this recipe");
    if (std::find(open_.begin(), open_.end(), fs::weakly_canonical(path)) != open_.end())
      return problems_.add(file.origin, "defaults", fmt::format("{} includes itself", path.string()),
                           "remove one of the two");
    merge(tree, load(path));
  }

  Problems& problems_;
  std::vector<fs::path> open_;  // files being read, outermost first
};

void apply_environment(ConfigNode& root, Problems& problems) {
  std::map<std::string, std::string> variables;  // sorted, so that problems come in a stable order
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const size_t equals = text.find('=');
    if (!text.starts_with(kPrefix) || text.starts_with(kTestPrefix) || equals == std::string_view::npos ||
        equals + 1 == text.size())
      continue;
    variables.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  for (const auto& [name, value] : variables) {
    if (kNotRecipeKeys.contains(name)) continue;
    std::string path;
    for (size_t i = kPrefix.size(); i < name.size(); ++i) {
      if (name.compare(i, 2, "__") == 0) {
        path += '.';
        ++i;
      } else {
        path += static_cast<char>(std::tolower(static_cast<unsigned char>(name[i])));
      }
    }
    set_from_text(root, path, value, "environment " + name, problems);
  }
}

void apply_overrides(ConfigNode& root, std::span<const std::string> overrides, Problems& problems) {
  for (const auto& text : overrides) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0) {
      problems.add("command line", "", fmt::format("'{}' is not an override", text), "write key.sub=value");
    } else {
      set_from_text(root, text.substr(0, equals), text.substr(equals + 1), "command line", problems);
    }
  }
}

// Replaces ${key.path} and ${env:NAME}, each value once, whatever the order of reference.
class Interpolator {
 public:
  Interpolator(ConfigNode& root, Problems& problems) : root_(root), problems_(problems) {}

  void resolve(ConfigNode& node, const std::string& path) {
    if (done_.contains(&node)) return;
    active_.insert(&node);
    for (size_t i = 0; i < node.items.size(); ++i) resolve(node.items[i], child_path(path, std::to_string(i)));
    for (auto& [key, value] : node.members) resolve(value, child_path(path, key));
    if (node.kind == Kind::kScalar && node.text.find("${") != std::string::npos) resolve_scalar(node, path);
    active_.erase(&node);
    mark_done(node);
  }

 private:
  void mark_done(const ConfigNode& node) {
    done_.insert(&node);
    for (const auto& item : node.items) mark_done(item);
    for (const auto& member : node.members) mark_done(member.second);
  }

  void resolve_scalar(ConfigNode& node, const std::string& path) {
    const std::string text = node.text;
    if (text.starts_with("${") && text.find('}') == text.size() - 1) {
      auto value = look_up(text.substr(2, text.size() - 3), node, path);
      if (!value) return;
      value->origin = node.origin;
      node = std::move(*value);
      return;
    }
    std::string result;
    for (size_t i = 0; i < text.size();) {
      if (text.compare(i, 3, "$${") == 0) {
        result += "${";
        i += 3;
      } else if (text.compare(i, 2, "${") == 0) {
        const size_t end = text.find('}', i);
        if (end == std::string::npos) return complain(node, path, "'${' without '}'", "write $${ for a literal ${");
        const std::string name = text.substr(i + 2, end - i - 2);
        const auto value = look_up(name, node, path);
        if (!value) return;
        if (value->kind != Kind::kScalar)
          return complain(node, path, fmt::format("${{{}}} is no scalar and cannot stand inside text", name), "");
        result += value->text;
        i = end + 1;
      } else {
        result += text[i++];
      }
    }
    node.text = std::move(result);
  }

  std::optional<ConfigNode> look_up(const std::string& name, ConfigNode& from, const std::string& path) {
    if (name.starts_with("env:")) {
      const char* value = std::getenv(name.c_str() + 4);
      if (value != nullptr && is_utf8(value)) return ConfigNode{.kind = Kind::kScalar, .text = value};
      if (value != nullptr) {
        complain(from, path, fmt::format("environment variable {} is not UTF-8", name.substr(4)), "export it as UTF-8");
        return std::nullopt;
      }
      complain(from, path, fmt::format("environment variable {} is not set", name.substr(4)),
               fmt::format("export {}=...", name.substr(4)));
      return std::nullopt;
    }
    ConfigNode* target = &root_;
    std::string walked;
    for (const auto& segment : split_path(name)) {
      if (target != &root_ && target->kind == Kind::kScalar && !active_.contains(target)) resolve(*target, walked);
      ConfigNode* next = nullptr;
      if (target->kind == Kind::kMap) next = find_member(*target, segment);
      if (const auto index = list_index(segment, target->items.size())) next = &target->items[*index];
      if (next == nullptr) {
        complain(from, path, fmt::format("${{{}}}: no such key in the recipe", name), missing_hint(*target, segment));
        return std::nullopt;
      }
      target = next;
      walked = child_path(walked, segment);
    }
    if (active_.contains(target)) {
      complain(from, path, fmt::format("${{{}}} refers to itself", name), "write the value in one of the two places");
      return std::nullopt;
    }
    resolve(*target, walked);
    if (!target->broken) return *target;
    from.broken = true;  // the target's own problem is reported already
    return std::nullopt;
  }

  static std::string missing_hint(const ConfigNode& node, const std::string& segment) {
    std::vector<std::string> names;
    for (const auto& member : node.members) names.push_back(member.first);
    const std::string nearest = nearest_name(segment, names);
    return nearest.empty() ? "a reference sees what is written in the recipe, not the defaults of unwritten keys"
                           : fmt::format("did you mean '{}'?", nearest);
  }

  void complain(ConfigNode& node, const std::string& path, const std::string& what, const std::string& hint) {
    node.broken = true;
    problems_.add(node.origin, path, what, hint);
  }

  ConfigNode& root_;
  Problems& problems_;
  std::set<const ConfigNode*> active_, done_;
};

}  // namespace

const ConfigNode* ConfigNode::find(const std::string& key) const {
  for (const auto& [name, value] : members)
    if (name == key) return &value;
  return nullptr;
}

void Problems::add(const Origin& origin, const std::string& path, const std::string& what, const std::string& hint) {
  std::string where = fmt::format("{}", origin);
  if (!path.empty() && where != path) where += ": " + path;  // a problem found after parsing has its key for an origin
  lines_.push_back(fmt::format("{}: {}{}", where, what, hint.empty() ? "" : " (" + hint + ")"));
}

void Problems::throw_if_any(const std::string& subject) const {
  if (lines_.empty()) return;
  std::string message = fmt::format("{}: {} {}", subject, lines_.size(), lines_.size() == 1 ? "problem" : "problems");
  for (const auto& line : lines_) message += "\n  " + line;
  throw UserError(message, "nothing was started");
}

ConfigNode load_config(const fs::path& recipe, std::span<const std::string> overrides, Problems& problems) {
  ConfigNode root = Loader(problems).load(recipe);
  apply_environment(root, problems);
  apply_overrides(root, overrides, problems);
  Interpolator(root, problems).resolve(root, "");
  return root;
}

std::string resolved_yaml(std::span<const ResolvedValue> values) {
  std::string text;
  std::vector<std::string> previous;
  for (const auto& value : values) {
    const auto parts = split_path(value.path);
    size_t common = 0;
    while (common + 1 < parts.size() && common < previous.size() && parts[common] == previous[common]) ++common;
    for (; common < parts.size(); ++common) {
      const bool is_item = list_index(parts[common], SIZE_MAX).has_value();
      const bool is_leaf = common + 1 == parts.size();
      text += fmt::format("{}{}{}\n", std::string(2 * common, ' '), is_item ? "-" : parts[common] + ":",
                          is_leaf ? fmt::format(" {}  # {}", value.value, value.origin) : "");
    }
    previous = parts;
  }
  return text;
}

}  // namespace moraine::core
