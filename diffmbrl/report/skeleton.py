"""The page that every job's report fills in: heading, lead, cautions, tables, figures, repetition, provenance.

A report of a job is one module with two functions, `contents(run) -> Contents` and `text(run) -> str` for the terminal,
and one row of `report.REPORTS`.
"""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffmbrl.render import page
from diffmbrl.render.page import escape, prose
from diffmbrl.report import gallery

Record = dict[str, Any]


class RunData(NamedTuple):
    """The files of a run, read.

    Args:
        config: `config.json`.
        provenance: `provenance.json`, empty if it is missing.
        records: The lines of `metrics.jsonl`.
        remarks: Sentences on damage, on notes of the run and on its resumptions.
        figures: The folder in which figures are drawn.
    """

    config: Record
    provenance: Record
    records: list[Record]
    remarks: list[str]
    figures: Path

    def of_kind(self, kind: str) -> list[Record]:
        """Return the records of one kind, in order."""
        return of_kind(self.records, kind)


class Contents(NamedTuple):
    """Contents of one run's page, in the order of the page.

    Args:
        lead: Sentences on the result, the headline first.
        note: A remark under them, empty for none.
        cautions: Sentences on what limits the result, besides the run's own remarks.
        tables: Title and HTML of each section before the figures.
        pictures: Figures; those of one group are one section.
        appendix: Title and HTML of each section after the figures.
        heading: The heading of the page; the task if None.
        kind: The kind of run, after the program's name; the job if None.
        facts: Configuration to show instead of the run's, None for the run's.
    """

    lead: Sequence[str]
    note: str = ""
    cautions: Sequence[str] = ()
    tables: Sequence[tuple[str, str]] = ()
    pictures: Sequence[gallery.Picture] = ()
    appendix: Sequence[tuple[str, str]] = ()
    heading: str | None = None
    kind: str | None = None
    facts: Record | None = None


def compose_page(run: RunData, contents: Contents) -> str:
    """Compose the whole page of a run.

    Args:
        run: The files of the run.
        contents: What its job's report says.

    Returns: one HTML document that refers to nothing outside itself.
    """
    config = run.config if contents.facts is None else contents.facts
    heading = str(config.get("task", "run")) if contents.heading is None else contents.heading
    job = str(config.get("job", "run"))
    first, *rest = contents.lead
    parts = [header(heading, contents.kind or job, config, run.provenance), f'<p class="lead">{prose(first)}</p>']
    parts += [page.items(rest, kind="more")] if rest else []
    parts += [note(contents.note)] if contents.note else []
    if cautions := [*run.remarks, *contents.cautions, *_uncommitted(run.provenance)]:
        parts.append(f'<aside class="care">\n<h3>To bear in mind</h3>\n{page.items(cautions)}\n</aside>')
    sections = [*contents.tables, *_figures(contents.pictures), *contents.appendix]
    sections += [("To repeat it", reproduce(config, run.provenance))]
    sections += [("Configuration and provenance", facts(config, run.provenance))]
    parts += [f"<h2>{escape(title)}</h2>\n{body}" for title, body in sections]
    return page.document(f"{heading} \u00b7 {job}", "\n".join(parts))


def table(label: str, head: str, lines: Iterable[str], remark: str = "") -> str:
    """Compose a table that scrolls sideways by itself, with a note below.

    Args:
        label: Its name, for readers that do not see it.
        head: HTML of its head: one or more `tr` elements.
        lines: HTML of its rows, `tr` elements.
        remark: Text of the note, empty for none.

    Returns: HTML.
    """
    shown = f"<table>\n<thead>{head}</thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody>\n</table>"
    return page.scroll(label, shown) + (note(remark) if remark else "")


def columns(names: Iterable[str], *, left: str = "") -> str:
    """Compose the one row of a table's head; the column named `left` is aligned to the left."""
    cells = (f"<th{page.attribute('left' if name == left else '')}>{escape(name)}</th>" for name in names)
    return f"<tr>{''.join(cells)}</tr>"


def note(text: str) -> str:
    """Compose a small paragraph."""
    return f'<p class="note">{prose(text)}</p>'


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """Return the records of one kind, in order."""
    return [record for record in records if record["kind"] == kind]


