#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/adapters/parametrisation.h"
#include "algorithms/mergers/config.h"

namespace moraine::algorithms::mergers {

// The seam for a new way to make one change of a linear map out of many: one file with a Merger and one line in
// register.cpp. It then works for `moraine merge`, and for whatever else holds adapters::Factored. Mergers see one slot
// at a time and never the base.

/// One participant's change of one slot, and how much it counts.
struct Contribution {
  std::string name;      // for messages
  std::string identity;  // of what is contributed: random masks depend on it, and not on the place in the list
  double weight = 1;     // may be negative; the change counts this many times
  std::optional<adapters::Factored> factors = {};  // scale * sum of b a
  at::Tensor dense = {};                           // [out, in]: instead of factors, where there are none
};

/// What mergers work on, all float64 on the CPU.
struct Merged {
  std::optional<adapters::Factored> factors = {};  // of scale 1 and one part
  at::Tensor dense = {};                           // [out, in]: instead of factors, where the rule keeps none
  double norm2 = 0, lost2 = 0;  // squared Frobenius norms: of the change before it was cut, of what was cut off

  /// The change, [out, in].
  at::Tensor change() const;
};

/// Which options of MergeConfig a type has, and what it can take.
struct Traits {
  bool rank = false, density = false, sign = false, seed = false;
  bool takes_dense = false;  // contributions without factors
};

/// A rule. Stateless; thread-safe. Sums run in the order of the contributions in float64, so who wants a result that
/// does not depend on arrival sorts them first.
class Merger {
 public:
  virtual ~Merger() = default;
  virtual std::string name() const = 0;     // as in recipes
  virtual std::string summary() const = 0;  // one line, with its source
  virtual Traits traits() const = 0;
  /// `slot`: its path, for messages and random masks. Contributions: at least one, all of one shape. Throws UserError
  /// on a contribution without factors where !Traits::takes_dense, on one that is not finite, and on ranks that the
  /// rule cannot take.
  Merged merge(std::span<const Contribution> contributions, const MergeConfig& config, const std::string& slot) const;

 protected:
  virtual Merged merge_checked(std::span<const Contribution> contributions, const MergeConfig& config,
                               const std::string& slot) const = 0;
};

/// All mergers, sorted by name. One line each in register.cpp.
const std::vector<const Merger*>& mergers();
/// Throws UserError with the nearest names.
const Merger& merger(const std::string& name);

/// A contribution's factors as one pair in float64, without its scale: b [out, R], a [R, in], R the sum of its parts'
/// ranks.
struct Pair {
  at::Tensor b, a;
};
Pair pair_of(const Contribution& contribution);
/// Rank of a contribution's factors; 0 without factors.
int64_t rank_of(const Contribution& contribution);
/// The change itself, [out, in] float64, not weighted.
at::Tensor change_of(const Contribution& contribution);

}  // namespace moraine::algorithms::mergers
