#pragma once

#include <map>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/artefact.h"
#include "models/decoder.h"
#include "models/mixture.h"

namespace moraine::algorithms::flexmore {

/// One expert over all layers: what a data owner trains and ships.
struct Expert {
  std::string name;
  std::vector<models::FfnExpert> layers;  // L
  std::vector<at::Tensor> router_rows;    // L x [d]
  std::vector<at::Tensor> biases;         // L x [1]; empty when the router has no bias
  // By k = 1 .. rank: B of the first k ranks alone is multiplied by it. Empty: by 1.
  std::vector<double> scales_by_rank = {};

  int64_t rank() const { return layers.front().rank(); }  // 0 = full-size
  /// Numbers a site ships: FFN part plus router rows (and biases).
  int64_t parameters() const;
};

/// Experts behind one router; expert 0 is the public model's own FFN.
struct Mixture {
  std::vector<at::Tensor> public_rows;  // L x [d]
  std::vector<Expert> experts;          // sorted by name
};

/// Names the frozen tensors a submission was trained against: Hugging Face name -> SHA-256 of the bytes. The public
/// router rows are listed as "model.layers.<l>.mlp.gate.weight[0]".
core::Json fingerprint_of_base(const std::map<std::string, at::Tensor>& weights,
                               const std::vector<at::Tensor>& public_rows);

/// Expert <-> artefact (kind "expert"; docs/formats.md). `meta` and `extra` tensors are added to the artefact's own.
core::ArtefactPtr write_expert(const Expert& expert, core::Json meta, models::NamedTensors extra = {});
/// `rank` > 0 slices a low-rank expert, by its scales_by_rank where it has them; 0 keeps it as it is. Throws UserError
/// on another kind or a missing tensor.
Expert read_expert(const core::Artefact& artefact, int64_t rank);

/// Joins experts of any ranks. The result does not depend on the order of `artefacts`. Every submission must carry the
/// same base fingerprint as `base_fingerprint`; otherwise a UserError names the expert and each tensor that differs.
Mixture merge(const std::vector<core::ArtefactPtr>& artefacts, const std::vector<int64_t>& ranks,
              const std::vector<at::Tensor>& public_rows, const core::Json& base_fingerprint);

/// Mixture <-> artefact (kind "mixture"): Hugging Face FlexMoRE keys of experts 1.. and the router; the public model is
/// not repeated.
core::ArtefactPtr write_mixture(const Mixture& mixture, core::Json meta);
Mixture read_mixture(const core::Artefact& artefact);

/// Uniform average of full-size experts' FFNs: the "model soup" of dense models that share everything else. One expert
/// without router rows, used as a plain FFN. Throws UserError if an expert is low-rank.
std::vector<models::FfnExpert> soup(const std::vector<Expert>& experts);

/// Attaches a mixture to every FFN slot of `decoder`. Throws UserError if top_k exceeds the experts.
std::vector<std::shared_ptr<models::MixtureFfn>> attach(models::Decoder& decoder, const Mixture& mixture,
                                                        models::MixtureFfn::Options options);

/// Attaches dense FFNs in place of the public ones (weight soup, a single expert's dense model).
void attach_dense(models::Decoder& decoder, const std::vector<models::FfnExpert>& layers);

/// Of the recipe's key `kernels`: auto | reference.
models::MixtureKernels mixture_kernels(const std::string& name);

/// Path of layer l's FFN slot: "model.layers.<l>.mlp".
std::string ffn_slot(size_t layer);

}  // namespace moraine::algorithms::flexmore
