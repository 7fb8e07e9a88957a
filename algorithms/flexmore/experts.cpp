#include "algorithms/flexmore/experts.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <fmt/ranges.h>

#include "algorithms/flexmore/phlora.h"
#include "core/error.h"
#include "core/file_name.h"
#include "core/hash.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::flexmore {
namespace {

// Calls visit(name, tensor reference) for every tensor of one expert's FFN in one layer.
template <typename Ffn, typename Visit>
void visit_ffn(Ffn& ffn, bool full, const std::string& prefix, Visit&& visit) {
  if (full) {
    visit(prefix + "gate_proj.weight", ffn.gate);
    visit(prefix + "up_proj.weight", ffn.up);
    visit(prefix + "down_proj.weight", ffn.down);
    return;
  }
  visit(prefix + "gate_proj_a.weight", ffn.gate_delta.a);
  visit(prefix + "gate_proj_b.weight", ffn.gate_delta.b);
  visit(prefix + "up_proj_a.weight", ffn.up_delta.a);
  visit(prefix + "up_proj_b.weight", ffn.up_delta.b);
  visit(prefix + "down_proj_a.weight", ffn.down_delta.a);
  visit(prefix + "down_proj_b.weight", ffn.down_delta.b);
}

at::Tensor load(const core::Artefact& artefact, const std::string& name) {
  const core::TensorView* view = artefact.file().find(name);
  if (!view)
    throw core::UserError(fmt::format("algorithms/flexmore: {} has no tensor '{}'", artefact.file().origin(), name),
                          "the artefact is not of this recipe; remove it to have it made again");
  return models::copy_of(*view);
}

// Metadata of an artefact, which may come from anywhere: there and of the right type, or a UserError.
template <typename T>
T meta_of(const core::Artefact& artefact, const char* key) {
  try {
    return artefact.meta().at(key).get<T>();
  } catch (const core::Json::exception&) {
    throw core::UserError(fmt::format("algorithms/flexmore: {}: the metadata's '{}' is missing or of another type",
                                      artefact.file().origin(), key),
                          "use a file that `moraine cp` or `moraine import` wrote");
  }
}

// The number of layers is believed as far as there are tensors for it.
size_t layers_of(const core::Artefact& artefact) {
  const auto layers = meta_of<int64_t>(artefact, "layers");
  if (layers < 1 || layers > static_cast<int64_t>(artefact.file().tensors().size()))
    throw core::UserError(fmt::format("algorithms/flexmore: {}: {} layers, but {} tensors", artefact.file().origin(),
                                      layers, artefact.file().tensors().size()),
                          "use a file that `moraine cp` or `moraine import` wrote");
  return static_cast<size_t>(layers);
}

[[noreturn]] void refuse_shapes(const std::string& expert, size_t layer, const std::string& what) {
  throw core::UserError(fmt::format("algorithms/flexmore: expert '{}': layer {}: {}", expert, layer, what),
                        "the tensors of an expert have to fit each other and its public model");
}

// All tensors of a layer fit each other: router row [d], and matrices or pairs of factors between d and one h.
void check_shapes(const std::string& name, size_t layer, const models::FfnExpert& ffn, const at::Tensor& row,
                  int64_t rank) {
  using Sides = std::vector<int64_t>;
  if (row.dim() != 1) refuse_shapes(name, layer, "the router row is no vector");
  const int64_t d = row.size(0);
  const auto expect = [&](const char* what, const at::Tensor& tensor, const Sides& sides) {
    if (tensor.sizes().vec() != sides)
      refuse_shapes(name, layer,
                    fmt::format("{} is [{}], expected [{}]", what, fmt::join(tensor.sizes().vec(), ", "),
                                fmt::join(sides, ", ")));
  };
  const at::Tensor& outer = rank == 0 ? ffn.gate : ffn.gate_delta.b;
  if (outer.dim() != 2) refuse_shapes(name, layer, "gate_proj is no matrix");
  const int64_t h = outer.size(0);
  if (rank == 0) {
    expect("gate_proj", ffn.gate, {h, d}), expect("up_proj", ffn.up, {h, d}), expect("down_proj", ffn.down, {d, h});
    return;
  }
  expect("gate_proj_a", ffn.gate_delta.a, {rank, d}), expect("gate_proj_b", ffn.gate_delta.b, {h, rank});
  expect("up_proj_a", ffn.up_delta.a, {rank, d}), expect("up_proj_b", ffn.up_delta.b, {h, rank});
  expect("down_proj_a", ffn.down_delta.a, {rank, h}), expect("down_proj_b", ffn.down_delta.b, {d, rank});
}

void expect_kind(const core::Artefact& artefact, const std::string& kind) {
  if (artefact.kind() != kind)
    throw core::UserError(fmt::format("algorithms/flexmore: {} is of kind '{}', expected '{}'",
                                      artefact.file().origin(), artefact.kind(), kind));
}

core::ArtefactPtr to_artefact(const std::string& kind, core::Json meta, models::NamedTensors tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<at::Tensor> keep;
  for (auto& [name, tensor] : tensors) tensor = tensor.detach().cpu();
  return core::Artefact::create(kind, std::move(meta), models::views_of(tensors, keep));
}

models::FfnExpert on_device(models::FfnExpert ffn, at::Device device) {
  if (ffn.functions.gate) return ffn;  // made on it
  visit_ffn(ffn, ffn.full(), "", [&](const std::string&, at::Tensor& t) { t = t.to(device); });
  return ffn;
}

// Scales for lower ranks, of an expert of that rank; none is no scaling.
std::vector<double> scales_of(const core::Artefact& artefact, int64_t rank) {
  if (!artefact.meta().contains("scales_by_rank")) return {};
  auto scales = meta_of<std::vector<double>>(artefact, "scales_by_rank");
  const bool positive = std::all_of(scales.begin(), scales.end(), [](double s) { return std::isfinite(s) && s > 0; });
  if (static_cast<int64_t>(scales.size()) != rank || !positive)
    throw core::UserError(fmt::format("algorithms/flexmore: {}: scales_by_rank are not {} positive numbers",
                                      artefact.file().origin(), rank),
                          "use a file that `moraine cp` or `moraine import` wrote");
  return scales;
}

// The first ranks of an expert alone.
void cut(models::FfnExpert& ffn, int64_t rank, const std::vector<double>& scales) {
  for (auto* delta : {&ffn.gate_delta, &ffn.up_delta, &ffn.down_delta}) {
    *delta = slice(*delta, rank);
    if (!scales.empty()) delta->b = delta->b * scales[static_cast<size_t>(rank - 1)];
  }
}

std::string layer_prefix(size_t layer) { return fmt::format("model.layers.{}.mlp.", layer); }

}  // namespace

