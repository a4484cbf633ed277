"""One self-contained page: its style, and the pieces of HTML that reports use. All text is escaped here."""

import html
import re

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b0568c",
    "#b97a00",
    "#2f8fc7",
    "#8c6d31",
)  # palette.PALETTE, as text on white
DARK = ("#5fb0e8", "#ff8f4d", "#35c79c", "#e9a1ca", "#f0b33c", "#86cff7", "#cfae6b")  # and on black

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #5d666f; --rule: #e1e4e8; --paper: #ffffff; --soft: #f6f7f8;
  --accent: #0b5cad; --warn: #8a4b00; --warn-soft: #fff6e8; @light@ }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --muted: #9aa4ae; --rule: #30363d; --paper: #14171a;
  --soft: #1c2024; --accent: #7ab8f5; --warn: #f0b866; --warn-soft: #2a2116; @dark@ } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 1.0625rem/1.6 Charter, "Bitstream Charter", "Sitka Text", Cambria, "Liberation Serif", Georgia, serif; }
main { max-width: 82rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1, h2, h3, table, figure, .kicker, .facts, nav, pre { font-family: -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "Liberation Sans", system-ui, sans-serif; }
.kicker { margin: 0; color: var(--muted); font-size: .875rem; letter-spacing: .02em; }
h1 { margin: .1rem 0 .4rem; font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.15; letter-spacing: -.015em; }
h2 { margin: 3rem 0 .75rem; padding-top: .6rem; border-top: 1px solid var(--rule); font-size: 1.25rem; }
h3 { margin: 0 0 .2rem; font-size: .95rem; }
p { margin: .5rem 0; max-width: 46rem; }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 1.6rem; padding: 0; list-style: none;
  color: var(--muted); font-size: .875rem; }
.lead { font-size: 1.35rem; line-height: 1.42; max-width: 50rem; margin: .8rem 0; text-wrap: pretty; }
.more { max-width: 46rem; margin: .8rem 0 0; padding-left: 1.1rem; }
.more li { margin: .35rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; border-block: 1px solid var(--ink); }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-size: .82rem; line-height: 1.35;
  font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .5rem .45rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
thead th { vertical-align: bottom; color: var(--muted); font-size: .78rem; }
thead tr:last-child th { border-bottom: 1px solid var(--muted); }
thead th.group { text-align: left; color: var(--ink); font-size: .82rem; padding-bottom: .1rem; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
th:first-child, td:first-child, .left { text-align: left; }
tbody th { position: sticky; left: 0; background: var(--paper); }
td small, th small { display: block; color: var(--muted); font-weight: 400; font-size: .75rem; }
td.wrap { white-space: normal; min-width: 11rem; }
.start { padding-left: 1.1rem; }
.best { font-weight: 700; }
.best small, .best .wrap { font-weight: 400; }
.chip { display: inline-block; width: .65em; height: .65em; margin-right: .5em; border-radius: 50%; }
.note { color: var(--muted); font-size: .875rem; }
.care { margin: 1.6rem 0 0; padding: .8rem 1rem; background: var(--warn-soft); border-left: 3px solid var(--warn);
  max-width: 50rem; }
.care ul { margin: .3rem 0 0; padding-left: 1.1rem; }
.care li { overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(27rem, 100%), 1fr)); gap: 2rem 2.2rem; }
figure { margin: 0; max-width: 42rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { margin-top: .3rem; color: var(--muted); font-size: .84rem; line-height: 1.45; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem 2.5rem; }
.pairs td, .pairs th { text-align: left; padding: .3rem .5rem .3rem 0; white-space: normal; overflow-wrap: anywhere; }
.pairs th { width: 42%; font-weight: 400; color: var(--muted); }
pre { margin: .8rem 0; padding: .8rem 1rem; overflow-x: auto; background: var(--soft); border-radius: 4px; font-size: .85rem;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .9em; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; } .lead { font-size: 1.15rem; } body { font-size: 1rem; } }
@media print { :root { @light@ --ink: #000; --muted: #444; --rule: #ccc; --paper: #fff; --soft: #f6f7f8; --warn-soft: #fff; }
  @page { size: A4; margin: 14mm; } main { max-width: none; padding: 0; } body { font-size: 10pt; }
  h2 { break-after: avoid; margin-top: 1.4rem; } figure, tr, .care { break-inside: avoid; }
  .scroll { overflow: visible; } table { font-size: 6.6pt; } th, td { padding: .3rem .22rem; }
  td small, th small { font-size: 6pt; }
  thead th { font-size: 6.4pt; white-space: normal; } tbody th { position: static; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem; } pre { white-space: pre-wrap; } .start { padding-left: .6rem; } }
"""


def document(title: str, body: str) -> str:
    """Compose a whole page, which refers to nothing outside itself."""
    style = STYLE
    for theme, colours in (("@light@", COLOURS), ("@dark@", DARK)):
        style = style.replace(theme, " ".join(f"--m{i}: {colour};" for i, colour in enumerate(colours)))
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n'


def escape(text: object) -> str:
    """Escape text for HTML, in content or attributes."""
    return html.escape(str(text), quote=True)


def prose(text: object) -> str:
    """Escape text and write true minus signs before numbers."""
    return re.sub(r"(?<![\w-])-(?=\d|inf)", "\u2212", escape(text))


def cell(value: str, *, below: str = "", kind: str = "", tag: str = "td") -> str:
    """Compose a table cell: a value, and a smaller one below it. A lone hyphen means that there is no value."""
    shown = "\u2013" if value == "-" else prose(value)
    return f"<{tag}{attribute(kind)}>{shown}{f'<small>{prose(below)}</small>' if below else ''}</{tag}>"


def attribute(kind: str) -> str:
    """Compose a class attribute, empty for no class."""
    return f' class="{escape(kind.strip())}"' if kind.strip() else ""


def items(texts: list[str], *, kind: str = "") -> str:
    """Compose a list."""
    return f"<ul{attribute(kind)}>\n" + "\n".join(f"<li>{prose(text)}</li>" for text in texts) + "\n</ul>"


def scroll(label: str, table: str) -> str:
    """Put a table into a box that scrolls sideways, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">\n{table}\n</div>'


def facts_table(title: str, facts: dict[str, object]) -> str:
    """Compose a table of names and values."""
    rows = "\n".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items())
    return f"<div>\n<h3>{escape(title)}</h3>\n<table>\n{rows}\n</table>\n</div>"
