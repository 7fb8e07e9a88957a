#include "algorithms/objectives/objective.h"

#include "algorithms/objectives/examples.h"
#include "core/error.h"
#include "core/hdf5.h"
#include "data/image_dataset.h"
#include "data/model_tokenizer.h"
#include "data/text_dataset.h"

namespace moraine::algorithms::objectives {
namespace {

namespace fs = std::filesystem;

const core::Schema<TaskOptions>& options_schema() {
  using C = TaskOptions;
  static const auto schema = core::Schema<C>()
                                 .field("seq_len", &C::seq_len)
                                 .field("tokenizer", &C::tokenizer)
                                 .field("packing", &C::packing)
                                 .field("label_smoothing", &C::label_smoothing)
                                 .field("mean", &C::mean)
                                 .field("deviation", &C::deviation)
                                 .field("validation_share", &C::validation_share);
  return schema;
}

/// One objective: what its files are, what it needs of a model, how it is read. A new one is a line in kinds().
struct Kind {
  std::string name;
  bool reads_images = false, predicts_tokens = false, examples = false;
  Metric metric;
  std::shared_ptr<const Objective> (*open)(const fs::path&, const DataSpec&, const models::ModelFacts&, at::Device);
};

template <std::shared_ptr<const Objective> (*kOpen)(const fs::path&, const DataSpec&)>
std::shared_ptr<const Objective> plain(const fs::path& path, const DataSpec& spec, const models::ModelFacts&,
                                       at::Device) {
  return kOpen(path, spec);
}

const std::vector<Kind>& kinds() {
  static const Metric bits{"bits per byte", false, [](const Evaluation& sums) { return sums.bits_per_byte(); }};
  static const Metric hits{"accuracy, %", true, [](const Evaluation& sums) { return 100 * sums.accuracy(); }};
  static const std::vector<Kind> all = {
      {"text", false, true, false, bits, plain<text_objective>},
      {"completion", false, true, true, bits, plain<completion_objective>},
      {"choice", false, true, true, hits, plain<choice_objective>},
      {"classification", false, false, true, hits, plain<classification_objective>},
      {"images", true, false, false, hits, images_objective},
  };
  return all;
}

const Kind& kind_of(const std::string& objective) {
  for (const Kind& kind : kinds())
    if (kind.name == objective) return kind;
  throw core::UserError(fmt::format("algorithms/objectives: no objective '{}'", objective),
                        "the run was planned by another version of Moraine");
}

/// By what the file says it is.
const Kind& kind_of_file(const fs::path& path) {
  const core::Hdf5File file(path, core::Hdf5File::Mode::kRead);
  const std::string format = file.text_attribute("format").value_or("");
  if (format == "moraine-text-domain") return kind_of("text");
  if (format == "moraine-images") return kind_of("images");
  if (format == "moraine-text-examples") return kind_of(file.text_attribute("task").value_or(""));
  throw core::UserError(fmt::format("data: not a prepared file: {}", path.string()),
                        "make one with scripts/prepare_text.py, scripts/prepare_examples.py or "
                        "scripts/prepare_images.py");
}

void require_model(const Kind& kind, const fs::path& path, const models::ModelFacts& model) {
  const auto refuse = [&](const char* what) {
    throw core::UserError(
        fmt::format("algorithms/objectives: {} is for {}, the model is a {}", path.string(), kind.name, model.family),
        what);
  };
  if (kind.reads_images && model.image_size == 0) refuse("images need a vision transformer");
  if (!kind.reads_images && model.vocab_size == 0) refuse("text needs a decoder or an encoder");
  if (kind.predicts_tokens && !model.predicts_tokens) refuse("next tokens are predicted by decoders");
}

void require_positions(int64_t tokens, const std::string& what, const models::ModelFacts& model) {
  if (tokens > model.max_tokens)
    throw core::UserError(fmt::format("algorithms/objectives: {} of {} tokens do not fit the model's {} positions",
                                      what, tokens, model.max_tokens),
                          "lower seq_len, or prepare shorter examples (--max-tokens)");
}

TaskFacts inspect_text(const fs::path& path, const std::string& split, const TaskOptions& options,
                       const models::ModelFacts& model, const fs::path& model_directory) {
  require_positions(options.seq_len, "sequences", model);
  TaskFacts facts;
  for (const std::string& part : {std::string("train"), split}) {
    const auto dataset = data::TextDataset::open(path, part, options.seq_len, options.tokenizer);
    data::check_model_tokenizer(dataset.info(), path, model_directory, model.vocab_size);
    facts.fingerprint = dataset.info().fingerprint;
    (part == "train" ? facts.train : facts.evaluated) =
        part == "train" ? dataset.num_sequences() : dataset.num_eval_sequences();
  }
  facts.tokens_per_row = options.seq_len;
  return facts;
}

TaskFacts inspect_examples(const Kind& kind, const fs::path& path, const std::string& split, const TaskOptions& options,
                           const models::ModelFacts& model, const fs::path& model_directory) {
  TaskFacts facts;
  for (const std::string& part : {std::string("train"), split}) {
    const auto dataset = data::ExampleDataset::open(path, part, options.tokenizer);
    const data::ExampleSetInfo& info = dataset.info();
    data::check_model_tokenizer({info.name, info.tokenizer, info.vocab_size, info.fingerprint}, path, model_directory,
                                model.vocab_size);
    int64_t longest = 0, tokens = 0;
    for (int64_t row = 0; row < dataset.size(); ++row) {
      longest = std::max(longest, dataset.length(row));
      tokens += dataset.length(row);
    }
    require_positions(longest, "examples", model);
    if (kind.predicts_tokens) require_lengths(dataset, options.seq_len + 1, path.string());
    facts.fingerprint = info.fingerprint;
    facts.classes = static_cast<int64_t>(info.class_names.size());
    (part == "train" ? facts.train : facts.evaluated) = dataset.groups();
    if (part == "train") facts.tokens_per_row = std::max<int64_t>(1, tokens / dataset.size());
  }
  if (options.packing) facts.tokens_per_row = options.seq_len;
  return facts;
}

TaskFacts inspect_images(const fs::path& path, const std::string& split, const TaskOptions& options,
                         const models::ModelFacts& model, bool scaled) {
  const auto dataset = data::ImageDataset::open(path);
  const data::ImageSetInfo& info = dataset.info();
  if (info.channels != model.channels && info.channels != 1)
    throw core::UserError(fmt::format("algorithms/objectives: {} has images of {} channels, the model takes {}",
                                      path.string(), info.channels, model.channels),
                          "only grey images can be repeated over a model's channels");
  if (!scaled && (info.height != model.image_size || info.width != model.image_size))
    throw core::UserError(fmt::format("algorithms/objectives: {} has images of {} x {}, the model takes {} x {}",
                                      path.string(), info.height, info.width, model.image_size, model.image_size),
                          "set model.image_size to the size to scale them to, a multiple of the model's patch size");
  const ImageRows rows = image_rows(static_cast<int64_t>(dataset.labels("train").size()), options.validation_share);
  if (rows.train.empty() || (split == "validation" && rows.validation.empty()))
    throw core::UserError(fmt::format("algorithms/objectives: {} leaves no image for {}", path.string(),
                                      rows.train.empty() ? "training" : "validation"),
                          "image files hold no validation split: set the task's validation_share, for instance to 0.1");
  TaskFacts facts{.fingerprint = info.fingerprint, .classes = info.num_classes()};
  facts.tokens_per_row = model.image_tokens;
  facts.train = static_cast<int64_t>(rows.train.size());
  facts.evaluated = static_cast<int64_t>(split == "test" ? dataset.labels("test").size() : rows.validation.size());
  return facts;
}

}  // namespace

const core::Schema<DataSpec>& data_schema() {
  using C = DataSpec;
  static const auto schema = core::Schema<C>()
                                 .field("name", &C::name)
                                 .field("objective", &C::objective)
                                 .field("fingerprint", &C::fingerprint)
                                 .field("split", &C::split)
                                 .field("classes", &C::classes)
                                 .object("options", &C::options, options_schema());
  return schema;
}

core::Json TaskFacts::to_json() const {
  core::Json json = {{"objective", objective}, {"fingerprint", fingerprint},
                     {"classes", classes},     {"tokens_per_row", tokens_per_row},
                     {"train", train},         {"evaluated", evaluated}};
  if (validation > 0) json["validation"] = validation;
  return json;
}

TaskFacts TaskFacts::from_json(const core::Json& json) {
  return {json.at("objective"),
          json.at("fingerprint"),
          json.at("classes"),
          json.at("tokens_per_row"),
          json.at("train"),
          json.at("evaluated"),
          json.value("validation", int64_t{0})};
}

const Metric& metric_of(const std::string& objective) { return kind_of(objective).metric; }

TaskOptions relevant(const TaskOptions& options, const std::string& objective, const std::string& split) {
  const Kind& kind = kind_of(objective);
  const bool training = split == "train";
  TaskOptions out;
  if (kind.predicts_tokens) out.seq_len = options.seq_len;
  if (!kind.reads_images) out.tokenizer = options.tokenizer;
  if (kind.reads_images) out.mean = options.mean, out.deviation = options.deviation;
  if (kind.reads_images && split != "test") out.validation_share = options.validation_share;
  if (training) out.label_smoothing = options.label_smoothing;
  if (training && kind.predicts_tokens && kind.examples) out.packing = options.packing;
  return out;
}

TaskFacts inspect(const fs::path& path, const std::string& split, const TaskOptions& options,
                  const models::ModelFacts& model, const ModelPlace& place) {
  const Kind& kind = kind_of_file(path);
  require_model(kind, path, model);
  TaskFacts facts = kind.reads_images ? inspect_images(path, split, options, model, place.scales_images)
                    : kind.examples   ? inspect_examples(kind, path, split, options, model, place.directory)
                                      : inspect_text(path, split, options, model, place.directory);
  facts.objective = kind.name;
  return facts;
}

std::shared_ptr<const Objective> open_objective(const fs::path& path, const DataSpec& spec,
                                                const models::ModelFacts& model, WorkerContext& context) {
  const Kind& kind = kind_of(spec.objective);
  const auto make = [&]() -> std::shared_ptr<void> {
    const auto opened = kind.open(path, spec, model, context.device());
    if (opened->fingerprint() != spec.fingerprint)
      throw core::UserError(fmt::format("algorithms/objectives: {} changed since the run was planned", path.string()),
                            "every worker must see the same prepared file; start again after copying it");
    return std::const_pointer_cast<Objective>(opened);
  };
  return std::static_pointer_cast<const Objective>(
      context.cached("objective/" + core::to_spec(data_schema(), spec).dump(), make));
}

}  // namespace moraine::algorithms::objectives
