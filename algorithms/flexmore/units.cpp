#include "algorithms/flexmore/units.h"

namespace moraine::algorithms::flexmore {
namespace {

template <typename C>
core::Schema<C> unit_schema() {
  core::Schema<C> s;
  s.template field<std::string>("method", &C::method)
      .choices({"flexmore"})
      .template field<int64_t>("version", &C::version)
      .min(C::kVersion)
      .max(C::kVersion)
      .template field<core::Json>("compute", &C::compute);
  return s;
}

template <typename C>
core::Schema<C> public_model_schema() {
  core::Schema<C> s = unit_schema<C>();
  s.template field<std::string>("base", &C::base)
      .template field<std::string>("dtype", &C::dtype)
      .choices({"float32", "bfloat16"});
  return s;
}

const core::Schema<EncoderSpec>& encoder_schema() {
  using C = EncoderSpec;
  static const auto schema = core::Schema<C>()
                                 .field("identity", &C::identity)
                                 .field("projection_seed", &C::projection_seed)
                                 .object("data", &C::data, text_schema());
  return schema;
}

const core::Schema<PublicRowsSpec>& public_rows_schema() {
  using C = PublicRowsSpec;
  static const auto schema = core::Schema<C>().field("init", &C::init).field("norm", &C::norm).field("seed", &C::seed);
  return schema;
}

const core::Schema<RowsSpec>& rows_schema() {
  using C = RowsSpec;
  static const auto schema = core::Schema<C>()
                                 .field("logit", &C::logit)
                                 .field("norm", &C::norm)
                                 .field("embedding_sequences", &C::embedding_sequences)
                                 .field("train", &C::train)
                                 .field("bias", &C::bias)
                                 .field("bias_value", &C::bias_value);
  return schema;
}

const core::Schema<MixtureSpec>& mixture_schema() {
  using C = MixtureSpec;
  static const auto schema = core::Schema<C>()
                                 .field("top_k", &C::top_k)
                                 .field("norm_topk_prob", &C::norm_topk_prob)
                                 .field("forward", &C::forward)
                                 .field("kernels", &C::kernels);
  return schema;
}

}  // namespace

const core::Schema<TrainBaseSpec>& TrainBaseSpec::schema() {
  using C = TrainBaseSpec;
  static const auto schema = unit_schema<C>()
                                 .field("architecture", &C::architecture)
                                 .field("train", &C::train)
                                 .field("save_dtype", &C::save_dtype)
                                 .field("seed", &C::seed)
                                 .object("data", &C::data, text_schema());
  return schema;
}

const core::Schema<EmbedPublicSpec>& EmbedPublicSpec::schema() {
  using C = EmbedPublicSpec;
  static const auto schema = public_model_schema<C>()
                                 .object("data", &C::data, text_schema())
                                 .field("sequences", &C::sequences)
                                 .field("second_moment", &C::second_moment)
                                 .optional_object("encoder", &C::encoder, encoder_schema());
  return schema;
}

const core::Schema<TrainExpertSpec>& TrainExpertSpec::schema() {
  using C = TrainExpertSpec;
  static const auto schema = public_model_schema<C>()
                                 .field("name", &C::name)
                                 .field("rank", &C::rank)
                                 .optional_object("adapter", &C::adapter, adapters::adapter_schema())
                                 .joined_later()
                                 .field("type_version", &C::type_version)
                                 .joined_later()
                                 .field("train", &C::train)
                                 .object("public_rows", &C::public_rows, public_rows_schema())
                                 .object("rows", &C::rows, rows_schema())
                                 .field("norm_topk_prob", &C::norm_topk_prob)
                                 .field("kernels", &C::kernels)
                                 .field("seed", &C::seed)
                                 .list("data", &C::data, text_schema())
                                 .list("encoder", &C::encoder, encoder_schema());
  return schema;
}

const core::Schema<ExtractSpec>& ExtractSpec::schema() {
  using C = ExtractSpec;
  static const auto schema = public_model_schema<C>().field("rank", &C::rank).field("subspace_seed", &C::subspace_seed);
  return schema;
}

const core::Schema<EvaluateSpec>& EvaluateSpec::schema() {
  using C = EvaluateSpec;
  static const auto schema = public_model_schema<C>()
                                 .field("what", &C::what)
                                 .choices({"base", "expert", "mixture", "soup", "btm"})
                                 .object("data", &C::data, text_schema())
                                 .field("sequences", &C::sequences)
                                 .field("batch_size", &C::batch_size)
                                 .optional_object("mixture", &C::mixture, mixture_schema())
                                 .optional_object("public_rows", &C::public_rows, public_rows_schema())
                                 .field("rank", &C::rank)
                                 .field("scale", &C::scale);
  return schema;
}

const core::Schema<MergeSpec>& MergeSpec::schema() {
  using C = MergeSpec;
  static const auto schema =
      public_model_schema<C>().field("ranks", &C::ranks).object("public_rows", &C::public_rows, public_rows_schema());
  return schema;
}

const core::Schema<SoupSpec>& SoupSpec::schema() {
  using C = SoupSpec;
  static const auto schema = unit_schema<C>().field<std::string>("base", &C::base);
  return schema;
}

}  // namespace moraine::algorithms::flexmore
