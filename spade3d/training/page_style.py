"""How a report looks: one style sheet for screens by day and by night, and for paper."""

STYLE = """
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1c2429; --soft: #5b676e; --line: #e2dfd7; --accent: #0d6b72;
  --tint: #e3eff0; --warn: #9a4a00; --warn-tint: #fdf0e1; --good: #22693c; --good-tint: #e7f3ea;
  --s0: #0d6b72; --s1: #c2571a; --s2: #5a55a8; --s3: #a8325f; --s4: #6b7a12; --s5: #86632f;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181b; --card: #1b2125; --ink: #e6e8e6; --soft: #98a4aa; --line: #2e373c; --accent: #6cc4c9;
  --tint: #1d3437; --warn: #f0b070; --warn-tint: #33271a; --good: #8fd0a4; --good-tint: #1b2e22;
  --s0: #6cc4c9; --s1: #ef9b62; --s2: #a9a5ee; --s3: #ee8fb2; --s4: #bccb5f; --s5: #d3b07c;
} }
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }
body {
  margin: 0; font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 64rem; margin: 0 auto; padding: 3.5rem 1.5rem 1rem; }
h1, h2, .figure b { font-family: Charter, "Iowan Old Style", "Source Serif 4", Georgia, "DejaVu Serif", serif; }
h1 { font-size: 2.3rem; line-height: 1.15; font-weight: 600; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; line-height: 1.25; font-weight: 600; margin: 0 0 .4rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.75rem 0 .5rem; overflow-wrap: anywhere; }
h3 small { font-weight: 400; color: var(--soft); margin-left: .5rem; }
p { margin: 0 0 .9rem; max-width: 44rem; }
a { color: var(--accent); }
.kind { color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .09em; text-transform: uppercase;
  margin-bottom: .4rem; }
.verdict { font-size: 1.2rem; line-height: 1.5; max-width: 46rem; }
.lead { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: 1.75rem 0 0; padding: .75rem 0;
  border: solid var(--line); border-width: 1px 0; font-size: .92rem; }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
section { margin: 3.25rem 0 0; scroll-margin-top: 1rem; }
footer { max-width: 64rem; margin: 3.5rem auto 0; padding: 1.25rem 1.5rem 3rem; color: var(--soft); font-size: .85rem;
  overflow-wrap: anywhere; }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem;
  margin: 1.75rem 0 1rem; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; }
.figure span, .figure small { display: block; color: var(--soft); font-size: .85rem; line-height: 1.45; }
.figure b { display: block; font-size: 2rem; line-height: 1.3; font-weight: 600; }

.callout { border-left: 4px solid var(--accent); background: var(--tint); border-radius: 0 8px 8px 0;
  padding: .7rem 1rem; max-width: none; overflow-wrap: anywhere; }
.callout strong { margin-right: .35rem; }
.callout.warning { border-color: var(--warn); background: var(--warn-tint); } .warning strong { color: var(--warn); }
.callout.good { border-color: var(--good); background: var(--good-tint); } .good strong { color: var(--good); }

.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .9rem 1.5rem;
  margin: 1rem 0; }
.facts dt { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.facts dd { margin: 0; overflow-wrap: anywhere; }

.scroll { overflow-x: auto; margin: 1rem 0 1.5rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; line-height: 1.4; }
caption { caption-side: bottom; text-align: left; color: var(--soft); font-size: .85rem; padding-top: .6rem; }
th, td { text-align: left; padding: .42rem .8rem .42rem 0; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; vertical-align: bottom; }
td { overflow-wrap: break-word; min-width: 4.5rem; max-width: 22rem; }
.right { text-align: right; padding: .42rem .6rem; overflow-wrap: normal; white-space: nowrap; }
.right + td:not(.right), .right + th:not(.right) { padding-left: 1.4rem; }
.bar { background: linear-gradient(var(--tint), var(--tint)) no-repeat right center
  / calc(var(--share) * 100%) calc(100% - 6px); }

details { margin: 1rem 0; } summary { cursor: pointer; color: var(--accent); padding: .25rem 0; }
pre { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; padding: 1rem; overflow-x: auto; }
ul.names { columns: 12rem auto; column-gap: 1.5rem; padding: 0; margin: .5rem 0 1rem; list-style: none;
  font-size: .9rem; }
ul.names li { overflow-wrap: anywhere; break-inside: avoid; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1.5rem 2rem; }
.chart { margin: 1rem 0; min-width: 0; } .chart svg { display: block; width: 100%; height: auto; overflow: visible; }
.wide { overflow-x: auto; } .wide svg { min-width: 36rem; }
figcaption { color: var(--soft); font-size: .88rem; line-height: 1.45; }
.chart figcaption { color: var(--ink); font-weight: 600; margin-bottom: .35rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .88rem; margin: .35rem 0; }
.key span::before { content: ""; display: inline-block; width: .8em; height: .8em; border-radius: 3px;
  margin-right: .45em; background: var(--colour); vertical-align: -.05em; }
svg text { font-size: 12px; fill: var(--soft); font-family: inherit; }
svg text.name { fill: var(--ink); font-size: 13px; }
.grid { stroke: var(--line); stroke-width: 1; } .zero { stroke: var(--ink); stroke-width: 1; opacity: .55; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; } .range { opacity: .16; }
.dot { fill: var(--s0); opacity: .3; } .mean { fill: var(--s0); } .interval { stroke: var(--s0); stroke-width: 2.5; }
.unclear .mean { fill: var(--card); stroke: var(--soft); stroke-width: 2; } .unclear .interval { stroke: var(--soft); }
.unclear .dot { fill: var(--soft); }

.slices { display: grid; gap: .5rem; grid-template-columns: repeat(var(--across), minmax(0, 1fr)); margin: .5rem 0; }
.slices figure { margin: 0; min-width: 0; } .slices img, .slices svg { display: block; width: 100%; height: auto;
  max-height: 22rem; object-fit: contain; border-radius: 5px; }
.slices figcaption { text-align: center; padding-top: .2rem; font-size: .82rem; }
svg text.match { font-weight: 700; fill: #fff; paint-order: stroke; stroke: #000; stroke-width: 3px; }

@media (max-width: 40rem) { main { padding-top: 2rem; } h1 { font-size: 1.8rem; } .slices { gap: .25rem; }
  .slices figcaption { font-size: .7rem; } }
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --accent: #0d6b72; --tint: #e6eeee;
    --warn: #7a3a00; --warn-tint: #fff; --good: #1d5a33; --good-tint: #fff; --s0: #0d6b72; --s1: #b04a10;
    --s2: #4a4598; --s3: #98224f; --s4: #5b6a02; --s5: #76531f; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } nav, summary { display: none; }
  section { margin-top: 2rem; } h2, h3 { break-after: avoid; }
  .chart, .case, tr, .callout, .figures { break-inside: avoid; }
  .scroll, .wide { overflow: visible; } .wide svg { min-width: 0; } .slices img { max-height: 11rem; }
}
"""
