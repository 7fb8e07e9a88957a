#pragma once

#include <cstdint>
#include <span>
#include <string>

#include <ATen/core/Tensor.h>

#include "data/image_dataset.h"

namespace moraine::algorithms {

/// Images of a data set as a backbone wants them: normalised, grey ones repeated over its channels, scaled to its size
/// (bilinear, anti-aliased when shrinking). Thread-safe.
class ImageSource {
 public:
  ImageSource(data::ImageDataset dataset, double mean, double deviation, int64_t channels, int64_t size,
              at::Device device);
  /// [rows, channels, size, size] float32 on the device. Throws UserError if the images have other channels than one or
  /// the backbone's.
  at::Tensor batch(const std::string& split, std::span<const int64_t> rows) const;
  /// Labels of the rows, on the host.
  std::vector<int64_t> labels(const std::string& split, std::span<const int64_t> rows) const;
  const data::ImageDataset& dataset() const { return dataset_; }
  at::Device device() const { return device_; }

 private:
  data::ImageDataset dataset_;
  double mean_, deviation_;
  int64_t channels_, size_;
  at::Device device_;
};

}  // namespace moraine::algorithms
