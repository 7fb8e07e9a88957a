#pragma once

#include <filesystem>

namespace moraine {

/// Small prepared files in a directory: text/{public,left,right}.h5 and images/{images,others,strangers}.h5 with a
/// recipe.yaml each (those of tests/cli), encoder/ (a BERT-type model with its tokeniser) and
/// encoded/{public,left,right}.h5, the same text prepared by that tokeniser. Needs the Python environment that
/// scripts/setup makes; takes four seconds.
void make_prepared_files(const std::filesystem::path& directory);

}  // namespace moraine
