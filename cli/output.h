#pragma once

#include <string_view>

#include "coordinator/report/table.h"
#include "core/error.h"
#include "core/json.h"

// The way out of every command: nothing else writes to standard output, and errors look alike.
namespace moraine::cli {

/// Writes to standard output, whole. Throws IoError if that fails, ReaderGone if the reading end of a pipe was closed.
void print(std::string_view text);
/// A document over several lines. Bytes that are no UTF-8 (of a path, say) appear as U+FFFD: it is always JSON.
void print_json(const core::Json& document);
/// Closes standard output. Throws IoError if what was written did not arrive after all (some file systems say so late).
void close_output();

/// Thrown by print(): nobody reads any more, as behind `| head`. Commands then end quietly with kExitReaderGone.
struct ReaderGone {};
/// What a shell shows for a process that SIGPIPE ended.
constexpr int kExitReaderGone = 141;

/// Opens /dev/null for standard descriptors that are closed, so that no file gets their number and their output, and
/// lets failed writes be errors instead of signals. Call it first.
void prepare_output();

/// How tables look on standard output: as wide as the terminal, `otherwise` columns elsewhere; coloured if wanted.
report::TableStyle table_style(size_t otherwise = 100);

/// Message and hint on standard error, as one line of JSON if `json`. Returns the exit code.
int report_error(const core::Error& error, bool json);

}  // namespace moraine::cli
