#include "models/olmo_core.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <fmt/ranges.h>

#include "core/error.h"
#include "models/tensor_io.h"

namespace moraine::models {
namespace {

constexpr std::pair<std::string_view, std::string_view> kTop[] = {{"embeddings.weight", "model.embed_tokens.weight"},
                                                                  {"lm_head.norm.weight", "model.norm.weight"},
                                                                  {"lm_head.w_out.weight", "lm_head.weight"}};
// Inside a block: OLMo-core's name, Hugging Face's.
constexpr std::pair<std::string_view, std::string_view> kBlock[] = {
    {"attention.w_q.weight", "self_attn.q_proj.weight"},
    {"attention.w_k.weight", "self_attn.k_proj.weight"},
    {"attention.w_v.weight", "self_attn.v_proj.weight"},
    {"attention.w_out.weight", "self_attn.o_proj.weight"},
    {"attention.q_norm.weight", "self_attn.q_norm.weight"},
    {"attention.k_norm.weight", "self_attn.k_norm.weight"},
    {"attention_norm.weight", "post_attention_layernorm.weight"},
    {"feed_forward_norm.weight", "post_feedforward_layernorm.weight"},
    {"feed_forward.w1.weight", "mlp.gate_proj.weight"},
    {"feed_forward.w3.weight", "mlp.up_proj.weight"},
    {"feed_forward.w2.weight", "mlp.down_proj.weight"},
    {"feed_forward_moe.router.weight", "mlp.gate.weight"}};
constexpr std::string_view kExperts = "feed_forward_moe.experts.mlp.", kBias = "feed_forward_moe.router.expert_bias";
constexpr std::pair<std::string_view, std::string_view> kMatrices[] = {
    {"w1", "gate_proj"}, {"w3", "up_proj"}, {"w2", "down_proj"}};

template <size_t N>
std::optional<std::string_view> look_up(const std::pair<std::string_view, std::string_view> (&table)[N],
                                        std::string_view name, bool to_core) {
  for (const auto& [core, hugging_face] : table)
    if (name == (to_core ? hugging_face : core)) return to_core ? core : hugging_face;
  return std::nullopt;
}

/// "<prefix>7.rest" as {7, "rest"}.
std::optional<std::pair<std::string, std::string_view>> split_layer(std::string_view name, std::string_view prefix) {
  if (!name.starts_with(prefix)) return std::nullopt;
  const size_t dot = name.find('.', prefix.size());
  if (dot == std::string_view::npos) return std::nullopt;
  return std::pair(std::string(name.substr(prefix.size(), dot - prefix.size())), name.substr(dot + 1));
}

int64_t number_of(const std::pair<std::string, std::string_view>& expert, const std::string& tensor) {
  int64_t number = 0;
  const std::string& text = expert.first;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || stop != text.data() + text.size())
    throw core::UserError(fmt::format("models: '{}' names no expert by a number", tensor),
                          "compare it with a checkpoint of transformers");
  return number;
}

[[noreturn]] void refuse(const std::string& origin, const core::TensorView& tensor, const std::string& expected) {
  throw core::UserError(fmt::format("models: {}: '{}' is [{}], expected {}", origin, tensor.name,
                                    fmt::join(tensor.shape, ", "), expected),
                        "only OLMo-core's layout without dropless experts is read");
}

struct Holder {
  std::shared_ptr<const void> files;
  std::vector<at::Tensor> tensors;
};

/// Cuts stacked, transposed experts apart. rows: of one expert in the stack.
void unstack(const core::TensorView& stacked, int64_t rows, const std::string& path, std::string_view matrix,
             Holder& holder, std::vector<core::TensorView>& out) {
  const at::Tensor all = borrow(stacked, holder.files);
  NamedTensors cut;
  for (int64_t e = 0; e * rows < stacked.shape[0]; ++e)
    cut.emplace_back(fmt::format("{}.experts.{}.{}.weight", path, e, matrix),
                     all.narrow(0, e * rows, rows).t().contiguous());
  std::vector<at::Tensor> none;
  for (auto& view : views_of(cut, none)) out.push_back(std::move(view));
  for (auto& [name, tensor] : cut) holder.tensors.push_back(tensor);
}

}  // namespace

