// Every key of every method's recipe, changed alone: a key's documentation says what it can change (a result, only what
// is measured, or nothing), and the ids of the units of the two plans say whether that is true.
#include <algorithm>
#include <map>
#include <set>

#include <gtest/gtest.h>

#include "algorithms/language_model.h"
#include "algorithms/register.h"
#include "core/error.h"
#include "core/file.h"
#include "models/decoder.h"
#include "models/vit.h"
#include "tests/sweeps/prepared_files.h"
#include "tests/sweeps/sweeps.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms {
namespace {

namespace fs = std::filesystem;
using core::Json;

// Results that are made up as a plan asks for them: enough for every plan to go on to its end.
class MadeUpResults final : public RunState {
 public:
  std::optional<std::string> result(const std::string& unit) const override {
    const auto it = results_.find(unit);
    return it == results_.end() ? std::nullopt : std::optional(it->second->id());
  }
  core::ArtefactPtr artefact(const std::string& id) const override { return artefacts_.at(id); }

  void finish(const Unit& unit) {
    // A higher rank scores better, so that a budget for ranks has something to decide.
    const double bits = 3 - 0.1 * unit.spec.value("rank", 0);
    const Json result = {{"nats", bits * 1000}, {"tokens", 1000}, {"bytes", 1000}, {"correct", 10}};
    const auto artefact = core::Artefact::create(
        unit.kind, {{"of", unit.id()}, {"result", result}, {"rank", unit.spec.value("rank", 0)}, {"name", "made-up"}},
        {});
    results_[unit.id()] = artefact;
    artefacts_[artefact->id()] = artefact;
  }

 private:
  std::map<std::string, core::ArtefactPtr> results_, artefacts_;
};

// The ids of a whole plan.
struct Ids {
  std::set<std::string> work, measurements;  // what leads to a result; what only measures one
  bool operator==(const Ids&) const = default;
};

Ids plan_to_the_end(const Method& method) {
  MadeUpResults results;
  Plan plan = method.plan(results);
  for (int wave = 0; wave < 100 && !plan.pending.empty(); ++wave, plan = method.plan(results))
    for (const auto& unit : plan.pending) results.finish(unit);
  EXPECT_TRUE(plan.pending.empty());
  Ids ids;
  for (const auto& unit : plan.finished) {
    const bool measures = unit.label.starts_with("test/") || unit.kind == "matrices";
    (measures ? ids.measurements : ids.work).insert(unit.id());
  }
  return ids;
}

struct Key {
  std::string path, doc;
  Json schema, fallback;
};

// A list of the alternatives, which may be written as its only item; or else the first one, which is no reference and
// not null.
Json unwrapped(const Json& schema) {
  if (!schema.contains("anyOf")) return schema;
  for (const auto& one : schema.at("anyOf"))
    if (one.value("type", "") == "array") return one;
  return unwrapped(schema.at("anyOf").at(0));
}

void collect(const Json& schema, const std::string& path, std::vector<Key>& out) {
  for (const auto& [name, property] : schema.at("properties").items()) {
    if (path.empty() && name == "defaults") continue;
    const std::string at = path.empty() ? name : path + "." + name;
    const Json value = unwrapped(property);
    const Json item = value.value("type", "") == "array" ? unwrapped(value.at("items")) : Json();
    if (value.contains("properties")) {
      collect(value, at, out);
    } else if (item.is_object() && item.contains("properties")) {
      collect(item, at + ".0", out);
    } else {
      out.push_back({at, property.value("description", ""), value, property.value("default", Json())});
    }
  }
}

std::vector<Key> keys_of(const MethodEntry& method) {
  std::vector<Key> keys;
  collect(method.json_schema(), "", keys);
  return keys;
}

Json value_at(const Json& values, const std::string& path) {
  std::string pointer = "/" + path;
  std::replace(pointer.begin(), pointer.end(), '.', '/');
  return values.value(Json::json_pointer(pointer), Json());
}

// Another value of the type that the schema allows; null when there is none, or none can be known.
Json another(const Json& schema, const Json& value) {
  if (schema.contains("enum")) {
    for (const auto& choice : schema.at("enum"))
      if (choice != value) return choice;
    return nullptr;
  }
  const std::string type = schema.value("type", "");
  if (type == "boolean") return !value.get<bool>();
  if (type == "array") {
    if (value.size() > 1) return Json(value.begin(), value.end() - 1);
    const Json item = another(unwrapped(schema.at("items")), value.empty() ? Json(0) : value.front());
    return item.is_null() ? item : Json::array({item});
  }
  const bool whole = type == "integer";
  if (!whole && type != "number") return nullptr;
  const double number = value.get<double>(), most = schema.value("maximum", 1e18);
  const double least = schema.value("minimum", schema.value("exclusiveMinimum", -1e18));
  for (const double other : {whole ? number + 1 : number / 2, whole ? number - 1 : number + 0.25})
    if (other != number && other <= most && (other > least || (other == least && schema.contains("minimum"))))
      return whole ? Json(static_cast<int64_t>(other)) : Json(other);
  return nullptr;
}

class RecipeKeys : public testing::TestWithParam<std::string> {
 protected:
  static void SetUpTestSuite() {
    files_ = std::make_unique<TemporaryDirectory>();
    make_prepared_files(files_->path());
    for (const uint64_t seed : {1, 2}) write_model(seed);
    write_vit();
    fs::create_directories(*files_ / "copies");
    for (const char* name : {"text", "images", "encoder", "encoded", "examples", "model1"})
      fs::copy(*files_ / name, *files_ / "copies" / name, fs::copy_options::recursive);
  }
  static void TearDownTestSuite() { files_.reset(); }

