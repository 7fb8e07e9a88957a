#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/adapters/config.h"
#include "core/json.h"
#include "core/ordered_json.h"
#include "models/slot.h"

namespace moraine::algorithms::adapters {

// The seam that a new way to change a frozen layer plugs into: one file with a SlotAdapter and a Parametrisation, and
// one line in register.cpp. It then runs wherever an AdapterConfig stands in a recipe, and counts, artefacts, exports
// and merges follow from what it declares.

/// Exact change of a linear map as a sum: delta W = scale * sum over parts of b a; a [r, in], b [out, r].
struct Factored {
  std::vector<std::pair<at::Tensor, at::Tensor>> parts;  // (b, a)
  double scale = 1;
  size_t frozen = 0;  // of the parts the last ones, which training does not move
};

/// A parametrisation's function on one slot.
class SlotAdapter : public models::SlotFunction {
 public:
  /// Kept, stored and sent, but never trained: under names relative to the slot, sorted.
  virtual models::NamedTensors state() const { return {}; }
  /// The dense change of the weight, [out, in], at least float32: base weight + delta = merged weight. nullopt when the
  /// map is not a linear one.
  virtual std::optional<at::Tensor> delta(const models::SlotBase& base) const = 0;
  /// The same as factors, when it is a product of such.
  virtual std::optional<Factored> factored(const models::SlotBase&) const { return std::nullopt; }
  /// The change of the bias, [out]; undefined when it has none.
  virtual at::Tensor bias_delta(const models::SlotBase&) const { return {}; }
  /// What the adapter's file in PEFT's form holds of this slot.
  virtual models::NamedTensors peft_tensors() const { return parameters(); }
};

/// Numbers of a whole adapter, in closed form on shapes.
struct Counts {
  int64_t trained = 0;
  int64_t stored = 0;  // in an artefact, which is what a worker sends; what a seed regenerates is not in it
};

/// How the change of a slot's linear map is written down exactly.
enum class Change {
  kFactors,  // SlotAdapter::factored(), of rank factored_rank(), affine in what is trained, and so delta()
  kDense,    // delta() alone
  kBias,     // of the bias alone
  kNone,     // it is no change of a linear map
};

/// What a procedure may ask before it uses a parametrisation.
struct Traits {
  bool zero_at_init = true;       // a fresh adapter changes no bit of the base's output
  bool reads_base = false;        // start values need the frozen weight, whatever `init` says
  bool uses_rank = true;          // rank, rank_pattern, alpha and init mean something
  bool rank_fits = true;          // a rank is at most min(in, out) of its slot
  bool nested_ranks = false;      // a LoRA whose first r' ranks are one of rank r': Adapter::truncated()
  bool from_seed = false;         // a part comes from create()'s seed alone and is not stored
  bool averages_exactly = false;  // as TensorTraits', of everything that is trained at once
  bool trains_shared = false;     // a tensor of SlotInit::shared is trained
  models::SlotKind slots = models::SlotKind::kLinear;  // where it sits
  Change change = Change::kFactors;
};

/// What a fresh adapter's start values are made of beside its seed and the frozen weight: something of the slot over as
/// many examples as the type's option `examples` (calibration.h).
enum class Wants { kNothing, kGradients, kInputMoments };

/// Rank of the sum that SlotAdapter::factored() gives, where change() is kFactors: what starts from the base
/// takes that back in as many ranks again.
inline int64_t factored_rank(const AdapterConfig& config) {
  return starts_from_base(config) ? 2 * config.rank : config.rank;
}

/// What a procedure may do with one trained tensor of a type.
struct TensorTraits {
  /// What the slot computes is affine in this tensor and all others that say so, jointly, while the rest is held: then
  /// the mean of the tensors gives the mean of the changes.
  bool averages_exactly = false;
  /// The dimension whose first r entries, in all tensors that have one, are the adapter of rank r at the same scale.
  std::optional<int64_t> ranks_at = std::nullopt;
};

/// What a slot's adapter is made of.
struct SlotInit {
  const Target& target;
  std::span<const Target> targets = {};  // all of the adapter
  const AdapterConfig& config;
  const models::SlotBase* base = nullptr;  // nullptr when neither Traits::reads_base nor starts_from_base()
  uint64_t seed = 0;
  at::Device device = at::kCPU;
  bool fresh = true;  // false: values will be overwritten, only shapes count
  // Of a fresh one, what Parametrisation::wants() says: the gradient of the loss by the weight, [out, in] float32, with
  // the learning rate of the first step; or the sum of x x^T over the slot's inputs x, [in, in] float64.
  at::Tensor gradient = {}, input_moments = {};
  double first_learning_rate = 0;
  /// A tensor that all slots of the adapter share, made once under its name. One that requires a gradient is trained.
  std::function<at::Tensor(const std::string& name, const std::function<at::Tensor()>& make)> shared = {};

