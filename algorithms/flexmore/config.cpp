#include "algorithms/flexmore/config.h"

#include <algorithm>
#include <charconv>
#include <set>

#include "algorithms/flexmore/comparisons.h"
#include "algorithms/flexmore/direct.h"
#include "core/error.h"

namespace moraine::algorithms::flexmore {
namespace {

using Violation = std::optional<std::string>;

std::optional<int64_t> parse_int(const std::string& text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

const core::Schema<ArchitectureConfig>& architecture_schema() {
  using C = ArchitectureConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("vocab_size", &C::vocab_size)
        .min(1)
        .doc("Rows of the embedding; at least the tokeniser's vocabulary")
        .field("hidden_size", &C::hidden_size)
        .min(1)
        .doc("Width d")
        .field("intermediate_size", &C::intermediate_size)
        .min(1)
        .doc("Inner width h of the FFN")
        .field("num_layers", &C::num_layers)
        .min(1)
        .doc("Blocks L")
        .field("num_heads", &C::num_heads)
        .min(1)
        .doc("Attention heads")
        .field("num_kv_heads", &C::num_kv_heads)
        .min(0)
        .doc("Key/value heads; 0 = num_heads")
        .field("max_position_embeddings", &C::max_position_embeddings)
        .min(1)
        .doc("Longest context")
        .unit("tokens")
        .field("rope_theta", &C::rope_theta)
        .above(0)
        .doc("Base of the rotary frequencies")
        .field("rms_norm_eps", &C::rms_norm_eps)
        .above(0)
        .doc("Added to the mean square")
        .field("initializer_range", &C::initializer_range)
        .above(0)
        .doc("Standard deviation of random weights")
        .field("tie_word_embeddings", &C::tie_word_embeddings)
        .doc("Use the embedding as output matrix")
        .check([](const C& c) -> Violation {
          if (c.hidden_size % c.num_heads) return "hidden_size must be a multiple of num_heads";
          if (c.num_kv_heads && c.num_heads % c.num_kv_heads) return "num_heads must be a multiple of num_kv_heads";
          return std::nullopt;
        });
    return s;
  }();
  return schema;
}

const core::Schema<PublicModelConfig>& model_schema() {
  using C = PublicModelConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("path", &C::path)
        .path()
        .doc("Hugging Face directory (config.json + safetensors); exclusive with architecture")
        .optional_object("architecture", &C::architecture, architecture_schema())
        .doc("Shapes of a model built from the seed")
        .optional_object("train", &C::train, train_schema())
        .doc("Training of that model on the text of public_path")
        .field("save_dtype", &C::save_dtype)
        .choices({"float32", "bfloat16"})
        .doc("A trained public model is rounded to this once, before any expert sees it")
        .check([](const C& c) -> Violation {
          if (c.path.empty() == !c.architecture) return "give exactly one of path and architecture";
          if (!c.path.empty() && c.train)
            return "train goes with architecture: a model that is loaded is never changed";
          if (c.train && c.train->dtype != "float32")
            return "train.dtype must be float32: nothing of this model is frozen; save_dtype is what it is rounded to";
          return std::nullopt;
        });
    return s;
  }();
  return schema;
}

Violation check_rank(const DomainConfig& c) {
  const auto number = given_rank(c);
  if (c.rank != "auto" && c.rank != "full" && !number)
    return fmt::format("rank '{}' must be auto, full or a number", c.rank);
  if (number && *number <= 0) return fmt::format("rank must be positive: {}", *number);
  if (c.train == "direct" && !c.adapter && !number) return "train: direct needs a number as rank, or an adapter";
  return std::nullopt;
}

Violation check_adapter(const DomainConfig& c) {
  if (!c.adapter) return std::nullopt;
  if (c.train != "direct") return "adapter goes with train: direct";
  if (const auto problem = expert_problem(*c.adapter)) return problem;
  if (!trains_factors(c)) return std::nullopt;
  if (c.rank == "full")
    return fmt::format("rank: full needs a full-size expert, and type {} trains factors", c.adapter->type);
  const int64_t trained = trained_rank(c), wanted = given_rank(c).value_or(trained);
  if (wanted > trained)
    return fmt::format("rank {} is more than the {} of the expert that its adapter makes", wanted, trained);
  if (wanted < trained && !adapters::can_be_truncated(*c.adapter))
    return fmt::format(
        "rank {}: its adapter makes an expert of rank {}, which has no first ranks to cut it to: leave rank out, or "
        "train a nested type (dylora, matryoshka)",
        wanted, trained);
  return std::nullopt;
}

const core::Schema<DomainConfig>& domain_schema() {
  using C = DomainConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("name", &C::name)
        .required()
        .doc("Name of the expert")
        .field("path", &C::path)
        .path()
        .doc("Prepared HDF5 file (scripts/prepare_text.py)")
        .field("encoder_text", &C::encoder_text)
        .path()
        .doc("router.init: encoder: the domain's text prepared with the encoder's tokeniser")
        .field("rank", &C::rank)
        .doc("Rank in the heterogeneous mixture: auto (chosen on validation), full, or a number")
        .field("train", &C::train)
        .choices({"full", "direct"})
        .doc(
            "full: train a full-size FFN, extract low rank by PHLoRA; direct: train A and B of the given rank, or "
            "adapter")
        .optional_object("adapter", &C::adapter, adapters::adapter_schema())
        .joined_later()
        .doc(
            "direct: adapter of the expert's three matrices per layer instead; one of factors makes a low-rank expert, "
            "another a full-size one; rank: auto is chosen on validation for nested types, their own otherwise")
        .field("learning_rate", &C::learning_rate)
        .joined_later()
        .above(0)
        .doc("Instead of train.learning_rate")
        .check([](const C& c) -> Violation {
          if (c.name.empty() || c.name == "public" ||
              c.name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_-") != std::string::npos)
            return fmt::format("name '{}' must be lower-case letters, digits, '-' and '_', and not 'public'", c.name);
          return std::nullopt;
        })
        .check(check_rank)
        .check(check_adapter);
    return s;
  }();
  return schema;
}

const core::Schema<RouterConfig>& router_schema() {
  using C = RouterConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("init", &C::init)
        .choices({"regression", "embedding", "centered", "encoder", "random"})
        .doc(
            "Where router rows start: least squares between the domain's and the public hidden states, the domain's "
            "mean hidden state, its difference to the public one, a text encoder's mean embedding of the domain, or at "
            "random")
        .field("encoder", &C::encoder)
        .path()
        .doc("encoder: Hugging Face directory of a BERT-type model with its tokenizer.json (scripts/fetch_encoder)")
        .field("init_logit", &C::init_logit)
        .above(0)
        .doc(
            "regression: logit aimed at on the domain's own text, against 0 on public text; raising it makes routing "
            "sharper")
        .field("init_norm", &C::init_norm)
        .above(0)
        .doc("embedding, centered: norm of a row at the start; raising it makes routing sharper")
        .field("train", &C::train)
        .doc(
            "Train the row with the expert, as FlexOlmo does; rows that never saw each other's text drift apart in "
            "scale")
        .field("bias", &C::bias)
        .choices({"none", "constant", "learned"})
        .doc("Bias on every expert but the public one, never positive")
        .field("bias_value", &C::bias_value)
        .max(0)
        .doc("Constant bias, or where a learned one starts")
        .field("embedding_sequences", &C::embedding_sequences)
        .min(1)
        .doc("Training sequences averaged into a domain embedding")
        .check([](const C& c) -> Violation {
          if ((c.init == "encoder") == c.encoder.empty()) return "init: encoder and the key encoder go together";
          return std::nullopt;
        });
    return s;
  }();
  return schema;
}

