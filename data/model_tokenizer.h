#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "data/text_dataset.h"
#include "data/tokenizer.h"

namespace moraine::data {

/// Compares the tokeniser that prepared text names (TextDomainInfo::tokenizer) with the one in a model's directory, and
/// the vocabularies. Every use of a text with a model passes here.
///
/// Throws UserError if the directory holds a tokenizer.json with another SHA-256 than the text's, or, for bytes, one at
/// all; and if the text has token ids that the model's vocabulary lacks. Where the directory does not say (no
/// tokenizer.json, or none that holds a model), a text that is not bytes for a byte-sized vocabulary is named in a
/// warning, once per pair of text and directory. A model that is still to be made has no directory (empty): it takes
/// any tokeniser its vocabulary holds.
void check_model_tokenizer(const TextDomainInfo& text, const std::filesystem::path& text_path,
                           const std::filesystem::path& model_directory, int64_t model_vocabulary);

/// The tokeniser of a model directory: its tokenizer.json (BpeTokenizer), or bytes where there is none and the model's
/// vocabulary is theirs with little padding (257 to 512).
///
/// Throws UserError if there is neither, if the file is not understood, or if it has more ids than the model.
std::unique_ptr<const Tokenizer> model_tokenizer(const std::filesystem::path& model_directory,
                                                 int64_t model_vocabulary);

}  // namespace moraine::data
