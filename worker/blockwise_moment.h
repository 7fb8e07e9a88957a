#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace moraine::worker {

/// Code books of 8-bit dynamic quantisation, 256 values in ascending order: 7 decades, each cut in twice as many parts
/// as the one below it, from 5.5e-7 to 0.993, and 0 and 1. Signed: negatives too, with half as many parts. Source:
/// 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 2.2; bitsandbytes' create_dynamic_map().
std::vector<float> dynamic_code_book(bool is_signed);

/// A moment of an optimiser in 8 bits: blocks of 256 values, each value the nearest code times the block's largest
/// magnitude. 1 + 4 / 256 bytes a value, the last block filled up.
///
/// An unsigned value above 0 is never stored as 0 (inferred: a second moment that vanished beside a first one that did
/// not would be a step without bound).
class BlockwiseMoment {
 public:
  static constexpr int64_t kBlock = 256;
  BlockwiseMoment(at::IntArrayRef sizes, bool is_signed, at::Device device);

  /// As float32 of the moment's shape.
  at::Tensor values() const;
  void store(const at::Tensor& values);
  /// uint8 [blocks, 256] and float32 [blocks], live.
  const at::Tensor& codes() const { return codes_; }
  const at::Tensor& scales() const { return scales_; }

 private:
  std::vector<int64_t> sizes_;
  int64_t count_;
  bool signed_;
  at::Tensor code_book_, midpoints_;  // [256], [255]
  at::Tensor codes_, scales_;
};

}  // namespace moraine::worker
