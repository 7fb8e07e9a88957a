#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "core/error.h"
#include "models/decoder_config.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

using Family = DecoderConfig::Family;
using testing::HasSubstr;

constexpr Family kAll[] = {Family::kLlama, Family::kMistral,  Family::kQwen2,
                           Family::kOlmo2, Family::kFlexOlmo, Family::kFlexMore};

DecoderConfig flex_7b(std::vector<int64_t> ranks) {
  DecoderConfig c;
  c.family = Family::kFlexMore;
  c.vocab_size = 100352, c.hidden_size = 4096, c.intermediate_size = 11008, c.num_layers = 32;
  c.num_heads = 32, c.num_kv_heads = 32, c.head_dim = 128;
  c.expert_ranks = std::move(ranks);
  c.num_experts = static_cast<int64_t>(c.expert_ranks.size()), c.num_experts_per_tok = 2;
  return c;
}

int64_t sum_of_shapes(const DecoderConfig& config) {
  int64_t sum = 0;
  for (const auto& [name, shape] : expected_tensors(config)) {
    sum += std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  }
  return sum;
}

TEST(ParameterCounts, SevenBillionModelsOfFlexOlmoAreExact) {
  DecoderConfig c = flex_7b({0, 0, 0, 0, 0, 0, 0});
  EXPECT_EQ(c.total_parameters(), 33'270'665'216);
  c.family = Family::kFlexOlmo;
  EXPECT_EQ(c.total_parameters(), 33'270'665'216);
  EXPECT_EQ(c.shared_parameters(), 2'970'095'616);
  EXPECT_EQ(c.ffn_parameters(), 4'328'521'728);
  EXPECT_EQ(flex_7b({0, 0}).total_parameters(), 11'627'401'216);
  c.family = Family::kOlmo2;
  EXPECT_EQ(c.total_parameters(), 7'298'617'344);
}

TEST(ParameterCounts, EveryRowOfTheFlexMoreTableIsExact) {
  // Rank, adapter, two-expert and seven-expert totals, computed in Python from S + F + E L d + sum of r 3 (d + h) L.
  struct Row {
    int64_t rank, adapter, two, seven;
  };
  constexpr Row kRows[] = {{1, 1449984, 7300329472, 7308234752},        {2, 2899968, 7301779456, 7316934656},
                           {4, 5799936, 7304679424, 7334334464},        {8, 11599872, 7310479360, 7369134080},
                           {16, 23199744, 7322079232, 7438733312},      {32, 46399488, 7345278976, 7577931776},
                           {64, 92798976, 7391678464, 7856328704},      {128, 185597952, 7484477440, 8413122560},
                           {256, 371195904, 7670075392, 9526710272},    {512, 742391808, 8041271296, 11753885696},
                           {1024, 1484783616, 8783663104, 16208236544}, {2048, 2969567232, 10268446720, 25116938240},
                           {4096, 5939134464, 13238013952, 42934341632}};
  for (const Row& row : kRows) {
    const DecoderConfig two = flex_7b({0, row.rank});
    EXPECT_EQ(two.low_rank_parameters(row.rank), row.adapter) << "rank " << row.rank;
    EXPECT_EQ(two.total_parameters(), row.two) << "rank " << row.rank;
    EXPECT_EQ(flex_7b({0, row.rank, row.rank, row.rank, row.rank, row.rank, row.rank}).total_parameters(), row.seven)
        << "rank " << row.rank;
  }
  // Ranks chosen from effective ranks in the follow-up.
  EXPECT_EQ(flex_7b({0, 64, 64, 32, 32, 16, 16}).total_parameters(), 7'624'331'264);
}

TEST(ParameterCounts, EqualTheSumOverExpectedTensors) {
  for (const Family family : kAll) {
    DecoderConfig c = tiny_config(family);
    EXPECT_EQ(sum_of_shapes(c), c.total_parameters());
    c.num_kv_heads = 2, c.head_dim = 6;
    EXPECT_EQ(sum_of_shapes(c), c.total_parameters());
    c.tie_word_embeddings = true;
    EXPECT_EQ(sum_of_shapes(c), c.total_parameters());
  }
  DecoderConfig biased = tiny_config(Family::kLlama);
  biased.attention_bias = biased.mlp_bias = true;
  EXPECT_EQ(sum_of_shapes(biased), biased.total_parameters());
  // Two layers, d = 16, 4 heads of 4: biases on q, k and v only.
  EXPECT_EQ(tiny_config(Family::kQwen2).total_parameters() - tiny_config(Family::kMistral).total_parameters(),
            2 * 3 * 16);
  EXPECT_EQ(sum_of_shapes(flex_7b({0, 0, 64, 1})), flex_7b({0, 0, 64, 1}).total_parameters());
}

// Keys of published config.json files of these families that no forward pass reads.
TEST(DecoderConfigJson, PublishedKeysThatChangeNothingAreAccepted) {
  const core::Json published[] = {
      {{"is_llama_config", true}, {"rope_interleaved", false}, {"transformers.js_config", {{"dtype", "q4"}}}},
      {{"use_mrope", false}, {"unsloth_fixed", true}, {"unsloth_version", "2025.1"}},
      {{"id2label", {{"0", "LABEL_0"}}}, {"label2id", {{"LABEL_0", 0}}}, {"problem_type", "regression"}},
      {{"do_sample", true}, {"temperature", 0.6}, {"top_p", 0.9}, {"max_length", 4096}, {"is_encoder_decoder", false}},
      {{"pruned_heads", core::Json::object()}, {"is_decoder", true}, {"tokenizer_class", "LlamaTokenizer"}}};
  for (const core::Json& keys : published) {
    core::Json json = tiny_config(Family::kLlama).to_json();
    json.update(keys);
    EXPECT_EQ(DecoderConfig::from_json(json, "test").to_json(), tiny_config(Family::kLlama).to_json()) << keys.dump();
  }
  const core::Json changing[] = {{{"rope_interleaved", true}},    {{"quantization_config", {{"bits", 4}}}},
                                 {{"use_mrope", true}},           {{"partial_rotary_factor", 0.5}},
                                 {{"is_encoder_decoder", true}},  {{"logits_scaling", 8.0}},
                                 {{"pruned_heads", {{"0", {1}}}}}};
  for (const core::Json& keys : changing) {
    core::Json json = tiny_config(Family::kLlama).to_json();
    json.update(keys);
    EXPECT_THROW(DecoderConfig::from_json(json, "test"), core::UserError) << keys.dump();
  }
}

TEST(DecoderConfigJson, SizesThatNoModelHasAreRefusedBeforeAnythingIsCounted) {
  for (const Family family : kAll)
    for (const core::Json& sizes :
         {core::Json{{"num_hidden_layers", 100000000}}, core::Json{{"vocab_size", int64_t{1} << 62}},
          core::Json{{"hidden_size", 1 << 30}, {"intermediate_size", 1 << 30}, {"head_dim", 4}}}) {
      core::Json json = tiny_config(family).to_json();
      json.update(sizes);
      json["layer_types"] = nullptr;
      EXPECT_THAT(thrown<core::UserError>([&] { DecoderConfig::from_json(json, "test"); }),
                  HasSubstr("than any model has"))
          << sizes.dump();
    }
}

TEST(DecoderConfigJson, RoundTripKeepsEveryField) {
  for (const Family family : kAll) {
    DecoderConfig c = tiny_config(family);
    c.num_kv_heads = 2, c.head_dim = 6, c.rms_norm_eps = 3e-6, c.rope_theta = 1234, c.tie_word_embeddings = true;
    c.eos_token_id = {7, 9}, c.pad_token_id = 3;
    c.norm_topk_prob = c.is_mixture();
    c.attention_bias = c.mlp_bias = family == Family::kLlama;
    if (family == Family::kMistral || family == Family::kQwen2) c.sliding_window = 5;
    if (family == Family::kQwen2) c.max_window_layers = 1;
    if (family == Family::kOlmo2) c.rope_scaling = {.type = RopeScaling::Type::kLinear, .factor = 2};
    if (family == Family::kLlama) c.rope_scaling = {RopeScaling::Type::kLlama3, 8, 1, 4, 16};
    const core::Json json = c.to_json();
    const DecoderConfig back = DecoderConfig::from_json(json, "test");
    EXPECT_EQ(back.to_json(), json);
    EXPECT_EQ(back.window_of(0), c.window_of(0));
    EXPECT_EQ(back.window_of(1), c.window_of(1));
    EXPECT_EQ(back.rope_scaling.type, c.rope_scaling.type);
    EXPECT_EQ(expected_tensors(back), expected_tensors(c));
  }
}

TEST(DecoderConfigJson, AbsentKeysTakeTransformersDefaults) {
  core::Json json = {{"model_type", "olmo2"},   {"vocab_size", 40},       {"hidden_size", 16},
                     {"intermediate_size", 24}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}};
  const DecoderConfig olmo = DecoderConfig::from_json(json, "test");
  EXPECT_EQ(olmo.rms_norm_eps, 1e-5);
  EXPECT_EQ(olmo.rope_theta, 10000);
  EXPECT_EQ(olmo.num_kv_heads, 4);
  EXPECT_EQ(olmo.head_dim, 4);
  json["model_type"] = "flex_olmo", json["num_experts"] = 4, json["num_experts_per_tok"] = 2;
  EXPECT_EQ(DecoderConfig::from_json(json, "test").rope_theta, 500000);
}

TEST(DecoderConfigJson, AbsentAndNullDifferAsInTransformers) {
  core::Json json = {{"model_type", "mistral"}, {"vocab_size", 40},       {"hidden_size", 64},
                     {"intermediate_size", 24}, {"num_hidden_layers", 2}, {"num_attention_heads", 16}};
  DecoderConfig c = DecoderConfig::from_json(json, "test");
  EXPECT_EQ(c.num_kv_heads, 8);
  EXPECT_EQ(c.sliding_window, 4096);
  EXPECT_EQ(c.max_position_embeddings, 131072);
  json["num_key_value_heads"] = nullptr, json["sliding_window"] = nullptr;
  c = DecoderConfig::from_json(json, "test");
  EXPECT_EQ(c.num_kv_heads, 16);
  EXPECT_EQ(c.sliding_window, 0);
  // Qwen2 names a window in every file and uses it only when told to.
  json["model_type"] = "qwen2", json["sliding_window"] = 7, json["max_window_layers"] = 1;
  EXPECT_EQ(DecoderConfig::from_json(json, "test").window_of(1), 0);
  json["use_sliding_window"] = true;
  EXPECT_EQ(DecoderConfig::from_json(json, "test").window_of(0), 0);
  EXPECT_EQ(DecoderConfig::from_json(json, "test").window_of(1), 7);
  json["layer_types"] = {"full_attention", "sliding_attention"};
  EXPECT_EQ(DecoderConfig::from_json(json, "test").window_of(1), 7);
  json["layer_types"] = {"sliding_attention", "full_attention"};
  EXPECT_THAT(thrown<core::UserError>([&] { DecoderConfig::from_json(json, "c"); }), HasSubstr("'layer_types'"));
}

TEST(DecoderConfigJson, RotaryTypesThatAreNotImplementedOrIncompleteSaySo) {
  const std::pair<core::Json, const char*> cases[] = {
      {{{"rope_type", "dynamic"}, {"factor", 2.0}}, "only the rotary types default, linear and llama3"},
      {{{"rope_type", "llama3"}, {"factor", 8.0}},
       "lacks high_freq_factor, low_freq_factor, original_max_position_embeddings"},
      {{{"type", "linear"}, {"factor", -1.0}}, "no positive number"},
      {{{"type", "linear"}, {"factor", 2.0}, {"beta_fast", 32}}, "'beta_fast'"},
      {{{"rope_type", "llama3"},
        {"factor", 8.0},
        {"low_freq_factor", 4.0},
        {"high_freq_factor", 1.0},
        {"original_max_position_embeddings", 16}},
       "high_freq_factor 1 must be above"},
      {"linear", "not implemented"}};
  for (const auto& [scaling, expected] : cases) {
    core::Json json = tiny_config(Family::kLlama).to_json();
    json["rope_scaling"] = scaling;
    EXPECT_THAT(thrown<core::UserError>([&] { DecoderConfig::from_json(json, "c"); }), HasSubstr(expected)) << scaling;
  }
}

TEST(DecoderConfigJson, ReadsRopeParametersOfTransformersFive) {
  core::Json json = tiny_config(Family::kOlmo2).to_json();
  json.erase("rope_theta");
  json["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 777.0}};
  EXPECT_EQ(DecoderConfig::from_json(json, "test").rope_theta, 777.0);
}

TEST(DecoderConfigJson, OptionsThatChangeTheMathsAreRefusedByName) {
  const std::pair<const char*, core::Json> changes[] = {
      {"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}},
      {"rope_parameters", {{"rope_type", "yarn"}, {"rope_theta", 1e4}}},
      {"hidden_act", "gelu"},
      {"clip_qkv", 8.0},
      {"sliding_window", 4096},
      {"quantization_config", {{"bits", 4}}},
      {"vocab_size", "many"},
      {"hidden_size", -16},
      {"head_dim", 5},
      {"num_key_value_heads", 3},
      {"rms_norm_eps", 0},
      {"num_experts_per_tok", 5},
      {"output_router_logits", true},
      {"expert_ranks", {0, 3, 0}},
      {"expert_ranks", {3, 3, 0, 5}},
      {"expert_ranks", {0, 17, 0, 5}},
      {"expert_ranks", {0, -1, 0, 5}},
      {"expert_ranks", {0, 1.5, 0, 5}}};
  for (const auto& [key, value] : changes) {
    core::Json json = tiny_config(Family::kFlexMore).to_json();
    json[key] = value;
    const std::string message = thrown<core::UserError>([&] { DecoderConfig::from_json(json, "base/config.json"); });
    EXPECT_THAT(message, HasSubstr(std::string("'") + key + "'")) << value;
    EXPECT_THAT(message, HasSubstr("base/config.json")) << key;
  }
}

TEST(DecoderConfigJson, AllProblemsAreReportedTogether) {
  core::Json json = tiny_config(Family::kLlama).to_json();
  json.erase("vocab_size");
  json["hidden_act"] = "relu";
  json["sliding_window"] = 128;
  const std::string message = thrown<core::UserError>([&] { DecoderConfig::from_json(json, "c"); });
  for (const char* key : {"vocab_size", "hidden_act", "sliding_window"}) EXPECT_THAT(message, HasSubstr(key));
}

TEST(DecoderConfigJson, UnknownModelTypeSuggestsTheNearest) {
  core::Json json = tiny_config(Family::kOlmo2).to_json();
  json["model_type"] = "olmo";
  EXPECT_THAT(thrown<core::UserError>([&] { DecoderConfig::from_json(json, "c"); }), HasSubstr("olmo2"));
  EXPECT_THROW(DecoderConfig::from_json(core::Json::array(), "c"), core::UserError);
}

}  // namespace
}  // namespace moraine::models