OwnedViews hugging_face_layout(const std::vector<core::TensorView>& tensors, std::shared_ptr<const void> owner,
                               const std::string& origin) {
  const auto of_core = [](const core::TensorView& tensor) { return tensor.name.starts_with("blocks.0."); };
  if (std::none_of(tensors.begin(), tensors.end(), of_core)) return {unpack_experts(tensors, origin), std::move(owner)};
  const auto embeddings = std::find_if(tensors.begin(), tensors.end(),
                                       [](const auto& tensor) { return tensor.name == "embeddings.weight"; });
  if (embeddings == tensors.end() || embeddings->shape.size() != 2 || embeddings->shape[1] == 0)
    throw core::UserError(
        fmt::format("models: {} has blocks.0.* as OLMo-core's checkpoints do, but no embeddings.weight [V, d]", origin),
        "check that the checkpoint is complete");
  const int64_t d = embeddings->shape[1];
  auto holder = std::make_shared<Holder>(Holder{owner, {}});
  OwnedViews out;
  for (const core::TensorView& tensor : tensors) {
    core::TensorView renamed = tensor;
    if (const auto top = look_up(kTop, tensor.name, false)) renamed.name = *top;
    const auto layer = split_layer(tensor.name, "blocks.");
    if (!layer) {
      out.tensors.push_back(std::move(renamed));
      continue;
    }
    const std::string path = "model.layers." + layer->first;
    const std::string_view rest = layer->second;
    if (rest == kBias) {
      if (borrow(tensor, owner).ne(0).any().item<bool>())
        throw core::UserError(
            fmt::format("models: {}: '{}' is not zero, and FlexOlmo's model in transformers has no bias of experts",
                        origin, tensor.name),
            "evaluate it with OLMo-core, or leave the bias out of the checkpoint");
      continue;
    }
    if (rest.starts_with(kExperts)) {
      const auto matrix = look_up(kMatrices, rest.substr(kExperts.size()), false);
      if (matrix) {
        const bool down = *matrix == "down_proj";
        if (tensor.shape.size() != 2 || tensor.shape[1] == 0 || (down && tensor.shape[1] != d) ||
            (!down && tensor.shape[0] % d != 0))
          refuse(origin, tensor, down ? "[E h, d]" : "[E d, h]");
        const auto w1 = std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) {
          return t.name == fmt::format("blocks.{}.{}w1", layer->first, kExperts);
        });
        if (down && w1 != tensors.end() && w1->shape.size() != 2) refuse(origin, *w1, "[E d, h]");
        const int64_t rows = down && w1 != tensors.end() ? w1->shape[1] : d;
        if (rows == 0 || tensor.shape[0] % rows != 0 ||
            (down && w1 != tensors.end() && tensor.shape[0] / rows != w1->shape[0] / d))
          refuse(origin, tensor, down ? "[E h, d] beside w1 [E d, h]" : "[E d, h]");
        unstack(tensor, rows, path + ".mlp", *matrix, *holder, out.tensors);
        continue;
      }
    }
    if (const auto name = look_up(kBlock, rest, false)) {
      renamed.name = fmt::format("{}.{}", path, *name);
      if (*name == "mlp.gate.weight") {
        if (tensor.shape.size() != 1 || tensor.shape[0] % d != 0) refuse(origin, tensor, "[E d]");
        renamed.shape = {tensor.shape[0] / d, d};
      }
    }
    out.tensors.push_back(std::move(renamed));  // a name of no known place is reported by whoever matches names
  }
  out.owner = std::move(holder);
  return out;
}

std::vector<LazyTensor> to_olmo_core(std::vector<LazyTensor> tensors) {
  std::vector<LazyTensor> out;
  std::map<std::string, std::map<int64_t, LazyTensor>> stacks;  // by name, then expert
  for (LazyTensor& tensor : tensors) {
    if (const auto top = look_up(kTop, tensor.name, true)) {
      tensor.name = *top;
      out.push_back(std::move(tensor));
      continue;
    }
    const auto layer = split_layer(tensor.name, "model.layers.");
    if (const auto name = layer ? look_up(kBlock, layer->second, true) : std::nullopt) {
      const bool router = layer->second == "mlp.gate.weight";
      const std::string renamed = fmt::format("blocks.{}.{}", layer->first, *name);
      out.push_back(
          {renamed, tensor.bytes,
           router ? std::function<at::Tensor()>([make = tensor.make] { return make().flatten(); }) : tensor.make});
      continue;
    }
    const auto expert = layer ? split_layer(layer->second, "mlp.experts.") : std::nullopt;
    const auto matrix = expert && expert->second.ends_with(".weight")
                            ? look_up(kMatrices, expert->second.substr(0, expert->second.size() - 7), true)
                            : std::nullopt;
    if (!matrix)
      throw core::UserError(fmt::format("models: OLMo-core has no place for '{}'", tensor.name),
                            "only OLMo2's and FlexOlmo's weights can be written in its layout");
    stacks[fmt::format("blocks.{}.{}{}", layer->first, kExperts, *matrix)].emplace(number_of(*expert, tensor.name),
                                                                                   std::move(tensor));
  }
  for (auto& [name, experts] : stacks) {
    LazyTensor stacked{name, 0, {}};
    std::vector<std::function<at::Tensor()>> makers;
    for (auto& [e, tensor] : experts) {
      stacked.bytes += tensor.bytes;
      makers.push_back(tensor.make);
    }
    stacked.make = [makers = std::move(makers)] {
      std::vector<at::Tensor> parts;
      for (const auto& make : makers) parts.push_back(make().t());
      return at::cat(parts).contiguous();
    };
    out.push_back(std::move(stacked));
  }
  return out;
}

}  // namespace moraine::models
