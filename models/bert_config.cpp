#include "models/bert_config.h"

#include <algorithm>
#include <array>
#include <vector>

#include <fmt/ranges.h>

#include "core/error.h"
#include "models/config_keys.h"

namespace moraine::models {
namespace {

using core::Json;

struct SizeKey {
  const char* key;
  int64_t BertConfig::*member;
};
constexpr std::array<SizeKey, 7> kSizes = {{{"vocab_size", &BertConfig::vocab_size},
                                            {"hidden_size", &BertConfig::hidden_size},
                                            {"intermediate_size", &BertConfig::intermediate_size},
                                            {"num_hidden_layers", &BertConfig::num_layers},
                                            {"num_attention_heads", &BertConfig::num_heads},
                                            {"max_position_embeddings", &BertConfig::max_position_embeddings},
                                            {"type_vocab_size", &BertConfig::type_vocab_size}}};

// Dropout is off in evaluation; the others name tokens and labels, how the model was made and what its head shares.
const std::vector<std::string> kIrrelevant = {"attention_probs_dropout_prob",
                                              "hidden_dropout_prob",
                                              "classifier_dropout",
                                              "gradient_checkpointing",
                                              "tie_word_embeddings",
                                              "pad_token_id",
                                              "id2label",
                                              "label2id",
                                              "num_labels"};

}  // namespace

BertConfig BertConfig::from_json(const Json& json, const std::string& origin) {
  BertConfig c;
  std::vector<std::string> wrong;
  const Json type = json.is_object() ? json.value("model_type", Json()) : Json();
  if (type != "bert")
    throw core::UserError(fmt::format("models: {}: not a BERT-type encoder: 'model_type' is {}", origin, type.dump()),
                          "use the directory of a BertModel or a BertForSequenceClassification");
  ConfigKeys read(json, wrong);
  read.find("model_type");
  for (const SizeKey& size : kSizes) {
    c.*size.member = read.integer(size.key, c.*size.member);
    if (c.*size.member < 1) wrong.push_back(fmt::format("'{}' must be positive: {}", size.key, c.*size.member));
  }
  c.layer_norm_eps = read.number("layer_norm_eps", c.layer_norm_eps);
  c.initializer_range = read.number("initializer_range", c.initializer_range);
  if (!(c.layer_norm_eps > 0)) wrong.push_back(fmt::format("'layer_norm_eps' must be positive: {}", c.layer_norm_eps));
  read.only("hidden_act", "gelu");
  read.only("position_embedding_type", "absolute");
  read.only("is_decoder", false);
  read.only("add_cross_attention", false);
  read.only("problem_type", "single_label_classification");
  read.refuse_unread(kIrrelevant);
  const auto real = [](int64_t size) { return static_cast<double>(size); };
  if (const auto implausible = implausible_sizes(
          c.num_layers,
          {c.vocab_size, c.hidden_size, c.intermediate_size, c.num_heads, c.max_position_embeddings, c.type_vocab_size},
          real(c.vocab_size) * real(c.hidden_size) +
              real(c.num_layers) * real(c.hidden_size) * (4 * real(c.hidden_size) + 2 * real(c.intermediate_size))))
    wrong.push_back(*implausible);
  if (wrong.empty() && c.hidden_size % c.num_heads != 0)
    wrong.push_back(
        fmt::format("'num_attention_heads' = {} does not divide 'hidden_size' = {}", c.num_heads, c.hidden_size));
  if (!wrong.empty())
    throw core::UserError(fmt::format("models: {}: cannot build this encoder:\n  {}", origin, fmt::join(wrong, "\n  ")),
                          "use a checkpoint of a supported architecture, or correct these keys");
  return c;
}

Json BertConfig::to_json() const {
  Json json = {{"model_type", "bert"},
               {"architectures", {num_labels > 0 ? "BertForSequenceClassification" : "BertModel"}},
               {"layer_norm_eps", layer_norm_eps},
               {"initializer_range", initializer_range},
               {"hidden_act", "gelu"},
               {"position_embedding_type", "absolute"}};
  for (const SizeKey& size : kSizes) json[size.key] = this->*size.member;
  if (num_labels > 0) {
    Json labels = Json::object();
    for (int64_t label = 0; label < num_labels; ++label) labels[std::to_string(label)] = fmt::format("LABEL_{}", label);
    json["id2label"] = labels;
  }
  return json;
}

int64_t BertConfig::total_parameters() const {
  const int64_t d = hidden_size, h = intermediate_size, norm = 2 * d;
  const int64_t layer = 4 * (d * d + d) + (d * h + h) + (h * d + d) + 2 * norm;
  return (vocab_size + max_position_embeddings + type_vocab_size) * d + norm + num_layers * layer +
         (pooler ? d * d + d : 0) + num_labels * (d + 1);
}

NamedShapes expected_tensors(const BertConfig& c) {
  NamedShapes list;
  const int64_t d = c.hidden_size, h = c.intermediate_size;
  const auto linear = [&](const std::string& path, int64_t out, int64_t in) {
    list.emplace_back(path + ".weight", Shape{out, in});
    list.emplace_back(path + ".bias", Shape{out});
  };
  const auto norm = [&](const std::string& path) {
    list.emplace_back(path + ".LayerNorm.weight", Shape{d});
    list.emplace_back(path + ".LayerNorm.bias", Shape{d});
  };
  const std::string embeddings = c.prefix() + "embeddings";
  list.emplace_back(embeddings + ".word_embeddings.weight", Shape{c.vocab_size, d});
  list.emplace_back(embeddings + ".position_embeddings.weight", Shape{c.max_position_embeddings, d});
  list.emplace_back(embeddings + ".token_type_embeddings.weight", Shape{c.type_vocab_size, d});
  norm(embeddings);
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    const std::string path = fmt::format("{}encoder.layer.{}", c.prefix(), layer);
    for (const char* part : {"query", "key", "value"}) linear(path + ".attention.self." + part, d, d);
    linear(path + ".attention.output.dense", d, d);
    norm(path + ".attention.output");
    linear(path + ".intermediate.dense", h, d);
    linear(path + ".output.dense", d, h);
    norm(path + ".output");
  }
  if (c.pooler) linear(c.prefix() + "pooler.dense", d, d);
  if (c.num_labels > 0) linear("classifier", c.num_labels, d);
  std::sort(list.begin(), list.end());
  return list;
}

}  // namespace moraine::models
