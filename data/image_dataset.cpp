#include "data/image_dataset.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "core/hdf5.h"
#include "core/json.h"
#include "data/fingerprint.h"

namespace moraine::data {
namespace {

constexpr const char* kFormat = "moraine-images";
constexpr int64_t kFormatVersion = 1;
constexpr std::array kSplits = {"train", "test"};
constexpr const char* kPrepareAgain = "prepare it again with scripts/prepare_images.py";

ImageSetInfo read_info(const core::Hdf5File& file) {
  const std::string path = file.path().string();
  if (file.text_attribute("format") != kFormat)
    throw core::UserError(fmt::format("data: not an image file: {}", path), "make one with scripts/prepare_images.py");
  const int64_t version = file.int_attribute("format_version").value_or(0);
  if (version != kFormatVersion)
    throw core::UserError(
        fmt::format("data: image format version {} where this build reads {}: {}", version, kFormatVersion, path),
        kPrepareAgain);
  ImageSetInfo info;
  info.name = file.text_attribute("name").value_or("");
  info.fingerprint = file.text_attribute("fingerprint").value_or("");
  const core::Json names = core::parse_json(file.text_attribute("class_names").value_or("[]"), path);
  if (!names.is_array()) throw core::UserError(fmt::format("data: class_names is no list: {}", path), kPrepareAgain);
  for (const auto& name : names) info.class_names.push_back(name.is_string() ? name.get<std::string>() : "");
  if (info.name.empty() || info.class_names.empty() || info.fingerprint.size() != 64)
    throw core::UserError(fmt::format("data: name, class_names or fingerprint missing: {}", path), kPrepareAgain);
  return info;
}

}  // namespace

struct ImageDataset::Splits {
  struct Split {
    int64_t size = 0;
    std::vector<int64_t> labels;
    std::once_flag once;
    std::vector<uint8_t> pixels;
  };
  core::Hdf5File file;
  std::array<Split, kSplits.size()> splits;

  explicit Splits(const std::filesystem::path& path) : file(path, core::Hdf5File::Mode::kRead) {}

  Split& find(const std::string& name) {
    const auto at = std::find(kSplits.begin(), kSplits.end(), name);
    if (at == kSplits.end())
      throw core::UserError(fmt::format("data: no split '{}': {}", name, file.path().string()),
                            "splits are train and test");
    return splits[static_cast<size_t>(at - kSplits.begin())];
  }

  [[noreturn]] void reject(const std::string& what, const char* split) const {
    throw core::UserError(fmt::format("data: {} of split '{}': {}", what, split, file.path().string()), kPrepareAgain);
  }

  void check(ImageSetInfo& info) {
    for (const char* name : kSplits) {
      Split& split = find(name);
      const auto shape = file.shape(std::string(name) + "/images");
      if (shape.size() != 4 || *std::min_element(shape.begin(), shape.end()) < 1)
        reject("images are not [n, C, H, W]", name);
      const std::array image = {shape[1], shape[2], shape[3]};
      if (info.channels == 0) info.channels = image[0], info.height = image[1], info.width = image[2];
      if (image != std::array{info.channels, info.height, info.width})
        reject("images have another shape than those", name);
      split.size = shape[0];
      split.labels = file.read_all<int64_t>(std::string(name) + "/labels");
      if (static_cast<int64_t>(split.labels.size()) != split.size) reject("labels do not fit the images", name);
      const auto [low, high] = std::minmax_element(split.labels.begin(), split.labels.end());
      if (*low < 0 || *high >= info.num_classes())
        reject(fmt::format("label {} is outside the {} classes", *low < 0 ? *low : *high, info.num_classes()), name);
    }
  }
};

ImageDataset::ImageDataset(ImageSetInfo info, std::shared_ptr<Splits> splits)
    : info_(std::move(info)), splits_(std::move(splits)) {}

ImageDataset ImageDataset::open(const std::filesystem::path& path) {
  auto splits = std::make_shared<Splits>(path);
  ImageSetInfo info = read_info(splits->file);
  splits->check(info);
  verify_fingerprint(splits->file, image_fingerprint);
  return ImageDataset(std::move(info), std::move(splits));
}

const std::filesystem::path& ImageDataset::path() const { return splits_->file.path(); }

const std::vector<int64_t>& ImageDataset::labels(const std::string& split) const { return splits_->find(split).labels; }

std::vector<float> ImageDataset::batch(const std::string& split, std::span<const int64_t> rows, double mean,
                                       double deviation) const {
  Splits::Split& source = splits_->find(split);
  std::call_once(source.once, [&] { source.pixels = splits_->file.read_all<uint8_t>(split + "/images"); });
  std::array<float, 256> value;
  for (size_t pixel = 0; pixel < value.size(); ++pixel)
    value[pixel] = static_cast<float>((static_cast<double>(pixel) / 255 - mean) / deviation);
  const int64_t pixels = info_.pixels();
  std::vector<float> out(rows.size() * static_cast<size_t>(pixels));
  auto to = out.begin();
  for (const int64_t row : rows) {
    MORAINE_CHECK(row >= 0 && row < source.size, "data: image {} of a split of {}", row, source.size);
    const auto from = source.pixels.begin() + row * pixels;
    to = std::transform(from, from + pixels, to, [&](uint8_t pixel) { return value[pixel]; });
  }
  return out;
}

}  // namespace moraine::data
