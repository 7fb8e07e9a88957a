#include "core/config_yaml.h"

#include <optional>
#include <sstream>

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include "core/error.h"
#include "core/utf8.h"

namespace moraine::core {

namespace {

using OriginOf = std::function<Origin(int, int)>;

// Builds the tree from events: yaml-cpp's own nodes hide duplicate keys, quotes and merge keys.
class TreeBuilder : public YAML::EventHandler {
 public:
  TreeBuilder(const OriginOf& origin_of, Problems& problems) : origin_of_(origin_of), problems_(problems) {}

  ConfigNode take_root() { return std::move(root_); }
  Origin origin_at(const YAML::Mark& mark) const {
    return mark.is_null() ? origin_of_(1, 1) : origin_of_(mark.line + 1, mark.column + 1);
  }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override { finish(leaf(mark, ConfigNode::Kind::kNull)); }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    ConfigNode node = leaf(mark, ConfigNode::Kind::kScalar);
    complain(node, "aliases are not supported", "refer to the key itself: ${key.path}");
    finish(std::move(node));
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t, const std::string& value) override {
    ConfigNode node = leaf(mark, ConfigNode::Kind::kScalar);
    node.text = value;
    node.quoted = tag == "!";  // yaml-cpp's mark of quoted and block scalars; plain ones carry "?"
    if (tag != "!") refuse_tag(node, tag);
    finish(std::move(node));
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {
    open_.push_back({.node = leaf(mark, ConfigNode::Kind::kList)});
    refuse_tag(open_.back().node, tag);
  }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t, YAML::EmitterStyle::value) override {
    open_.push_back({.node = leaf(mark, ConfigNode::Kind::kMap)});
    refuse_tag(open_.back().node, tag);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapEnd() override { close(); }

 private:
  // A list or map that is still being read; a map waits for a key or for the value of `key`.
  struct Frame {
    ConfigNode node;
    std::optional<std::string> key = std::nullopt;
    Origin key_origin = {};
    bool discard = false;  // the value of a refused key
  };

  ConfigNode leaf(const YAML::Mark& mark, ConfigNode::Kind kind) const {
    ConfigNode node;
    node.kind = kind;
    node.origin = origin_at(mark);
    return node;
  }

  std::string path() const {
    std::string path;
    for (const auto& frame : open_) {
      if (frame.node.kind == ConfigNode::Kind::kList)
        path = config_detail::child_path(path, std::to_string(frame.node.items.size()));
      else if (frame.key)
        path = config_detail::child_path(path, *frame.key);
    }
    return path;
  }

  void complain(ConfigNode& node, const std::string& what, const std::string& hint) {
    node.broken = true;
    problems_.add(node.origin, path(), what, hint);
  }

  void refuse_tag(ConfigNode& node, const std::string& tag) {
    if (!tag.empty() && tag != "?")
      complain(node, "the tag " + tag + " is not supported", "remove it; a key's type is fixed");
  }

  void close() {
    ConfigNode node = std::move(open_.back().node);
    open_.pop_back();
    finish(std::move(node));
  }

  void finish(ConfigNode node) {
    if (open_.empty()) {
      root_ = std::move(node);
      return;
    }
    Frame& frame = open_.back();
    if (frame.node.kind == ConfigNode::Kind::kList) {
      frame.node.items.push_back(std::move(node));
    } else if (!frame.key) {
      begin_member(frame, node);
    } else {
      if (node.kind == ConfigNode::Kind::kNull) node.origin = frame.key_origin;  // yaml-cpp names the next line
      if (!frame.discard) {
        frame.node.members.emplace_back(*frame.key, std::move(node));
        frame.node.member_origins.push_back(frame.key_origin);
      }
      frame.key.reset();
    }
  }

  void begin_member(Frame& frame, ConfigNode& key) {
    frame.discard = true;
    frame.key_origin = key.origin;
    if (key.kind != ConfigNode::Kind::kScalar || key.broken) {
      if (!key.broken) complain(key, "a key must be text", "");
      frame.key.emplace(1, '?');
      return;
    }
    frame.key = key.text;
    for (size_t i = 0; i < frame.node.members.size(); ++i) {
      if (frame.node.members[i].first != key.text) continue;
      complain(key, "the key stands twice, first at " + frame.node.member_origins[i], "remove one of the two");
      return;
    }
    if (key.text == "<<" && !key.quoted) {
      complain(key, "merge keys are not supported", "list the shared file under defaults:, or write ${key.path}");
      return;
    }
    frame.discard = false;
  }

  const OriginOf& origin_of_;
  Problems& problems_;
  std::vector<Frame> open_;
  ConfigNode root_;
};

// yaml-cpp hands malformed bytes on, and they would fail much later, when a value is stored. UTF-16 and UTF-32, known
// by their first bytes, it decodes itself.
void refuse_foreign_bytes(const std::string& text, const OriginOf& origin_of) {
  if (text.starts_with("\xFF\xFE") || text.starts_with("\xFE\xFF") || text.starts_with(std::string("\0\0\xFE\xFF", 4)))
    return;
  int line = 1, column = 1;
  for (size_t pos = 0; pos < text.size();) {
    const size_t start = pos;
    next_code_point(text, pos);
    if (!is_utf8(std::string_view(text).substr(start, pos - start)))
      throw UserError(
          fmt::format("{}: not UTF-8: byte {:#04x}", origin_of(line, column), static_cast<unsigned char>(text[start])),
          "save it as UTF-8, for example with: iconv -f latin1 -t utf-8");
    column = text[start] == '\n' ? 1 : column + 1;
    if (text[start] == '\n') ++line;
  }
}

}  // namespace

ConfigNode parse_yaml(const std::string& text, const OriginOf& origin_of, Problems& problems) {
  refuse_foreign_bytes(text, origin_of);
  TreeBuilder builder(origin_of, problems);
  std::istringstream stream(text);
  try {
    YAML::Parser parser(stream);
    if (!parser.HandleNextDocument(builder)) {
      ConfigNode empty;
      empty.origin = origin_of(1, 1);
      return empty;
    }
    ConfigNode root = builder.take_root();
    if (parser.HandleNextDocument(builder))
      problems.add(root.origin, "", "more than one YAML document", "remove what follows '---'");
    return root;
  } catch (const YAML::Exception& error) {
    throw UserError(
        fmt::format("{}: not YAML: {}", builder.origin_at(error.mark), error.msg),
        "check indentation, quotes and brackets there; inside [] and {} a reference needs quotes: \"${key}\"");
  }
}

}  // namespace moraine::core
