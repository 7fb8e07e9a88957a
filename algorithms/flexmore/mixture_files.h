#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/flexmore/experts.h"
#include "algorithms/method.h"
#include "models/decoder.h"

namespace moraine::algorithms::flexmore {

/// A mixture together with the public model it stands on: all that another tool needs of it.
struct MixtureModel {
  models::DecoderConfig base;                      // the dense public model
  std::map<std::string, at::Tensor> base_weights;  // by Hugging Face name, as stored
  Mixture mixture;
  int64_t top_k = 2;
  bool norm_topk_prob = false;
  std::filesystem::path source = {};  // of the public model: its tokeniser files go along; empty = it has none
};

/// Reads a flex_olmo directory (one tensor per expert, or packed) or a flexmore one, with the router_bias.safetensors
/// beside it if there is one. Experts are named by config.json's "_expert_names", else "expert1", ... Throws UserError
/// on another model type, an option that is not implemented, weights that do not fit or differ from the SHA256SUMS
/// beside them, and names that cannot be file names or stand twice.
MixtureModel read_mixture_directory(const std::filesystem::path& directory);

/// FlexMoRE keys (docs/formats.md): experts as they are; a router bias goes into router_bias.safetensors, with a
/// warning.
void write_flexmore_directory(const MixtureModel& model, const std::filesystem::path& directory);

/// A model of transformers' FlexOlmoForCausalLM: low-rank experts become W + B A, summed in float64 and rounded once to
/// `dtype` (absent: the widest type stored); olmo_core: in OLMo-core's key layout (models/olmo_core.h). Throws
/// UserError if the router has a bias, which that model lacks.
void write_flexolmo_directory(const MixtureModel& model, const std::filesystem::path& directory,
                              std::optional<at::ScalarType> dtype, bool olmo_core = false);

/// The expert's correction of the public FFN as a PEFT LoRA of gate_proj, up_proj and down_proj with alpha = r, so that
/// the scale is 1. The adapter is the expert alone; its router rows have no place in it. Throws UserError if it is
/// full-size.
void write_peft_expert(const Expert& expert, const std::filesystem::path& directory, const std::string& base_model);

/// The mixture of these experts alone (empty = all); its top k shrinks to what is left. Throws UserError on an unknown
/// name.
MixtureModel keep_experts(MixtureModel model, const std::vector<std::string>& names);

/// Serves `moraine export` for a mixture: peft (one directory per expert), hf (FlexMoRE keys), flexolmo.
void export_mixture(MixtureModel all, const ExportRequest& request);

/// The public model in `dtype` with the mixture attached.
models::Decoder assemble(const MixtureModel& model, at::ScalarType dtype);

}  // namespace moraine::algorithms::flexmore