models::MixtureKernels mixture_kernels(const std::string& name) {
  return name == "reference" ? models::MixtureKernels::kReference : models::MixtureKernels::kAuto;
}

std::string ffn_slot(size_t layer) { return fmt::format("model.layers.{}.mlp", layer); }

int64_t Expert::parameters() const {
  int64_t total = 0;
  for (auto ffn : layers)
    visit_ffn(ffn, ffn.full(), "", [&](const std::string&, const at::Tensor& t) { total += t.numel(); });
  for (const auto& row : router_rows) total += row.numel();
  for (const auto& bias : biases) total += bias.numel();
  return total;
}

core::Json fingerprint_of_base(const std::map<std::string, at::Tensor>& weights,
                               const std::vector<at::Tensor>& public_rows) {
  core::Json out = core::Json::object();
  const auto add = [&out](const std::string& name, const at::Tensor& tensor) {
    const at::Tensor here = tensor.cpu();  // outlives its view
    std::vector<at::Tensor> keep;
    const auto views = models::views_of({{name, here}}, keep);
    out[name] = core::sha256(views.front().data);
  };
  for (const auto& [name, tensor] : weights) add(name, tensor);
  for (size_t l = 0; l < public_rows.size(); ++l) add(layer_prefix(l) + "gate.weight[0]", public_rows[l]);
  return out;
}

core::ArtefactPtr write_expert(const Expert& expert, core::Json meta, models::NamedTensors extra) {
  models::NamedTensors tensors = std::move(extra);
  for (size_t l = 0; l < expert.layers.size(); ++l) {
    const std::string prefix = layer_prefix(l);
    auto ffn = expert.layers[l];
    visit_ffn(ffn, ffn.full(), prefix,
              [&](const std::string& name, const at::Tensor& t) { tensors.emplace_back(name, t); });
    tensors.emplace_back(prefix + "gate.weight", expert.router_rows[l]);
    if (!expert.biases.empty()) tensors.emplace_back(prefix + "gate.bias", expert.biases[l]);
  }
  meta["name"] = expert.name;
  meta["rank"] = expert.rank();
  meta["layers"] = expert.layers.size();
  meta["parameters"] = expert.parameters();
  if (!expert.scales_by_rank.empty()) meta["scales_by_rank"] = expert.scales_by_rank;
  return to_artefact("expert", std::move(meta), std::move(tensors));
}

