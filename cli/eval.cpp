#include <limits>

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <CLI/CLI.hpp>

#include "algorithms/adapters/adapter.h"
#include "algorithms/evaluate.h"
#include "algorithms/flexmore/mixture_files.h"
#include "cli/command.h"
#include "cli/output.h"
#include "cli/prompt.h"
#include "coordinator/report/table.h"
#include "core/error.h"
#include "core/file.h"
#include "core/json.h"
#include "data/model_tokenizer.h"
#include "models/tensor_io.h"
#include "worker/context.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;
namespace flexmore = algorithms::flexmore;

struct EvalArguments {
  std::string model, adapter, split = "test", dtype = "float32", logits, format = "text";
  std::vector<std::string> data, experts;
  int64_t seq_len = 256, sequences = 0, batch_size = 16;
  int threads = 1;
  bool prompted = false;
  PromptArguments prompt;
};

fs::path model_directory(const fs::path& path) {
  if (!fs::exists(path / "recipe.json")) return path;
  for (const char* published : {"mixture", "merged_model", "public_model"})
    if (fs::exists(path / published / "config.json")) return path / published;
  throw core::UserError(
      fmt::format("cli: {} holds no language model (mixture/, merged_model/ or public_model/)", path.string()),
      fs::exists(path / "experts")
          ? fmt::format("eval the base model with --adapter {}", (path / "experts" / "NAME").string())
          : "finish the run, or name a Hugging Face directory");
}

models::Decoder load_model(const EvalArguments& arguments) {
  const fs::path directory = model_directory(arguments.model);
  const auto dtype = arguments.dtype == "bfloat16"  ? at::kBFloat16
                     : arguments.dtype == "float64" ? at::kDouble
                                                    : at::kFloat;
  const auto config = models::DecoderConfig::from_directory(directory);
  if (config.is_mixture())
    return flexmore::assemble(flexmore::keep_experts(flexmore::read_mixture_directory(directory), arguments.experts),
                              dtype);
  if (!arguments.experts.empty())
    throw core::UserError(fmt::format("cli: {} is no mixture: --experts has no meaning", directory.string()),
                          "leave out --experts");
  return models::Decoder::from_directory(directory, dtype);
}

// The first batch's tokens [n, seq_len + 1] and logits [n, seq_len, V], for comparison with other tools.
void write_logits(models::Decoder& model, const data::TextDataset& dataset, const EvalArguments& arguments) {
  const int64_t available = dataset.num_eval_sequences(),
                wanted = arguments.sequences ? arguments.sequences : arguments.batch_size;
  const int64_t count = std::min({available, wanted, arguments.batch_size});
  std::vector<int64_t> rows = dataset.eval_batch(0, count);
  for (int64_t& token : rows) token = std::max<int64_t>(token, 0);  // padding
  const at::Tensor tokens = at::from_blob(rows.data(), {count, dataset.seq_len() + 1}, at::kLong);
  const at::Tensor logits = model.forward(tokens.narrow(1, 0, dataset.seq_len()).contiguous());
  std::vector<at::Tensor> keep;
  core::write_atomically(arguments.logits,
                         core::serialize_safetensors(models::views_of({{"logits", logits}, {"tokens", tokens}}, keep),
                                                     {{"format", "pt"}}));
}

void refuse_replacing_inputs(const EvalArguments& arguments) {
  if (arguments.logits.empty()) return;
  std::vector<fs::path> inputs(arguments.data.begin(), arguments.data.end());
  inputs.insert(inputs.end(), {arguments.model, arguments.adapter});
  core::refuse_replacing(arguments.logits, inputs);
}

