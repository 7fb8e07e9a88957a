#include "algorithms/mergers/merge_adapters.h"

#include <algorithm>
#include <set>

#include <ATen/core/grad_mode.h>

#include "algorithms/adapters/lora.h"
#include "algorithms/adapters/peft_files.h"
#include "core/error.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::mergers {
namespace {

constexpr const char* kBias = ".bias";

/// Whose adapter, and which of its targets, change a slot.
using Member = std::pair<const Participant*, size_t>;

/// Contributions to one slot in the order of the participants, and to its bias under a name of its own.
std::map<std::string, std::vector<Contribution>> contributions_of(const std::string& path,
                                                                  const std::vector<Member>& members,
                                                                  const models::Backbone& base) {
  std::map<std::string, std::vector<Contribution>> out;
  for (const auto& [from, target] : members) {
    const adapters::SlotAdapter& function = from->adapter->function(target);
    const adapters::AdapterConfig& config = from->adapter->config();
    if (adapters::parametrisation(config.type).change(config) != adapters::Change::kBias) {
      Contribution contribution{from->name, from->identity, from->weight, function.factored(base.base(path)), {}};
      if (!contribution.factors) {
        const auto change = function.delta(base.base(path));
        if (!change)
          throw core::UserError(fmt::format("algorithms/mergers: '{}' is of type {}, which is no change of weights",
                                            from->name, config.type),
                                "leave it out: only changes of weights can be merged");
        contribution.dense = *change;
      }
      out[path].push_back(std::move(contribution));
    }
    if (const at::Tensor bias = function.bias_delta(base.base(path)); bias.defined())
      out[path + kBias].push_back({from->name, from->identity, from->weight, std::nullopt, bias.unsqueeze(1)});
  }
  return out;
}

[[noreturn]] void refuse(const std::string& path, const std::string& why, const std::string& hint) {
  throw core::UserError(fmt::format("algorithms/mergers: the merged change of {} is no LoRA: {}", path, why), hint);
}

int64_t rank_of(const Merged& merged) { return merged.factors->parts.front().second.size(0); }

void check_factors(const MergedSlots& merged) {
  for (const auto& [path, change] : merged) {
    if (path.ends_with(kBias)) refuse(path, "it changes a bias", "write the merged model: --to hf");
    if (!change.factors)
      refuse(path, "it is dense", "write the merged model, --to hf, or cut it to a rank: svd, ..._svd");
    const auto& [b, a] = change.factors->parts.front();
    if (const int64_t most = std::min(b.size(0), a.size(1)); a.size(0) > most)
      refuse(path, fmt::format("rank {} of a {} x {} matrix", a.size(0), b.size(0), a.size(1)),
             fmt::format("type svd with rank {} keeps the sum exactly; or --to hf", most));
  }
}

/// The shortest names that select these linear slots of the model and no others.
std::vector<std::string> names_of(const MergedSlots& merged, const models::Backbone& base) {
  std::set<std::string> ends;
  std::vector<std::string> paths;
  for (const auto& [path, change] : merged) {
    ends.insert(path.substr(path.rfind('.') + 1));
    paths.push_back(path);
  }
  for (const models::Slot& slot : base.slots())
    if (slot.kind == models::SlotKind::kLinear && ends.contains(slot.path.substr(slot.path.rfind('.') + 1)) &&
        !merged.contains(slot.path))
      return paths;
  return {ends.begin(), ends.end()};
}

/// The rank that most slots have, and the others' as patterns.
adapters::AdapterConfig config_of(const MergedSlots& merged, const models::Backbone& base) {
  adapters::AdapterConfig config;
  config.target_modules = names_of(merged, base);
  std::map<int64_t, int64_t> slots_of_rank;
  for (const auto& [path, change] : merged) ++slots_of_rank[rank_of(change)];
  const auto by_count = [](const auto& left, const auto& right) { return left.second < right.second; };
  config.rank = std::ranges::max_element(slots_of_rank, by_count)->first;
  config.alpha = static_cast<double>(config.rank);
  for (const auto& [path, change] : merged) {
    if (const int64_t rank = rank_of(change); rank != config.rank) {
      config.rank_pattern.push_back({path, rank});
      config.alpha_pattern.push_back({path, static_cast<double>(rank)});
    }
  }
  return config;
}

}  // namespace

MergedSlots merge_adapters(std::span<const Participant> participants, const models::Backbone& base,
                           const MergeConfig& config) {
  const at::NoGradGuard no_grad;
  const Merger& rule = merger(config.type);
  std::map<std::string, std::vector<Member>> slots;
  for (const Participant& from : participants)
    for (size_t i = 0; i < from.adapter->targets().size(); ++i)
      slots[from.adapter->targets()[i].slot.path].emplace_back(&from, i);
  MergedSlots merged;  // dense changes of one slot at a time
  for (const auto& [path, members] : slots)
    for (const auto& [name, contributions] : contributions_of(path, members, base))
      merged.emplace(name, rule.merge(contributions, config, name));
  return merged;
}

models::NamedTensors changes_of(const MergedSlots& merged) {
  models::NamedTensors changes;
  for (const auto& [path, change] : merged) {
    const bool bias = path.ends_with(kBias);
    changes.emplace_back(bias ? path : path + ".weight", bias ? change.change().squeeze(1) : change.change());
  }
  std::ranges::sort(changes, {}, &std::pair<std::string, at::Tensor>::first);
  return changes;
}

void write_peft(const MergedSlots& merged, const models::Backbone& base, const std::filesystem::path& directory,
                const std::string& base_model) {
  check_factors(merged);
  models::NamedTensors tensors;
  for (const auto& [path, change] : merged) {
    const auto& [b, a] = change.factors->parts.front();
    tensors.emplace_back(adapters::peft_name(path + ".lora_A.weight"), a.to(at::kFloat).contiguous());
    tensors.emplace_back(adapters::peft_name(path + ".lora_B.weight"), b.to(at::kFloat).contiguous());
  }
  std::ranges::sort(tensors, {}, &std::pair<std::string, at::Tensor>::first);
  const adapters::AdapterConfig config = config_of(merged, base);
  std::vector<at::Tensor> keep;
  adapters::write_peft_directory(directory, adapters::lora_peft_config(config), config, models::views_of(tensors, keep),
                                 base_model);
}

}  // namespace moraine::algorithms::mergers