Expert read_expert(const core::Artefact& artefact, int64_t rank) {
  expect_kind(artefact, "expert");
  Expert expert;
  expert.name = core::check_file_name(meta_of<std::string>(artefact, "name"), "an expert", artefact.file().origin());
  const auto stored = meta_of<int64_t>(artefact, "rank");
  if (rank < 0 || (rank > 0 && stored == 0))
    throw core::UserError(
        fmt::format("algorithms/flexmore: expert '{}' cannot be used at rank {}: it was shipped full-size", expert.name,
                    rank),
        "extract a low-rank expert from it first");
  const size_t layers = layers_of(artefact);
  const std::vector<double> scales = scales_of(artefact, stored);
  const bool whole = rank == 0 || rank == stored;
  if (whole) expert.scales_by_rank = scales;
  for (size_t l = 0; l < layers; ++l) {
    const std::string prefix = layer_prefix(l);
    models::FfnExpert ffn;
    visit_ffn(ffn, stored == 0, prefix, [&](const std::string& name, at::Tensor& t) { t = load(artefact, name); });
    check_shapes(expert.name, l, ffn, load(artefact, prefix + "gate.weight"), stored);
    if (!whole) cut(ffn, rank, scales);
    expert.layers.push_back(std::move(ffn));
    expert.router_rows.push_back(load(artefact, prefix + "gate.weight"));
    if (artefact.file().find(prefix + "gate.bias")) expert.biases.push_back(load(artefact, prefix + "gate.bias"));
  }
  return expert;
}

Mixture merge(const std::vector<core::ArtefactPtr>& artefacts, const std::vector<int64_t>& ranks,
              const std::vector<at::Tensor>& public_rows, const core::Json& base_fingerprint) {
  MORAINE_CHECK_EQ(artefacts.size(), ranks.size());
  Mixture mixture{public_rows, {}};
  for (size_t i = 0; i < artefacts.size(); ++i) {
    Expert expert = read_expert(*artefacts[i], ranks[i]);
    if (expert.layers.size() != public_rows.size())
      throw core::UserError(fmt::format("algorithms/flexmore: expert '{}' has {} layers, the public model {}",
                                        expert.name, expert.layers.size(), public_rows.size()),
                            "every expert has to be trained against the same public model");
    for (size_t l = 0; l < public_rows.size(); ++l)
      if (expert.router_rows[l].sizes() != public_rows[l].sizes())
        refuse_shapes(expert.name, l,
                      fmt::format("its router row has {} values, the public expert's {}", expert.router_rows[l].numel(),
                                  public_rows[l].numel()));
    const auto trained_against = meta_of<core::Json>(*artefacts[i], "base_tensors");
    std::vector<std::string> differing;
    for (const auto& [name, digest] : base_fingerprint.items())
      if (!trained_against.contains(name) || trained_against.at(name) != digest) differing.push_back(name);
    for (const auto& [name, digest] : trained_against.items())
      if (!base_fingerprint.contains(name)) differing.push_back(name);
    if (!differing.empty())
      throw core::UserError(
          fmt::format(
              "algorithms/flexmore: expert '{}' was trained against another public model; {} tensors differ: {}",
              expert.name, differing.size(), fmt::join(differing, ", ")),
          "every site must use a byte-identical public model; re-saving it in another dtype is enough to break this");
    mixture.experts.push_back(std::move(expert));
  }
  std::sort(mixture.experts.begin(), mixture.experts.end(),
            [](const Expert& a, const Expert& b) { return a.name < b.name; });
  for (size_t i = 1; i < mixture.experts.size(); ++i)
    if (mixture.experts[i].name == mixture.experts[i - 1].name)
      throw core::UserError(fmt::format("algorithms/flexmore: two experts are named '{}'", mixture.experts[i].name),
                            "rename one");
  return mixture;
}

