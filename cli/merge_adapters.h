#pragma once

#include <filesystem>
#include <string>

#include "core/config.h"

namespace moraine::cli {

/// `moraine merge` of a file with the key `adapters`: adapters of one base model become one, in `format` peft (a PEFT
/// directory) or hf (the merged model). `root` as load_config() gave it with `problems`; `file` names it in messages.
void merge_adapters(const core::ConfigNode& root, core::Problems& problems, const std::string& file,
                    const std::filesystem::path& out, const std::string& format);

/// The table of its keys, for --help.
std::string merge_adapters_keys();

}  // namespace moraine::cli