const core::Schema<RankConfig>& rank_schema() {
  using C = RankConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("candidates", &C::candidates)
        .min(1)
        .unique()
        .doc("Ranks tried for experts with rank: auto")
        .field("budget", &C::budget)
        .above(0)
        .max(1)
        .doc("Largest share of the full-size mixture's added parameters that low-rank experts may take together")
        .check([](const C& c) -> Violation {
          if (c.candidates.empty()) return "candidates must not be empty";
          return std::nullopt;
        });
    return s;
  }();
  return schema;
}

const core::Schema<EvaluationConfig>& evaluation_schema() {
  using C = EvaluationConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("sequences", &C::sequences)
        .min(0)
        .evaluation_only()
        .doc("Test sequences per domain; 0 = all")
        .field("validation_sequences", &C::validation_sequences)
        .min(0)
        .doc("Validation sequences per domain for choosing ranks; 0 = all")
        .field("batch_size", &C::batch_size)
        .min(1)
        .doc("Sequences per forward pass")
        .field("split", &C::split)
        .choices({"test", "validation"})
        .evaluation_only()
        .doc("Which documents the tables are about; use validation while choosing settings");
    return s;
  }();
  return schema;
}

Violation check_model(const FlexMoreConfig& c) {
  if (c.model.path.empty() && !c.model.architecture)
    return "model is missing: give model.path (a Hugging Face directory of an OLMo2-type model) or model.architecture "
           "(shapes of one that is trained here)";
  return std::nullopt;
}