  /// An option of the type, from the recipe or its default.
  template <typename T>
  T option(const char* name) const;
};

/// One type of adapter. Stateless; thread-safe.
class Parametrisation {
 public:
  virtual ~Parametrisation() = default;
  virtual std::string name() const = 0;     // as in recipes
  virtual std::string summary() const = 0;  // one line, with its source
  virtual Traits traits() const { return {}; }
  /// Of a type whose options decide what it is; Traits::change otherwise.
  virtual Change change(const AdapterConfig&) const { return traits().change; }
  /// Of a trained tensor by its name relative to the slot, or among the shared ones.
  virtual TensorTraits tensor_traits(std::string_view name) const;
  /// Raised when a change of the code changes results for the same specification.
  virtual int64_t result_version() const { return 1; }
  /// AdapterConfig::options with their defaults; no others are allowed, and types must agree.
  virtual core::Json options() const { return core::Json::object(); }
  virtual Wants wants(const AdapterConfig&) const { return Wants::kNothing; }
  /// What is wrong with a configuration beyond the types of its fields.
  virtual std::optional<std::string> problem(const AdapterConfig&) const { return std::nullopt; }
  /// Tensors of SlotInit::shared that are frozen and stored all the same: state of the adapter.
  virtual std::vector<std::string> kept_shared(const AdapterConfig&) const { return {}; }
  virtual Counts count(std::span<const Target> targets, const AdapterConfig& config) const = 0;
  /// Trained tensors are float32 leaves that require gradients, and depend on seed and slot path alone.
  virtual std::shared_ptr<SlotAdapter> make(const SlotInit& init) const = 0;
  /// PEFT's name for it, "" when PEFT does not know it; then parameters have PEFT's names.
  virtual std::string peft_type() const { return ""; }
  /// Whether PEFT knows this configuration of it.
  virtual bool in_peft(const AdapterConfig&) const { return !peft_type().empty(); }
  /// adapter_config.json's fields, of a type PEFT knows.
  virtual core::Json peft_config(const AdapterConfig& config) const;
  /// Those fields as they are in a file `origin`. Types of one peft_type() read the same files: the first one is asked,
  /// and the file says which of them it is.
  virtual AdapterConfig config_from_peft(const core::OrderedJson& json, const std::string& origin) const;
};

/// All parametrisations, sorted by name. One line each in register.cpp.
const std::vector<const Parametrisation*>& parametrisations();
/// Throws UserError with the nearest names.
const Parametrisation& parametrisation(const std::string& name);

/// The value of an option.
core::Json option_of(const AdapterConfig& config, const char* name);

template <typename T>
T SlotInit::option(const char* name) const {
  return option_of(config, name).get<T>();
}

/// A generator for what belongs to `purpose` of one slot.
at::Generator generator_for(const SlotInit& init, const std::string& purpose);
/// A leaf of the values on the slot's device.
at::Tensor leaf(const at::Tensor& values, at::Device device);
/// Rows of x with a share of their values zeroed and the others scaled up, in training; x itself otherwise. Which ones
/// depends on the pass and `path` alone.
at::Tensor dropped(const at::Tensor& x, double share, const models::Pass& pass, const std::string& path);

}  // namespace moraine::algorithms::adapters
