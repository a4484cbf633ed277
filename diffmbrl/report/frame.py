"""The pieces that every report has, whatever ran: what it is, its figures, how to repeat it, on what it ran."""

import json
import shlex
from typing import Any

from diffmbrl.render import page
from diffmbrl.render.page import escape, prose
from diffmbrl.report import gallery


def header(task: str, job: str, config: dict[str, Any], provenance: dict[str, Any]) -> str:
    device = provenance.get("device") or {}
    git = provenance.get("git") or {}
    facts = [f"{name} {config[name]}" for name in ("horizon", "seeds", "starts") if config.get(name) is not None]
    facts += [f"{device.get('count')} \u00d7 {device.get('kind')}"] if device else []
    facts += [("float64" if provenance["x64"] else "float32")] if "x64" in provenance else []
    facts += [f"commit {git['commit'][:9]}{' (modified)' if git.get('dirty') else ''}"] if git.get("commit") else []
    facts += [str(provenance["time"])[:10]] if provenance.get("time") else []
    again = len(resumed(provenance))
    facts += [f"resumed {'once' if again == 1 else f'{again} times'}"] if again else []
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f'<p class="kicker">diffmbrl {escape(job)}</p>\n<h1>{escape(task)}</h1>\n<ul class="facts">{listed}</ul>'


def resumed(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """What `session` wrote each time the run was resumed."""
    entries = provenance.get("resumed")
    whole = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [{"remarks": [], **entry} for entry in whole if isinstance(entry.get("remarks", []), list)]


def figure(picture: gallery.Picture) -> str:
    caption = f"<figcaption>{prose(picture.caption)}</figcaption>"
    return f"<figure>\n<h3>{escape(picture.title)}</h3>\n{picture.svg}\n{caption}\n</figure>"


def reproduce(config: dict[str, Any], provenance: dict[str, Any]) -> str:
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


def facts(config: dict[str, Any], provenance: dict[str, Any]) -> str:
    kept = {key: value for key, value in provenance.items() if key not in ("versions", "argv", "command")}
    blocks = [("Configuration", config), ("Provenance", kept), ("Versions", provenance.get("versions") or {})]
    return (
        '<div class="pairs">\n'
        + "\n".join(page.facts_table(name, _flat(facts)) for name, facts in blocks if facts)
        + "\n</div>"
    )


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as one, with dotted names; lists in one line."""
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
