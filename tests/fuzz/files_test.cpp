// Spoilt files that a command is given: safetensors, HDF5, YAML, and the JSON of models and adapters.
#include <gtest/gtest.h>

#include "tests/fuzz/command.h"
#include "tests/fuzz/mutators.h"
#include "tests/fuzz/world.h"

namespace moraine::fuzz {
namespace {

using Line = std::vector<std::string>;

// Feeds spoilt versions of `file` to the commands that read it.
struct Feeding {
  std::string test, file;
  std::vector<std::string> needed;                   // beside the file, of the world
  std::function<std::vector<Line>(Scratch&)> lines;  // made anew for every mutation
  uint64_t usual;
};

void feed(const Feeding& how) {
  limit_memory(uint64_t{4} << 30);
  Scratch scratch(how.needed);
  Judge judge(how.test);
  for (uint64_t seed = first_seed(); seed < first_seed() + rounds(how.usual) && !judge.has_enough(); ++seed) {
    Random random(seed);
    scratch.spoil(how.file, random);
    for (const Line& line : how.lines(scratch)) {
      judge.command(seed, scratch / how.file, line);
      static_cast<void>(scratch.out());
    }
    scratch.mend(how.file);
  }
}

class SpoiltFiles : public testing::Test {
 protected:
  static void SetUpTestSuite() { World::get(); }
};

TEST_F(SpoiltFiles, AnExpertIsRefusedOrRead) {
  feed({"expert",
        "expert.safetensors",
        {"expert.safetensors", "base", "merge.yaml", "mixture"},
        [](Scratch& s) -> std::vector<Line> {
          return {{"inspect", s / "expert.safetensors", "--spectra"},
                  {"export", s / "expert.safetensors", s.out(), "--to", "peft"},
                  {"merge", s / "merge.yaml", s.out()}};
        },
        300});
}

TEST_F(SpoiltFiles, AnAdapterArtefactIsRefusedOrRead) {
  feed({"adapter",
        "adapter.safetensors",
        {"adapter.safetensors"},
        [](Scratch& s) -> std::vector<Line> {
          return {{"inspect", s / "adapter.safetensors", "--format", "json"},
                  {"export", s / "adapter.safetensors", s.out(), "--to", "peft"}};
        },
        300});
}

std::vector<Line> model_commands(Scratch& s, const std::string& directory) {
  const std::string text = World::get() / "text/left.h5", recipe = World::get() / "text/recipe.yaml";
  return {{"inspect", s / directory},
          {"eval", s / directory, "--data", text, "--seq-len", "32", "--sequences", "1"},
          {"import", s / directory, s.out()},
          {"validate", recipe, "model.architecture=null", "model.train=null", "model.path=" + (s / directory).string()},
          {"params", recipe, "model.architecture=null", "model.train=null", "model.path=" + (s / directory).string()}};
}

TEST_F(SpoiltFiles, WeightsOfAModelAreRefusedOrRead) {
  feed({"weights", "base/model.safetensors", {"base"}, [](Scratch& s) { return model_commands(s, "base"); }, 200});
}

TEST_F(SpoiltFiles, TheConfigurationOfAModelIsRefusedOrRead) {
  feed({"config", "base/config.json", {"base"}, [](Scratch& s) { return model_commands(s, "base"); }, 300});
}

TEST_F(SpoiltFiles, AnIndexOfShardsIsRefusedOrRead) {
  feed({"index",
        "sharded/model.safetensors.index.json",
        {"sharded"},
        [](Scratch& s) { return model_commands(s, "sharded"); },
        200});
}

std::vector<Line> mixture_commands(Scratch& s) {
  const std::string text = World::get() / "text/left.h5";
  return {{"inspect", s / "mixture"},
          {"eval", s / "mixture", "--data", text, "--seq-len", "32", "--sequences", "1"},
          {"import", s / "mixture", s.out()},
          {"export", s / "mixture", s.out(), "--to", "peft"},
          {"export", s / "mixture", s.out(), "--to", "hf"},
          {"export", s / "mixture", s.out(), "--to", "flexolmo"}};
}

TEST_F(SpoiltFiles, TheConfigurationOfAMixtureIsRefusedOrRead) {
  feed({"mixture_config", "mixture/config.json", {"mixture"}, mixture_commands, 200});
}

TEST_F(SpoiltFiles, WeightsOfAMixtureAreRefusedOrRead) {
  feed({"mixture_weights", "mixture/model.safetensors", {"mixture"}, mixture_commands, 150});
}

std::vector<Line> lora_commands(Scratch& s) {
  const std::string text = World::get() / "text/left.h5";
  return {{"inspect", s / "lora"},
          {"import", s / "lora", s.out()},
          {"import", s / "lora", s.out(), "--base", s / "base"},
          {"eval", s / "base", "--adapter", s / "lora", "--data", text, "--seq-len", "32", "--sequences", "1"}};
}

TEST_F(SpoiltFiles, TheConfigurationOfAnAdapterIsRefusedOrRead) {
  feed({"adapter_config", "lora/adapter_config.json", {"lora", "base"}, lora_commands, 300});
}

TEST_F(SpoiltFiles, TheFactorsOfAnAdapterAreRefusedOrRead) {
  feed({"adapter_model", "lora/adapter_model.safetensors", {"lora", "base"}, lora_commands, 200});
}

TEST_F(SpoiltFiles, ATokenizerIsRefusedOrRead) {
  feed({"tokenizer",
        "speaking/tokenizer.json",
        {"speaking"},
        [](Scratch& s) -> std::vector<Line> {
          return {{"eval", s / "speaking", "--prompt", "It's 12 o'clock.<|im_end|> \xC3\xA9t\xC3\xA9"},
                  {"eval", s / "speaking", "--prompt", "the end", "--generate", "3", "--format", "json"}};
        },
        400});
}

TEST_F(SpoiltFiles, PreparedTextIsRefusedOrRead) {
  feed({"text",
        "text/left.h5",
        {"text", "base"},
        [](Scratch& s) -> std::vector<Line> {
          return {{"inspect", s / "text/left.h5"},
                  {"eval", s / "base", "--data", s / "text/left.h5", "--seq-len", "32", "--sequences", "2"},
                  {"validate", s / "text/recipe.yaml"}};
        },
        400});
}

TEST_F(SpoiltFiles, AListOfExpertsToMergeIsRefusedOrRead) {
  feed({"merge",
        "merge.yaml",
        {"expert.safetensors", "base", "merge.yaml", "mixture"},
        [](Scratch& s) -> std::vector<Line> {
          return {{"merge", s / "merge.yaml", s.out()}};
        },
        200});
}

TEST_F(SpoiltFiles, AListOfAdaptersToMergeAndWhatItNamesAreRefusedOrRead) {
  for (const std::string file : {"merge_adapters.yaml", "lora/adapter_config.json", "lora/adapter_model.safetensors"})
    feed({"merge_adapters",
          file,
          {"base", "lora", "merge_adapters.yaml"},
          [](Scratch& s) -> std::vector<Line> {
            return {{"merge", s / "merge_adapters.yaml", s.out()}};
          },
          80});
}

std::vector<Line> encoder_commands(Scratch& s) {
  return {{"inspect", s / "encoder"},
          {"validate", World::get() / "text/recipe.yaml", "router.init=encoder",
           "router.encoder=" + (s / "encoder").string(),
           "public_encoder_text=" + (World::get() / "encoded/public.h5").string(),
           "domains.0.encoder_text=" + (World::get() / "encoded/left.h5").string(),
           "domains.1.encoder_text=" + (World::get() / "encoded/right.h5").string()}};
}

TEST_F(SpoiltFiles, AnEncoderIsRefusedOrRead) {
  for (const std::string file : {"tokenizer.json", "config.json", "model.safetensors"})
    feed({"encoder", "encoder/" + file, {"encoder"}, encoder_commands, 80});
}

}  // namespace
}  // namespace moraine::fuzz
