#pragma once

// Part of core/config.h: the bodies of Schema's templates.
#include <cmath>

#include "core/error.h"

namespace moraine::core {

namespace config_detail {

template <typename T>
struct ValueOf {
  using Element = T;
  static constexpr bool kList = false, kOptional = false;
};
template <typename T>
struct ValueOf<std::vector<T>> {
  using Element = T;
  static constexpr bool kList = true, kOptional = false;
};
template <typename T>
struct ValueOf<std::optional<T>> {
  using Element = T;
  static constexpr bool kList = false, kOptional = true;
};

template <typename Element>
constexpr ValueType value_type() {
  if constexpr (std::is_same_v<Element, bool>)
    return ValueType::kBool;
  else if constexpr (std::is_same_v<Element, int64_t> || std::is_same_v<Element, uint64_t>)
    return ValueType::kInteger;
  else if constexpr (std::is_same_v<Element, double>)
    return ValueType::kNumber;
  else if constexpr (std::is_same_v<Element, Json>)
    return ValueType::kAny;
  else {
    static_assert(std::is_same_v<Element, std::string>,
                  "a field is a bool, int64_t, uint64_t, double, std::string or Json, or an optional or vector of one");
    return ValueType::kText;
  }
}

template <typename T>
Json to_value(const T& value) {
  if constexpr (ValueOf<T>::kOptional)
    return value ? Json(*value) : Json(nullptr);
  else
    return Json(value);
}

template <typename T>
T from_value(const Json& json) {
  if constexpr (ValueOf<T>::kOptional)
    return json.is_null() ? T() : T(json.get<typename ValueOf<T>::Element>());
  else
    return json.get<T>();
}

}  // namespace config_detail

template <typename C>
Schema<C>& Schema<C>::add(config_detail::FieldInfo info, Member member) {
  for (const auto& other : table_)
    MORAINE_CHECK(other.name != info.name, "field '{}' stands twice in a schema", info.name);
  info.default_value = member.get(C{}, true);
  table_.push_back(std::move(info));
  members_.push_back(std::move(member));
  return *this;
}

template <typename C>
template <typename T>
Schema<C>& Schema<C>::field(std::string name, T C::*member) {
  using Value = config_detail::ValueOf<T>;
  config_detail::FieldInfo info{.name = std::move(name),
                                .type = config_detail::value_type<typename Value::Element>(),
                                .list = Value::kList,
                                .optional = Value::kOptional,
                                .is_unsigned = std::is_same_v<typename Value::Element, uint64_t>};
  return add(std::move(info),
             {.parse =
                  [member](const config_detail::FieldInfo& field, const ConfigNode& node, const std::string& path,
                           C& out, Problems& problems) {
                    if (const auto value = config_detail::parse_value(field, node, path, problems))
                      out.*member = config_detail::from_value<T>(*value);
                  },
              .get = [member](const C& value, bool) { return config_detail::to_value(value.*member); }});
}

template <typename C>
template <typename S>
Schema<C>& Schema<C>::object(std::string name, S C::*member, const Schema<S>& schema) {
  config_detail::FieldInfo info{.name = std::move(name), .type = config_detail::ValueType::kObject};
  info.nested = std::make_shared<const config_detail::Table>(schema.table_);
  return add(
      std::move(info),
      {.parse = [member, schema](const config_detail::FieldInfo&, const ConfigNode& node, const std::string& path,
                                 C& out, Problems& problems) { schema.parse(node, path, out.*member, problems); },
       .get = [member, schema](const C& value, bool complete) { return schema.write(value.*member, complete); }});
}

template <typename C>
template <typename S>
Schema<C>& Schema<C>::optional_object(std::string name, std::optional<S> C::*member, const Schema<S>& schema) {
  config_detail::FieldInfo info{.name = std::move(name), .type = config_detail::ValueType::kObject, .optional = true};
  info.nested = std::make_shared<const config_detail::Table>(schema.table_);
  return add(std::move(info), {.parse =
                                   [member, schema](const config_detail::FieldInfo&, const ConfigNode& node,
                                                    const std::string& path, C& out, Problems& problems) {
                                     if (node.kind == ConfigNode::Kind::kNull) {
                                       (out.*member).reset();
                                     } else {
                                       if (!(out.*member)) (out.*member).emplace();
                                       schema.parse(node, path, *(out.*member), problems);
                                     }
                                   },
                               .get =
                                   [member, schema](const C& value, bool complete) {
                                     return value.*member ? schema.write(*(value.*member), complete) : Json(nullptr);
                                   }});
}

template <typename C>
template <typename S>
Schema<C>& Schema<C>::list(std::string name, std::vector<S> C::*member, const Schema<S>& schema) {
  config_detail::FieldInfo info{.name = std::move(name), .type = config_detail::ValueType::kObject, .list = true};
  info.nested = std::make_shared<const config_detail::Table>(schema.table_);
  return add(std::move(info), {.parse =
                                   [member, schema](const config_detail::FieldInfo&, const ConfigNode& node,
                                                    const std::string& path, C& out, Problems& problems) {
                                     const auto* items = config_detail::parse_items(node, path, problems);
                                     if (items == nullptr) return;
                                     (out.*member).assign(items->size(), S{});
                                     for (size_t i = 0; i < items->size(); ++i)
                                       schema.parse((*items)[i], config_detail::child_path(path, std::to_string(i)),
                                                    (out.*member)[i], problems);
                                   },
                               .get =
                                   [member, schema](const C& value, bool complete) {
                                     Json list = Json::array();
                                     for (const auto& item : value.*member)
                                       list.push_back(schema.write(item, complete));
                                     return list;
                                   }});
}

template <typename C>
template <typename S>
Schema<C>& Schema<C>::map(std::string name, std::map<std::string, S> C::*member, const Schema<S>& schema) {
  config_detail::FieldInfo info{.name = std::move(name), .type = config_detail::ValueType::kObject, .map = true};
  info.nested = std::make_shared<const config_detail::Table>(schema.table_);
  return add(std::move(info), {.parse =
                                   [member, schema](const config_detail::FieldInfo&, const ConfigNode& node,
                                                    const std::string& path, C& out, Problems& problems) {
                                     const auto* members = config_detail::parse_members(node, path, problems);
                                     if (members == nullptr) return;
                                     (out.*member).clear();
                                     for (const auto& [key, item] : *members)
                                       schema.parse(item, config_detail::child_path(path, key), (out.*member)[key],
                                                    problems);
                                   },
                               .get =
                                   [member, schema](const C& value, bool complete) {
                                     Json map = Json::object();
                                     for (const auto& [key, item] : value.*member)
                                       map[key] = schema.write(item, complete);
                                     return map;
                                   }});
}

template <typename C>
config_detail::FieldInfo& Schema<C>::last() {
  MORAINE_CHECK(!table_.empty(), "a schema is refined before it has a field");
  return table_.back();
}

template <typename C>
void Schema<C>::parse(const ConfigNode& node, const std::string& path, C& out, Problems& problems) const {
  const size_t before = problems.size();
  if (!config_detail::check_keys(table_, node, path, problems)) return;
  for (size_t i = 0; i < table_.size(); ++i)
    if (const ConfigNode* child = node.find(table_[i].name))
      members_[i].parse(table_[i], *child, config_detail::child_path(path, table_[i].name), out, problems);
  if (problems.size() > before) return;
  for (const auto& rule : checks_)
    if (const auto what = rule(out)) problems.add(node.origin, path, *what);
}

template <typename C>
Json Schema<C>::write(const C& value, bool complete) const {
  Json json = Json::object();
  for (size_t i = 0; i < table_.size(); ++i) {
    Json field = members_[i].get(value, complete);
    const bool left_out =
        table_[i].joined_later && !complete && members_[i].get(value, true) == table_[i].default_value;
    if (!left_out) json[table_[i].name] = std::move(field);
  }
  return json;
}

template <typename C>
C Schema<C>::from_json(const Json& json, const std::string& what) const {
  Problems problems;
  C value{};
  parse(config_detail::complete_node(table_, json, "", problems), "", value, problems);
  problems.throw_if_any(what);
  return value;
}

}  // namespace moraine::core
