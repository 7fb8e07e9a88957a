#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/adapters/config.h"
#include "algorithms/run_config.h"
#include "algorithms/worker_context.h"
#include "core/config.h"
#include "models/decoder.h"

namespace moraine::algorithms::flexmore {

/// Shapes of a public OLMo2 model that is built from a seed instead of loaded. (Pre-norm families do not fit: without a
/// norm after the FFN nothing absorbs the gates' scale.)
struct ArchitectureConfig {
  int64_t vocab_size = 264;  // 257 byte tokens padded to a multiple of 8
  int64_t hidden_size = 128;
  int64_t intermediate_size = 352;
  int64_t num_layers = 4;
  int64_t num_heads = 4;
  int64_t num_kv_heads = 0;  // 0 = num_heads
  int64_t max_position_embeddings = 256;
  double rope_theta = 10000;
  double rms_norm_eps = 1e-6;
  double initializer_range = 0.02;
  bool tie_word_embeddings = false;
};

/// The frozen public model every expert is trained against: a Hugging Face directory, or shapes + training on public
/// text.
struct PublicModelConfig {
  std::string path;  // Hugging Face directory; exclusive with `architecture`
  std::optional<ArchitectureConfig> architecture;
  std::optional<TrainConfig> train;    // needed to run when built from `architecture`
  std::string save_dtype = "float32";  // a trained public model is rounded to this once, before any expert sees it
};

/// One data owner.
struct DomainConfig {
  std::string name;
  std::string path;           // prepared HDF5 file; may be empty for `moraine params`
  std::string rank = "auto";  // auto = chosen on validation | full | a number
  std::string encoder_text;   // router.init = encoder: text of the domain prepared with the encoder's tokeniser
  // full = full-size expert, low rank by PHLoRA | direct = A and B of the given rank, or `adapter`, are trained
  std::string train = "full";
  std::optional<adapters::AdapterConfig> adapter = {};  // direct.h
  std::optional<double> learning_rate = {};             // instead of train.learning_rate
};

/// Router of the mixture.
struct RouterConfig {
  std::string init = "regression";  // regression | embedding | centered | encoder | random
  std::string encoder;              // encoder: Hugging Face directory of a BERT-type model
  double init_logit = 10;     // regression: logit a row aims at on its own domain's text, against 0 on public text
  double init_norm = 0.5;     // embedding, centered: norm of each domain row; FlexOlmo's released rows have .41-.55
  bool train = false;         // train the row with the expert, as FlexOlmo does
  std::string bias = "none";  // none | constant | learned
  double bias_value = -0.01;  // constant: on every expert but the public one; learned: start
  int64_t embedding_sequences = 64;  // sequences averaged into one embedding
};

/// Which rank each expert gets in the heterogeneous mixture.
struct RankConfig {
  std::vector<int64_t> candidates = {4, 8, 16, 32, 64};
  double budget = 0.33;  // share of the full-size mixture's added parameters
};

struct EvaluationConfig {
  int64_t sequences = 128;            // per split and domain; 0 = all
  int64_t validation_sequences = 64;  // for choosing ranks
  int64_t batch_size = 16;
  std::string split = "test";  // test | validation: which documents the tables are about
};

struct FlexMoreConfig : RunConfig {
  PublicModelConfig model;
  std::string public_path;          // prepared HDF5 file of public text
  std::string public_encoder_text;  // router.init = encoder: public text prepared with the encoder's tokeniser
  std::vector<DomainConfig> domains;
  int64_t seq_len = 256;
  std::string tokenizer = "bytes-v1";
  TrainConfig train;  // of the experts
  RouterConfig router;
  RankConfig ranks;
  int64_t top_k = 2;
  bool norm_topk_prob = false;
  std::string forward = "factored";      // factored | per_expert
  std::string kernels = "auto";          // auto | reference
  std::vector<std::string> leave_out;    // domains whose owners opted out: no expert of theirs is in any result
  std::vector<std::string> comparisons;  // of kComparisons: measured beside the mixture, in the same run
  EvaluationConfig evaluation;
};

const core::Schema<FlexMoreConfig>& flexmore_schema();

/// Architecture of the public model. Reads config.json when the model is a directory. Throws UserError.
models::DecoderConfig public_architecture(const PublicModelConfig& model);

/// Whether the domain of that name is not left out.
bool is_member(const FlexMoreConfig& config, const std::string& domain);
/// The domains that are not left out, in the recipe's order.
std::vector<DomainConfig> members(const FlexMoreConfig& config);

/// The number in `rank`; "auto" and "full" are none.
std::optional<int64_t> given_rank(const DomainConfig& domain);

}  // namespace moraine::algorithms::flexmore
