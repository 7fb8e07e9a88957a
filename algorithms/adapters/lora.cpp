#include "algorithms/adapters/lora.h"

#include <algorithm>
#include <cmath>
#include <set>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>
#include <fmt/ranges.h>

#include "algorithms/adapters/peft_files.h"
#include "core/error.h"
#include "core/hash.h"
#include "core/safetensors.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::adapters {
namespace {

constexpr const char* kPrefix = "base_model.model.";
constexpr const char* kA = ".lora_A.weight";
constexpr const char* kB = ".lora_B.weight";

at::Tensor initial_a(const LoraTarget& target, const std::string& init, uint64_t seed) {
  const at::NoGradGuard no_grad;
  const at::Generator generator = at::detail::createCPUGenerator(core::derive_seed(seed, target.slot.path + kA));
  const at::Tensor a = at::empty({target.rank, target.slot.in}, at::kFloat);
  if (init == "gaussian") return a.normal_(0, 1.0 / static_cast<double>(target.rank), generator);
  const double bound = 1.0 / std::sqrt(static_cast<double>(target.slot.in));  // kaiming_uniform with a = sqrt(5)
  return a.uniform_(-bound, bound, generator);
}

/// Compares names and shapes of a file with what the configuration asks for; reports all differences at once.
void check_tensors(const core::Safetensors& file, const std::vector<LoraTarget>& targets) {
  std::vector<std::string> problems;
  std::set<std::string> expected;
  const auto check = [&](const std::string& name, std::vector<int64_t> shape) {
    expected.insert(name);
    const core::TensorView* view = file.find(name);
    if (view == nullptr) {
      problems.push_back("missing " + name);
    } else if (view->shape != shape) {
      problems.push_back(
          fmt::format("{} is [{}], expected [{}]", name, fmt::join(view->shape, ", "), fmt::join(shape, ", ")));
    }
  };
  for (const LoraTarget& target : targets) {
    check(kPrefix + target.slot.path + kA, {target.rank, target.slot.in});
    check(kPrefix + target.slot.path + kB, {target.slot.out, target.rank});
  }
  for (const core::TensorView& view : file.tensors()) {
    if (!expected.contains(view.name)) problems.push_back("left over " + view.name);
  }
  if (problems.empty()) return;
  throw core::UserError(fmt::format("algorithms/adapters: {} does not fit its configuration and this model:\n  {}",
                                    file.origin(), fmt::join(problems, "\n  ")),
                        "use the base model the adapter was trained on, and the adapter_config.json it was saved with");
}

at::Tensor read_factor(const core::Safetensors& file, const std::string& name, std::optional<at::ScalarType> dtype,
                       at::Device device) {
  const at::Tensor stored = models::copy_of(*file.find(name));
  if (!stored.is_floating_point()) {
    throw core::UserError(
        fmt::format("algorithms/adapters: {}: {} is not of a floating-point type", file.origin(), name),
        "save the adapter in float32, bfloat16 or float16");
  }
  return stored.to(device, dtype.value_or(stored.scalar_type())).set_requires_grad(true);
}

/// What is stored narrower than float32 is computed with in float32, as in PEFT.
at::ScalarType compute_type(const at::Tensor& a, const at::Tensor& b) {
  return c10::promoteTypes(at::kFloat, c10::promoteTypes(a.scalar_type(), b.scalar_type()));
}

}  // namespace

LoraLinear::LoraLinear(at::Tensor a, at::Tensor b, double scale) : a_(std::move(a)), b_(std::move(b)), scale_(scale) {}

at::Tensor LoraLinear::forward(const at::Tensor& x, const models::SlotBase& base) {
  const at::Tensor y = base.forward(x);
  const at::ScalarType type = c10::promoteTypes(compute_type(a_, b_), x.scalar_type());
  const at::Tensor update = at::linear(at::linear(x.to(type), a_.to(type)), b_.to(type));
  return y.add(update, scale_).to(y.scalar_type());
}

models::NamedTensors LoraLinear::parameters() const { return {{"lora_A.weight", a_}, {"lora_B.weight", b_}}; }

at::Tensor LoraLinear::delta() const {
  const at::NoGradGuard no_grad;
  const at::ScalarType type = compute_type(a_, b_);
  return at::matmul(b_.to(type), a_.to(type)).mul(scale_);
}

LoraAdapter LoraAdapter::create(const LoraConfig& config, std::span<const models::Slot> slots, uint64_t seed,
                                at::Device device) {
  LoraAdapter adapter;
  adapter.targets_ = lora_targets(config, slots);
  adapter.peft_ = peft_config(config);  // patterns in alphabetical order, as they are tried
  for (const LoraTarget& target : adapter.targets_) {
    const at::Tensor a = initial_a(target, config.init, seed).to(device).set_requires_grad(true);
    const at::Tensor b = at::zeros({target.slot.out, target.rank}, a.options()).set_requires_grad(true);
    adapter.functions_.push_back(std::make_shared<LoraLinear>(a, b, target.scale));
  }
  return adapter;
}

LoraAdapter LoraAdapter::load(const std::filesystem::path& directory, std::span<const models::Slot> slots,
                              std::optional<at::ScalarType> dtype, at::Device device) {
  const std::filesystem::path config_path = directory / "adapter_config.json",
                              tensors_path = directory / "adapter_model.safetensors";
  LoraAdapter adapter;
  const core::OrderedJson peft = core::read_ordered_json(config_path);
  adapter.peft_ = peft;
  adapter.config_ = lora_config_from_peft(peft, config_path.string());
  const core::Safetensors file = core::open_checked(tensors_path);
  LoraConfig config = adapter.config_;
  if (names_no_target(config)) config.target_modules = modules_with_factors(file);
  adapter.targets_ = lora_targets(config, slots, Matching::kAnyName);
  check_tensors(file, adapter.targets_);
  for (const LoraTarget& target : adapter.targets_) {
    const std::string path = kPrefix + target.slot.path;
    adapter.functions_.push_back(std::make_shared<LoraLinear>(
        read_factor(file, path + kA, dtype, device), read_factor(file, path + kB, dtype, device), target.scale));
  }
  return adapter;
}

void LoraAdapter::save(const std::filesystem::path& directory, const std::string& base_model) const {
  models::NamedTensors tensors;
  for (const auto& [name, tensor] : parameters()) tensors.emplace_back(name, tensor.detach().to(at::kCPU));
  std::vector<at::Tensor> keep;
  write_peft_directory(directory, peft_, config_, models::views_of(tensors, keep), base_model);
}

void LoraAdapter::attach(models::Backbone& model) const {
  for (size_t i = 0; i < targets_.size(); ++i) model.attach(targets_[i].slot.path, functions_[i]);
}

void LoraAdapter::detach(models::Backbone& model) const {
  for (const LoraTarget& target : targets_) model.detach(target.slot.path);
}

models::NamedTensors LoraAdapter::parameters() const {
  models::NamedTensors all;
  for (size_t i = 0; i < targets_.size(); ++i) {
    for (const auto& [name, tensor] : functions_[i]->parameters())
      all.emplace_back(targets_[i].slot.path + "." + name, tensor);
  }
  std::ranges::sort(all, {}, &std::pair<std::string, at::Tensor>::first);
  return all;
}

models::NamedTensors LoraAdapter::deltas() const {
  models::NamedTensors all;
  for (size_t i = 0; i < targets_.size(); ++i)
    all.emplace_back(targets_[i].slot.path + ".weight", functions_[i]->delta());
  std::ranges::sort(all, {}, &std::pair<std::string, at::Tensor>::first);
  return all;
}

}  // namespace moraine::algorithms::adapters
