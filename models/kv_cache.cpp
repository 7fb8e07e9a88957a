#include "models/kv_cache.h"

#include <algorithm>

#include <ATen/ops/empty.h>

#include "core/error.h"

namespace moraine::models {
namespace {

constexpr int64_t kFirstReserve = 64;  // tokens

// Room for `length` tokens; doubled when it has to grow, so that a token is copied twice at most on average.
void reserve(KeyValueCache::Layer& layer, const at::Tensor& like, int64_t length) {
  const int64_t reserved = layer.keys.defined() ? layer.keys.size(2) : 0;
  if (length <= reserved) return;
  const int64_t room = std::max({length, 2 * reserved, kFirstReserve});
  for (at::Tensor* held : {&layer.keys, &layer.values}) {
    at::Tensor grown = at::empty({like.size(0), like.size(2), room, like.size(3)}, like.options());
    if (layer.length > 0) grown.narrow(2, 0, layer.length).copy_(held->narrow(2, 0, layer.length));
    *held = std::move(grown);
  }
}

}  // namespace

void KeyValueCache::append(size_t layer, const at::Tensor& keys, const at::Tensor& values) {
  if (layer == layers_.size()) layers_.emplace_back();
  MORAINE_CHECK(layer < layers_.size(), "layers are filled in order");
  Layer& held = layers_[layer];
  const int64_t length = keys.size(1);
  MORAINE_CHECK(!held.keys.defined() || held.keys.size(0) == keys.size(0), "a cache belongs to one batch");
  reserve(held, keys, held.length + length);
  held.keys.narrow(2, held.length, length).copy_(keys.transpose(1, 2));
  held.values.narrow(2, held.length, length).copy_(values.transpose(1, 2));
  held.length += length;
}

}  // namespace moraine::models
