#include "coordinator/accepted_state.h"

#include <gtest/gtest.h>

#include <fstream>

#include "coordinator/verify.h"
#include "core/error.h"
#include "toy.h"

namespace moraine::coordinator {
namespace {

void flip_last_byte(const std::filesystem::path& path) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(-1, std::ios::end);
  const char byte = static_cast<char>(file.get() ^ 1);
  file.seekp(-1, std::ios::end);
  file.put(byte);
}

Record accepted(const algorithms::Unit& unit, const core::Artefact& artefact) {
  return {1, RecordType::kAccept, {{"unit", unit.id()}, {"artefact", artefact.id()}}};
}

TEST(AcceptedState, KeepsArtefactsByTheirHash) {
  const TemporaryDirectory directory;
  const core::ArtefactPtr artefact = toy_artefact("a");
  const std::string id = artefact->id();
  AcceptedState state(directory.path(), {});
  state.store(*artefact);
  EXPECT_TRUE(std::filesystem::exists(directory.path() / id.substr(0, 2) / (id.substr(2) + ".safetensors")));
  EXPECT_THROW(state.artefact(id), core::InternalError) << "stored, not accepted";
  state.accept(toy_unit("a").id(), id);
  EXPECT_EQ(state.artefact(id)->meta().at("name"), "a");
  state.accept(toy_unit("b").id(), toy_artefact("b")->id());
  EXPECT_THROW(state.artefact(toy_artefact("b")->id()), core::UserError) << "accepted, not stored";
}

TEST(AcceptedState, KeepsABoundedNumberOfFilesMapped) {
  const TemporaryDirectory directory;
  AcceptedState state(directory.path(), {});
  std::weak_ptr<const core::Artefact> first;
  for (int i = 0; i < 1100; ++i) {
    const core::ArtefactPtr artefact = toy_artefact(std::to_string(i));
    const auto path = state.path_of(artefact->id());
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(artefact->bytes().span().data()),
               static_cast<std::streamsize>(artefact->bytes().size()));
    state.accept(std::to_string(i), artefact->id());
    const core::ArtefactPtr opened = state.artefact(artefact->id());
    if (i == 0) first = opened;
    if (i == 1000) {
      EXPECT_EQ(state.artefact(artefact->id()), opened) << "one object while somebody holds it";
      EXPECT_FALSE(first.expired());
    }
  }
  EXPECT_TRUE(first.expired()) << "a process may have 65,530 mappings";
  EXPECT_EQ(state.artefact(toy_artefact("0")->id())->meta().at("name"), "0") << "opened again";
}

TEST(AcceptedState, NoticesDamageOnReadingAndRepairsItOnWriting) {
  const TemporaryDirectory directory;
  const core::ArtefactPtr artefact = toy_artefact("a");
  AcceptedState state(directory.path(), {});
  state.store(*artefact);
  state.accept(toy_unit("a").id(), artefact->id());
  flip_last_byte(state.path_of(artefact->id()));
  EXPECT_THROW(state.artefact(artefact->id()), core::UserError);
  state.store(*artefact);
  EXPECT_EQ(state.artefact(artefact->id())->id(), artefact->id());
}

TEST(AcceptedState, ReportsADirectoryItCannotWrite) {
  const TemporaryDirectory directory;
  std::ofstream(directory.path() / "file") << "in the way";
  EXPECT_THROW(AcceptedState(directory.path() / "file", {}).store(*toy_artefact("a")), core::IoError);
}

TEST(AcceptedState, ForgetsUnitsWhoseArtefactIsMissingOrDamaged) {
  const TemporaryDirectory directory;
  AcceptedState state(directory.path(), {});
  for (const char* name : {"whole", "damaged", "missing"}) {
    const core::ArtefactPtr artefact = toy_artefact(name);
    state.store(*artefact);
    state.accept(toy_unit(name).id(), artefact->id());
    if (std::string(name) == "damaged") flip_last_byte(state.path_of(artefact->id()));
    if (std::string(name) == "missing") std::filesystem::remove(state.path_of(artefact->id()));
  }
  EXPECT_TRUE(state.result(toy_unit("missing").id()).has_value()) << "nothing is read before it is asked for";
  state.forget_damaged();
  EXPECT_EQ(state.result(toy_unit("whole").id()), toy_artefact("whole")->id());
  EXPECT_FALSE(state.result(toy_unit("damaged").id()).has_value());
  EXPECT_FALSE(state.result(toy_unit("missing").id()).has_value());
  EXPECT_THROW(state.artefact(toy_artefact("missing")->id()), core::InternalError);
}

TEST(AcceptedState, TakesTheLastResultOfAUnit) {
  const TemporaryDirectory directory;
  const auto unit = toy_unit("u");
  const std::vector<Record> records = {accepted(unit, *toy_artefact("old")), accepted(unit, *toy_artefact("new"))};
  EXPECT_EQ(AcceptedState(directory.path(), records).result(unit.id()), toy_artefact("new")->id());
}

TEST(FirstNonFinite, NamesTensorAndElementInEveryFloatType) {
  const auto check = [](core::DType dtype, auto finite, auto bad) {
    const std::vector<decltype(finite)> values = {finite, finite, bad};
    const core::TensorView tensor{"layer.A", dtype, {3}, std::as_bytes(std::span(values))};
    const auto found = first_non_finite(*core::Artefact::create("toy", {}, std::span(&tensor, 1)));
    return found.value_or("finite");
  };
  const std::string expected = "tensor 'layer.A' element 2 is NaN or infinite";
  EXPECT_EQ(check(core::DType::kF32, 1e38f, std::numeric_limits<float>::quiet_NaN()), expected);
  EXPECT_EQ(check(core::DType::kF32, 1e38f, -std::numeric_limits<float>::infinity()), expected);
  EXPECT_EQ(check(core::DType::kF64, 1e300, std::numeric_limits<double>::infinity()), expected);
  EXPECT_EQ(check(core::DType::kBF16, uint16_t{0x7f7f}, uint16_t{0xff80}), expected);
  EXPECT_EQ(check(core::DType::kF16, uint16_t{0x7bff}, uint16_t{0x7c01}), expected);
  EXPECT_EQ(check(core::DType::kF32, 1e38f, 3e38f), "finite");
  EXPECT_EQ(check(core::DType::kI64, int64_t{-1}, int64_t{-1}), "finite") << "integers have no NaN";
}

}  // namespace
}  // namespace moraine::coordinator
