#include "coordinator/report/summary_check.h"

#include <cmath>
#include <limits>
#include <set>

#include "core/error.h"

namespace moraine::report {
namespace {

using core::Json;

// Format 1 as a pattern. An object lists its keys ("?" = may be absent, "*" = any key); a list gives the pattern of its
// elements; a string names a type: text, number, value (number or null), count (integer >= 0), flag, scalar (anything
// but a list or object), point ([number, value]), or "=a|b": one of these texts.
const Json& table_pattern() {
  static const Json pattern = Json::parse(R"({
    "title": "text",
    "columns": [{"key": "text", "label": "text", "unit?": "text", "better?": "=lower|higher", "digits?": "count"}],
    "rows": [{"*": "scalar"}],
    "notes?": ["text"], "highlight?": "flag", "best_in?": "=row|column"})");
  return pattern;
}

const Json& summary_pattern() {
  static const Json pattern = [] {
    Json json = Json::parse(R"({
      "format": "count", "name": "text", "method": "text", "complete": "flag", "headline?": "text", "hash?": "text",
      "measured_on?": {"*": "text"},
      "curves?": [{"title": "text", "x_label": "text", "y_label": "text", "log_x?": "flag", "log_y?": "flag",
                   "series": [{"name": "text", "points": ["point"]}], "notes?": ["text"]}],
      "heatmaps?": [{"title": "text", "row_label": "text", "column_label": "text", "rows": ["text"], "columns": ["text"],
                     "values": [["value"]], "digits?": "count", "notes?": ["text"]}],
      "timeline?": {"title": "text", "restarts?": ["number"], "coordinating_s?": "number", "notes?": ["text"],
                    "units": [{"label": "text", "kind": "text", "worker": "text", "start_s": "number", "end_s": "number",
                               "attempt": "count", "status": "=done|failed|reused"}]},
      "recipe?": [{"path": "text", "value": "scalar", "origin": "text"}],
      "versions?": {"*": "scalar"},
      "timing?": [{"label": "text", "seconds": "number"}]})");
    json["tables?"] = Json::array({table_pattern()});
    return json;
  }();
  return pattern;
}

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw core::InternalError(
      fmt::format("report: malformed summary: {}: {}", path.empty() ? "the document" : path, what));
}

std::string join(const std::string& path, const std::string& key) { return path.empty() ? key : path + "." + key; }

bool has_type(const Json& json, const std::string& type) {
  if (type == "text") return json.is_string();
  if (type == "number") return json.is_number() && std::isfinite(json.get<double>());
  if (type == "value") return json.is_number() || json.is_null();
  if (type == "count") return json.is_number_integer() && json >= 0;
  if (type == "flag") return json.is_boolean();
  if (type == "scalar") return !json.is_structured();
  if (type == "point")
    return json.is_array() && json.size() == 2 && has_type(json[0], "number") && has_type(json[1], "value");
  return json.is_string() &&
         ("|" + type.substr(1) + "|").find("|" + json.get<std::string>() + "|") != std::string::npos;
}

void match(const Json& json, const Json& pattern, const std::string& path) {
  if (pattern.is_string()) {
    if (!has_type(json, pattern))
      refuse(path, fmt::format("expected {}, found {}", pattern.get<std::string>(), json.dump().substr(0, 60)));
  } else if (pattern.is_array()) {
    if (!json.is_array()) refuse(path, fmt::format("expected a list, found {}", json.type_name()));
    for (size_t i = 0; i < json.size(); ++i) match(json[i], pattern[0], fmt::format("{}[{}]", path, i));
  } else {
    if (!json.is_object()) refuse(path, fmt::format("expected an object, found {}", json.type_name()));
    for (const auto& [key, value] : pattern.items())
      if (key != "*" && key.back() != '?' && !json.contains(key)) refuse(join(path, key), "is missing");
    for (const auto& [key, value] : json.items()) {
      auto known = pattern.find(key);
      if (known == pattern.end()) known = pattern.find(key + "?");
      if (known == pattern.end()) known = pattern.find("*");
      if (known == pattern.end()) refuse(join(path, key), "is not a key of format 1");
      match(value, *known, join(path, key));
    }
  }
}

void check_table_keys(const Json& table, const std::string& path) {
  std::set<std::string> keys;
  for (const Json& column : table["columns"])
    if (!keys.insert(column["key"]).second)
      refuse(path + ".columns", "two columns have the key " + column["key"].dump());
  for (size_t i = 0; i < table["rows"].size(); ++i)
    for (const auto& [key, value] : table["rows"][i].items())
      if (!keys.count(key)) refuse(fmt::format("{}.rows[{}].{}", path, i, key), "is not the key of a column");
}

void check_heatmap_shape(const Json& map, const std::string& path) {
  const size_t rows = map["rows"].size(), columns = map["columns"].size();
  if (map["values"].size() != rows)
    refuse(path + ".values", fmt::format("{} rows of values, {} row names", map["values"].size(), rows));
  for (size_t i = 0; i < rows; ++i)
    if (map["values"][i].size() != columns)
      refuse(fmt::format("{}.values[{}]", path, i),
             fmt::format("{} values, {} column names", map["values"][i].size(), columns));
}

}  // namespace

void check_table(const Json& table, const std::string& path) {
  match(table, table_pattern(), path);
  check_table_keys(table, path);
}

void check_summary(const Json& summary) {
  if (summary.is_object() && summary.contains("format") && summary["format"] != 1)
    refuse("format", "this program knows format 1, found " + summary["format"].dump());
  match(summary, summary_pattern(), "");
  const auto each = [&](const char* key, auto check) {
    if (!summary.contains(key)) return;
    for (size_t i = 0; i < summary[key].size(); ++i) check(summary[key][i], fmt::format("{}[{}]", key, i));
  };
  each("tables", check_table_keys);
  each("heatmaps", check_heatmap_shape);
}

double number_or_nan(const Json& value) {
  const double number = value.is_number() ? value.get<double>() : std::numeric_limits<double>::quiet_NaN();
  return std::isfinite(number) ? number : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace moraine::report
