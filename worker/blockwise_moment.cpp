#include "worker/blockwise_moment.h"

#include <algorithm>
#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>

namespace moraine::worker {
namespace {

int64_t blocks_of(int64_t count) { return (count + BlockwiseMoment::kBlock - 1) / BlockwiseMoment::kBlock; }

int64_t code_of_zero(const std::vector<float>& book) {
  return std::lower_bound(book.begin(), book.end(), 0.0F) - book.begin();
}

}  // namespace

std::vector<float> dynamic_code_book(bool is_signed) {
  constexpr int kDecades = 7;
  std::vector<float> book = {0, 1};
  for (int decade = 0; decade < kDecades; ++decade) {
    const int parts = (is_signed ? 1 : 2) << decade;
    const double size = std::pow(10.0, decade - (kDecades - 1));
    for (int part = 0; part < parts; ++part) {
      const double middle = size * (0.1 + 0.9 * (part + 0.5) / parts);
      book.push_back(static_cast<float>(middle));
      if (is_signed) book.push_back(static_cast<float>(-middle));
    }
  }
  std::ranges::sort(book);
  return book;
}

BlockwiseMoment::BlockwiseMoment(at::IntArrayRef sizes, bool is_signed, at::Device device)
    : sizes_(sizes.vec()), count_(c10::multiply_integers(sizes)), signed_(is_signed) {
  const std::vector<float> book = dynamic_code_book(is_signed);
  std::vector<float> midpoints;
  for (size_t i = 0; i + 1 < book.size(); ++i) midpoints.push_back((book[i] + book[i + 1]) / 2);
  code_book_ = at::tensor(book).to(device);
  midpoints_ = at::tensor(midpoints).to(device);
  codes_ = at::full({blocks_of(count_), kBlock}, code_of_zero(book), at::TensorOptions(at::kByte).device(device));
  scales_ = at::zeros({blocks_of(count_)}, at::TensorOptions(at::kFloat).device(device));
}

at::Tensor BlockwiseMoment::values() const {
  const at::Tensor relative = code_book_.index_select(0, codes_.flatten().to(at::kLong)).view(codes_.sizes());
  return relative.mul(scales_.unsqueeze(1)).flatten().narrow(0, 0, count_).view(sizes_);
}

void BlockwiseMoment::store(const at::Tensor& values) {
  const at::Tensor blocks = at::constant_pad_nd(values.flatten(), {0, codes_.numel() - count_}, 0).view(codes_.sizes());
  scales_.copy_(blocks.abs().amax(1));
  const at::Tensor divisor = at::where(scales_.gt(0), scales_, 1).unsqueeze(1), relative = blocks.div(divisor);
  at::Tensor codes = at::bucketize(relative, midpoints_, /*out_int32=*/true);
  if (!signed_) codes = at::maximum(codes, relative.gt(0).to(codes.scalar_type()));
  codes_.copy_(codes);
}

}  // namespace moraine::worker
