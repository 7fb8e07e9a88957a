#include "core/config_table.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/config.h"
#include "core/error.h"
#include "core/registry.h"
#include "core/utf8.h"

namespace moraine::core::config_detail {

namespace {

using Kind = ConfigNode::Kind;

struct Complaint {
  std::string what, hint;
};

std::string_view noun(ValueType type) {
  switch (type) {
    case ValueType::kBool:
      return "true or false";
    case ValueType::kInteger:
      return "an integer";
    case ValueType::kNumber:
      return "a number";
    case ValueType::kText:
      return "text";
    case ValueType::kAny:
      return "any value";
    case ValueType::kObject:
      break;
  }
  return "a map of keys";
}

std::string found(const ConfigNode& node) {
  switch (node.kind) {
    case Kind::kNull:
      return "nothing";
    case Kind::kList:
      return "a list";
    case Kind::kMap:
      return "a map of keys";
    case Kind::kScalar:
      break;
  }
  return node.quoted ? fmt::format("the text \"{}\"", node.text) : fmt::format("'{}'", node.text);
}

Complaint mismatch(const ConfigNode& node, ValueType type, std::string hint = "") {
  if (hint.empty() && node.kind == Kind::kNull) hint = "give a value, or remove the key to use its default";
  if (hint.empty() && node.kind == Kind::kScalar && node.quoted) hint = "remove the quotes";
  return {fmt::format("must be {}, found {}", noun(type), found(node)), std::move(hint)};
}

// YAML readers disagree about 010 (eight or ten) and 0x10, so neither is a number here.
std::string hint_for_digits(std::string_view text) {
  std::string_view digits = text;
  if (!digits.empty() && (digits[0] == '-' || digits[0] == '+')) digits.remove_prefix(1);
  if (digits.starts_with("0x") || digits.starts_with("0o")) return "write the number in decimal";
  if (digits.size() > 1 && digits[0] == '0' && std::isdigit(static_cast<unsigned char>(digits[1]))) {
    const size_t first = digits.find_first_not_of('0');
    return fmt::format("leading zeros mean octal in YAML; write {}",
                       first == std::string_view::npos ? "0" : digits.substr(first));
  }
  if (digits.find('_') != std::string_view::npos) return "write digits without '_'";
  return "";
}

std::optional<double> finite_number(std::string_view text) {
  if (text.starts_with('+')) text.remove_prefix(1);
  double value = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (failed != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
  return value;
}

template <typename Integer>
std::optional<Json> parse_integer(const ConfigNode& node, Complaint& complaint) {
  std::string_view text = node.text;
  if (text.starts_with('+')) text.remove_prefix(1);
  Integer value = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = end == text.data() + text.size();
  std::string hint = hint_for_digits(node.text);
  if (failed == std::errc() && whole && hint.empty()) return Json(value);
  if (failed == std::errc::result_out_of_range && whole) hint = "it must fit in 64 bits";
  if (const auto real = finite_number(node.text);
      hint.empty() && real && *real == std::trunc(*real) && std::abs(*real) < 1e15)
    hint = fmt::format("write {:.0f}", *real);
  complaint = mismatch(node, ValueType::kInteger, hint);
  return std::nullopt;
}

std::optional<Json> parse_number(const ConfigNode& node, Complaint& complaint) {
  std::string hint = hint_for_digits(node.text);
  if (const auto value = finite_number(node.text); value && hint.empty()) return Json(*value);
  std::string lower;
  for (unsigned char c : node.text) lower += static_cast<char>(std::tolower(c));
  if (hint.empty() && (lower.ends_with("nan") || lower.ends_with("inf"))) hint = "it must be finite";
  complaint = mismatch(node, ValueType::kNumber, hint);
  return std::nullopt;
}

std::optional<Json> parse_scalar(const FieldInfo& info, const ConfigNode& node, Complaint& complaint) {
  const ValueType type = info.type;
  if (node.kind == Kind::kScalar) {
    if (type == ValueType::kText) return Json(node.text);
    if (!node.quoted) {
      if (type == ValueType::kInteger)
        return info.is_unsigned ? parse_integer<uint64_t>(node, complaint) : parse_integer<int64_t>(node, complaint);
      if (type == ValueType::kNumber) return parse_number(node, complaint);
      if (node.text == "true" || node.text == "false") return Json(node.text == "true");
    }
  }
  complaint = mismatch(node, type);
  if (type == ValueType::kText && node.kind == Kind::kNull) complaint.hint = "write \"\" for empty text";
  return std::nullopt;
}

std::string bound_text(const FieldInfo& info) {
  std::vector<std::string> parts;
  if (info.min) parts.push_back(fmt::format("{} {}", info.min_exclusive ? ">" : ">=", *info.min));
  if (info.max) parts.push_back(fmt::format("<= {}", *info.max));
  if (!info.choices.empty()) parts.push_back(fmt::format("one of {}", fmt::join(info.choices, ", ")));
  return fmt::format("{}", fmt::join(parts, ", "));
}

std::optional<Complaint> out_of_bounds(const FieldInfo& info, const Json& value) {
  if (value.is_number()) {
    const double number = value.get<double>();
    const bool low = info.min && (info.min_exclusive ? number <= *info.min : number < *info.min);
    if (low)
      return Complaint{
          fmt::format("must be {} {}, found {}", info.min_exclusive ? "above" : "at least", *info.min, value.dump()),
          ""};
    if (info.max && number > *info.max)
      return Complaint{fmt::format("must be at most {}, found {}", *info.max, value.dump()), ""};
  }
  if (value.is_string() && !info.choices.empty()) {
    const auto& name = value.get_ref<const std::string&>();
    if (std::find(info.choices.begin(), info.choices.end(), name) == info.choices.end())
      return Complaint{fmt::format("'{}' is not one of the choices", name), name_hint(name, info.choices)};
  }
  return std::nullopt;
}

ConfigNode node_from_json(const Json& json) {
  ConfigNode node;
  if (json.is_array()) {
    node.kind = Kind::kList;
    for (const auto& item : json) node.items.push_back(node_from_json(item));
  } else if (json.is_object()) {
    node.kind = Kind::kMap;
    for (const auto& [key, value] : json.items()) {
      node.members.emplace_back(key, node_from_json(value));
      node.member_origins.emplace_back("stored");
    }
  } else if (!json.is_null()) {
    node.kind = Kind::kScalar;
    node.quoted = json.is_string();
    node.text = json.is_string() ? json.get<std::string>() : json.dump();
  }
  node.origin = "stored";
  return node;
}

// The reverse, for values that no schema types.
Json json_from_node(const ConfigNode& node) {
  if (node.kind == Kind::kNull) return nullptr;
  if (node.kind == Kind::kScalar) {
    Json value = node.quoted ? Json(node.text) : Json::parse(node.text, nullptr, /*allow_exceptions=*/false);
    return value.is_discarded() ? Json(node.text) : value;
  }
  Json out = node.kind == Kind::kList ? Json::array() : Json::object();
  for (const auto& item : node.items) out.push_back(json_from_node(item));
  for (const auto& [key, member] : node.members) out[key] = json_from_node(member);
  return out;
}

Json absolute_path(const ConfigNode& node, const std::string& text) {
  if (text.empty()) return text;
  return std::filesystem::absolute(node.directory / text)
      .lexically_normal()
      .string();  // an absolute text wins over the directory
}

std::optional<Json> parse_element(const FieldInfo& info, const ConfigNode& node, const std::string& path,
                                  Problems& problems) {
  if (node.broken) return std::nullopt;
  if (info.type == ValueType::kAny) return json_from_node(node);
  Complaint complaint;
  auto value = parse_scalar(info, node, complaint);
  if (value) {
    const auto outside = out_of_bounds(info, *value);
    if (!outside && info.is_path) value = absolute_path(node, value->get<std::string>());
    if (!outside && (!info.is_path || is_utf8(value->get_ref<const std::string&>()))) return value;
    complaint = outside ? *outside
                        : Complaint{"the name of a directory in this path is not UTF-8, and paths are stored as UTF-8",
                                    "rename that directory, or link to it under another name"};
  }
  problems.add(node.origin, path, complaint.what, complaint.hint);
  return std::nullopt;
}

// Text as a YAML scalar that reads back as the same text.
std::string quote_text(const std::string& text) {
  static const std::vector<std::string> words = {"null", "true", "false", "yes", "no", "on", "off"};
  const auto is_plain = [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '-' || c == '.' || c == '/'; };
  std::string lower;
  for (unsigned char c : text) lower += static_cast<char>(std::tolower(c));
  if (!text.empty() && std::all_of(text.begin(), text.end(), is_plain) &&
      std::isalpha(static_cast<unsigned char>(text[0])) && std::find(words.begin(), words.end(), lower) == words.end())
    return text;
  std::string escaped;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text.compare(i, 2, "${") == 0) escaped += '$';
    escaped += text[i];
  }
  return Json(escaped).dump();  // JSON strings are YAML strings
}

std::string yaml_value(const Json& value) {
  if (value.is_string()) return quote_text(value.get<std::string>());
  if (!value.is_array()) return value.dump();
  std::vector<std::string> items;
  for (const auto& item : value) items.push_back(yaml_value(item));
  return fmt::format("[{}]", fmt::join(items, ", "));
}

// What the key means and, where it is not "a result", what it can change.
std::string full_doc(const FieldInfo& info) {
  std::string doc = info.doc;
  if (info.effect == Effect::kResult) return doc;
  if (!doc.empty()) doc += doc.ends_with('.') ? " " : ". ";
  return doc + (info.effect == Effect::kEvaluation ? "Evaluation only." : "Never changes a result.");
}

std::string type_text(const FieldInfo& info) {
  static constexpr std::string_view kNames[] = {"bool", "integer", "number", "text", "object", "any value"};
  const auto name = kNames[static_cast<size_t>(info.type)];
  std::string text =
      info.list ? fmt::format("list of {}{}", name, info.type == ValueType::kText ? "" : "s") : std::string(name);
  if (info.optional) text += " or null";
  if (!info.unit.empty()) text += fmt::format(" ({})", info.unit);
  return text;
}

// What one element may be. A reference such as ${train.steps} is text in the file, whatever it stands for.
Json element_schema(const FieldInfo& info) {
  static const Json reference = {{"type", "string"}, {"pattern", "\\$\\{"}};
  if (info.type == ValueType::kAny) return Json::object();
  if (info.type == ValueType::kObject) return {{"anyOf", {json_schema(*info.nested, false), reference}}};
  if (!info.choices.empty()) return {{"anyOf", {{{"enum", info.choices}}, reference}}};
  if (info.type == ValueType::kText) return {{"type", "string"}};
  static constexpr const char* kNames[] = {"boolean", "integer", "number"};
  Json schema = {{"type", kNames[static_cast<size_t>(info.type)]}};
  if (info.min) schema[info.min_exclusive ? "exclusiveMinimum" : "minimum"] = *info.min;
  if (info.max) schema["maximum"] = *info.max;
  return {{"anyOf", {schema, reference}}};
}

void require_all(const Table& table, const Json& json, const std::string& path, Problems& problems) {
  if (!json.is_object()) return;  // reported by the parse that follows
  for (const auto& field : table) {
    const std::string at = child_path(path, field.name);
    if (!json.contains(field.name)) {
      if (!field.required && !field.joined_later) problems.add("stored", at, "is missing");
    } else if (field.map && json[field.name].is_object()) {
      for (const auto& [key, item] : json[field.name].items())
        require_all(*field.nested, item, child_path(at, key), problems);
    } else if (field.nested && field.list && json[field.name].is_array()) {
      for (size_t i = 0; i < json[field.name].size(); ++i)
        require_all(*field.nested, json[field.name][i], child_path(at, std::to_string(i)), problems);
    } else if (field.nested) {
      require_all(*field.nested, json[field.name], at, problems);
    }
  }
}

}  // namespace

