#include "core/json.h"

#include <algorithm>
#include <set>
#include <vector>

#include "core/error.h"
#include "core/file.h"

namespace moraine::core {

namespace {

constexpr int kDeepest = 128;  // whoever walks a document does so by recursion

// nlohmann keeps the last of two equal keys; we refuse, because a reader that keeps the first would see other data.
class Checks {
 public:
  explicit Checks(const std::string& origin) : origin_(origin) {}

  void see(int depth, Json::parse_event_t event, const Json& value) {
    if (depth > kDeepest)
      throw UserError(fmt::format("{}: values stand more than {} levels inside each other", origin_, kDeepest),
                      "the file is damaged, or not what it should be: check it or make it again");
    if (event == Json::parse_event_t::object_start) {
      open_.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      open_.pop_back();
    } else if (event == Json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!open_.back().insert(key).second)
        throw UserError(fmt::format("{}: key '{}' stands twice in one object", origin_, key), "remove one of the two");
    }
  }

 private:
  const std::string& origin_;
  std::vector<std::set<std::string>> open_;
};

}  // namespace

Json parse_json(std::string_view text, const std::string& origin) {
  try {
    Checks checks(origin);
    return Json::parse(text, [&](int depth, Json::parse_event_t event, Json& value) {
      checks.see(depth, event, value);
      return true;
    });
  } catch (const Json::parse_error& error) {
    const std::string_view before = text.substr(0, error.byte > 0 ? error.byte - 1 : 0);
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    const size_t start = before.rfind('\n') == std::string_view::npos ? 0 : before.rfind('\n') + 1;
    std::string what = error.what();  // "[json.exception.parse_error.101] parse error at line 1, column 2: reason"
    if (const size_t reason = what.find(": "); reason != std::string::npos) what.erase(0, reason + 2);
    throw UserError(fmt::format("{}:{}:{}: not valid JSON: {}", origin, line, before.size() - start + 1, what));
  } catch (const Json::out_of_range&) {  // the only other one that parsing throws; it does not say where
    throw UserError(fmt::format("{}: a number does not fit in 64 bits", origin),
                    "the file is damaged, or not what it should be: check it or make it again");
  }
}

Json read_json(const std::filesystem::path& path) {
  require_file(path);
  return parse_json(read_text(path), path.string());
}

}  // namespace moraine::core