void evaluate_data(models::Decoder& model, const EvalArguments& arguments, algorithms::WorkerContext& context) {
  core::Json rows = core::Json::array();
  for (const auto& file : arguments.data) {
    const auto dataset = data::TextDataset::open(file, arguments.split, arguments.seq_len);
    data::check_model_tokenizer(dataset.info(), file, model_directory(arguments.model), model.config().vocab_size);
    if (arguments.seq_len > model.config().max_position_embeddings)
      throw core::UserError(fmt::format("cli: --seq-len {} is more than the model's {} positions", arguments.seq_len,
                                        model.config().max_position_embeddings),
                            "lower --seq-len");
    if (!arguments.logits.empty()) write_logits(model, dataset, arguments);
    const auto result = algorithms::evaluate(model, dataset, arguments.sequences, arguments.batch_size, context);
    rows.push_back({{"data", dataset.info().name},
                    {"bits_per_byte", result.bits_per_byte()},
                    {"loss", result.loss()},
                    {"accuracy", result.accuracy()},
                    {"tokens", result.tokens},
                    {"bytes", result.bytes}});
  }
  if (arguments.format == "json") return print_json(rows);
  print(
      report::render_table(report::plain_table(fmt::format("{} on the {} split", arguments.model, arguments.split),
                                               {"data", "bits_per_byte", "loss", "accuracy", "tokens", "bytes"}, rows),
                           table_style()));
}

void evaluate_model(const EvalArguments& arguments) {
  if (!arguments.prompted && arguments.data.empty())
    throw core::UserError("cli: eval: nothing to evaluate", "give --data FILE.h5 or --prompt TEXT");
  const at::NoGradGuard no_grad;
  worker::WorkerOptions options;
  options.threads = arguments.threads;
  worker::check_options(options);
  at::set_num_threads(options.threads);
  refuse_replacing_inputs(arguments);
  Prompt prompt;
  if (arguments.prompted) prompt = read_prompt(arguments.prompt, model_directory(arguments.model));
  models::Decoder model = load_model(arguments);
  std::optional<algorithms::adapters::Adapter> adapter;
  if (!arguments.adapter.empty()) {
    adapter = algorithms::adapters::Adapter::load(arguments.adapter, model, std::nullopt, at::kCPU);
    adapter->attach(model);
  }
  const algorithms::Unit unit{"evaluate", "eval", core::Json::object(), {}, algorithms::Place::kCoordinator, 1};
  worker::DirectContext context(unit, 1, options, g_signals,
                                {.artefact = [](const std::string&) { return core::ArtefactPtr(); },
                                 .metric = [](const core::metrics::Record&) {},
                                 .progress = [](double, double) {}});
  if (arguments.prompted) return answer_prompt(model, prompt, arguments.prompt, arguments.format == "json", context);
  evaluate_data(model, arguments, context);
}

}  // namespace

void add_eval(CLI::App& app, int& exit_code) {
  auto* command =
      app.add_subcommand("eval", "Scores of a model on prepared text or on a prompt, and what it writes after that");
  auto a = std::make_shared<EvalArguments>();
  command
      ->add_option("model", a->model,
                   "Hugging Face directory (dense, FlexOlmo, FlexMoRE), or a run: its mixture, else its public model")
      ->required();
  command->add_option("--data", a->data, "Prepared HDF5 files: bits per byte, loss (nats per token), accuracy")
      ->delimiter(',');
  command->add_option("--split", a->split, "train | validation | test")
      ->check(CLI::IsMember({"train", "validation", "test"}))
      ->capture_default_str();
  command->add_option("--seq-len", a->seq_len, "Tokens per sequence")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--sequences", a->sequences, "Sequences evaluated; 0 = all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--batch-size", a->batch_size, "Sequences per forward pass")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--experts", a->experts, "Only these experts of a mixture, separated by commas")->delimiter(',');
  command->add_option("--adapter", a->adapter, "PEFT directory to put on the model");
  command->add_option("--dtype", a->dtype, "Compute type")
      ->check(CLI::IsMember({"float32", "bfloat16", "float64"}))
      ->capture_default_str();
  command->add_option("--threads", a->threads, "CPU threads")->capture_default_str();
  command->add_option("--logits", a->logits,
                      "Also write tokens and logits of the first batch into this safetensors file");
  add_prompt_options(*command, a->prompt,
                     {"--data", "--split", "--seq-len", "--sequences", "--batch-size", "--logits"});
  add_format_option(*command, a->format);
  command->footer(
      "Examples: moraine eval runs/quickstart --data data/domains/german.h5\n          moraine eval runs/quickstart "
      "--data data/domains/german.h5 --experts german --format json\n          moraine eval "
      "models/smollm2-135m --adapter runs/fit/experts/law --prompt 'The court' --generate 100");
  command->callback([=, &exit_code] {
    a->prompted = command->count("--prompt") > 0;
    evaluate_model(*a);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
