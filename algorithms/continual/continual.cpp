#include "algorithms/continual/continual.h"

#include <algorithm>
#include <limits>

#include <ATen/core/grad_mode.h>

#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/hdf5.h"
#include "data/image_dataset.h"
#include "models/open_backbone.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {
namespace {

// Identity of a model directory: its configuration and every tensor's bytes.
std::string identity_of(const models::Backbone& model) {
  const at::NoGradGuard no_grad;
  std::string text = model.config_json().dump();
  const models::NamedTensors weights(model.weights().begin(), model.weights().end());
  std::vector<at::Tensor> keep;
  for (const auto& view : models::views_of(weights, keep))
    text += fmt::format("\n{} {}", view.name, core::sha256(view.data));
  return "dir:" + core::sha256(text);
}

// Runs recorded before there were other families have the configuration of a vision transformer alone.
models::ModelFacts recorded_model(const core::Json& inputs) {
  if (inputs.contains("model")) return models::ModelFacts::from_json(inputs.at("model"));
  return vit_facts(models::VitConfig::from_json(inputs.at("architecture"), "recorded inputs"));
}

core::Json to_json(const StreamFacts& stream) {
  core::Json tasks = core::Json::array();
  for (const auto& task : stream.tasks)
    tasks.push_back({{"classes", task.classes}, {"train", task.train}, {"test", task.test}});
  return {{"order", stream.order}, {"hash", stream.hash}, {"tasks", tasks}};
}

StreamFacts stream_from_json(const core::Json& json) {
  StreamFacts stream{json.at("order").get<int64_t>(), json.at("hash").get<std::string>(), {}};
  for (const auto& task : json.at("tasks"))
    stream.tasks.push_back({task.at("classes").get<std::vector<int64_t>>(), task.at("train").get<int64_t>(),
                            task.at("test").get<int64_t>()});
  return stream;
}

// A model that is loaded runs at its own size unless the recipe says otherwise.
void require_size(const ContinualConfig& config, const models::ModelFacts& model, core::Problems& problems) {
  if (config.model.path.empty() || config.model.image_size > 0 || model.image_size == 0) return;
  const auto dataset = data::ImageDataset::open(config.images->path);
  const data::ImageSetInfo& info = dataset.info();
  if (info.height == model.image_size && info.width == model.image_size) return;
  problems.add("model.image_size", "model.image_size",
               fmt::format("images are {} x {}, the model in {} takes {} x {}", info.height, info.width,
                           config.model.path, model.image_size, model.image_size),
               fmt::format("set model.image_size to the size to scale them to, a multiple of {}; {} keeps the model as "
                           "it is",
                           model.config.at("patch_size").get<int64_t>(), model.image_size));
}

}  // namespace

Continual::Continual(ContinualConfig config)
    : config_(std::move(config)), model_(backbone_facts(config_.model)), tokens_(model_.image_tokens) {}

Continual::Continual(ContinualConfig config, const core::Json& inputs)
    : config_(std::move(config)),
      model_(recorded_model(inputs)),
      tokens_(inputs.value("tokens", model_.image_tokens)),
      file_classes_(inputs.value("file_classes", std::vector<int64_t>())),
      class_names_(inputs.at("class_names").get<std::vector<std::string>>()),
      fingerprint_(inputs.at("fingerprint").get<std::string>()),
      backbone_fingerprint_(inputs.at("backbone_fingerprint").get<std::string>()),
      backbone_id_(inputs.at("backbone").get<std::string>()) {
  for (const auto& stream : inputs.at("streams")) streams_.push_back(stream_from_json(stream));
}

core::Json Continual::inputs() const {
  core::Json streams = core::Json::array();
  for (const auto& stream : streams_) streams.push_back(to_json(stream));
  core::Json inputs = {{"model", model_.to_json()},   {"tokens", tokens_},
                       {"streams", streams},          {"class_names", class_names_},
                       {"fingerprint", fingerprint_}, {"backbone_fingerprint", backbone_fingerprint_},
                       {"backbone", backbone_id_}};
  if (!file_classes_.empty()) inputs["file_classes"] = file_classes_;
  return inputs;
}

