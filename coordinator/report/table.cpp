#include "coordinator/report/table.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>

#include <fmt/format.h>

#include "coordinator/report/axis.h"
#include "coordinator/report/summary_check.h"
#include "coordinator/report/text.h"

namespace moraine::report {
namespace {

using core::Json;
using Cell = std::pair<size_t, size_t>;  // row, column

const Json& cell_of(const Json& table, const Cell& cell) {
  static const Json kNone;
  const Json& row = table["rows"][cell.first];
  const auto it = row.find(table["columns"][cell.second]["key"].get_ref<const std::string&>());
  return it == row.end() ? kNone : *it;
}

std::string cell_text(const Json& cell, int digits) {
  if (cell.is_string()) return printable(cell.get_ref<const std::string&>());
  if (cell.is_boolean()) return cell.get<bool>() ? "yes" : "no";
  return std::isnan(number_or_nan(cell)) ? "–" : format_number(cell.get<double>(), digits);
}

// Methods side by side: columns of one unit and one direction are compared within each row, others within each column.
bool best_in_rows(const Json& table) {
  if (table.contains("best_in")) return table["best_in"] == "row";
  std::set<std::pair<std::string, std::string>> measures;
  size_t compared = 0;
  for (const Json& column : table["columns"])
    if (column.contains("better")) {
      measures.emplace(column["better"], column.value("unit", ""));
      ++compared;
    }
  return compared >= 2 && measures.size() == 1;
}

// Marks the best of the cells that are compared with each other.
void mark_best(const Json& table, const std::vector<Cell>& compared, bool lower, TableText& text) {
  if (compared.size() < 2) return;
  const auto less = [&](const Cell& a, const Cell& b) { return cell_of(table, a) < cell_of(table, b); };
  const auto shown = [&](const Cell& cell) { return text.cells[cell.first][cell.second]; };
  const auto [low, high] = std::minmax_element(compared.begin(), compared.end(), less);
  if (shown(*low) == shown(*high)) return;
  const std::string winner = shown(lower ? *low : *high);
  for (const Cell& cell : compared) text.best[cell.first][cell.second] = shown(cell) == winner;
}

void mark_all(const Json& table, TableText& text) {
  const bool in_rows = best_in_rows(table);
  const size_t rows = text.cells.size(), columns = text.labels.size();
  for (size_t i = 0; i < (in_rows ? rows : columns); ++i) {
    std::vector<Cell> lower, higher;
    for (size_t j = 0; j < (in_rows ? columns : rows); ++j) {
      const Cell cell = in_rows ? Cell{i, j} : Cell{j, i};
      const std::string better = table["columns"][cell.second].value("better", "");
      if (better.empty() || !text.numeric[cell.second] || std::isnan(number_or_nan(cell_of(table, cell)))) continue;
      (better == "lower" ? lower : higher).push_back(cell);
    }
    mark_best(table, lower, true, text);
    mark_best(table, higher, false, text);
  }
  std::set<std::string> directions;
  for (size_t i = 0; i < rows; ++i)
    for (size_t j = 0; j < columns; ++j)
      if (text.best[i][j]) directions.insert(table["columns"][j]["better"]);
  if (directions.empty()) return;
  text.legend = std::string("best in its ") + (in_rows ? "row" : "column") +
                (directions.size() == 1 ? " (" + *directions.begin() + " is better)" : "");
}

std::string pad(const std::string& text, size_t width, bool right) {
  const std::string space(width - std::min(width, display_width(text)), ' ');
  return right ? space + text : text + space;
}

// A column of a terminal table: its header broken into lines at spaces, and its width.
struct Head {
  std::vector<std::string> lines;
  size_t width = 0;
};

Head make_head(const TableText& text, size_t column, size_t header_limit) {
  Head head;
  for (const auto& row : text.cells) head.width = std::max(head.width, display_width(row[column]));
  header_limit = std::max(header_limit, head.width);
  std::istringstream words(text.labels[column]);
  for (std::string word; words >> word;) {
    if (head.lines.empty() || display_width(head.lines.back()) + 1 + display_width(word) > header_limit) {
      head.lines.push_back(word);
    } else {
      head.lines.back() += " " + word;
    }
  }
  if (!text.units[column].empty()) head.lines.push_back(text.units[column]);
  for (const auto& line : head.lines) head.width = std::max(head.width, display_width(line));
  return head;
}

// Column 0 and the columns [begin, end) as one block of lines.
std::string block(const TableText& text, const std::vector<Head>& heads, size_t begin, size_t end, bool color) {
  std::vector<size_t> shown{0};
  for (size_t j = begin; j < end; ++j) shown.push_back(j);
  const auto put = [&](const std::string& s, size_t j) { return pad(s, heads[j].width, text.numeric[j]) + "  "; };
  const auto line = [&](const char* tint, auto content) {
    std::string out = "  ";
    for (const size_t j : shown) out += content(j);
    out.erase(out.find_last_not_of(' ') + 1);
    return (color ? tint + out + "\x1b[0m" : out) + "\n";
  };
  size_t header_lines = 0;
  for (const size_t j : shown) header_lines = std::max(header_lines, heads[j].lines.size());
  std::string out;
  for (size_t k = 0; k < header_lines; ++k)
    out += line("\x1b[1m", [&](size_t j) {  // labels stand on the rule
      const size_t blank = header_lines - heads[j].lines.size();
      return put(k < blank ? "" : heads[j].lines[k - blank], j);
    });
  out += line("\x1b[2m", [&](size_t j) {
    std::string rule;
    for (size_t k = 0; k < heads[j].width; ++k) rule += "─";
    return rule + "  ";
  });
  for (size_t i = 0; i < text.cells.size(); ++i)
    out += line("", [&](size_t j) {
      std::string cell = put(text.cells[i][j], j);
      if (!text.best[i][j]) return cell;
      cell.resize(cell.size() - 2);
      // The mark stands between the columns, so that the digits stay aligned.
      return (color ? "\x1b[1;32m" + cell + "*\x1b[0m" : cell + "*") + " ";
    });
  return out;
}

std::string terminal_table(const Json& table, const TableStyle& style) {
  const TableText text = lay_out(table);
  std::vector<Head> heads;
  for (const size_t header_limit :
       {style.width, size_t{16}, size_t{12}, size_t{8}}) {  // headers in as few lines as fit
    heads.clear();
    size_t used = 0;
    for (size_t j = 0; j < text.labels.size(); ++j)
      used += heads.emplace_back(make_head(text, j, header_limit)).width + 2;
    if (used <= style.width) break;
  }
  const std::string title = printable(table["title"].get<std::string>());
  std::string out =
      (style.color ? "\x1b[1m" + title + "\x1b[0m" : title) + (text.unit.empty() ? "" : " (" + text.unit + ")") + "\n";
  for (size_t begin = 1, end = 0; !heads.empty() && end < heads.size(); begin = end) {
    size_t used = heads[0].width + 2;
    for (end = begin; end < heads.size() && (end == begin || used + heads[end].width + 2 <= style.width); ++end)
      used += heads[end].width + 2;
    out += (begin > 1 ? "\n" : "") + block(text, heads, begin, end, style.color);
  }
  if (!text.legend.empty()) out += "  * " + text.legend + "\n";
  for (const Json& note : table.value("notes", Json::array())) out += "  " + printable(note.get<std::string>()) + "\n";
  return out;
}

std::string markdown_table(const Json& table) {
  const TableText text = lay_out(table);
  const auto escape = [](const std::string& s) {
    std::string out;
    for (const char c : printable(s)) {
      if (std::string_view("|\\*_`<").find(c) != std::string_view::npos) out += '\\';
      out += c;
    }
    return out;
  };
  std::string out =
      "**" + escape(table["title"]) + "**" + (text.unit.empty() ? "" : " (" + escape(text.unit) + ")") + "\n\n|";
  for (size_t j = 0; j < text.labels.size(); ++j)
    out += " " + escape(text.labels[j]) + (text.units[j].empty() ? "" : " (" + escape(text.units[j]) + ")") + " |";
  out += "\n|";
  for (const bool numeric : text.numeric) out += numeric ? " ---: |" : " --- |";
  for (size_t i = 0; i < text.cells.size(); ++i) {
    out += "\n|";
    for (size_t j = 0; j < text.labels.size(); ++j) {
      const char* mark = text.best[i][j] ? "**" : "";
      out += " " + (mark + escape(text.cells[i][j]) + mark) + " |";
    }
  }
  out += "\n";
  if (!text.legend.empty()) out += "\nBold: " + text.legend + ".\n";
  for (const Json& note : table.value("notes", Json::array())) out += "\n" + escape(note) + "\n";
  return out;
}

}  // namespace

Json plain_table(const std::string& title, const std::vector<std::string>& keys, Json rows) {
  Json columns = Json::array();
  for (const std::string& key : keys) columns.push_back({{"key", key}, {"label", key}});
  return {{"title", title}, {"columns", columns}, {"rows", std::move(rows)}};
}

TableText lay_out(const Json& table) {
  TableText text;
  const size_t rows = table["rows"].size(), columns = table["columns"].size();
  text.cells.resize(rows);
  std::set<std::string> units;
  for (size_t j = 0; j < columns; ++j) {
    const Json& column = table["columns"][j];
    std::vector<double> numbers;
    size_t texts = 0;
    for (size_t i = 0; i < rows; ++i) {
      const Json& cell = cell_of(table, {i, j});
      if (cell.is_string() || cell.is_boolean()) ++texts;
      if (!std::isnan(number_or_nan(cell))) numbers.push_back(cell.get<double>());
    }
    const int digits = column.contains("digits") ? column["digits"].get<int>() : choose_digits(numbers);
    for (size_t i = 0; i < rows; ++i) text.cells[i].push_back(cell_text(cell_of(table, {i, j}), digits));
    text.labels.push_back(printable(column["label"].get<std::string>()));
    text.units.push_back(printable(column.value("unit", "")));
    text.numeric.push_back(numbers.size() > texts);
    if (text.numeric.back()) units.insert(text.units.back());
  }
  if (units.size() == 1 && !units.begin()->empty()) {
    text.unit = *units.begin();
    text.units.assign(columns, "");
  }
  text.best.assign(rows, std::vector<bool>(columns, false));
  mark_all(table, text);
  return text;
}

std::string render_table(const Json& table, const TableStyle& style) {
  check_table(table);
  return terminal_table(table, style);
}

std::string render_markdown(const Json& table) {
  check_table(table);
  return markdown_table(table);
}

std::string render_csv(const Json& table) {
  check_table(table);
  const auto field = [](const Json& value) {
    std::string s = value.is_string() ? value.get<std::string>() : (value.is_null() ? "" : value.dump());
    if (s.find_first_of(",\"\r\n") == std::string::npos) return s;
    std::string out = "\"";
    for (const char c : s) out += c == '"' ? "\"\"" : std::string(1, c);
    return out + "\"";
  };
  const size_t columns = table["columns"].size();
  std::string out;
  for (size_t j = 0; j < columns; ++j) out += (j ? "," : "") + field(table["columns"][j]["key"]);
  out += "\r\n";
  for (size_t i = 0; i < table["rows"].size(); ++i) {
    for (size_t j = 0; j < columns; ++j) out += (j ? "," : "") + field(cell_of(table, {i, j}));
    out += "\r\n";
  }
  return out;
}

std::string render_text(const Json& summary, const TableStyle& style) {
  check_summary(summary);
  std::string out;
  if (!summary["complete"].get<bool>()) out += "The run is not complete: values that are still missing show as –.\n\n";
  const std::string headline = summary.value("headline", "");
  if (!headline.empty()) out += printable(headline) + "\n\n";
  const Json tables = summary.value("tables", Json::array());
  std::string highlighted;
  for (const Json& table : tables)
    if (table.value("highlight", false))
      highlighted += (highlighted.empty() ? "" : "\n") + terminal_table(table, style);
  return out + (highlighted.empty() && !tables.empty() ? terminal_table(tables[0], style) : highlighted);
}

}  // namespace moraine::report
