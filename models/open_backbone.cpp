#include "models/open_backbone.h"

#include <algorithm>

#include <fmt/ranges.h>

#include "core/error.h"
#include "models/bert.h"
#include "models/decoder.h"
#include "models/vit.h"

namespace moraine::models {
namespace {

namespace fs = std::filesystem;
using Dtype = std::optional<at::ScalarType>;
using ImageSize = std::optional<int64_t>;

const std::vector<std::string> kKinds = {"linear", "ffn", "block"};  // of slots, in the enumeration's order

/// One family of architectures. A new one is a line in families().
struct Family {
  std::string name;
  std::vector<std::string> model_types;  // of config.json
  std::unique_ptr<Backbone> (*open)(const fs::path&, Dtype, ImageSize);
  void (*describe)(const Backbone&, ModelFacts&);
};

void refuse_image_size(const fs::path& directory, ImageSize image_size) {
  if (image_size)
    throw core::UserError(fmt::format("models: {} reads no images: an image size has no meaning", directory.string()),
                          "leave image_size out");
}

std::unique_ptr<Backbone> open_decoder(const fs::path& directory, Dtype dtype, ImageSize image_size) {
  refuse_image_size(directory, image_size);
  return std::make_unique<Decoder>(Decoder::from_directory(directory, dtype).share());
}

void describe_decoder(const Backbone& model, ModelFacts& facts) {
  const DecoderConfig& config = dynamic_cast<const Decoder&>(model).config();
  facts.vocab_size = config.vocab_size;
  facts.max_tokens = config.max_position_embeddings;
  facts.predicts_tokens = true;
  const std::string type = config.to_json().at("model_type");
  const std::string name = type == "llama"     ? "Llama"
                           : type == "mistral" ? "Mistral"
                           : type == "qwen2"   ? "Qwen2"
                                               : "";  // transformers 4.57 has none for the others
  facts.classifier = {name.empty() ? "" : name + "ForSequenceClassification", "", "score", /*bias=*/false};
}

std::unique_ptr<Backbone> open_encoder(const fs::path& directory, Dtype dtype, ImageSize image_size) {
  refuse_image_size(directory, image_size);
  return std::make_unique<Bert>(Bert::from_directory(directory, dtype).without_classifier());
}

void describe_encoder(const Backbone& model, ModelFacts& facts) {
  const BertConfig& config = dynamic_cast<const Bert&>(model).config();
  facts.vocab_size = config.vocab_size;
  facts.max_tokens = config.max_position_embeddings;
  facts.classifier = {config.pooler ? "BertForSequenceClassification" : "", "bert.", "classifier"};
}

std::unique_ptr<Backbone> open_vit(const fs::path& directory, Dtype dtype, ImageSize image_size) {
  return std::make_unique<Vit>(Vit::from_directory(directory, dtype, image_size).backbone());
}

void describe_vit(const Backbone& model, ModelFacts& facts) {
  const VitConfig& config = dynamic_cast<const Vit&>(model).config();
  facts.image_size = config.image_size;
  facts.channels = config.num_channels;
  facts.image_tokens = 1 + config.num_patches();
  // DINOv2's classifier reads the patches' mean, too.
  const bool plain = config.family == VitFamily::kVit;
  facts.classifier = {plain ? "ViTForImageClassification" : "", "vit.", "classifier"};
}

const std::vector<Family>& families() {
  static const std::vector<Family> all = {
      {"decoder", {"llama", "mistral", "qwen2", "olmo2", "flex_olmo", "flexmore"}, open_decoder, describe_decoder},
      {"encoder", {"bert"}, open_encoder, describe_encoder},
      {"vit", {"vit", "dinov2"}, open_vit, describe_vit},
  };
  return all;
}

/// What config.json calls the model; timm's names an architecture instead of a type.
std::string type_in(const core::Json& config) {
  if (!config.is_object()) return "";
  const auto text = [&](const char* key) {
    const auto found = config.find(key);
    return found != config.end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  return text("architecture").starts_with("vit") ? "vit" : text("model_type");
}

const Family& family_of(const fs::path& directory) {
  const fs::path path = directory / "config.json";
  const std::string type = type_in(core::read_json(path));
  std::vector<std::string> known;
  for (const Family& family : families()) {
    if (std::ranges::find(family.model_types, type) != family.model_types.end()) return family;
    known.insert(known.end(), family.model_types.begin(), family.model_types.end());
  }
  throw core::UserError(fmt::format("models: {}: no model of type '{}' can be read", path.string(), type),
                        fmt::format("types that can: {}, and timm's vit_*", fmt::join(known, ", ")));
}

}  // namespace

core::Json ModelFacts::to_json() const {
  core::Json all = core::Json::array();
  for (const Slot& slot : slots)
    all.push_back({slot.path, kKinds[static_cast<size_t>(slot.kind)], slot.in, slot.out, slot.inner});
  return {{"family", family},
          {"width", width},
          {"parameters", parameters},
          {"vocab_size", vocab_size},
          {"max_tokens", max_tokens},
          {"predicts_tokens", predicts_tokens},
          {"image_size", image_size},
          {"channels", channels},
          {"slots", all},
          {"config", config},
          {"image_tokens", image_tokens},
          {"classifier", {classifier.architecture, classifier.prefix, classifier.module, classifier.bias}}};
}

ModelFacts ModelFacts::from_json(const core::Json& json) {
  ModelFacts facts{.family = json.at("family"),
                   .width = json.at("width"),
                   .parameters = json.at("parameters"),
                   .vocab_size = json.at("vocab_size"),
                   .max_tokens = json.at("max_tokens"),
                   .predicts_tokens = json.at("predicts_tokens"),
                   .image_size = json.at("image_size"),
                   .channels = json.at("channels"),
                   .image_tokens = json.at("image_tokens"),
                   .classifier = {json.at("classifier").at(0), json.at("classifier").at(1), json.at("classifier").at(2),
                                  json.at("classifier").at(3)},
                   .slots = {},
                   .config = json.at("config")};
  for (const core::Json& slot : json.at("slots"))
    facts.slots.push_back(
        {slot.at(0), static_cast<SlotKind>(std::ranges::find(kKinds, slot.at(1).get<std::string>()) - kKinds.begin()),
         slot.at(2), slot.at(3), slot.at(4)});
  return facts;
}

std::unique_ptr<Backbone> open_backbone(const fs::path& directory, Dtype dtype, ImageSize image_size) {
  return family_of(directory).open(directory, dtype, image_size);
}

ModelFacts model_facts(const fs::path& directory, ImageSize image_size) {
  const Family& family = family_of(directory);
  const std::unique_ptr<Backbone> model = family.open(directory, std::nullopt, image_size);
  ModelFacts facts{
      .family = family.name, .width = model->width(), .slots = model->slots(), .config = model->config_json()};
  for (const auto& [name, weight] : model->weights()) facts.parameters += weight.numel();
  family.describe(*model, facts);
  return facts;
}

}  // namespace moraine::models
