#pragma once

#include <cstddef>

// What the terminal behind a descriptor can do, if there is one.
namespace moraine::core {

/// From now on no descriptor counts as a terminal: mpirun gives its processes one, whoever reads what it collects.
/// Not thread-safe; call it at start-up.
void distrust_terminals();

/// Whether a line there can be redrawn: a terminal, and TERM names one that can (not "dumb").
bool is_terminal(int descriptor);

/// Whether to colour what goes there: NO_COLOR (not empty) says no, CLICOLOR_FORCE (neither empty nor 0) yes,
/// CLICOLOR=0 no; otherwise terminals are coloured.
bool color_wanted(int descriptor);

/// Columns of the terminal there; `otherwise` when there is none or it does not say.
size_t terminal_width(int descriptor, size_t otherwise);

}  // namespace moraine::core