CellsOffered Continual::offered(Setting setting) const {
  const auto uses = [&](const char* name) {
    return std::find(config_.methods.begin(), config_.methods.end(), name) != config_.methods.end();
  };
  const bool heads = std::any_of(config_.methods.begin(), config_.methods.end(),
                                 [](const auto& name) { return find_learner(name).has_head(); });
  CellsOffered cells;
  cells.tasks = streams_.empty() ? 0 : static_cast<int64_t>(streams_.front().tasks.size());
  cells.ahead = setting == Setting::kTaskIncremental && config_.evaluation.ahead && heads;
  cells.joint = uses("joint");
  return cells;
}

std::shared_ptr<const ExampleSource> Continual::open_examples() const {
  return config_.images ? open_images(*config_.images, model_, at::kCPU)
                        : open_texts(config_.text_paths(), model_, config_.model.path, at::kCPU);
}

void Continual::open_streams(const ExampleSource& examples, core::Problems& problems) {
  const data::LabelledSet& set = examples.set();
  fingerprint_ = set.fingerprint;
  class_names_ = set.class_names;
  tokens_ = examples.tokens_per_example();
  if (!config_.images && !config_.texts) file_classes_ = examples.classes_of_files();
  if (const auto problem =
          data::problem_of(config_.stream_spec(-1, file_classes_), static_cast<int64_t>(set.class_names.size()))) {
    problems.add("stream", "stream", *problem, "every class stands in one task or in leave_out");
    return;
  }
  streams_.clear();
  for (const int64_t order : config_.orders) {
    const auto stream = data::TaskStream::make(set, config_.stream_spec(order, file_classes_));
    StreamFacts facts{order, stream.hash, {}};
    for (const auto& task : stream.tasks)
      facts.tasks.push_back(
          {task.classes, static_cast<int64_t>(task.train.size()), static_cast<int64_t>(task.test.size())});
    streams_.push_back(std::move(facts));
  }
}

void Continual::open_backbone_data(core::Problems& problems) {
  const auto images =
      open_images({config_.model.data_path, config_.images->mean, config_.images->deviation}, model_, at::kCPU);
  backbone_fingerprint_ = images->set().fingerprint;
  if (backbone_fingerprint_ == fingerprint_)
    problems.add("model.data_path", "model.data_path",
                 "holds the images of the stream: the backbone would know the labels of tasks to come",
                 "train it on another data set");
}

void Continual::check_metrics(core::Problems& problems) const {
  for (size_t i = 0; i < config_.metrics.size(); ++i) {
    const MetricInfo& info = find_metric(config_.metrics[i]);
    const auto reason = why_missing(info, offered(Setting::kTaskIncremental));
    if (!reason || !why_missing(info, offered(Setting::kClassIncremental))) continue;
    const bool ahead = info.needs == Needs::kAll || info.needs == Needs::kNext || info.needs == Needs::kNextBefore;
    std::string hint = "leave the metric out";
    if (ahead && !config_.evaluation.ahead) hint = "set evaluation.ahead: true, or leave the metric out";
    if (ahead && config_.evaluation.ahead && !offered(Setting::kTaskIncremental).ahead)
      hint = "these methods know nothing of classes to come: add one with a head, or leave the metric out";
    if (info.needs == Needs::kJoint) hint = "add joint to methods, or leave the metric out";
    problems.add(fmt::format("metrics.{}", i), fmt::format("metrics.{}", i),
                 fmt::format("{} cannot be had from this stream: {}", info.name, *reason), hint);
  }
}