std::string child_path(const std::string& path, const std::string& name) {
  return path.empty() ? name : path + "." + name;
}

bool check_keys(const Table& table, const ConfigNode& node, const std::string& path, Problems& problems) {
  if (node.broken) return false;
  if (node.kind != Kind::kMap && node.kind != Kind::kNull) {
    const Complaint complaint = mismatch(node, ValueType::kObject);
    problems.add(node.origin, path, complaint.what);
    return false;
  }
  std::vector<std::string> names;
  for (const auto& field : table) names.push_back(field.name);
  // The one key of a recipe that no table has: it is taken out of the tree when the file is read.
  const std::vector<std::string> read_before = {"defaults"};
  for (size_t i = 0; i < node.members.size(); ++i) {
    const auto& key = node.members[i].first;
    if (std::find(names.begin(), names.end(), key) != names.end()) continue;
    const bool near = path.empty() && !nearest_name(key, read_before).empty();
    problems.add(node.member_origins[i], child_path(path, key), "unknown key",
                 near ? "did you mean 'defaults'?" : name_hint(key, names));
  }
  for (const auto& field : table)
    if (field.required && node.find(field.name) == nullptr)
      problems.add(node.origin, child_path(path, field.name), "is required", field.doc);
  return true;
}

std::optional<Json> parse_value(const FieldInfo& info, const ConfigNode& node, const std::string& path,
                                Problems& problems) {
  if (node.broken) return std::nullopt;
  if (info.optional && node.kind == Kind::kNull) return Json(nullptr);
  if (!info.list) return parse_element(info, node, path, problems);
  if (info.type == ValueType::kText && node.kind == Kind::kScalar) {  // one name is a list of one
    const auto value = parse_element(info, node, path, problems);
    return value ? std::optional(Json::array({*value})) : std::nullopt;
  }
  const auto* items = parse_items(node, path, problems);
  if (items == nullptr) return std::nullopt;
  Json values = Json::array();
  for (size_t i = 0; i < items->size(); ++i)
    if (auto value = parse_element(info, (*items)[i], child_path(path, std::to_string(i)), problems))
      values.push_back(std::move(*value));
  if (values.size() != items->size()) return std::nullopt;
  if (info.unique)
    for (size_t i = 0; i < values.size(); ++i)
      if (std::find(values.begin(), values.begin() + static_cast<ptrdiff_t>(i), values[i]) !=
          values.begin() + static_cast<ptrdiff_t>(i)) {
        problems.add((*items)[i].origin, path, fmt::format("{} stands twice", values[i].dump()),
                     "remove one of the two");
        return std::nullopt;
      }
  return values;
}

