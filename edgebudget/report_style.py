"""How the report looks: one style sheet, light and dark, on screen and on paper."""

CSS = """
:root { color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --line: #dfe3e8; --ink: #1b2430; --soft: #5d6878;
  --accent: #1f5fbf; --good: #1a7f4b; --good-soft: #e3f4ea; --bad: #b42318; --bad-soft: #fdeae8;
  --int8: #1f8f8a; --int16: #7a5bc7; --float: #d08a1d; --other: #8a94a3; --note: #8a5a00;
  --note-soft: #fdf3dc; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #12161c; --card: #1a2029; --line: #2d3643; --ink: #e6eaf0; --soft: #9aa6b5;
  --accent: #78a9ff; --good: #4cc38a; --good-soft: #14301f; --bad: #ff8076; --bad-soft: #3a1715;
  --int8: #3cb8b2; --int16: #a58bf0; --float: #e3a545; --other: #77828f; --note: #e3b45c;
  --note-soft: #33280f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .1rem 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .5rem; }
p { margin: .4rem 0; }
.kind { color: var(--soft); font-size: .8rem; letter-spacing: .08em; text-transform: uppercase;
  margin: 0; }
.soft { color: var(--soft); }
.verdict { margin: 1.3rem 0 0; padding: .95rem 1.2rem; border-radius: .6rem;
  border-left: .35rem solid; }
.verdict strong { font-size: 1.15rem; display: block; }
.verdict.good { background: var(--good-soft); border-color: var(--good); }
.verdict.good strong { color: var(--good); }
.verdict.bad { background: var(--bad-soft); border-color: var(--bad); }
.verdict.bad strong { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.4rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.4; font-weight: 650;
  white-space: nowrap; }
.tile span { color: var(--soft); font-size: .85rem; display: block; line-height: 1.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; }
th, td { padding: .42rem .7rem .42rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small, li small { color: var(--soft); display: block; font-size: .82rem; line-height: 1.4; }
code, .hash { font: .85em ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.badge { display: inline-block; border-radius: 1rem; padding: .05rem .6rem; font-size: .78rem;
  font-weight: 600; white-space: nowrap; background: var(--card); border: 1px solid var(--line); }
.badge.measured, .badge.yes { color: var(--good); background: var(--good-soft);
  border-color: transparent; }
.badge.simulated { color: var(--accent); }
.badge.modelled { color: var(--note); background: var(--note-soft); border-color: transparent; }
.badge.unknown, .badge.no { color: var(--bad); background: var(--bad-soft);
  border-color: transparent; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); }
.step { border: 1px solid var(--line); border-radius: .6rem; padding: .7rem 1rem; margin: .7rem 0; }
.step h3 { margin: 0; font-size: 1rem; display: flex; gap: .7rem; align-items: baseline;
  flex-wrap: wrap; }
.step h3 span { font-weight: 400; color: var(--soft); font-size: .88rem; }
.step.undone h3 code { text-decoration: line-through; }
ul { margin: .4rem 0; padding-left: 1.2rem; }
.legend { display: flex; gap: 1.2rem; font-size: .85rem; color: var(--soft); }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem;
  margin-right: .4rem; vertical-align: -.05rem; }
.key.int8 { background: var(--int8); } .key.int16 { background: var(--int16); }
.key.float { background: var(--float); } .key.other { background: var(--other); }
svg.plot { width: 100%; height: auto; display: block; overflow: visible; margin: .6rem 0; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.title { fill: var(--ink); } svg text.name { font-size: 11.5px;
  paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
svg text.strong { fill: var(--accent); font-weight: 650; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg line.limit { stroke: var(--bad); stroke-dasharray: 5 4; } svg text.limit { fill: var(--bad); }
svg .forbidden { fill: var(--bad); opacity: .06; }
svg .front { fill: none; stroke: var(--accent); opacity: .35; stroke-width: 1.5; }
svg .point { fill: var(--paper); stroke: var(--accent); stroke-width: 1.8; }
svg .chosen { fill: var(--accent); stroke: var(--paper); stroke-width: 2; }
svg .unknown { fill: var(--other); }
svg .int8 { fill: var(--int8); } svg .int16 { fill: var(--int16); }
svg .float { fill: var(--float); } svg .other { fill: var(--other); }
svg .good { fill: var(--good); } svg .bad { fill: var(--bad); }
svg .roof { fill: none; stroke: var(--bad); stroke-width: 1.8; }
svg .flame { fill: var(--accent); opacity: .8; } svg .odd { opacity: .55; }
svg text.inside { fill: var(--paper); font-size: 11px; pointer-events: none; }
svg .track { fill: var(--line); } svg .mark { fill: var(--ink); }
svg.meter { width: 7rem; height: .85rem; overflow: visible; display: block;
  margin: .35rem 0 0 auto; }
@media print { main { max-width: none; padding: 0; } .step, tr { break-inside: avoid; } }
"""
