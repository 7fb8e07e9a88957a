#include "algorithms/continual/config.h"

#include <map>
#include <numeric>

#include "algorithms/continual/learner.h"
#include "algorithms/continual/metrics.h"
#include "core/error.h"
#include "models/vit.h"

namespace moraine::algorithms::continual {
namespace {

using Violation = std::optional<std::string>;

const core::Schema<ArchitectureConfig>& architecture_schema() {
  using C = ArchitectureConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("image_size", &C::image_size)
        .min(1)
        .unit("pixels")
        .doc("Height and width; images of another size are scaled to it")
        .field("patch_size", &C::patch_size)
        .min(1)
        .unit("pixels")
        .doc("Side of a patch; tokens grow with its inverse square")
        .field("num_channels", &C::num_channels)
        .min(1)
        .doc("Channels; grey images are repeated")
        .field("hidden_size", &C::hidden_size)
        .min(1)
        .doc("Width d")
        .field("intermediate_size", &C::intermediate_size)
        .min(1)
        .doc("Inner width of the MLP")
        .field("num_layers", &C::num_layers)
        .min(1)
        .doc("Blocks")
        .field("num_heads", &C::num_heads)
        .min(1)
        .doc("Attention heads")
        .check([](const C& c) -> Violation {
          if (c.image_size % c.patch_size) return "image_size must be a multiple of patch_size";
          if (c.hidden_size % c.num_heads) return "hidden_size must be a multiple of num_heads";
          return std::nullopt;
        });
    return s;
  }();
  return schema;
}

const core::Schema<BackboneConfig>& backbone_schema() {
  using C = BackboneConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("path", &C::path)
        .path()
        .doc(
            "Hugging Face or timm directory (config.json + safetensors): of images a ViT, of texts an encoder or a "
            "decoder; exclusive with architecture")
        .field("image_size", &C::image_size)
        .joined_later()
        .min(0)
        .max(8192)
        .unit("pixels")
        .doc(
            "Height and width at which the model of path is run: images are scaled to it (bilinear), grey ones "
            "repeated "
            "over the model's channels, and the model's positions interpolated (bicubic). A multiple of its patch "
            "size; "
            "0 = the model's own size, which the images must then have. Cost grows with its square")
        .optional_object("architecture", &C::architecture, architecture_schema())
        .doc("Shapes of a ViT built from the seed")
        .field("data_path", &C::data_path)
        .path()
        .doc(
            "Prepared images such a ViT is trained on, with their labels; empty = random weights. Must be other images "
            "than the stream's")
        .optional_object("train", &C::train, train_schema())
        .doc("Training of that ViT; belongs to data_path")
        .check([](const C& c) -> Violation {
          if (c.path.empty() == !c.architecture) return "give exactly one of path and architecture";
          if (!c.path.empty() && (c.train || !c.data_path.empty()))
            return "train and data_path go with architecture: a model that is loaded is not trained first";
          if (c.path.empty() && c.image_size > 0)
            return "image_size goes with path: a model that is built has architecture.image_size";
          if (c.data_path.empty() == c.train.has_value())
            return "train and data_path belong together: give both, or neither for random weights";
          return std::nullopt;
        });
    return s;
  }();
  return schema;
}

const core::Schema<TaskConfig>& task_schema() {
  using C = TaskConfig;
  static const auto schema = core::Schema<C>()
                                 .field("classes", &C::classes)
                                 .min(0)
                                 .unique()
                                 .doc("Labels of one task")
                                 .field("path", &C::path)
                                 .joined_later()
                                 .path()
                                 .doc("Instead: a prepared file of texts whose classes are this task's (texts.path)")
                                 .check([](const C& c) -> Violation {
                                   if (c.classes.empty() == c.path.empty()) return "give one of classes and path";
                                   return std::nullopt;
                                 });
  return schema;
}

