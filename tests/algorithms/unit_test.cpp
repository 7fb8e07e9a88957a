#include "algorithms/unit.h"

#include <gtest/gtest.h>

#include "core/error.h"
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
  PlanMemory* memory() const override { return remembers ? &plans : nullptr; }
  std::string done;
  bool keeps = true, remembers = false;
  mutable PlanMemory plans;
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

TEST(PlanBuilder, AsksOnceForWhatIsFinished) {
  Nothing state;
  state.remembers = true;
  int made = 0;
  const auto unit = [&](const std::string& label, int x) {
    ++made;
    return Unit{.kind = "k", .label = label, .spec = {{"x", x}}, .inputs = {}, .cost = 3};
  };
  state.done = unit("a", 1).id();
  made = 0;
  for (int plan = 0; plan < 3; ++plan) {
    PlanBuilder builder(state);
    EXPECT_EQ(builder.need("a", [&] { return unit("a", 1); }), "artefact");
    EXPECT_EQ(builder.need("the same", [&] { return unit("the same", 1); }), "artefact");
    EXPECT_EQ(builder.need("b", [&] { return unit("b", 2); }), std::nullopt);
    const Plan all = builder.finish();
    EXPECT_EQ(made, plan == 0 ? 3 : 3 + plan);
    EXPECT_EQ(all.pending.size(), 1u);
    EXPECT_EQ(all.finished_cost, (std::map<std::string, double>{{"k", 3}}));
  }
  PlanBuilder builder(state);
  builder.need("b", [&] { return unit("b", 2); });
  EXPECT_THROW(builder.need("b", [&] { return unit("b", 3); }), core::InternalError);
}

}  // namespace
}  // namespace moraine::algorithms
