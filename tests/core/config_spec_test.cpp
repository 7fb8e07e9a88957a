// Schemas of what is recorded: unit specifications and recipes of older versions.
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/config.h"
#include "core/error.h"

namespace moraine::core {
namespace {

using testing::HasSubstr;

struct Share {
  int64_t first = 0, count = 0;
};
struct Spec {
  uint64_t seed = 0;
  Json architecture;
  std::map<std::string, Share> shares;
  std::vector<int64_t> ranks;
  double scale = 1;
  Share part;  // joined later
  bool strict = false;
};

const Schema<Share>& share_schema() {
  static const auto schema = Schema<Share>().field("first", &Share::first).field("count", &Share::count).min(1);
  return schema;
}

const Schema<Spec>& schema_without_new_keys() {
  static const auto schema = Schema<Spec>()
                                 .field("seed", &Spec::seed)
                                 .field("architecture", &Spec::architecture)
                                 .map("shares", &Spec::shares, share_schema())
                                 .field("ranks", &Spec::ranks)
                                 .unique()
                                 .field("scale", &Spec::scale);
  return schema;
}

const Schema<Spec>& spec_schema() {
  static const auto schema = [] {
    Schema<Spec> s = schema_without_new_keys();
    return s.object("part", &Spec::part, share_schema())
        .joined_later()
        .field("strict", &Spec::strict)
        .joined_later()
        .evaluation_only()
        .doc("Refuse what is odd");
  }();
  return schema;
}

Spec sample() {
  Spec spec;
  spec.seed = std::numeric_limits<uint64_t>::max();
  spec.architecture = {{"theta", 1e4}, {"layers", {1, 2.5, "3", true, nullptr}}, {"empty", Json::object()}};
  spec.shares = {{"german", {0, 10}}, {"a.b", {5, 1}}};
  spec.ranks = {8, 4};
  spec.scale = 0.1;
  return spec;
}

std::string complaint(const Schema<Spec>& schema, const Json& spec) {
  try {
    from_spec(schema, spec);
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(UnitSpecification, IsReadBackAsItWasWritten) {
  const Json json = to_spec(spec_schema(), sample());
  const Spec back = from_spec(spec_schema(), Json::parse(json.dump()));
  EXPECT_EQ(back.seed, std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(back.architecture, sample().architecture);
  EXPECT_EQ(back.shares.at("a.b").first, 5);
  EXPECT_EQ(to_spec(spec_schema(), back), json);
}

TEST(UnitSpecification, OfAnotherVersionIsRefusedByKey) {
  Json json = to_spec(spec_schema(), sample());
  json["scal"] = json["scale"];
  json.erase("scale");
  EXPECT_THAT(complaint(spec_schema(), json), HasSubstr("unit specification: 2 problems"));
  EXPECT_THAT(complaint(spec_schema(), json), HasSubstr("scale: is missing"));
  EXPECT_THAT(complaint(spec_schema(), json), HasSubstr("scal: unknown key"));
  json = to_spec(spec_schema(), sample());
  json["shares"]["german"]["count"] = 0;
  EXPECT_THAT(complaint(spec_schema(), json), HasSubstr("shares.german.count: must be at least 1"));
  json["shares"]["german"].erase("count");
  EXPECT_THAT(complaint(spec_schema(), json), HasSubstr("shares.german.count: is missing"));
  json["shares"] = {1, 2};
  EXPECT_THAT(complaint(spec_schema(), json), HasSubstr("shares: must be a map"));
}

TEST(UnitSpecification, AKeyThatJoinedLaterLeavesOlderOnesAsTheyAre) {
  const Json old = to_spec(schema_without_new_keys(), sample());
  EXPECT_EQ(to_spec(spec_schema(), sample()), old) << "its default changes no id";
  EXPECT_FALSE(from_spec(spec_schema(), old).strict) << "and stands for what was not recorded";
  Spec changed = sample();
  changed.strict = true;
  changed.part.count = 3;
  const Json json = to_spec(spec_schema(), changed);
  EXPECT_EQ(json.at("strict"), true);
  EXPECT_EQ(json.at("part").at("count"), 3);
  EXPECT_TRUE(from_spec(spec_schema(), json).strict);
  std::vector<ResolvedValue> values;
  spec_schema().resolve(ConfigNode{.kind = ConfigNode::Kind::kMap}, "", sample(), values);
  EXPECT_TRUE(std::any_of(values.begin(), values.end(), [](const auto& value) { return value.path == "strict"; }))
      << "people see every value";
}

TEST(UnitSpecification, ListsOfDifferentItemsRefuseOneThatStandsTwice) {
  Json json = to_spec(spec_schema(), sample());
  json["ranks"] = {8, 4, 8};
  EXPECT_THAT(complaint(spec_schema(), json), HasSubstr("ranks: 8 stands twice (remove one of the two)"));
}

struct Train {
  int64_t steps = 1, log_every = 10;
};
struct Domain {
  std::string name, path;
  Train train;
};
struct Recipe {
  std::vector<Domain> domains;
  std::map<std::string, Domain> named;
  std::optional<Train> extra;
};

TEST(RecipeIdentity, LeavesOutWhatChangesNothingAndPathsAtAnyDepth) {
  const auto train =
      Schema<Train>().field("steps", &Train::steps).field("log_every", &Train::log_every).changes_nothing();
  const auto domain = Schema<Domain>()
                          .field("name", &Domain::name)
                          .field("path", &Domain::path)
                          .path()
                          .object("train", &Domain::train, train);
  const auto schema = Schema<Recipe>()
                          .list("domains", &Recipe::domains, domain)
                          .map("named", &Recipe::named, domain)
                          .optional_object("extra", &Recipe::extra, train);
  Recipe recipe;
  recipe.domains.push_back({"german", "/data/german.h5", {5, 1}});
  recipe.named["x"] = {"x", "/x.h5", {6, 1}};
  const Json kept = schema.identity(schema.to_json(recipe));
  EXPECT_EQ(kept, Json::parse(R"({"domains": [{"name": "german", "train": {"steps": 5}}],
                                  "named": {"x": {"name": "x", "train": {"steps": 6}}}, "extra": null})"));
  EXPECT_THAT(schema.markdown(), HasSubstr("Never changes a result."));
  EXPECT_THAT(spec_schema().markdown(), HasSubstr("Refuse what is odd. Evaluation only."));
}

}  // namespace
}  // namespace moraine::core