  static void write_model(uint64_t seed) {
    models::DecoderConfig config;
    config.family = models::DecoderConfig::Family::kOlmo2;
    config.vocab_size = 264, config.hidden_size = 16, config.intermediate_size = 24, config.num_layers = 2;
    config.num_heads = config.num_kv_heads = 2, config.head_dim = 8, config.max_position_embeddings = 64;
    const auto model = models::Decoder::from_config(config, seed, at::kFloat);
    write_model_directory(file(fmt::format("model{}", seed)), config.to_json(),
                          {model.weights().begin(), model.weights().end()});
  }

  static void write_vit() {
    models::VitConfig config;
    config.image_size = 6, config.patch_size = 3, config.num_channels = 1, config.hidden_size = 8;
    config.intermediate_size = 12, config.num_layers = 1, config.num_heads = 2;
    const auto model = models::Vit::from_config(config, 1, at::kFloat);
    write_model_directory(file("vit"), config.to_json(), {model.weights().begin(), model.weights().end()});
  }

  static std::string file(const std::string& name) { return (*files_ / name).string(); }
  // A recipe with overrides, as `run` reads it, and its whole plan.
  struct Loaded {
    Json values;
    std::vector<core::ResolvedValue> resolved;
    Ids ids;
  };
  const Loaded& load(const std::string& recipe, const Overrides& overrides);
  void examine(const Sweep& sweep, const Key& key);

