#include "algorithms/continual/units.h"

namespace moraine::algorithms::continual {

const core::Schema<StreamSpec>& StreamSpec::schema() {
  using C = StreamSpec;
  static const auto schema =
      core::Schema<C>().field("order", &C::order).field("hash", &C::hash).field("draw", &C::draw);
  return schema;
}

const core::Schema<SiteSpec>& SiteSpec::schema() {
  static const auto schema = [] {
    core::Schema<SiteSpec> s;
    add_site_fields(s);
    return s;
  }();
  return schema;
}

SiteSpec SiteSpec::of(const core::Json& spec) {
  core::Json own = core::Json::object();
  for (const char* key : {"method", "version", "compute", "images", "texts", "backbone", "architecture", "stream"})
    if (const auto found = spec.find(key); found != spec.end()) own[key] = *found;
  return core::from_spec(schema(), own);
}

const core::Schema<BackboneSpec>& BackboneSpec::schema() {
  using C = BackboneSpec;
  static const auto schema = [] {
    core::Schema<C> s;
    add_site_fields(s);
    s.field("data", &C::data).field("train", &C::train).field("seed", &C::seed);
    return s;
  }();
  return schema;
}

const core::Schema<EvaluateSpec>& EvaluateSpec::schema() {
  using C = EvaluateSpec;
  static const auto schema = [] {
    core::Schema<C> s;
    add_site_fields(s);
    s.field("state", &C::state)
        .field("parts", &C::parts)
        .min(0)
        .field("after", &C::after)
        .min(-1)
        .field("ahead", &C::ahead)
        .field("batch_size", &C::batch_size)
        .min(1)
        .field("head_seed", &C::head_seed)
        .joined_later()
        .optional_object("lora", &C::lora, adapters::adapter_schema())
        .joined_later()
        .field("lora_seed", &C::lora_seed)
        .joined_later();
    return s;
  }();
  return schema;
}

const core::Schema<MatricesSpec>& MatricesSpec::schema() {
  using C = MatricesSpec;
  static const auto schema = [] {
    core::Schema<C> s;
    add_site_fields(s);
    s.field("tracks", &C::tracks);
    return s;
  }();
  return schema;
}

}  // namespace moraine::algorithms::continual
