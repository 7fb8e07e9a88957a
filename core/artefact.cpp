#include "core/artefact.h"

#include "core/error.h"
#include "core/hash.h"

namespace moraine::core {

namespace {
constexpr const char* kMetaKey = "moraine";
}

std::shared_ptr<const Artefact> Artefact::create(const std::string& kind, Json meta,
                                                 std::span<const TensorView> tensors) {
  if (meta.is_null()) meta = Json::object();
  MORAINE_CHECK(meta.is_object() && !kind.empty(), "an artefact needs a kind and an object as metadata");
  MORAINE_CHECK(!meta.contains("kind") || meta["kind"] == kind, "kind '{}' against metadata {}", kind,
                meta["kind"].dump());
  meta["kind"] = kind;
  // "format": "pt" is what Hugging Face's loaders ask for.
  Bytes bytes(serialize_safetensors(tensors, {{"format", "pt"}, {kMetaKey, meta.dump()}}));
  return parse(std::move(bytes), "", "new artefact");
}

std::shared_ptr<const Artefact> Artefact::parse(Bytes bytes, const std::string& expected_id,
                                                const std::string& origin) {
  auto artefact = std::make_shared<Artefact>();
  artefact->id_ = sha256(bytes.span());
  if (!expected_id.empty() && artefact->id_ != expected_id)
    throw UserError(fmt::format("{}: damaged artefact: expected SHA-256 {}, found {} over {} bytes", origin,
                                expected_id, artefact->id_, bytes.size()),
                    "delete the file: its unit then runs again");
  artefact->file_ = Safetensors::parse(std::move(bytes), origin);
  const auto& metadata = artefact->file_.metadata();
  const auto text = metadata.find(kMetaKey);
  if (text == metadata.end())
    throw UserError(
        fmt::format("{}: a safetensors file, but no Moraine artefact (no metadata key '{}')", origin, kMetaKey));
  artefact->meta_ = parse_json(text->second, fmt::format("{}: metadata '{}'", origin, kMetaKey));
  if (!artefact->meta_.is_object() || !artefact->meta_.contains("kind") || !artefact->meta_["kind"].is_string())
    throw UserError(fmt::format("{}: the artefact's metadata has no kind", origin));
  artefact->kind_ = artefact->meta_["kind"].get<std::string>();
  return artefact;
}

}  // namespace moraine::core
