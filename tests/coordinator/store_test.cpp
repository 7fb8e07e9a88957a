#include "coordinator/store.h"

#include <gtest/gtest.h>

#include <fstream>

#include "coordinator/accepted_state.h"
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

TEST(Store, KeepsArtefactsByTheirHash) {
  const TempDirectory directory;
  const core::ArtefactPtr artefact = toy_artefact("a");
  const std::string id = artefact->id();
  { Store(directory.path()).put(*artefact); }
  EXPECT_TRUE(std::filesystem::exists(directory.path() / id.substr(0, 2) / (id.substr(2) + ".safetensors")));
  Store store(directory.path());
  EXPECT_EQ(store.get(id)->meta().at("name"), "a");
  EXPECT_THROW(store.get(toy_artefact("b")->id()), core::UserError);
}

TEST(Store, NoticesDamageOnReadingAndRepairsItOnWriting) {
  const TempDirectory directory;
  const core::ArtefactPtr artefact = toy_artefact("a");
  { Store(directory.path()).put(*artefact); }
  Store store(directory.path());
  flip_last_byte(store.path_of(artefact->id()));
  EXPECT_THROW(store.get(artefact->id()), core::UserError);
  store.put(*artefact);
  EXPECT_EQ(store.get(artefact->id())->id(), artefact->id());
}

TEST(Store, ReportsADirectoryItCannotWrite) {
  const TempDirectory directory;
  std::ofstream(directory.path() / "file") << "in the way";
  EXPECT_THROW(Store(directory.path() / "file").put(*toy_artefact("a")), core::IoError);
}

TEST(AcceptedState, ForgetsUnitsWhoseArtefactIsMissingOrDamaged) {
  const TempDirectory directory;
  const RunLayout layout{directory.path()};
  Store store(layout.artefacts());
  std::vector<Record> records;
  for (const char* name : {"whole", "damaged", "missing"}) {
    const core::ArtefactPtr artefact = toy_artefact(name);
    store.put(*artefact);
    records.push_back(accepted(toy_unit(name), *artefact));
    if (std::string(name) == "damaged") flip_last_byte(store.path_of(artefact->id()));
    if (std::string(name) == "missing") std::filesystem::remove(store.path_of(artefact->id()));
  }
  AcceptedState state(layout, records);
  EXPECT_TRUE(state.result(toy_unit("missing").id()).has_value()) << "nothing is read before it is asked for";
  state.forget_damaged();
  EXPECT_EQ(state.result(toy_unit("whole").id()), toy_artefact("whole")->id());
  EXPECT_FALSE(state.result(toy_unit("damaged").id()).has_value());
  EXPECT_FALSE(state.result(toy_unit("missing").id()).has_value());
  EXPECT_THROW(state.artefact(toy_artefact("missing")->id()), core::InternalError);
}

TEST(AcceptedState, TakesTheLastResultOfAUnit) {
  const TempDirectory directory;
  const auto unit = toy_unit("u");
  const std::vector<Record> records = {accepted(unit, *toy_artefact("old")), accepted(unit, *toy_artefact("new"))};
  EXPECT_EQ(AcceptedState(RunLayout{directory.path()}, records).result(unit.id()), toy_artefact("new")->id());
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
