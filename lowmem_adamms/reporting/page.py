"""A page of ours: its frame, its style, the one script, which filters a table, and its writing."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputError
from .markup import plain

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

SCRIPT = """
(function () {
  var box = document.getElementById("filter");
  if (!box) return;
  var rows = document.querySelectorAll("table.answers tbody tr");
  box.hidden = false;
  box.querySelector("input").addEventListener("input", function (event) {
    var wanted = event.target.value.toLowerCase();
    rows.forEach(function (row) {
      row.hidden = row.textContent.toLowerCase().indexOf(wanted) < 0;
    });
  });
})();
"""

STYLE = """\
:root {
  color-scheme: light;
  --page: #ffffff; --ink: #1b1f24; --muted: #59636e; --rule: #dde1e6; --soft: #f4f6f8;
  --bar: #e3e8ee; --line: #8a95a1; --accent: #0a5ca8; --accent-soft: #e6f0fa;
  --warn: #9a3f00; --code: #7a2e6b; --code-soft: #f7ebf4;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --page: #14171b; --ink: #e3e7eb; --muted: #9aa5b1; --rule: #2d333a; --soft: #1b1f24;
    --bar: #29303a; --line: #76818d; --accent: #6db5f7; --accent-soft: #16304a;
    --warn: #f2a160; --code: #e2a3d3; --code-soft: #37213a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font: 0.875rem/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 1.75rem 2rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; font-weight: 650; margin: 0 0 0.6rem; }
section { margin-top: 2.25rem; }
p, ul, figure, dl, dd { margin: 0; padding: 0; }
ul { list-style: none; }
header p { margin-bottom: 0.2rem; }
.muted, .none { color: var(--muted); }
.none { font-style: italic; }
.code { font: 0.75em/1 ui-monospace, "DejaVu Sans Mono", monospace; color: var(--code);
  background: var(--code-soft); border-radius: 3px; padding: 0.1em 0.3em; margin: 0 0.1em;
  unicode-bidi: isolate; direction: ltr; white-space: nowrap; }

.choice { display: flex; gap: 1.5rem; align-items: flex-start; margin-top: 1.25rem;
  border: 1px solid var(--rule); border-left: 4px solid var(--accent); border-radius: 4px;
  padding: 1rem 1.25rem; }
.choice .alpha { flex: none; color: var(--accent); text-align: center; }
.choice .alpha span { display: block; font-size: 0.8rem; color: var(--muted); }
.choice .alpha b { font-size: 2.6rem; line-height: 1.05; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.choice .lead { font-size: 1.05rem; font-weight: 600; margin-bottom: 0.3rem; }
.choice li { overflow-wrap: anywhere; }
.choice li.note::before { content: "Note: "; color: var(--warn); font-weight: 600; }

.pair { display: grid; grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr);
  gap: 2rem; align-items: start; }
.pair figure { position: sticky; top: 1rem; }
svg { display: block; width: 100%; height: auto; max-width: 52rem; }
svg text { font-size: 14px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .title, svg .why, svg .diff { fill: var(--muted); }
svg .low { stroke: var(--page); stroke-width: 4px; paint-order: stroke; stroke-linejoin: round; }
svg text.chosen { fill: var(--accent); font-weight: 700; }
svg text.warn { fill: var(--warn); font-weight: 600; }
svg .grid { stroke: var(--rule); }
svg .band { fill: var(--accent-soft); }
svg .bar { fill: var(--bar); }
svg .bar.fine { stroke: var(--line); }
svg .end { stroke: var(--line); stroke-dasharray: 3 4; }
svg .line { fill: none; stroke: var(--line); stroke-width: 1.5; }
svg .whisker { fill: none; stroke: var(--ink); stroke-width: 1.5; }
svg .point { fill: var(--ink); stroke: var(--page); stroke-width: 1.5; }
svg .point.chosen { fill: var(--accent); }
svg .point.tie { stroke: var(--accent); stroke-width: 2.5; }
svg .point.earlier { fill: var(--page); stroke: var(--ink); }
svg .point.degenerate { fill: var(--page); stroke: var(--warn); stroke-width: 2.5; }
figcaption { font-size: 0.8rem; color: var(--muted); margin-top: 0.4rem; display: flex;
  flex-wrap: wrap; gap: 0.1rem 1.2rem; }
.key { display: inline-block; vertical-align: middle; margin: 0 0.4em 0.15em 0; }
.key.point { width: 9px; height: 9px; border-radius: 50%; background: var(--ink); }
.key.earlier { box-sizing: border-box; background: none; border: 1.5px solid var(--ink); }
.key.whisker { width: 2px; height: 13px; background: var(--ink); }
.key.bar { width: 14px; height: 10px; background: var(--bar); }
.key.cross { color: var(--warn); font-weight: 700; }

table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: 0.8rem; padding-bottom: 0.3rem; }
th, td { border-bottom: 1px solid var(--rule); padding: 0.4rem 0.6rem; vertical-align: top;
  text-align: left; font-weight: 400; }
thead th { color: var(--muted); font-size: 0.8rem; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; }
.numbers th, .numbers td { text-align: right; white-space: nowrap; }
.numbers thead th { white-space: normal; line-height: 1.25; }
.numbers th:first-child { text-align: left; padding-left: 0.5rem; font-weight: 600; }
tr.chosen > * { background: var(--accent-soft); }
tr.total > * { border-top: 1px solid var(--line); border-bottom: 0; font-weight: 600; }
td.warn { color: var(--warn); font-weight: 600; }
.tag { font-size: 0.75rem; font-weight: 400; color: var(--accent); }
.meter { display: inline-block; width: 3rem; height: 0.5rem; margin-left: 0.3rem;
  background: linear-gradient(var(--accent), var(--accent)) no-repeat var(--bar);
  background-size: calc(100% * var(--share)) 100%; }

.bar-above { display: flex; gap: 1.5rem; justify-content: space-between; align-items: baseline;
  flex-wrap: wrap; margin-bottom: 0.5rem; }
input { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line);
  border-radius: 4px; padding: 0.2rem 0.5rem; margin-left: 0.3rem; }