Violation check_domains(const FlexMoreConfig& c) {
  std::set<std::string> names;
  for (const auto& domain : c.domains)
    if (!names.insert(domain.name).second) return fmt::format("domain '{}' stands twice", domain.name);
  for (const auto& name : c.leave_out)
    if (!names.count(name)) return fmt::format("leave_out: no domain '{}'", name);
  if (!c.domains.empty() && c.leave_out.size() >= c.domains.size()) return "leave_out leaves no expert";
  return std::nullopt;
}

// A direct expert that can be cut to lower ranks as it is.
bool can_be_swept(const DomainConfig& domain) { return domain.adapter && adapters::can_be_truncated(*domain.adapter); }

Violation check_candidates(const FlexMoreConfig& c) {
  for (const auto& domain : members(c))
    if (chooses_rank(domain) && ranks_within(domain, c.ranks.candidates).empty())
      return fmt::format("domain '{}': its adapter has rank {}, less than all of ranks.candidates", domain.name,
                         trained_rank(domain));
  return std::nullopt;
}

Violation check_comparisons(const FlexMoreConfig& c) {
  if (c.domains.empty() && !c.comparisons.empty()) return "comparisons need domains";
  for (const auto& comparison : c.comparisons)
    if (comparison == "scaled_delta" || comparison == "random_subspace" || comparison == "rank_sweep")
      for (const auto& domain : members(c))
        if (trains_factors(domain) && !(comparison == "rank_sweep" && can_be_swept(domain)))
          return fmt::format("comparisons: {} needs full-size experts; domain '{}' is trained at its rank", comparison,
                             domain.name);
  return std::nullopt;
}

Violation check_top_k(const FlexMoreConfig& c) {
  if (c.domains.empty()) return std::nullopt;  // the public model alone
  const auto experts = static_cast<int64_t>(members(c).size()) + 1;
  if (c.top_k > experts)
    return fmt::format("top_k {} is more than the {} experts of the mixture (public one included)", c.top_k, experts);
  return std::nullopt;
}

}  // namespace