core::ArtefactPtr write_mixture(const Mixture& mixture, core::Json meta) {
  models::NamedTensors tensors;
  core::Json names = core::Json::array(), ranks = core::Json::array({0});
  int64_t added = 0;
  for (const auto& expert : mixture.experts) {
    names.push_back(expert.name);
    ranks.push_back(expert.rank());
    added += expert.parameters();
  }
  for (size_t l = 0; l < mixture.public_rows.size(); ++l) {
    std::vector<at::Tensor> rows = {mixture.public_rows[l]}, biases;
    for (size_t e = 0; e < mixture.experts.size(); ++e) {
      const Expert& expert = mixture.experts[e];
      auto ffn = expert.layers[l];
      visit_ffn(ffn, ffn.full(), layer_prefix(l) + fmt::format("experts.{}.", e + 1),
                [&](const std::string& name, const at::Tensor& t) { tensors.emplace_back(name, t); });
      rows.push_back(expert.router_rows[l]);
      if (!expert.biases.empty()) biases.push_back(expert.biases[l]);
    }
    tensors.emplace_back(layer_prefix(l) + "gate.weight", at::stack(rows));
    if (!biases.empty()) {
      if (biases.size() != mixture.experts.size())
        throw core::UserError("algorithms/flexmore: some experts carry a router bias and some do not",
                              "train all with one router.bias");
      tensors.emplace_back(layer_prefix(l) + "gate.bias", at::cat(biases));
    }
  }
  meta["experts"] = names;
  meta["expert_ranks"] = ranks;
  meta["layers"] = mixture.public_rows.size();
  meta["added_parameters"] = added;
  return to_artefact("mixture", std::move(meta), std::move(tensors));
}

Mixture read_mixture(const core::Artefact& artefact) {
  expect_kind(artefact, "mixture");
  Mixture mixture;
  const size_t layers = layers_of(artefact);
  const auto names = meta_of<std::vector<std::string>>(artefact, "experts");
  const auto ranks = meta_of<std::vector<int64_t>>(artefact, "expert_ranks");
  const std::string& origin = artefact.file().origin();
  if (ranks.size() != names.size() + 1)
    throw core::UserError(
        fmt::format("algorithms/flexmore: {}: {} ranks for {} experts", origin, ranks.size(), names.size()),
        "expert_ranks holds one rank per expert and a 0 for the public one");
  for (const auto& name : names)
    mixture.experts.push_back({core::check_file_name(name, "an expert", origin), {}, {}, {}});
  for (size_t l = 0; l < layers; ++l) {
    const at::Tensor rows = load(artefact, layer_prefix(l) + "gate.weight");
    const bool has_bias = artefact.file().find(layer_prefix(l) + "gate.bias") != nullptr;
    const at::Tensor bias = has_bias ? load(artefact, layer_prefix(l) + "gate.bias") : at::Tensor();
    if (rows.dim() != 2 || rows.size(0) != static_cast<int64_t>(ranks.size()) ||
        (has_bias && bias.numel() != static_cast<int64_t>(names.size())))
      throw core::UserError(
          fmt::format("algorithms/flexmore: {}: layer {}: the router does not have {} rows", origin, l, ranks.size()),
          "one row per expert, the public one first; one bias per expert but that");
    mixture.public_rows.push_back(rows[0].contiguous());
    for (size_t e = 0; e < names.size(); ++e) {
      const auto index = static_cast<int64_t>(e);
      models::FfnExpert ffn;
      visit_ffn(ffn, ranks[e + 1] == 0, layer_prefix(l) + fmt::format("experts.{}.", e + 1),
                [&](const std::string& name, at::Tensor& t) { t = load(artefact, name); });
      check_shapes(names[e], l, ffn, rows[index + 1], ranks[e + 1]);
      mixture.experts[e].layers.push_back(std::move(ffn));
      mixture.experts[e].router_rows.push_back(rows[index + 1].contiguous());
      if (has_bias) mixture.experts[e].biases.push_back(bias.narrow(0, index, 1).contiguous());
    }
  }
  return mixture;
}

