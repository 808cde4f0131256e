"""One HTML page about a study: it loads nothing, and reads well in the dark and on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path

from experiments.report import tables
from experiments.report.charts import accuracy_chart, lines_of
from experiments.report.commands import short_path, sweep_command
from experiments.report.curves import AXES
from experiments.report.gain import gains_over_local
from experiments.report.groups import Group, Stat, Study
from experiments.report.looks import Look, looks_for
from experiments.report.maps import embedding_maps
from experiments.report.predictors import what_is_tested
from experiments.report.sections import (
    gains_section,
    maps_section,
    name_cell,
    runs_section,
    swatch,
)

STYLE = Path(__file__).with_name("page.css")
HEADINGS = {"round": "By round", "bytes": "By traffic", "seconds": "By time"}


@dataclass(frozen=True)
class Source:
    """Where a page comes from: the folder of the runs, and the command that made the page."""

    folder: Path
    command: str


def render(study: Study, source: Source, *, num_maps: int) -> str:
    """Return the page.

    Parameters
    ----------
    study
        What to show.
    source
        Stated in the page.
    num_maps
        Draw at most so many runs' embeddings.
    """
    looks = looks_for([(group.key, group.method) for group in study.groups])
    made = _made_by(study, source)
    maps, passed_over = embedding_maps(study, limit=num_maps)
    body = [
        _head(study, source),
        _notice(study),
        "<h2>Results</h2>",
        _results(study, looks),
        "<h2>Test accuracy</h2>",
        _curves(study, looks, made),
        "<h2>What each client gains over training alone</h2>",
        gains_section(*gains_over_local(study), looks, made),
        "<h2>What the embeddings have learned</h2>",
        maps_section(maps, passed_over, made),
        "<h2>Runs</h2>",
        runs_section(study),
    ]
    return _document(f"{source.folder.name}: {len(study.members)} runs", body)


def _document(title: str, body: Sequence[str]) -> str:
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _head(study: Study, source: Source) -> str:
    members, done = study.members, [m for m in study.members if m.status == "completed"]
    data = sorted({str(m.run.config.get("dataset", "?")) for m in members})
    clients = sorted({int(m.run.summary.get("num_clients", 0)) for m in members} - {0})
    seeds = sorted({member.seed for member in members})
    facts = [
        f"{len(members)} runs, {len(done)} completed",
        f"{len(study.groups)} settings",
        f"seeds {', '.join(map(str, seeds))}",
        f"data {', '.join(data)}",
        f"{' or '.join(map(str, clients)) or '?'} clients",
        f"{datetime.now():%Y-%m-%d %H:%M}",
    ]
    return (
        f"<header><h1>{escape(source.folder.name)}</h1>"
        f'<p class="quiet">{escape(" · ".join(facts))}</p>'
        f'<p class="lead">{_finding(study)}</p></header>'
    )


def _finding(study: Study) -> str:
    """Say in one sentence what came out, with the errors, and how Local did."""
    scored = [(g, stat) for g in study.groups if (stat := _micro(g)) is not None]
    if not scored:
        return "No run has completed yet; what is drawn below comes from unfinished runs."
    group, best = max(scored, key=lambda pair: pair[1].mean)
    said = (
        f"Highest micro accuracy in the last round: <b>{escape(group.label)}</b>, {_seeded(best)}."
    )
    alone = [pair for pair in scored if pair[0].method == "local" and pair[0] is not group]
    for other, stat in alone:
        name = "Local" if len(alone) == 1 else escape(other.label)
        said += f" Every client alone ({name}): {_seeded(stat)}."
    rivals = [pair for pair in scored if pair[0] is not group]
    if rivals and best.error is not None:
        second, stat = max(rivals, key=lambda pair: pair[1].mean)
        if stat.error is not None and best.mean - stat.mean < best.error + stat.error:
            said += f" {escape(second.label)} is within the standard errors of it."
    return said


def _micro(group: Group) -> Stat | None:
    return group.stat(lambda member: member.last("accuracy_micro"))


def _seeded(stat: Stat) -> str:
    plural = "s" if stat.count > 1 else ", no standard error"
    return f"{tables.percent(stat)} % ({stat.count} seed{plural})"


def _notice(study: Study) -> str:
    rows = [
        f"<li>{escape(group.label)}, seed {member.seed}: {escape(member.left_out)}"
        f"{_reason(str(member.run.summary.get('reason') or ''))}</li>"
        for group in study.groups
        for member in group.left_out
    ]
    rows += [f"<li>{escape(fault)}</li>" for fault in study.unreadable]
    if not rows:
        return ""
    return (
        '<div class="notice"><b>Not in any mean below:</b><ul>' + "".join(rows) + "</ul>"
        '<span class="small quiet">Runs that have not completed are drawn as dotted lines, marked '
        "†. “Interrupted” is also what a run says that is still going on outside a sweep."
        "</span></div>"
    )


def _reason(text: str) -> str:
    short = text if len(text) <= 240 else text[:239] + "…"
    return f' <span class="quiet">({escape(short)})</span>' if text else ""


def _results(study: Study, looks: Mapping[str, Look]) -> str:
    shown = tables.columns(study)
    header = "".join(f'<th title="{escape(c.meaning)}">{c.header}</th>' for c in shown)
    best = max((s.mean for g in study.groups if (s := _micro(g))), default=None)
    rows = []
    for group in study.groups:
        cells = []
        for place, column in enumerate(shown):
            stat = _micro(group)
            top = place == 0 and stat is not None and stat.mean == best
            cells.append(f"<td{' class=top' if top else ''}>{_with_error(column.cell(group))}</td>")
        state = tables.status(group)
        css = "ok" if state == "completed" else "off"
        rows.append(
            f"<tr>{name_cell(group.label, looks[group.key])}{''.join(cells)}"
            f"<td>{len(group.counted)}</td>"
            f'<td class="status left {css}">{escape(state)}</td></tr>'
        )
    meanings = "; ".join(f"<b>{c.header}</b>: {escape(c.meaning)}" for c in shown)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr><th>method / variant</th>{header}'
        f'<th>seeds</th><th class="left">status</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="small quiet">Mean ± standard error over seeds, of completed runs only. '
        f"{meanings}.</p>"
    )


def _with_error(text: str) -> str:
    mean, sign, error = text.partition(" ± ")
    return f'{mean} <span class="se">± {error}</span>' if sign else text


def _curves(study: Study, looks: Mapping[str, Look], made: str) -> str:
    figures, several = [], any(len(group.counted) > 1 for group in study.groups)
    for axis in AXES:
        lines = lines_of(study, looks, axis)
        if lines:
            figures.append(
                f"<figure><h3>{HEADINGS[axis]}</h3>{accuracy_chart(lines, axis)}"
                f"<figcaption>{_caption(axis)} {made}</figcaption></figure>"
            )
    if not figures:
        return '<p class="quiet">No run has been evaluated yet.</p>'
    band = (
        "Bands: one standard error over seeds. " if several else "One seed each: no error bands. "
    )
    legend = "".join(
        f"<li>{swatch(looks[g.key])}{escape(g.label)}</li>" for g in study.groups if g.members
    )
    return (
        f'<p class="quiet">Micro accuracy (all test examples alike). '
        f"{escape(what_is_tested(study))} {band}The accuracy axis starts at 0.</p>"
        f'<ul class="legend">{legend}</ul><div class="figures">{"".join(figures)}</div>'
    )


def _caption(axis: str) -> str:
    return {
        "round": "A round is one pass over the clients.",
        "bytes": "Sent so far, to and from all clients; a line across the chart: no traffic.",
        "seconds": "Wall clock of the rounds so far, mean over seeds, on the machine of the runs.",
    }[axis]


def _made_by(study: Study, source: Source) -> str:
    """Return the commands behind every figure: the one that draws, and those that ran."""
    sweeps = {sweep_command(member.run) for member in study.members}
    ran = "".join(f"<code>{escape(c)}</code>, then " for c in sorted(s for s in sweeps if s))
    alone = "the runs' own commands at the end of this page, then " if None in sweeps else ""
    return f"Made by {ran}{alone}<code>{escape(source.command)}</code>."


def write_report(study: Study, source: Source, *, num_maps: int) -> tuple[Path, Path]:
    """Write report.html and report.md into the folder; return their paths."""
    page, table = source.folder / "report.html", source.folder / "report.md"
    page.write_text(render(study, source, num_maps=num_maps), encoding="utf-8")
    table.write_text(tables.markdown(study, source=source.command), encoding="utf-8")
    return page, table


def default_source(folder: Path) -> Source:
    """Return the source of `mh-pfedhn report FOLDER`."""
    return Source(folder, f"mh-pfedhn report {short_path(folder)}")