const core::Schema<FlexMoreConfig>& flexmore_schema() {
  using C = FlexMoreConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    add_run_fields(s);
    s.object("model", &C::model, model_schema())
        .doc("The frozen public model")
        .field("public_path", &C::public_path)
        .path()
        .doc("Prepared HDF5 file of public text")
        .field("public_encoder_text", &C::public_encoder_text)
        .path()
        .doc("router.init: encoder: public text prepared with the encoder's tokeniser")
        .list("domains", &C::domains, domain_schema())
        .doc("One entry per expert")
        .field("seq_len", &C::seq_len)
        .min(2)
        .doc("Context of training and evaluation")
        .unit("tokens")
        .field("tokenizer", &C::tokenizer)
        .doc("Tokeniser the data must have been prepared with")
        .object("train", &C::train, train_schema())
        .doc("Training of each expert")
        .object("router", &C::router, router_schema())
        .doc("Router rows")
        .object("ranks", &C::ranks, rank_schema())
        .doc("Choice of ranks")
        .field("top_k", &C::top_k)
        .min(1)
        .doc("Experts active per token in the mixtures, public one included")
        .field("norm_topk_prob", &C::norm_topk_prob)
        .doc("Renormalise the selected gates; post-norm blocks make no difference")
        .field("forward", &C::forward)
        .choices({"factored", "per_expert"})
        .doc("How mixtures are computed; per_expert is the slow reference")
        .field("kernels", &C::kernels)
        .choices({"auto", "reference"})
        .doc(
            "Low-rank experts: auto = ragged-rank kernels where they exist and are faster (CPU; with gradients up to 4 "
            "experts per token), else ATen; reference = ATen. Results differ by rounding only")
        .field("leave_out", &C::leave_out)
        .unique()
        .doc(
            "Domains whose owners opted out: nothing is trained on their text and no expert of theirs is in any "
            "mixture, "
            "soup or comparison; their text is still measured")
        .field("comparisons", &C::comparisons)
        .choices(kComparisons)
        .evaluation_only()
        .unique()
        .doc(
            "Also measured: btm = branch-train-merge, the two most probable experts per token; cross_domain = each "
            "expert on every text; joint = one expert trained on all domains with all experts' steps; random_subspace "
            "= a random cut of the rank PHLoRA has; rank_sweep = every candidate rank on the tables' text, with "
            "regressions; scaled_delta = 0.25, 0.5 and 0.75 of the full-size change")
        .object("evaluation", &C::evaluation, evaluation_schema())
        .doc("What is measured")
        .check(check_model)
        .check(check_domains)
        .check(check_candidates)
        .check(check_comparisons)
        .check(check_top_k);
    return s;
  }();
  return schema;
}

bool is_member(const FlexMoreConfig& config, const std::string& domain) {
  return std::find(config.leave_out.begin(), config.leave_out.end(), domain) == config.leave_out.end();
}

std::vector<DomainConfig> members(const FlexMoreConfig& config) {
  std::vector<DomainConfig> out;
  for (const auto& domain : config.domains)
    if (is_member(config, domain.name)) out.push_back(domain);
  return out;
}

std::optional<int64_t> given_rank(const DomainConfig& domain) { return parse_int(domain.rank); }

models::DecoderConfig public_architecture(const PublicModelConfig& model) {
  if (!model.architecture) {
    auto config = models::DecoderConfig::from_directory(model.path);
    if (config.is_mixture() || !config.post_norm())
      throw core::UserError(fmt::format("algorithms/flexmore: {} is not a dense post-norm model", model.path),
                            "experts are trained against a dense OLMo2-type model");
    return config;
  }
  const ArchitectureConfig& a = *model.architecture;
  models::DecoderConfig config;
  config.family = models::DecoderConfig::Family::kOlmo2;
  config.vocab_size = a.vocab_size;
  config.hidden_size = a.hidden_size;
  config.intermediate_size = a.intermediate_size;
  config.num_layers = a.num_layers;
  config.num_heads = a.num_heads;
  config.num_kv_heads = a.num_kv_heads ? a.num_kv_heads : a.num_heads;
  config.head_dim = a.hidden_size / a.num_heads;
  config.max_position_embeddings = a.max_position_embeddings;
  config.rms_norm_eps = a.rms_norm_eps;
  config.rope_theta = a.rope_theta;
  config.initializer_range = a.initializer_range;
  config.tie_word_embeddings = a.tie_word_embeddings;
  return config;
}

}  // namespace moraine::algorithms::flexmore
