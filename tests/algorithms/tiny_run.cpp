#include "tests/algorithms/tiny_run.h"

#include <atomic>

#include "core/error.h"
#include "core/hash.h"
#include "core/hdf5.h"
#include "data/byte_tokenizer.h"
#include "data/fingerprint.h"
#include "worker/context.h"

namespace moraine::algorithms {

TinyRun::TinyRun(const std::filesystem::path& recipe, const std::vector<std::string>& overrides)
    : parsed_(load_recipe(recipe, overrides)) {
  parsed_.method->open_inputs();
}

void TinyRun::run() {
  for (Plan plan = method().plan(*this); !plan.pending.empty(); plan = method().plan(*this))
    for (const auto& unit : plan.pending) {
      const core::ArtefactPtr made = execute(method(), unit, *this);
      method().check_result(unit, *made);
      accept(unit, made);
    }
}

core::ArtefactPtr TinyRun::execute(const Method& method, const Unit& unit, const RunState& state) {
  static const std::atomic<int> no_signals{0};
  const worker::WorkerOptions options;
  worker::DirectContext context(unit, 1, options, no_signals,
                                {.artefact = [&](const std::string& id) { return state.artefact(id); },
                                 .metric = [](const core::metrics::Record&) {},
                                 .progress = [](double, double) {}});
  return method.execute(unit, context);
}

void TinyRun::accept(const Unit& unit, const core::ArtefactPtr& artefact) {
  results_[unit.id()] = artefact->id();
  artefacts_[artefact->id()] = artefact;
}

void TinyRun::adopt(const TinyRun& other) {
  results_ = other.results_;
  artefacts_ = other.artefacts_;
}

std::optional<std::string> TinyRun::result(const std::string& unit) const {
  const auto it = results_.find(unit);
  return it == results_.end() ? std::nullopt : std::optional(it->second);
}

core::ArtefactPtr TinyRun::made_by(const std::string& label) const {
  for (const auto& unit : finished())
    if (unit.label == label) return artefact(result(unit.id()).value());
  throw core::InternalError("no unit " + label);
}

std::map<std::string, std::string> TinyRun::made() const {
  std::map<std::string, std::string> ids;
  for (const auto& unit : finished()) ids[unit.label] = result(unit.id()).value();
  return ids;
}

void write_text_file(const std::filesystem::path& path, const std::string& name, const std::string& tokenizer,
                     int64_t size) {
  core::Hdf5File file(path, core::Hdf5File::Mode::kCreate);
  for (const std::string split : {"train", "validation", "test"}) {
    std::vector<uint16_t> tokens;
    for (int64_t i = 0; i < size; ++i)
      tokens.push_back(
          static_cast<uint16_t>('a' + core::derive_seed(static_cast<uint64_t>(i), name + split) % 9 + name.size()));
    file.write<uint16_t>(split + "/tokens", tokens, {size});
    file.write<int64_t>(split + "/documents", std::vector<int64_t>{0, size}, {2});
    if (tokenizer == data::ByteTokenizer::kName) continue;
    std::vector<int64_t> offsets;
    for (int64_t i = 0; i <= size; ++i) offsets.push_back(i);
    file.write<int64_t>(split + "/byte_offsets", offsets, {size + 1});
  }
  file.set_attribute("format", std::string("moraine-text-domain"));
  file.set_attribute("format_version", int64_t{1});
  file.set_attribute("name", name);
  file.set_attribute("tokenizer", tokenizer);
  file.set_attribute("vocab_size", data::ByteTokenizer::kVocabSize);
  file.set_attribute("fingerprint", data::text_fingerprint(file));
  file.close();
}

void write_image_file(const std::filesystem::path& path, int64_t classes, uint32_t state) {
  core::Hdf5File file(path, core::Hdf5File::Mode::kCreate);
  file.set_attribute("format", "moraine-images");
  file.set_attribute("format_version", 1);
  file.set_attribute("name", "tiny");
  core::Json names = core::Json::array();
  for (int64_t label = 0; label < classes; ++label) names.push_back("c" + std::to_string(label));
  file.set_attribute("class_names", names.dump());
  for (const auto& [split, each] : {std::pair{"train", 14}, std::pair{"test", 5}}) {
    std::vector<uint8_t> pixels;
    std::vector<int64_t> labels;
    for (int64_t row = 0; row < each * classes; ++row) {
      labels.push_back(row % classes);
      for (int64_t pixel = 0; pixel < 16; ++pixel) {
        state = state * 1664525 + 1013904223;
        pixels.push_back(static_cast<uint8_t>((state >> 24) / 2 + (pixel == 2 * labels.back() ? 120 : 0)));
      }
    }
    file.write<uint8_t>(std::string(split) + "/images", pixels, {each * classes, 1, 4, 4});
    file.write<int64_t>(std::string(split) + "/labels", labels, {each * classes});
  }
  file.set_attribute("fingerprint", data::image_fingerprint(file));
  file.close();
}

void write_classification_file(const std::filesystem::path& path, int64_t examples) {
  constexpr int64_t kLength = 6;
  core::Hdf5File file(path, core::Hdf5File::Mode::kCreate);
  for (const std::string split : {"train", "validation", "test"}) {
    std::vector<uint16_t> tokens;
    std::vector<int64_t> starts = {0}, labels;
    for (int64_t i = 0; i < examples; ++i) {
      labels.push_back(i % 2);
      for (int64_t t = 0; t < kLength; ++t) {
        const auto letter = static_cast<int64_t>(core::derive_seed(static_cast<uint64_t>(kLength * i + t), split) % 8);
        tokens.push_back(static_cast<uint16_t>('a' + 8 * labels.back() + letter));
      }
      starts.push_back(std::ssize(tokens));
    }
    file.write<uint16_t>(split + "/tokens", tokens, {std::ssize(tokens)});
    const auto put = [&](const char* name, const std::vector<int64_t>& values) {
      file.write<int64_t>(split + "/" + name, values, {std::ssize(values)});
    };
    put("examples", starts), put("prompts", std::vector<int64_t>(labels.size(), kLength)), put("labels", labels);
    put("bytes", std::vector<int64_t>(labels.size(), 0));
  }
  file.set_attribute("format", std::string("moraine-text-examples"));
  file.set_attribute("format_version", int64_t{1});
  file.set_attribute("name", std::string("tiny"));
  file.set_attribute("task", std::string("classification"));
  file.set_attribute("class_names", std::string(R"(["low","high"])"));
  file.set_attribute("tokenizer", std::string(data::ByteTokenizer::kName));
  file.set_attribute("vocab_size", data::ByteTokenizer::kVocabSize);
  file.set_attribute("end_of_document", int64_t{256});
  file.set_attribute("fingerprint", data::examples_fingerprint(file));
  file.close();
}

}  // namespace moraine::algorithms
