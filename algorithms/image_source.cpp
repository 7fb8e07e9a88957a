#include "algorithms/image_source.h"

#include <utility>
#include <vector>

#include <ATen/ops/_upsample_bilinear2d_aa.h>
#include <ATen/ops/from_blob.h>

#include "core/error.h"

namespace moraine::algorithms {

ImageSource::ImageSource(data::ImageDataset dataset, double mean, double deviation, int64_t channels, int64_t size,
                         at::Device device)
    : dataset_(std::move(dataset)),
      mean_(mean),
      deviation_(deviation),
      channels_(channels),
      size_(size),
      device_(device) {
  const int64_t own = dataset_.info().channels;
  if (own != channels_ && own != 1)
    throw core::UserError(fmt::format("algorithms: {} has images of {} channels, the backbone takes {}",
                                      dataset_.path().string(), own, channels_),
                          "use a backbone with as many channels; only grey images can be repeated");
}

at::Tensor ImageSource::batch(const std::string& split, std::span<const int64_t> rows) const {
  const data::ImageSetInfo& info = dataset_.info();
  const auto count = static_cast<int64_t>(rows.size());
  std::vector<float> pixels = dataset_.batch(split, rows, mean_, deviation_);
  at::Tensor images = at::from_blob(pixels.data(), {count, info.channels, info.height, info.width}, at::kFloat);
  if (info.height != size_ || info.width != size_)
    images = at::_upsample_bilinear2d_aa(images, {size_, size_}, /*align_corners=*/false);
  if (info.channels != channels_) images = images.expand({count, channels_, size_, size_});
  return images.to(device_, /*non_blocking=*/false, /*copy=*/true);  // the pixels above are gone when this returns
}

std::vector<int64_t> ImageSource::labels(const std::string& split, std::span<const int64_t> rows) const {
  const auto& all = dataset_.labels(split);
  std::vector<int64_t> out;
  for (const int64_t row : rows) out.push_back(all[static_cast<size_t>(row)]);
  return out;
}

}  // namespace moraine::algorithms
