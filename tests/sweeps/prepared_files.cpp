#include "tests/sweeps/prepared_files.h"

#include <cstdlib>

#include "algorithms/language_model.h"
#include "core/error.h"
#include "models/bert.h"

namespace moraine {

void make_prepared_files(const std::filesystem::path& directory) {
  const std::string source = MORAINE_SOURCE_DIR;
  const std::string line =
      fmt::format("'{}/.venv/bin/python' '{}/tests/sweeps/make_files.py' '{}'", source, source, directory.string());
  MORAINE_CHECK(std::system(line.c_str()) == 0, "failed: {}", line);
  models::BertConfig config;
  config.vocab_size = 128, config.hidden_size = 8, config.intermediate_size = 16, config.num_layers = 1;
  config.num_heads = 2, config.max_position_embeddings = 512;
  const auto bert = models::Bert::from_config(config, 1, at::kFloat);
  algorithms::write_model_directory(directory / "encoder", config.to_json(),
                                    {bert.weights().begin(), bert.weights().end()});
}

}  // namespace moraine
