#include "algorithms/unit.h"

#include <gtest/gtest.h>

#include "core/hash.h"

namespace moraine::algorithms {
namespace {

class Nothing : public RunState {
 public:
  std::optional<std::string> result(const std::string& unit) const override {
    return unit == done ? std::optional<std::string>("artefact") : std::nullopt;
  }
  core::ArtefactPtr artefact(const std::string&) const override { return nullptr; }
  bool keeps_finished_specs() const override { return keeps; }
  std::string done;
  bool keeps = true;
};

TEST(Unit, IdIsTheHashOfTheCanonicalJsonOfKindSpecAndInputs) {
  for (const Unit& unit :
       {Unit{.kind = "train", .label = "x", .spec = {{"b", 1.5}, {"a", {1, nullptr}}}, .inputs = {"i", "j"}},
        Unit{.kind = "q\"\\\n\u00e9", .label = "y", .spec = nullptr, .inputs = {}}}) {
    EXPECT_EQ(unit.id(),
              core::sha256(core::Json{{"kind", unit.kind}, {"spec", unit.spec}, {"inputs", unit.inputs}}.dump()));
  }
}

TEST(PlanBuilder, NotesEveryUnitOnceWithItsId) {
  Nothing state;
  const Unit a{.kind = "a", .label = "a", .spec = {{"x", 1}}, .inputs = {"i"}},
      b{.kind = "b", .label = "b", .spec = {}, .inputs = {}};
  state.done = a.id();
  for (const bool keeps : {true, false}) {
    state.keeps = keeps;
    PlanBuilder builder(state);
    EXPECT_EQ(builder.need(a), "artefact");
    EXPECT_EQ(builder.need(b), std::nullopt);
    EXPECT_EQ(builder.need(a), "artefact");
    const Plan plan = builder.finish();
    ASSERT_EQ(plan.finished.size(), 1u);
    ASSERT_EQ(plan.pending.size(), 1u);
    EXPECT_EQ(plan.finished_ids.at(0), a.id());
    EXPECT_EQ(plan.pending_ids.at(0), b.id());
    EXPECT_EQ(plan.finished[0].spec.is_null(), !keeps);
    EXPECT_EQ(plan.finished[0].label, "a");
  }
}

}  // namespace
}  // namespace moraine::algorithms
