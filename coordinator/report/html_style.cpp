#include <string>

#include "coordinator/report/figures.h"

namespace moraine::report {
namespace {

// Series colours keep a CIE Lab distance of at least 17 for normal sight and every dichromacy and a contrast of 4.5 to
// the page and to the text upon them (--on).
constexpr const char* kLight =
    "--page:#ffffff;--panel:#f5f7f9;--ink:#1a1f24;--muted:#586069;--rule:#d5dbe1;--accent:#1b5fd0;--best:#e4edfb;--bad:"
    "#b3261e;"
    "--heat:#0b3d91;--on:#fff;--s0:#1b5fd0;--s1:#d14900;--s2:#07614f;--s3:#b03aa8;--s4:#7a7383;--s5:#4f3f00;--s6:#"
    "2a1f66;";
constexpr const char* kDark =
    "--page:#14171a;--panel:#1c2126;--ink:#e4e8eb;--muted:#9aa4ae;--rule:#343b43;--accent:#58d5ff;--best:#17384a;--bad:"
    "#ff8a80;"
    "--heat:#7cc8ff;--on:#000;--s0:#58d5ff;--s1:#d98d2b;--s2:#17a672;--s3:#dd55b0;--s4:#b4c9c0;--s5:#f0e766;--s6:#"
    "8f8cff;";

constexpr const char* kRules = R"css(
*{box-sizing:border-box}
html{background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans","DejaVu Sans",sans-serif;
-webkit-text-size-adjust:100%;-webkit-print-color-adjust:exact;print-color-adjust:exact}
body{max-width:1128px;margin:0 auto;padding:28px 24px 40px}
header{border-bottom:1px solid var(--rule);padding-bottom:14px}
h1{font-size:30px;line-height:1.2;margin:2px 0 8px;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:20px;margin:36px 0 12px;font-weight:650}
.facts{display:flex;flex-wrap:wrap;gap:4px 22px;margin:0;padding:0;list-style:none;font-size:13px;color:var(--muted)}
.facts b{color:var(--ink);font-weight:600}
.headline{font-size:19px;line-height:1.45;max-width:50em;margin:20px 0 0}
.warning{border-left:4px solid var(--bad);background:var(--panel);padding:8px 14px;margin:18px 0 0}
code{font:.92em ui-monospace,"Liberation Mono","DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
figure{margin:0 0 26px;break-inside:avoid}
figcaption{font-weight:600;margin-bottom:6px}
.unit{font-weight:400;color:var(--muted)}
.note{color:var(--muted);font-size:13px;margin:5px 0 0;max-width:62em}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:6px 32px}
.grid .curve{max-width:640px}
.flow{display:flex;flex-wrap:wrap;gap:6px 40px}
.flow figure{max-width:100%}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 14px 5px 0;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--rule)}
th{font-weight:600;text-wrap:balance}
thead th{color:var(--muted);font-size:13px;border-bottom:1.5px solid var(--muted);vertical-align:bottom}
tbody tr:last-child>*{border-bottom:0}
.num{text-align:right;padding:5px 8px 5px 14px}
td.num{white-space:nowrap}
td.best{font-weight:700;background:var(--best);border-radius:3px}
.highlight table{font-size:16px}
.highlight thead th{font-size:14px}
.highlight figcaption{font-size:16px}
td.share{width:40%;min-width:80px}
.timing th{white-space:nowrap}
.share div{height:10px;border-radius:2px;background:var(--accent);min-width:2px}
details{margin:8px 0 0}
summary{cursor:pointer;color:var(--accent);font-size:14px}
details table{margin-top:8px;font-size:13px}
.timing table{width:100%}
footer{margin-top:40px;padding-top:12px;border-top:1px solid var(--rule);color:var(--muted);font-size:13px}
svg{display:block;max-width:100%;height:auto}
.curve>svg{width:100%}
.timeline .scroll>svg{width:100%;min-width:900px}
svg text{fill:var(--ink);font-size:12px}
svg .tick{fill:var(--muted);font-variant-numeric:tabular-nums}
svg .label{fill:var(--muted)}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .axis{stroke:var(--muted);stroke-width:1}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dash .line{stroke-dasharray:6 4}
.dot .line{stroke-dasharray:1.5 4}
.leader{fill:none;stroke:currentColor;stroke-width:.8;opacity:.55}
.marker{fill:currentColor;stroke:transparent;stroke-width:10}
.hit{fill:transparent;stroke:transparent;stroke-width:6}
.hit:hover{fill:currentColor}
svg g text.name{fill:currentColor;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;margin:0 0 8px;padding:0;list-style:none;font-size:13px}
.legend li{display:inline-flex;align-items:center;gap:6px}
.legend .count{color:var(--muted)}
.cell,.shade{fill:var(--heat)}
.cell{stroke:var(--rule);stroke-width:1}
svg .low,svg .middle{fill:#000}svg .high{fill:#fff}
.bar{rx:2px}
.bar.failed{fill:var(--page);stroke:var(--bad);stroke-width:1.6;stroke-dasharray:4 2}
.bar.reused{fill:var(--page);stroke:var(--muted);stroke-width:1.2}
svg .inside{font-size:11px}
svg .inside.failed{fill:var(--bad)}svg .inside.reused{fill:var(--muted)}
svg line.restart{stroke:var(--bad);stroke-width:1.4;stroke-dasharray:5 4}
svg text.restart{fill:var(--bad);font-size:11px}
)css";

constexpr const char* kPrint = R"css(
@media print{html{font-size:9.5pt}.grid{grid-template-columns:1fr 1fr}.flow{gap:6px 4%}.heatmap{width:46%}body{padding:0;max-width:none}h2{break-after:avoid}.timeline .scroll>svg{min-width:0}.scroll{overflow:visible}}
)css";

}  // namespace

std::string style_sheet() {
  std::string css = std::string(":root{color-scheme:light dark;") + kLight + "}\n" + (kRules + 1);
  for (size_t i = 0; i < kNumSeriesColors; ++i) {
    const std::string n = std::to_string(i);
    css += ".s" + n + "{color:var(--s" + n + ")}.b" + n + " .done{fill:var(--s" + n + ")}\n";
  }
  css += "svg .inside.done{fill:var(--on)}\n@media screen and (prefers-color-scheme:dark){:root{";
  return css + kDark + "}svg .low{fill:#fff}svg .high{fill:#000}}\n" + (kPrint + 1);
}

}  // namespace moraine::report