void Continual::open_inputs() {
  core::Problems problems;
  const auto attempt = [&](const std::string& key, auto&& action) {
    try {
      action();
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
    }
  };
  attempt(config_.images  ? "images.path"
          : config_.texts ? "texts.path"
                          : "stream.tasks",
          [&] {
            if (config_.images) require_size(config_, model_, problems);
            open_streams(*open_examples(), problems);
          });
  if (!config_.model.data_path.empty()) attempt("model.data_path", [&] { open_backbone_data(problems); });
  for (const auto& name : config_.methods)
    attempt("learners." + name, [&] { find_learner(name).check(config_, model_); });
  if (!streams_.empty()) check_metrics(problems);
  if (!config_.model.path.empty())
    attempt("model.path", [&] { backbone_id_ = identity_of(*open_backbone(config_.model, std::nullopt)); });
  if (config_.model.architecture && !config_.model.train)
    backbone_id_ =
        fmt::format("random:{}", core::derive_seed(static_cast<uint64_t>(config_.seed), "continual/backbone"));
  problems.throw_if_any(config_.name);
}

ParameterTable Continual::parameters() const {
  ParameterTable table;
  table.columns = {"method", "trained per task", "% of the backbone", "numbers per class", "numbers sent per task"};
  for (const auto& name : config_.methods) {
    const Learner& learner = find_learner(name);
    const int64_t trained = learner.trained_parameters(config_, model_);
    table.rows.push_back({name, trained, 100.0 * static_cast<double>(trained) / static_cast<double>(model_.parameters),
                          learner.numbers_per_class(config_, model_), learner.numbers_sent(config_, model_)});
  }
  table.notes = {fmt::format("backbone: {} parameters, width {}; numbers sent: without what every class adds",
                             model_.parameters, model_.width)};
  return table;
}

void Continual::publish(const RunState& state, const std::filesystem::path& run_directory) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  if (stages.backbone && backbone_id_.empty()) {
    const auto backbone = state.artefact(*stages.backbone);
    models::NamedTensors weights;
    for (const auto& view : backbone->file().tensors()) weights.emplace_back(view.name, models::copy_of(view));
    write_model_directory(run_directory / "backbone", model_.config, std::move(weights));
  }
  if (!stages.matrices) return;
  const auto artefact = state.artefact(*stages.matrices);
  core::Hdf5File file(run_directory / "metrics.h5", core::Hdf5File::Mode::kCreate);
  file.set_attribute("format", "moraine-continual-metrics");
  file.set_attribute("format_version", 1);
  file.set_attribute("name", config_.name);
  file.set_attribute("methods", core::Json(config_.methods).dump());
  file.set_attribute("orders", core::Json(config_.orders).dump());
  file.set_attribute("seeds", core::Json(config_.all_seeds()).dump());
  file.set_attribute("class_names", core::Json(class_names_).dump());
  core::Json streams = core::Json::array();
  for (const auto& stream : streams_) streams.push_back(to_json(stream));
  file.set_attribute("streams", streams.dump());
  for (const auto& view : artefact->file().tensors()) {
    std::vector<double> values(static_cast<size_t>(view.numel()));
    std::copy_n(reinterpret_cast<const double*>(view.data.data()), values.size(), values.begin());
    std::replace(values.begin(), values.end(), kNotEvaluated, std::numeric_limits<double>::quiet_NaN());
    file.write<double>(view.name, values, view.shape);
  }
  file.close();
}

MethodEntry method_entry() {
  return {"continual",
          "methods that learn classes task by task, compared on the same streams",
          [](const core::ConfigNode& root, core::Problems& problems) {
            ContinualConfig config;
            parse_continual(root, config, problems);
            ParsedRecipe recipe;
            recipe.run = config;
            continual_schema().resolve(root, "", config, recipe.resolved);
            recipe.values = continual_schema().to_json(config);
            if (problems.empty()) recipe.method = std::make_unique<Continual>(std::move(config));
            return recipe;
          },
          [](const core::Json& values, const core::Json& inputs) -> std::unique_ptr<Method> {
            return std::make_unique<Continual>(continual_schema().from_json(modernised(values)), inputs);
          },
          [](const core::Json& values) { return continual_schema().identity(modernised(values)); },
          [] { return continual_schema().json_schema(); },
          [] { return continual_schema().markdown(); }};
}

}  // namespace moraine::algorithms::continual
