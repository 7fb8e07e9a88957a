#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/adapters/config.h"
#include "algorithms/language_model.h"
#include "core/config.h"
#include "core/json.h"

namespace moraine::algorithms::flexmore {

// What the units of a FlexMoRE run do: one struct per kind, written by plan() and read by execute(), and nothing else
// decides what a worker computes. A key that a unit does not use has a neutral value, so that changing it in the recipe
// costs nothing. Each kind has its own result version, raised when a change of the code changes results for the same
// specification.

/// What all kinds have.
struct UnitSpec {
  std::string method = "flexmore";
  core::Json compute = {};  // compute_identity(): what else bits depend on
};

/// Kinds that stand on the public model.
struct OnPublicModel : UnitSpec {
  std::string base = {};          // "dir:<hash>" or an artefact id
  std::string dtype = "float32";  // the model is read in this type
};

/// Text of a domain for `router.init: encoder`.
struct EncoderSpec {
  std::string identity = {};  // of the encoder
  uint64_t projection_seed = 0;
  TextSpec data = {};
};

/// How the router's rows of the public expert begin.
struct PublicRowsSpec {
  std::string init = "regression";
  double norm = 0;    // embedding
  uint64_t seed = 0;  // random
};

/// How the router's rows of an expert begin and whether they are trained.
struct RowsSpec {
  double logit = 0;                 // regression
  double norm = 0;                  // embedding, centered
  int64_t embedding_sequences = 1;  // of the expert's own text
  bool train = false;
  std::string bias = "none";
  double bias_value = 0;  // unless none
};

/// Trains the public model on public text.
struct TrainBaseSpec : UnitSpec {
  static constexpr const char* kKind = "train_base";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  core::Json architecture = {};  // as config.json
  core::Json train = {};         // train_identity()
  std::string save_dtype = "float32";
  uint64_t seed = 0;
  TextSpec data = {};
  static const core::Schema<TrainBaseSpec>& schema();
};

/// What public text looks like to the routers.
struct EmbedPublicSpec : OnPublicModel {
  static constexpr const char* kKind = "embed_public";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  TextSpec data = {};
  int64_t sequences = 1;
  bool second_moment = false;
  std::optional<EncoderSpec> encoder = {};
  static const core::Schema<EmbedPublicSpec>& schema();
};

/// Trains one expert beside the public one. Inputs: the public embedding.
struct TrainExpertSpec : OnPublicModel {
  static constexpr const char* kKind = "train_expert";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  std::string name = {};
  int64_t rank = 0;  // 0 = full-size
  std::optional<adapters::AdapterConfig> adapter =
      {};                    // what is trained instead of the expert's own matrices or factors
  int64_t type_version = 1;  // Parametrisation::result_version()
  core::Json train = {};     // train_identity()
  PublicRowsSpec public_rows = {};
  RowsSpec rows = {};
  bool norm_topk_prob = false;
  std::string kernels = "auto";  // full-size experts and adapters do not pass through them
  uint64_t seed = 0;
  std::vector<TextSpec> data = {};  // of several domains: in turn
  std::vector<EncoderSpec> encoder = {};
  static const core::Schema<TrainExpertSpec>& schema();
};

/// Cuts a full-size expert to a rank. Inputs: the expert.
struct ExtractSpec : OnPublicModel {
  static constexpr const char* kKind = "extract";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  int64_t rank = 1;
  std::optional<uint64_t> subspace_seed = {};  // the random control of PHLoRA instead
  static const core::Schema<ExtractSpec>& schema();
};

/// How a mixture is computed.
struct MixtureSpec {
  int64_t top_k = 2;
  bool norm_topk_prob = false;
  std::string forward = "factored";
  std::string kernels = "auto";
};

/// Scores something on a text. Inputs: base: none; expert: public embedding, expert; mixture, soup: the artefact; btm:
/// public embedding, experts.
struct EvaluateSpec : OnPublicModel {
  static constexpr const char* kKind = "evaluate";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  std::string what = "base";  // base | expert | mixture | soup | btm
  TextSpec data = {};
  int64_t sequences = 0;
  int64_t batch_size = 1;
  std::optional<MixtureSpec> mixture = {};         // expert, mixture, btm
  std::optional<PublicRowsSpec> public_rows = {};  // expert, btm
  int64_t rank = 0;                                // expert: cut to this; 0 = as it was shipped
  std::optional<double> scale = {};                // expert: share of its change
  static const core::Schema<EvaluateSpec>& schema();
};

/// Joins experts. Inputs: public embedding, experts.
struct MergeSpec : OnPublicModel {
  static constexpr const char* kKind = "merge";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  std::vector<int64_t> ranks = {};  // of the experts, in the order of the inputs; 0 = as it was shipped
  PublicRowsSpec public_rows = {};
  static const core::Schema<MergeSpec>& schema();
};

/// Averages full-size experts. Inputs: the experts.
struct SoupSpec : UnitSpec {
  static constexpr const char* kKind = "soup";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  std::string base = {};
  static const core::Schema<SoupSpec>& schema();
};

}  // namespace moraine::algorithms::flexmore
