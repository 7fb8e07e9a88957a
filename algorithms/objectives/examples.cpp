#include "algorithms/objectives/examples.h"

#include <algorithm>
#include <numeric>

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>

#include "core/error.h"

namespace moraine::algorithms::objectives {
namespace {

at::Tensor filled(int64_t rows, int64_t width, int64_t value) { return at::full({rows, width}, value, at::kLong); }

}  // namespace

std::vector<int64_t> all_rows(int64_t size) {
  std::vector<int64_t> rows(static_cast<size_t>(size));
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

models::Input texts(std::span<const data::Example> examples, at::Device device) {
  size_t longest = 1;
  for (const auto& example : examples) longest = std::max(longest, example.tokens.size());
  const auto rows = static_cast<int64_t>(examples.size()), width = static_cast<int64_t>(longest);
  at::Tensor tokens = filled(rows, width, 0), mask = filled(rows, width, 0);
  for (int64_t row = 0; row < rows; ++row) {
    const auto& own = examples[static_cast<size_t>(row)].tokens;
    std::ranges::copy(own, tokens.mutable_data_ptr<int64_t>() + row * width);
    std::fill_n(mask.mutable_data_ptr<int64_t>() + row * width, own.size(), 1);
  }
  return {.tokens = tokens.to(device), .mask = mask.to(device).ne(0)};
}

ExampleBatch completions(std::span<const std::vector<data::Example>> rows, at::Device device) {
  int64_t width = 1;
  bool shared = false;
  for (const auto& row : rows) {
    int64_t length = 0;
    for (const auto& example : row) length += static_cast<int64_t>(example.tokens.size()) - 1;
    width = std::max(width, length);
    shared |= row.size() > 1;
  }
  const auto count = static_cast<int64_t>(rows.size());
  at::Tensor tokens = filled(count, width, 0), targets = filled(count, width, -1), segments = filled(count, width, -1);
  for (int64_t row = 0; row < count; ++row) {
    int64_t place = row * width, segment = 0;
    for (const auto& example : rows[static_cast<size_t>(row)]) {
      for (size_t i = 0; i + 1 < example.tokens.size(); ++i, ++place) {
        tokens.mutable_data_ptr<int64_t>()[place] = example.tokens[i];
        segments.mutable_data_ptr<int64_t>()[place] = segment;
        if (static_cast<int64_t>(i) + 1 >= example.prompt)
          targets.mutable_data_ptr<int64_t>()[place] = example.tokens[i + 1];
      }
      ++segment;
    }
  }
  ExampleBatch batch{{.tokens = tokens.to(device)}, targets.to(device)};
  if (shared) batch.input.segments = segments.to(device);
  return batch;
}

void require_lengths(const data::ExampleDataset& dataset, int64_t longest, const std::string& path) {
  int64_t over = 0, most = 0;
  for (int64_t row = 0; row < dataset.size(); ++row) {
    over += dataset.length(row) > longest;
    most = std::max(most, dataset.length(row));
  }
  if (over > 0)
    throw core::UserError(fmt::format("algorithms/objectives: {} of {} examples of {} are longer than {} tokens, one "
                                      "has {}",
                                      over, dataset.size(), path, longest, most),
                          "raise seq_len, or prepare the file with a smaller --max-tokens");
}

std::vector<std::vector<int64_t>> packed(std::span<const int64_t> order, const std::vector<int64_t>& lengths,
                                         int64_t capacity) {
  std::vector<std::vector<int64_t>> rows;
  int64_t left = 0;
  for (const int64_t example : order) {
    const int64_t length = lengths[static_cast<size_t>(example)];
    if (rows.empty() || length > left) rows.emplace_back(), left = capacity;
    rows.back().push_back(example);
    left -= length;
  }
  return rows;
}

}  // namespace moraine::algorithms::objectives