def _figures(pictures: Sequence[gallery.Picture]) -> list[tuple[str, str]]:
    groups = dict.fromkeys(picture.group for picture in pictures)
    shown = {group: "\n".join(figure(x) for x in pictures if x.group == group) for group in groups}
    return [(group, f'<div class="figures">\n{body}\n</div>') for group, body in shown.items()]


def _uncommitted(provenance: Record) -> list[str]:
    dirty = (provenance.get("git") or {}).get("dirty")
    return ["The code had changes that are not in the commit."] if dirty else []


def header(heading: str, job: str, config: Record, provenance: Record) -> str:
    """Compose the heading, the kind of run above it and the most important facts below it."""
    device = provenance.get("device") or {}
    git = provenance.get("git") or {}
    facts = [f"{name} {config[name]}" for name in ("horizon", "seeds", "starts") if config.get(name) is not None]
    facts += [f"{device.get('count')} \u00d7 {device.get('kind')}"] if device else []
    facts += [("float64" if provenance["x64"] else "float32")] if "x64" in provenance else []
    facts += [f"commit {git['commit'][:9]}{' (modified)' if git.get('dirty') else ''}"] if git.get("commit") else []
    facts += [str(provenance["time"])[:10]] if provenance.get("time") else []
    count = len(resumed(provenance))
    facts += [f"resumed {'once' if count == 1 else f'{count} times'}"] if count else []
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f'<p class="kicker">diffmbrl {escape(job)}</p>\n<h1>{escape(heading)}</h1>\n<ul class="facts">{listed}</ul>'


def resumed(provenance: Record) -> list[Record]:
    """Return the entries that `runs.session` wrote at each resumption."""
    entries = provenance.get("resumed")
    whole = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [{"remarks": [], **entry} for entry in whole if isinstance(entry.get("remarks", []), list)]


def figure(picture: gallery.Picture) -> str:
    """Compose a figure with its title and caption."""
    caption = f"<figcaption>{prose(picture.caption)}</figcaption>"
    return f"<figure>\n<h3>{escape(picture.title)}</h3>\n{picture.svg}\n{caption}\n</figure>"


def reproduce(config: Record, provenance: Record) -> str:
    """Compose the commands that repeat the run and its report."""
    git, versions = provenance.get("git") or {}, provenance.get("versions") or {}
    lines = []
    if git.get("commit"):
        lines.append(f"git checkout {git['commit']}")
        if git.get("dirty"):
            lines[0] += "  # plus changes that were not committed"
    elif versions.get("diffmbrl"):
        lines.append(f"pip install diffmbrl=={versions['diffmbrl']}")
    lines += [
        f"export {name}={shlex.quote(str(value))}" for name, value in (provenance.get("environment") or {}).items()
    ]
    lines.append(str(provenance.get("command") or f"diffmbrl {config.get('job')} {config.get('task')}"))
    text = (
        "The numbers repeat with the same versions on the same kind of device, except where a budget of seconds ended an arm; "
        "times differ. To draw this report again from its data:"
    )
    return (
        f"<pre>{escape(chr(10).join(lines))}</pre>\n<p>{prose(text)}</p>\n"
        "<pre>diffmbrl report RUN   # the folder with config.json, provenance.json and metrics.jsonl</pre>"
    )


def facts(config: Record, provenance: Record) -> str:
    """Compose the tables of configuration, provenance and versions."""
    rest = {key: value for key, value in provenance.items() if key not in ("versions", "argv", "command")}
    blocks = [("Configuration", config), ("Provenance", rest), ("Versions", provenance.get("versions") or {})]
    return (
        '<div class="pairs">\n'
        + "\n".join(page.facts_table(name, _flat(facts)) for name, facts in blocks if facts)
        + "\n</div>"
    )


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Flatten nested dictionaries to dotted names; lists become one line."""
    out: dict[str, object] = {}
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, dict)):
            out[prefix + key] = (
                ", ".join(json.dumps(x) if isinstance(x, (list, dict)) else str(x) for x in value) or "none"
            )
        else:
            plain = {"None": "none", "True": "yes", "False": "no"}
            out[prefix + key] = plain.get(str(value), value)
    return out