std::vector<models::FfnExpert> soup(const std::vector<Expert>& experts) {
  MORAINE_CHECK(!experts.empty(), "a soup needs experts");
  std::vector<models::FfnExpert> layers(experts.front().layers.size());
  for (const auto& expert : experts)
    if (expert.rank() != 0)
      throw core::UserError(fmt::format("algorithms/flexmore: weight soup needs full-size experts, '{}' has rank {}",
                                        expert.name, expert.rank()));
  const auto count = static_cast<double>(experts.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto mean = [&](at::Tensor models::FfnExpert::*member) {
      at::Tensor sum = (experts.front().layers[l].*member).to(at::kDouble);
      for (size_t e = 1; e < experts.size(); ++e) sum = sum + (experts[e].layers[l].*member).to(at::kDouble);
      return (sum / count).to((experts.front().layers[l].*member).scalar_type());
    };
    layers[l].gate = mean(&models::FfnExpert::gate);
    layers[l].up = mean(&models::FfnExpert::up);
    layers[l].down = mean(&models::FfnExpert::down);
  }
  return layers;
}

namespace {

// Every layer of the expert has the sides of the FFN it stands beside.
void check_fit(const Expert& expert, const models::Decoder& decoder) {
  if (static_cast<int64_t>(expert.layers.size()) != decoder.config().num_layers)
    throw core::UserError(fmt::format("algorithms/flexmore: expert '{}' has {} layers, the public model {}",
                                      expert.name, expert.layers.size(), decoder.config().num_layers),
                          "use the public model that the expert was trained against");
  for (size_t l = 0; l < expert.layers.size(); ++l) {
    const models::FfnExpert& ffn = expert.layers[l];
    if (ffn.functions.gate) continue;  // which stand on the decoder's own matrices
    const int64_t h = ffn.full() ? ffn.gate.size(0) : ffn.gate_delta.b.size(0), d = expert.router_rows[l].numel();
    if (h != decoder.config().intermediate_size || d != decoder.config().hidden_size)
      refuse_shapes(expert.name, l,
                    fmt::format("its FFN is {} x {}, the public model's {} x {}", h, d,
                                decoder.config().intermediate_size, decoder.config().hidden_size));
  }
}

}  // namespace

std::vector<std::shared_ptr<models::MixtureFfn>> attach(models::Decoder& decoder, const Mixture& mixture,
                                                        models::MixtureFfn::Options options) {
  if (static_cast<int64_t>(mixture.public_rows.size()) != decoder.config().num_layers)
    throw core::UserError(fmt::format("algorithms/flexmore: a mixture of {} layers on a public model of {}",
                                      mixture.public_rows.size(), decoder.config().num_layers),
                          "use the public model that the experts were trained against");
  for (const Expert& expert : mixture.experts) check_fit(expert, decoder);
  const at::Device device = decoder.device();
  std::vector<std::shared_ptr<models::MixtureFfn>> attached;
  for (size_t l = 0; l < mixture.public_rows.size(); ++l) {
    std::vector<at::Tensor> rows = {mixture.public_rows[l].to(device).unsqueeze(0)}, biases;
    std::vector<models::FfnExpert> ffns;
    for (const Expert& expert : mixture.experts) {
      rows.push_back(expert.router_rows[l].to(device).unsqueeze(0));
      if (!expert.biases.empty()) biases.push_back(expert.biases[l].to(device));
      ffns.push_back(on_device(expert.layers[l], device));
    }
    attached.push_back(std::make_shared<models::MixtureFfn>(
        std::move(rows), biases.empty() ? at::Tensor() : at::cat(biases), std::move(ffns), options));
    decoder.attach(ffn_slot(l), attached.back());
  }
  return attached;
}

namespace {

// A plain dense FFN in place of the public one.
class DenseFfn : public models::SlotFunction {
 public:
  explicit DenseFfn(models::FfnExpert ffn) : ffn_(std::move(ffn)) {}
  at::Tensor forward(const at::Tensor& x, const models::SlotBase&, const models::Pass&) override {
    return models::swiglu(x, ffn_.gate.to(x.scalar_type()), ffn_.up.to(x.scalar_type()), ffn_.down.to(x.scalar_type()));
  }
  models::NamedTensors parameters() const override { return {}; }

 private:
  models::FfnExpert ffn_;
};

}  // namespace

void attach_dense(models::Decoder& decoder, const std::vector<models::FfnExpert>& layers) {
  for (size_t l = 0; l < layers.size(); ++l)
    decoder.attach(ffn_slot(l), std::make_shared<DenseFfn>(on_device(layers[l], decoder.device())));
}

}  // namespace moraine::algorithms::flexmore