  static std::unique_ptr<TemporaryDirectory> files_;
  std::map<std::pair<std::string, Overrides>, Loaded> loaded_;
};
std::unique_ptr<TemporaryDirectory> RecipeKeys::files_;

const RecipeKeys::Loaded& RecipeKeys::load(const std::string& recipe, const Overrides& overrides) {
  const auto known = loaded_.find({recipe, overrides});
  if (known != loaded_.end()) return known->second;
  const fs::path path = files_->write("recipe.yaml", recipe);
  ParsedRecipe parsed = load_recipe(path, overrides);
  parsed.method->open_inputs();
  Loaded loaded{parsed.values, parsed.resolved, plan_to_the_end(*parsed.method)};
  const auto restored = find_method(parsed.run.method).restore(parsed.values, parsed.method->inputs());
  EXPECT_EQ(plan_to_the_end(*restored).work, loaded.ids.work) << "a recorded run plans something else";
  return loaded_.emplace(std::pair(recipe, overrides), std::move(loaded)).first->second;
}

Overrides joined(Overrides first, const Overrides& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

std::string written(const std::vector<core::ResolvedValue>& resolved) {
  std::string text;
  for (const auto& value : resolved) text += value.path + ": " + value.value + "\n";
  return text;
}

void RecipeKeys::examine(const Sweep& sweep, const Key& key) {
  SCOPED_TRACE(sweep.method + ": " + key.path);
  const auto found = sweep.changes.find(key.path);
  Change how = found == sweep.changes.end() ? Change{} : found->second;
  if (how.refused && !how.context.empty()) {
    EXPECT_THROW(load(sweep.recipe, how.context), core::UserError);
    return;
  }
  const Loaded& base = load(sweep.recipe, how.context);
  for (const auto& moved : how.moved)
    EXPECT_EQ(load(sweep.recipe, joined(how.context, {moved})).ids, base.ids) << "the same bytes elsewhere: " << moved;
  if (how.change.empty()) {
    Json value = value_at(base.values, key.path);
    if (value.is_null()) value = key.fallback;
    const Json other = another(key.schema, value);
    if (other.is_null()) {  // a key of one value, or one whose change has to be named above
      EXPECT_TRUE((key.schema.value("type", "") != "string" && !value.is_object()) || !how.moved.empty())
          << "no other value known";
      return;
    }
    how.change = {key.path + "=" + other.dump()};
  }
  SCOPED_TRACE(testing::PrintToString(how.change));
  if (how.refused) {
    EXPECT_THROW(load(sweep.recipe, joined(how.context, how.change)), core::UserError);
    return;
  }
  const Loaded& changed = load(sweep.recipe, joined(how.context, how.change));
  EXPECT_NE(changed.values, base.values) << "recipe.json does not hold it";
  EXPECT_NE(written(changed.resolved), written(base.resolved)) << "report and resolved.yaml do not hold it";
  const Ids &before = base.ids, &after = changed.ids;
  if (key.doc.ends_with("Never changes a result.") || key.path == "run_dir") {
    EXPECT_TRUE(after == before) << "changes ids of units";
  } else if (key.doc.ends_with("Evaluation only.")) {
    EXPECT_TRUE(std::includes(after.work.begin(), after.work.end(), before.work.begin(), before.work.end()))
        << "changes more than measurements";
    EXPECT_EQ(after.measurements == before.measurements, how.only_drawn) << "reaches no measurement";
  } else if (how.configured) {
    EXPECT_FALSE(after.measurements == before.measurements) << "reaches no measurement";
  } else {
    EXPECT_FALSE(after.work == before.work) << "reaches no result: " << key.doc;
  }
}

// Of paths: the same bytes elsewhere change nothing, other bytes do.
TEST_P(RecipeKeys, ChangeWhatTheirDocumentationSays) {
  std::set<std::string> examined;
  for (const Sweep& sweep : Sweeps(files_->path()).of(GetParam()))
    for (const Key& key : keys_of(find_method(GetParam()))) {
      if (key.path == "method" || (!sweep.only.empty() && !sweep.only.contains(key.path))) continue;
      if (sweep.only.empty() && sweep.changes.contains(key.path) && sweep.changes.at(key.path).elsewhere) continue;
      examined.insert(key.path);
      examine(sweep, key);
    }
  for (const Key& key : keys_of(find_method(GetParam())))
    EXPECT_TRUE(key.path == "method" || examined.contains(key.path)) << "no recipe of the sweep covers " << key.path;
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& entry : methods()) names.push_back(entry.name);
  return names;
}
INSTANTIATE_TEST_SUITE_P(Methods, RecipeKeys, testing::ValuesIn(method_names()),
                         [](const auto& each) { return each.param; });

}  // namespace
}  // namespace moraine::algorithms
