#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "data/example_dataset.h"
#include "models/backbone.h"

namespace moraine::algorithms::objectives {

/// Examples side by side, filled up to the longest: what a model reads, and what it is to predict.
struct ExampleBatch {
  models::Input input;
  at::Tensor targets;  // [B, T] int64 for token_loss(), -1 where nothing is asked
};

/// Whole texts with their mask, for classification.
models::Input texts(std::span<const data::Example> examples, at::Device device);
/// Rows for next-token prediction of what follows the prompts. A row may hold several examples, one after the other:
/// `rows[i]` are the examples of row i; segments are set when any row has more than one.
ExampleBatch completions(std::span<const std::vector<data::Example>> rows, at::Device device);

/// Throws UserError, with how many, if examples are longer than `longest` tokens.
void require_lengths(const data::ExampleDataset& dataset, int64_t longest, const std::string& path);

/// 0 .. size - 1.
std::vector<int64_t> all_rows(int64_t size);

/// Fills rows of at most `capacity` tokens with examples in their order: a new row whenever the next does not fit.
/// `order` names examples by their place in `lengths`.
std::vector<std::vector<int64_t>> packed(std::span<const int64_t> order, const std::vector<int64_t>& lengths,
                                         int64_t capacity);

}  // namespace moraine::algorithms::objectives
