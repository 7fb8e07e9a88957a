#include "worker/checkpoint.h"

#include <algorithm>
#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/safetensors.h"
#include "models/tensor_io.h"

namespace moraine::worker {
namespace {

constexpr int kFormat = 2;

/// Covers contents, which the safetensors format itself does not check.
uint32_t checksum(const std::vector<core::TensorView>& sorted_views) {
  uint32_t crc = 0;
  for (const core::TensorView& view : sorted_views) crc = core::crc32c(view.data, crc);
  return crc;
}

/// What is wrong with the file, nullopt when it can be used.
std::optional<std::string> defect(const core::Safetensors& file, const core::Json& meta, const std::string& job,
                                  const models::NamedTensors& tensors) {
  if (meta.value("format", 0) != kFormat) return "its format is unknown";
  if (meta.value("job", "") != job) return "it belongs to another job";
  if (meta.value("crc32c", int64_t{-1}) != checksum(file.tensors())) return "its contents are damaged";
  if (!meta.contains("loop")) return "the state of the loop is missing";
  if (file.tensors().size() != tensors.size()) return "it holds other tensors";
  for (const auto& [name, tensor] : tensors) {
    const core::TensorView* view = file.find(name);
    if (view == nullptr) return "tensor " + name + " is missing";
    if (tensor.sizes() != at::IntArrayRef(view->shape) || models::dtype_of(tensor) != view->dtype)
      return "tensor " + name + " has another shape or dtype";
  }
  return std::nullopt;
}

}  // namespace

void save_checkpoint(const std::filesystem::path& path, const std::string& job, const core::Json& loop,
                     const models::NamedTensors& tensors) {
  models::NamedTensors on_host;
  for (const auto& [name, tensor] : tensors) on_host.emplace_back(name, tensor.detach().to(at::kCPU));
  std::vector<at::Tensor> keep;
  std::vector<core::TensorView> views = models::views_of(on_host, keep);
  std::ranges::sort(views, {}, &core::TensorView::name);
  const core::Json meta = {{"format", kFormat}, {"job", job}, {"crc32c", checksum(views)}, {"loop", loop}};
  core::write_atomically(path, core::serialize_safetensors(views, {{"moraine", meta.dump()}}));
}

core::Json load_checkpoint(const std::filesystem::path& path, const std::string& job,
                           const models::NamedTensors& tensors) {
  if (!std::filesystem::exists(path)) return nullptr;
  try {
    const core::Safetensors file = core::Safetensors::open(path);
    const auto entry = file.metadata().find("moraine");
    if (entry == file.metadata().end()) throw core::UserError("it is no checkpoint of Moraine");
    const core::Json meta = core::parse_json(entry->second, path.string());
    if (const auto what = defect(file, meta, job, tensors)) throw core::UserError(*what);
    const at::NoGradGuard no_grad;
    for (const auto& [name, tensor] : tensors) at::Tensor(tensor).copy_(models::borrow(*file.find(name)));
    return meta.at("loop");
  } catch (const core::Error& error) {
    core::log::warn("checkpoint ignored, training starts over: path={} reason={}", path.string(), error.what());
  } catch (const core::Json::exception& error) {
    core::log::warn("checkpoint ignored, training starts over: path={} reason={}", path.string(), error.what());
  }
  return nullptr;
}

}  // namespace moraine::worker