const core::Schema<StreamConfig>& stream_schema() {
  using C = StreamConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.list("tasks", &C::tasks, task_schema())
        .doc("Explicit tasks; empty = base_classes and increment")
        .field("base_classes", &C::base_classes)
        .min(0)
        .doc("B{m}: classes of the first task; 0 = increment")
        .field("increment", &C::increment)
        .min(1)
        .doc("Inc{n}: new classes per task; the last task takes what is left")
        .field("leave_out", &C::leave_out)
        .min(0)
        .unique()
        .doc("Labels that are in no task")
        .field("train_per_class", &C::train_per_class)
        .min(0)
        .unit("examples")
        .doc("Training examples of each class; 0 = all")
        .field("test_per_class", &C::test_per_class)
        .min(0)
        .unit("examples")
        .doc("Test examples of each class; 0 = all")
        .field("validation_per_class", &C::validation_per_class)
        .min(0)
        .unit("examples")
        .doc("Training examples of each class that are held back, for evaluation.split: validation");
    return s;
  }();
  return schema;
}

const core::Schema<EvaluationConfig>& evaluation_schema() {
  using C = EvaluationConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("batch_size", &C::batch_size)
        .min(1)
        .unit("examples")
        .evaluation_only()
        .doc("Examples per forward pass")
        .field("split", &C::split)
        .choices({"test", "validation"})
        .doc("Which examples the accuracies are about; use validation while choosing settings")
        .field("ahead", &C::ahead)
        .evaluation_only()
        .doc("Also evaluate tasks before they are trained, task-incrementally; forward transfer needs it");
    return s;
  }();
  return schema;
}

Violation cross_check(const ContinualConfig& c) {
  if (c.orders.empty()) return "orders must not be empty; -1 is the order of the labels";
  if (c.methods.empty()) return "methods must not be empty";
  if (c.evaluation.split == "validation" && c.stream.validation_per_class == 0)
    return "evaluation.split: validation needs stream.validation_per_class";
  const auto files = std::ranges::count_if(c.stream.tasks, [](const TaskConfig& task) { return !task.path.empty(); });
  if (files > 0 && files < std::ssize(c.stream.tasks)) return "give either all tasks a path or none";
  if (c.images.has_value() + c.texts.has_value() + (files > 0) != 1)
    return "give exactly one of images, texts and tasks with paths";
  if (!c.images && c.model.path.empty()) return "texts need a model at model.path: shapes are those of a ViT";
  std::vector<const TrainConfig*> trainings = all_training(c.learners);
  trainings.push_back(&c.train);
  if (c.model.train) trainings.push_back(&*c.model.train);
  for (const TrainConfig* train : trainings)
    if (train->dtype != "float32") return "streams are trained in float32: set dtype: float32";
  return std::nullopt;
}

std::vector<std::string> metric_names() {
  std::vector<std::string> names;
  for (const auto& info : metric_table()) names.push_back(info.name);
  return names;
}

}  // namespace

const core::Schema<ContinualConfig>& continual_schema() {
  using C = ContinualConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    add_run_fields(s);
    s.object("model", &C::model, backbone_schema())
        .doc("The frozen backbone all methods start from")
        .optional_object("images", &C::images, images_schema())
        .doc("The labelled images, or")
        .optional_object("texts", &C::texts, texts_schema())
        .joined_later()
        .doc("the labelled texts of the stream")
        .object("stream", &C::stream, stream_schema())
        .doc("How they are cut into tasks")
        .field("orders", &C::orders)
        .unique()
        .min(-1)
        .max(4294967295.0)
        .doc("Class orders, each a run of its own: a seed as in iCaRL (1993), or -1 for the order of the labels")
        .field("seeds", &C::seeds)
        .unique()
        .min(0)
        .doc("Seeds of initial values and data order, each a run of its own; empty = the run's seed")
        .field("methods", &C::methods)
        .unique()
        .choices(learner_names())
        .doc("Methods compared in this run, on the same streams and backbone")
        .object("train", &C::train, train_schema())
        .doc("Training on one task; joint training takes as many steps per task it sees")
        .object("learners", &C::learners, learners_schema())
        .joined_later()
        .doc("Options of methods, each by its name")
        .object("evaluation", &C::evaluation, evaluation_schema())
        .doc("What is measured")
        .field("metrics", &C::metrics)
        .unique()
        .choices(metric_names())
        .evaluation_only()
        .doc("Metrics in the tables, each named by its convention; empty = the canonical ones")
        .check(cross_check);
    return s;
  }();
  return schema;
}