const std::vector<ConfigNode>* parse_items(const ConfigNode& node, const std::string& path, Problems& problems) {
  if (node.broken) return nullptr;
  if (node.kind == Kind::kList) return &node.items;
  problems.add(node.origin, path, fmt::format("must be a list, found {}", found(node)),
               node.kind == Kind::kScalar ? fmt::format("write [{}]", node.text) : "");
  return nullptr;
}

const std::vector<std::pair<std::string, ConfigNode>>* parse_members(const ConfigNode& node, const std::string& path,
                                                                     Problems& problems) {
  if (node.broken) return nullptr;
  if (node.kind == Kind::kMap || node.kind == Kind::kNull) return &node.members;
  problems.add(node.origin, path, mismatch(node, ValueType::kObject).what);
  return nullptr;
}

void resolve(const Table& table, const ConfigNode* node, const std::string& path, const Json& value,
             std::vector<ResolvedValue>& out) {
  for (const auto& field : table) {
    const ConfigNode* child = node ? node->find(field.name) : nullptr;
    const std::string at = child_path(path, field.name);
    const Json& part = value.at(field.name);
    if (field.map) {
      for (const auto& [key, item] : part.items())
        resolve(*field.nested, child ? child->find(key) : nullptr, child_path(at, key), item, out);
    } else if (field.nested && part.is_object()) {
      resolve(*field.nested, child, at, part, out);
    } else if (field.nested && part.is_array() && !part.empty()) {
      for (size_t i = 0; i < part.size(); ++i) {
        const bool given = child && i < child->items.size();
        resolve(*field.nested, given ? &child->items[i] : nullptr, child_path(at, std::to_string(i)), part[i], out);
      }
    } else {
      out.push_back({at, yaml_value(part), child ? child->origin : "default"});
    }
  }
}

