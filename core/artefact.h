#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/json.h"
#include "core/safetensors.h"

namespace moraine::core {

/// Immutable named tensors plus metadata, named by the SHA-256 of its canonical safetensors bytes.
/// Metadata is one JSON object stored under the safetensors metadata key "moraine"; it holds only what follows from the
/// unit (kind, shapes, scores), never times or host names, so that equal work gives equal ids. Thread-safe to read.
class Artefact {
 public:
  /// Builds the canonical bytes; `kind` ("expert", "mixture", "evaluation", ...) becomes meta()["kind"]. Throws
  /// InternalError on duplicate names or a tensor whose bytes do not fit its shape.
  static std::shared_ptr<const Artefact> create(const std::string& kind, Json meta,
                                                std::span<const TensorView> tensors);
  /// Parses bytes that came from disk or a peer. Throws UserError if malformed or if `expected_id` (non-empty) is not
  /// their hash.
  static std::shared_ptr<const Artefact> parse(Bytes bytes, const std::string& expected_id, const std::string& origin);

  const std::string& id() const { return id_; }
  const std::string& kind() const { return kind_; }
  const Json& meta() const { return meta_; }
  const Safetensors& file() const { return file_; }
  const Bytes& bytes() const { return file_.bytes(); }

 private:
  std::string id_, kind_;
  Json meta_;
  Safetensors file_;
};
using ArtefactPtr = std::shared_ptr<const Artefact>;

}  // namespace moraine::core
