"""The style sheet of all pages: light and dark, tables and plots that scroll in a box of their own."""

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2226; --muted: #858c92; --line: #d9dcdf;
  --accent: #1f6fb2; --other: #b3641a; --soft: #f1f3f4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181b; --ink: #e4e7ea; --muted: #8d959c; --line: #343a40; --accent: #5fa8e6; --other: #e39a4f;
    --soft: #1e2226; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0; overflow-wrap: anywhere; }
h3 + p { margin: 0 0 .5rem; }
p, li, figcaption, dd { overflow-wrap: anywhere; }
.when, figcaption, .note { color: var(--muted); font-size: .875rem; }
@media (prefers-color-scheme: light) { .when, figcaption, .note { color: #5c6369; } }
.lead { font-size: 1.15rem; max-width: 60rem; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--soft); vertical-align: bottom; white-space: normal; min-width: 5.5rem; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
tr.student th { color: var(--accent); }
.long tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; max-width: 16rem; }
.words th, .words td { white-space: normal; text-align: left; overflow-wrap: anywhere; min-width: 8rem; }
summary { cursor: pointer; margin: .75rem 0; }
.legend + .legend { margin-top: -1rem; }
.plot { padding: .75rem; }
.box + .box { margin-top: .75rem; }
.plot svg { display: block; width: 100%; height: auto; }
.slices { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; }
figure { margin: 0; }
.slices img { display: block; width: 100%; height: auto; background: #000; border-radius: 4px;
  image-rendering: pixelated; }
.legend:empty { display: none; }
.legend { list-style: none; padding: 0; margin: .5rem 0 1.5rem; display: flex; flex-wrap: wrap; gap: .25rem 1rem;
  font-size: .875rem; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; font-size: .875rem;
  margin: 0; }
dt { color: var(--muted); }
@media (prefers-color-scheme: light) { dt { color: #5c6369; } }
dd { margin: 0; min-width: 0; }
pre { background: var(--soft); padding: .75rem; border-radius: 6px; font-size: .8125rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.odd { color: var(--other); font-weight: 600; }
article img { max-width: 100%; height: auto; border-radius: 4px; }
"""