ConfigNode complete_node(const Table& table, const Json& json, const std::string& path, Problems& problems) {
  require_all(table, json, path, problems);
  return node_from_json(json);
}

Json identity(const Table& table, const Json& value) {
  Json out = Json::object();
  for (const auto& field : table) {
    const auto part = value.find(field.name);
    if (part == value.end() || field.is_path || field.effect == Effect::kNothing) continue;
    Json& kept = out[field.name] = *part;
    if (!field.nested) continue;
    if (kept.is_object() && !field.map) {
      kept = identity(*field.nested, *part);
    } else if (kept.is_structured()) {
      for (auto& item : kept) item = identity(*field.nested, item);
    }
  }
  return out;
}

Json json_schema(const Table& table, bool is_root) {
  Json properties = Json::object(), required = Json::array();
  for (const auto& field : table) {
    Json schema = element_schema(field);
    const Json one = schema;
    if (field.list) schema = {{"type", "array"}, {"items", schema}};
    if (field.list && field.unique) schema["uniqueItems"] = true;
    if (field.list && field.type == ValueType::kText) schema = {{"anyOf", {one, schema}}};
    if (field.map) schema = {{"type", "object"}, {"additionalProperties", schema}};
    if (field.optional) schema = {{"anyOf", {schema, {{"type", "null"}}}}};
    if (const std::string doc = full_doc(field); !doc.empty()) schema["description"] = doc;
    if (!field.required && !field.nested) schema["default"] = field.default_value;
    if (field.required) required.push_back(field.name);
    properties[field.name] = std::move(schema);
  }
  Json schema = {{"type", "object"}, {"additionalProperties", false}};
  if (is_root) {
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema";
    properties["defaults"] = {{"description", "Recipe files to start from, relative to this one; later ones win"},
                              {"type", "array"},
                              {"items", {{"type", "string"}}}};
    required = Json::array();  // a file under `defaults:`, the environment or the command line may give them
  }
  if (!required.empty()) schema["required"] = std::move(required);
  schema["properties"] = std::move(properties);
  return schema;
}

std::string markdown(const Table& table, const std::string& path) {
  std::string rows;
  for (const auto& field : table) {
    const std::string at = child_path(path, field.name);
    std::string doc;
    for (char c : full_doc(field)) doc += c == '|' ? std::string("\\|") : std::string(1, c);
    const std::string fallback = field.required                                   ? "required"
                                 : field.nested && !field.list && !field.optional ? ""
                                                                                  : yaml_value(field.default_value);
    rows += fmt::format("| `{}` | {} | {} | {} | {} |\n", at, type_text(field), fallback, bound_text(field), doc);
    if (field.nested)
      rows += markdown(*field.nested, field.list ? child_path(at, "N") : field.map ? child_path(at, "NAME") : at);
  }
  return rows;
}

}  // namespace moraine::core::config_detail