std::vector<std::string> ContinualConfig::text_paths() const {
  if (texts) return {texts->path};
  std::vector<std::string> paths;
  for (const auto& task : stream.tasks)
    if (!task.path.empty()) paths.push_back(task.path);
  return paths;
}

data::TaskStreamSpec ContinualConfig::stream_spec(int64_t order, const std::vector<int64_t>& file_classes) const {
  data::TaskStreamSpec spec;
  int64_t first = 0;
  for (const int64_t classes : file_classes) {
    auto& list = spec.tasks.emplace_back(static_cast<size_t>(classes));
    std::iota(list.begin(), list.end(), first);
    first += classes;
  }
  if (file_classes.empty())
    for (const auto& task : stream.tasks) spec.tasks.push_back(task.classes);
  spec.base_classes = stream.base_classes;
  spec.increment = stream.increment;
  spec.leave_out = stream.leave_out;
  spec.train_per_class = stream.train_per_class;
  spec.test_per_class = stream.test_per_class;
  spec.validation_per_class = stream.validation_per_class;
  spec.evaluate_validation = evaluation.split == "validation";
  spec.seed = static_cast<uint64_t>(seed);
  spec.order = order;
  return spec;
}

core::Json modernised(core::Json values) {
  if (!values.contains("lora")) return values;
  const core::Json options = {{"adapter", values.at("lora")}, {"train", values.value("lora_train", core::Json())}};
  values.erase("lora");
  values.erase("lora_train");
  // It always stood there with all its values; today's recipes leave out what is the default.
  const auto& schema = seq_lora_schema();
  if (schema.to_json(schema.from_json(options)) != schema.to_json({})) values["learners"]["seq_lora"] = options;
  return values;
}

void parse_continual(const core::ConfigNode& root, ContinualConfig& config, core::Problems& problems) {
  static const std::map<std::string, std::string> moved = {{"lora", "learners.seq_lora.adapter"},
                                                           {"lora_train", "learners.seq_lora.train"}};
  core::ConfigNode kept = root;
  kept.members.clear();
  kept.member_origins.clear();
  for (size_t i = 0; i < root.members.size(); ++i) {
    const auto& [key, node] = root.members[i];
    if (const auto place = moved.find(key); place != moved.end()) {
      problems.add(root.member_origins[i], key, "has moved to " + place->second, "options stand under their method");
      continue;
    }
    kept.members.emplace_back(key, node);
    kept.member_origins.push_back(root.member_origins[i]);
  }
  continual_schema().parse(kept, "", config, problems);
}

std::unique_ptr<models::Backbone> open_backbone(const BackboneConfig& model, std::optional<at::ScalarType> dtype) {
  const auto size = model.image_size > 0 ? std::optional(model.image_size) : std::nullopt;
  return models::open_backbone(model.path, dtype, size);
}

models::ModelFacts vit_shapes(const models::VitConfig& shapes) {
  return {.family = "vit",
          .width = shapes.hidden_size,
          .parameters = shapes.backbone_parameters(),
          .image_size = shapes.image_size,
          .channels = shapes.num_channels,
          .image_tokens = 1 + shapes.num_patches(),
          .slots = {},
          .config = shapes.to_json()};
}

models::ModelFacts vit_facts(const models::VitConfig& shapes) {
  models::ModelFacts facts = vit_shapes(shapes);
  facts.slots = models::Vit::from_config(shapes, 0, at::kFloat).slots();  // its values are never read
  facts.classifier = {"ViTForImageClassification", "vit.", "classifier"};
  return facts;
}

models::ModelFacts backbone_facts(const BackboneConfig& model) {
  if (model.architecture) return vit_facts(vit_config(*model.architecture));
  return models::model_facts(model.path, model.image_size > 0 ? std::optional(model.image_size) : std::nullopt);
}

models::VitConfig vit_config(const ArchitectureConfig& shapes) {
  models::VitConfig config;
  config.image_size = shapes.image_size;
  config.patch_size = shapes.patch_size;
  config.num_channels = shapes.num_channels;
  config.hidden_size = shapes.hidden_size;
  config.intermediate_size = shapes.intermediate_size;
  config.num_layers = shapes.num_layers;
  config.num_heads = shapes.num_heads;
  return config;
}

}  // namespace moraine::algorithms::continual
