#pragma once

#include <string>
#include <vector>

#include "core/json.h"

// Tables of a summary (docs/formats.md, "summary.json") for people: terminal, Markdown, CSV. The functions that take
// JSON throw InternalError naming the JSON path if it is malformed.
namespace moraine::report {

struct TableStyle {
  size_t width = 100;  // columns of the terminal; a wider table is printed in blocks that repeat its first column
  bool color = false;  // ANSI colours, for terminals only
};

/// Rows of {key: value} as a table (docs/formats.md) whose columns are labelled by their keys.
core::Json plain_table(const std::string& title, const std::vector<std::string>& keys, core::Json rows);

/// One table with title and notes, ready to print. The best value of each row or column carries a '*' (bold in
/// Markdown); cells that print alike share it, and nothing is marked where all print alike.
std::string render_table(const core::Json& table, const TableStyle& style = {});
std::string render_markdown(const core::Json& table);
/// RFC 4180, one header line of column keys, numbers at full precision, empty where there is no value.
std::string render_csv(const core::Json& table);
/// What `moraine run` ends with: the headline and the highlighted tables (the first one if none is) of a summary.
std::string render_text(const core::Json& summary, const TableStyle& style = {});

/// A checked table as text cells: what every rendering starts from.
struct TableText {
  std::string unit;                             // of all numeric columns, when they agree
  std::vector<std::string> labels, units;       // per column; units are empty when `unit` is not
  std::vector<bool> numeric;                    // per column: mostly numbers, right-aligned
  std::vector<std::vector<std::string>> cells;  // [row][column]; "–" where there is no value
  std::vector<std::vector<bool>> best;          // [row][column]
  std::string legend;  // what a mark means: "best in its row (lower is better)"; "" if there is none
};
TableText lay_out(const core::Json& table);

}  // namespace moraine::report
