#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/json.h"
#include "core/ordered_json.h"
#include "models/slot.h"

namespace moraine::algorithms::adapters {

/// Another rank (or alpha) for the modules whose path matches the regular expression `(.*\.)?(module)$`, as Python
/// reads it (python_regex.h).
struct ModuleRank {
  std::string module;
  int64_t rank = 8;
};
struct ModuleAlpha {
  std::string module;
  double alpha = 8;
};

/// Which modules get an adapter of which type and size. Names and matching rules are those of Hugging Face PEFT 0.21.
struct AdapterConfig {
  std::string type = "lora";                  // parametrisation.h
  core::Json options = core::Json::object();  // of the type alone: Parametrisation::options()
  int64_t rank = 8;
  double alpha = 8;
  double dropout = 0;  // share of the adapter's inputs that training zeroes
  std::vector<std::string> target_modules = {
      "all-linear"};                         // whole paths or their last segments; "all-linear" alone: all but lm_head
  std::string target_regex;                  // instead of target_modules: matches the whole path
  std::vector<std::string> exclude_modules;  // as target_modules
  std::string exclude_regex;                 // beside exclude_modules: matches the whole path
  std::vector<int64_t> layers_to_transform;  // layer numbers; empty = all; needs named target_modules
  std::vector<ModuleRank> rank_pattern;      // the first that matches decides; see targets_of()
  std::vector<ModuleAlpha> alpha_pattern;
  // A: kaiming U(+-1/sqrt(in)) | gaussian N(0, 1/r) | eva, from the slot's inputs; B is 0. pissa | olora: both from the
  // frozen weight
  std::string init = "kaiming";
  double lr_ratio = 1;      // B and vectors learn at this multiple of the rate (LoRA+, arXiv 2402.12354)
  bool use_rslora = false;  // scale alpha / sqrt(r) instead of alpha / r
};
const core::Schema<AdapterConfig>& adapter_schema();

/// B A of a fresh adapter is a part of the base.
inline bool starts_from_base(const AdapterConfig& config) { return config.init == "pissa" || config.init == "olora"; }

/// An adapter's file whose target_modules is null: the modules that have tensors are meant.
inline bool names_no_target(const AdapterConfig& config) {
  return config.target_modules.empty() && config.target_regex.empty();
}

/// One slot the adapter sits on.
struct Target {
  models::Slot slot;
  int64_t rank = 0;
  double alpha = 0, scale = 0;  // y += scale * x A^T B^T
};

/// What an update of that rank is multiplied by: alpha / rank, or alpha / sqrt(rank).
double scale_of(double alpha, int64_t rank, bool use_rslora);

/// kEveryName, for recipes: a target, an exclusion or a pattern that matches no linear slot is an error, and patterns
/// are tried in alphabetical order, which is the order PEFT writes them in. kAnyName, for files, whose tensors say what
/// is meant: PEFT's own rules, one target must match, and patterns are tried in the order of the file.
enum class Matching { kEveryName, kAnyName };

/// The linear slots that `config` selects, in slot order. Works on shapes alone. Throws UserError if a name matches no
/// slot (the slots are listed), a regular expression is malformed, or a rank is not in [1, min(in, out)] of its slot
/// (Traits::rank_fits).
std::vector<Target> targets_of(const AdapterConfig& config, std::span<const models::Slot> slots,
                               Matching matching = Matching::kEveryName);

/// Numbers in pairs A and B: the sum of rank * (in + out).
int64_t lora_parameters(std::span<const Target> targets);

/// Reads adapter_config.json, whose patterns keep their order. An unknown peft_type and options that would change the
/// result and are not implemented here (biases, initialisations that change the base, ...) are UserErrors;
/// unknown fields are named in a warning. A target_modules of null leaves both ways to name targets empty: the tensors
/// say which modules are meant.
AdapterConfig config_from_peft(const core::OrderedJson& json, const std::string& origin);

}  // namespace moraine::algorithms::adapters