.answers { table-layout: fixed; }
.answers col.asked { width: 26%; }
.answers caption { position: absolute; width: 1px; height: 1px; overflow: hidden; padding: 0;
  clip-path: inset(50%); }
.answers thead th { position: sticky; top: 0; background: var(--page); }
.answers thead th.chosen { color: var(--accent); font-weight: 700; }
.answers td { border-left: 1px solid var(--rule); }
.answers td.chosen { background: var(--accent-soft); box-shadow: inset 2px 0 var(--accent); }
.answers p, .steady p, .long { overflow-wrap: anywhere; white-space: pre-wrap; }
[dir="auto"] { text-align: start; }
.range { font-size: 0.75rem; color: var(--muted); }
td.chosen .range { color: var(--accent); font-weight: 600; }
.asked { display: flex; gap: 0.7rem; }
col.asked { display: table-column; }
.asked .muted, .steady th .muted { font-size: 0.75rem; }
.images { display: flex; flex-direction: column; gap: 0.3rem; flex: none; width: 96px; }
.images:empty { display: none; }
.images img { display: block; max-width: 96px; height: auto; border-radius: 3px; }
.file { font-size: 0.75rem; color: var(--muted); overflow-wrap: anywhere; }
summary { cursor: pointer; }
.long summary { list-style: none; }
.long summary::-webkit-details-marker { display: none; }
.long summary::after { content: " more"; color: var(--accent); font-size: 0.8rem; }
.long[open] summary::after { content: "less"; }
.long[open] summary span { display: none; }
details.steady { margin-top: 1rem; }
details.steady > summary { font-weight: 600; }
table.steady { margin-top: 0.6rem; table-layout: fixed; }
table.steady caption { display: none; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  column-gap: 2.5rem; }
dl { display: grid; grid-template-columns: fit-content(14rem) minmax(0, 1fr); }
dt, dd { border-bottom: 1px solid var(--rule); padding: 0.3rem 0; overflow-wrap: anywhere; }
dt { color: var(--muted); padding-right: 1.5rem; }
dd { white-space: pre-wrap; }

.pair.stacked { grid-template-columns: minmax(0, 1fr); }
.pair.stacked figure { position: static; }
@media (max-width: 60rem) {
  .pair { grid-template-columns: minmax(0, 1fr); }
  .pair figure { position: static; }
}
@media (max-width: 36rem) {
  main { padding: 1rem 1rem 3rem; }
  .choice { gap: 1rem; padding: 0.8rem 0.9rem; }
  svg text { font-size: 21px; }
  svg .tight { display: none; }
  .numbers { font-size: 0.78rem; }
  .numbers thead th { font-size: 0.7rem; }
  .numbers th, .numbers td { padding: 0.35rem 0.25rem; }
  .numbers .tag { display: block; }
  .meter { display: none; }
}
@media print {
  html { font-size: 9pt; }
  body { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  svg { max-width: 36rem; }
  main { max-width: none; padding: 0; }
  tr, figure, .choice { break-inside: avoid; }
  #filter { display: none; }
  .answers thead th { position: static; }
}
"""

# With many alphas, or little room, a prompt's answers go below each other
STACKED = """
.answers, .answers tbody, .answers tr, .answers tbody th, .answers td { display: block; }
.answers thead, .answers colgroup { display: none; }
.answers tr { border-bottom: 1px solid var(--line); padding: 0.6rem 0; }
.answers tr[hidden] { display: none; }
.answers tbody th, .answers td { border: 0; padding: 0.25rem 0.5rem; }
.answers td { display: grid; grid-template-columns: 4.2rem minmax(0, 1fr); gap: 0.5rem; }
.answers .range { padding-top: 0.1rem; }
"""


def page(title: str, body: Iterable[str], *, style: str = "", script: str = "") -> str:
    """The whole page; body and style are finished, the title is escaped here.

    style: what the page needs besides STYLE. script: the only one that may run, even if a string
    should ever get past the escaping.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return PAGE.format(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        title=plain(title),
        style=STYLE + style,
        body="\n".join(body),
        script=script,
    )


def write(path: Path, page: str) -> None:
    """Put `page` at `path` as UTF-8, whole or not at all. OutputError if that cannot be done."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{path}: cannot write the report: {reason}; choose another") from error
