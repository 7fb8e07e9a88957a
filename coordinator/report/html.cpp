#include "coordinator/report/html.h"

#include <algorithm>

#include <fmt/format.h>

#include "coordinator/report/axis.h"
#include "coordinator/report/figures.h"
#include "coordinator/report/summary_check.h"
#include "coordinator/report/table.h"
#include "coordinator/report/text.h"

namespace moraine::report {
namespace {

using core::Json;

const Json& list_of(const Json& summary, const char* key) {
  static const Json kNone = Json::array();
  const auto it = summary.find(key);
  return it == summary.end() ? kNone : *it;
}

std::string section(const char* title, const char* css_class, const std::string& body) {
  return body.empty() ? ""
                      : fmt::format("<section>\n<h2>{}</h2>\n<div class=\"{}\">\n{}</div>\n</section>\n", title,
                                    css_class, body);
}

std::string draw_each(const Json& parts, std::string (*draw)(const Json&)) {
  std::string html;
  for (const Json& part : parts) html += draw(part);
  return html;
}

std::string draw_timing(const Json& timing) {
  if (timing.empty()) return "";
  double longest = 1e-9, total = 0;
  for (const Json& entry : timing) {
    longest = std::max(longest, entry["seconds"].get<double>());
    total += entry["seconds"].get<double>();
  }
  std::string html = "<table>\n";
  const auto row = [&](const std::string& label, double seconds, const std::string& bar) {
    html += fmt::format("<tr><th scope=\"row\">{}</th><td class=\"share\">{}</td><td class=\"num\">{}</td></tr>\n",
                        escape_html(label), bar, format_duration(seconds));
  };
  for (const Json& entry : timing)
    row(entry["label"], entry["seconds"],
        fmt::format("<div style=\"width:{:.1f}%\"></div>", 100 * entry["seconds"].get<double>() / longest));
  row("sum", total, "");
  return figure("timing", {{"title", "Where the time went"}}, html + "</table>\n");
}

std::string draw_versions(const Json& versions) {
  if (versions.empty()) return "";
  Json rows = Json::array();
  for (const auto& [part, version] : versions.items()) rows.push_back({{"part", part}, {"version", version}});
  return draw_table(plain_table("Versions", {"part", "version"}, rows));
}

std::string draw_recipe(const Json& recipe) {
  if (recipe.empty()) return "";
  const auto defaults =
      std::count_if(recipe.begin(), recipe.end(), [](const Json& item) { return item["origin"] == "default"; });
  Json table = {{"title", ""}, {"rows", recipe}};
  table["columns"] = {{{"key", "path"}, {"label", "key"}},
                      {{"key", "value"}, {"label", "value"}},
                      {{"key", "origin"}, {"label", "from"}}};
  return fmt::format("<details><summary>{} values, {} of them defaults</summary>\n{}</details>\n", recipe.size(),
                     defaults, draw_table(table));
}

std::string header(const Json& summary) {
  const std::string hash = summary.value("hash", ""), headline = summary.value("headline", "");
  const bool complete = summary["complete"];
  std::string html =
      fmt::format("<header>\n<h1>{}</h1>\n<ul class=\"facts\"><li>method <b>{}</b></li><li>{}</li>",
                  escape_html(summary["name"].get<std::string>()), escape_html(summary["method"].get<std::string>()),
                  complete ? "complete" : "not complete");
  if (!hash.empty()) html += fmt::format("<li>merged artefact <code>{}</code></li>", escape_html(hash));
  html += "</ul>\n</header>\n";
  if (!complete)
    html +=
        "<p class=\"warning\">This run is not complete: what follows covers its finished units only. Running the same "
        "command again continues it.</p>\n";
  if (!headline.empty()) html += "<p class=\"headline\">" + escape_html(headline) + "</p>\n";
  return html;
}

}  // namespace

std::string figure(std::string_view css_class, const Json& part, const std::string& body,
                   const std::string& extra_note) {
  const std::string title = part["title"], unit = part.value("unit", "");
  std::string html = fmt::format("<figure class=\"{}\">\n", css_class);
  if (!title.empty())
    html += fmt::format("<figcaption>{}{}</figcaption>\n", escape_html(title),
                        unit.empty() ? "" : " <span class=\"unit\">" + escape_html(unit) + "</span>");
  html += body;
  std::vector<std::string> notes = part.value("notes", std::vector<std::string>());
  if (!extra_note.empty()) notes.insert(notes.begin(), extra_note);
  for (const auto& note : notes) html += "<p class=\"note\">" + escape_html(note) + "</p>\n";
  return html + "</figure>\n";
}

std::string draw_table(const Json& table) {
  const TableText text = lay_out(table);
  std::string html = "<div class=\"scroll\"><table>\n<thead><tr>";
  for (size_t j = 0; j < text.labels.size(); ++j)
    html += fmt::format(
        "<th scope=\"col\"{}>{}{}</th>", text.numeric[j] ? " class=\"num\"" : "", escape_html(text.labels[j]),
        text.units[j].empty() ? "" : "<br><span class=\"unit\">" + escape_html(text.units[j]) + "</span>");
  html += "</tr></thead>\n<tbody>\n";
  for (size_t i = 0; i < text.cells.size(); ++i) {
    html += "<tr>";
    for (size_t j = 0; j < text.cells[i].size(); ++j) {
      const std::string css_class = std::string(text.numeric[j] ? "num" : "") + (text.best[i][j] ? " best" : "");
      html += fmt::format("<{0}{1}>{2}</{0}>", j == 0 ? "th" : "td",
                          css_class.empty() ? "" : " class=\"" + css_class + "\"", escape_html(text.cells[i][j]));
    }
    html += "</tr>\n";
  }
  html += "</tbody></table></div>\n";
  Json caption = {{"title", table["title"]}, {"unit", text.unit}, {"notes", table.value("notes", Json::array())}};
  return figure(table.value("highlight", false) ? "table highlight" : "table", caption, html,
                text.legend.empty() ? "" : "Bold: " + text.legend + ".");
}

std::string render_html(const Json& summary) {
  check_summary(summary);
  Json tables = list_of(summary, "tables");
  std::stable_partition(tables.begin(), tables.end(),
                        [](const Json& table) { return table.value("highlight", false); });
  const bool has_units = summary.contains("timeline") && !summary["timeline"]["units"].empty();
  return fmt::format(
             "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" "
             "content=\"width=device-width, initial-scale=1\">\n<title>{} - Moraine "
             "report</title>\n<style>\n{}</style>\n</head>\n<body>\n",
             escape_html(summary["name"].get<std::string>()), style_sheet()) +
         header(summary) + section("Results", "flow", draw_each(tables, draw_table)) +
         section("Curves", "grid", draw_each(list_of(summary, "curves"), draw_curve)) +
         section("Matrices", "flow", draw_each(list_of(summary, "heatmaps"), draw_heatmap)) +
         section("Time line", "whole", has_units ? draw_timeline(summary["timeline"]) : "") +
         section("Time and versions", "grid",
                 draw_timing(list_of(summary, "timing")) + draw_versions(list_of(summary, "versions"))) +
         section("Resolved recipe", "whole", draw_recipe(list_of(summary, "recipe"))) +
         "<footer>Written by Moraine from summary.json, format 1.</footer>\n</body>\n</html>\n";
}

}  // namespace moraine::report
