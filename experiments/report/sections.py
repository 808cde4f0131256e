"""The lower sections of the page: gains over Local, maps of embeddings, and all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from experiments.report import tables
from experiments.report.charts import gain_chart, signed
from experiments.report.commands import local_command, preset_settings, run_command
from experiments.report.gain import GroupGain, Unmatched
from experiments.report.groups import Stat, Study
from experiments.report.looks import SCALE, Look
from experiments.report.maps import EmbeddingMap

SHORT_LABEL = 16
STATUS_CLASS = {"completed": "ok", "running": "run"}


def gains_section(
    gains: Sequence[GroupGain],
    unmatched: Sequence[Unmatched],
    looks: Mapping[str, Look],
    made: str,
) -> str:
    """Write the section about gains over Local; where no Local run fits, how to get one."""
    if not gains and not any(run.differs for run in unmatched):
        return (
            '<p class="notice">No run of <code>method = "local"</code> with the same data, models '
            "and seed is here, so nobody can say what federation gains. Add one: <code>mh-pfedhn "
            "run PRESET --seed SEED --set method=local</code>, or a variant in the sweep file."
            "</p>"
        )
    figure = (
        f'<div class="figures wide"><figure>{gain_chart(gains, looks)}'
        "<figcaption>Each client against itself under Local with the same examples, model, seed "
        "and local training, at the last evaluation. Bar: mean over clients; thick line: its "
        f"standard error over seeds. {made}</figcaption>"
        f"</figure>{_family_gains(gains)}</div>"
        if gains
        else ""
    )
    return _without_local(unmatched) + figure


def _without_local(unmatched: Sequence[Unmatched]) -> str:
    """Name the runs that no Local run fits, why, and the command that makes one."""
    if not unmatched:
        return ""
    presets = preset_settings()
    found: dict[tuple[str, str], list[Unmatched]] = {}
    for run in unmatched:
        command = local_command(run.member.run, presets)
        pattern = command.replace(f"--seed {run.member.seed}", "--seed SEED")
        found.setdefault((pattern, _why(run)), []).append(run)
    rows = []
    for (pattern, why), runs in found.items():
        labels = "; ".join(dict.fromkeys(run.label for run in runs))
        seeds = sorted({run.member.seed for run in runs})
        command = pattern.replace("--seed SEED", f"--seed {seeds[0]}")
        each = ", and so for each seed" if len(seeds) > 1 else ""
        rows.append(
            f"<li>{escape(labels)}, seed{'s' if len(seeds) > 1 else ''} "
            f"{', '.join(map(str, seeds))}: {escape(why)}. What fits: <code>{escape(command)}"
            f"</code>{each}</li>"
        )
    return (
        '<div class="notice"><b>No gain over Local, for no Local run fits:</b><ul>'
        + "".join(rows)
        + "</ul></div>"
    )


def _why(run: Unmatched) -> str:
    if not run.differs:
        return "no Local run has the same data, models and seed"
    said = [f"{key} {theirs} instead of {own}" for key, (own, theirs) in run.differs.items()]
    return f"the nearest Local run has {', '.join(said)}"


def _family_gains(gains: Sequence[GroupGain]) -> str:
    families = list(dict.fromkeys(name for gain in gains for name in gain.by_family))
    if len(families) < 2:
        return ""
    rows = []
    for gain in gains:
        cells = "".join(_signed_cell(gain.by_family.get(name)) for name in families)
        rows.append(f"<tr>{name_cell(gain.group.label)}{cells}</tr>")
    header = "".join(f"<th>{escape(name.rpartition(':')[2])}</th>" for name in families)
    return (
        '<div class="side"><h3>Mean gain by architecture, points</h3>'
        f'<div class="scroll" tabindex="0"><table><thead><tr><th>method / variant</th>{header}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def _signed_cell(stat: Stat | None) -> str:
    if stat is None:
        return f"<td>{tables.NONE}</td>"
    css = "up" if stat.mean > 0 else "down"
    error = f' <span class="se">± {100 * stat.error:.1f}</span>' if stat.error is not None else ""
    return f'<td class="{css}">{signed(round(100 * stat.mean, 1))}{error}</td>'


def maps_section(maps: Sequence[EmbeddingMap], passed_over: Sequence[str], made: str) -> str:
    """Write the section of maps; `passed_over` names the groups without room for one."""
    if not maps:
        return (
            '<p class="quiet">No completed run here has a hypernetwork, a checkpoint (or the '
            "embeddings that a sweep keeps of it), three clients or more, and embeddings that "
            "learn: with <code>embedding-lr = 0</code> they stand still.</p>"
        )
    rest = (
        f"<p class=quiet>Not drawn, for lack of room: {escape('; '.join(passed_over))}. "
        "<code>--maps N</code> draws more.</p>"
        if passed_over
        else ""
    )
    intro = (
        '<p class="quiet">A client is a point. What counts is the direction in which training '
        "has moved its embedding away from its random start, chunk by chunk; the map shows the "
        "first two principal components of these directions, at one scale. The components often "
        "explain little: trust the numbers above a map, computed in all dimensions, more than "
        "the map. Clients that are near one another have moved alike.</p>"
    )
    return intro + "".join(_map(found, made) for found in maps) + rest


def _map(found: EmbeddingMap, made: str) -> str:
    keys = "".join(
        f'<li><svg viewBox="0 0 15 12" style="width:15px" aria-hidden="true"><circle class='
        f'"client k{colour}" cx="7" cy="6" r="5.4"/></svg>{escape(name)}</li>'
        for name, colour in found.families
    )
    said = " ".join(escape(words) for words in found.findings)
    ramp = f"linear-gradient(90deg,{','.join(SCALE)})"
    labels = (
        f"<figure><h4 class=quiet>By label overlap</h4>{found.by_labels}<figcaption>Alike "
        f'<span class="ramp" style="background:{ramp}"></span> colours: alike label distributions '
        "(first axis of a scaling of 1 &minus; overlap). Lines join each client with the two whose "
        f"labels overlap most with its own; darker: more. {made}</figcaption></figure>"
        if found.by_labels
        else f'<figure><p class="notice small">By label overlap: not drawn. {escape(found.why)}</p>'
        "</figure>"
    )
    return (
        f'<div class="map"><h3>{escape(found.title)}</h3><p class="small">{said}</p>'
        f'<div class="figures"><figure><h4 class=quiet>By architecture</h4>{found.by_family}'
        f'<ul class="legend">{keys}</ul><figcaption>{made}</figcaption></figure>{labels}</div>'
        "</div>"
    )


def runs_section(study: Study) -> str:
    """Write the table of all runs, each with the command that repeats it."""
    presets, rows, before = preset_settings(), [], ""
    for member, cells in zip(study.members, tables.run_rows(study), strict=True):
        label, seed, state, accuracy, rounds, seconds, name = cells
        css = STATUS_CLASS.get(member.status, "off")
        command = str(member.note.get("command") or run_command(member.run, presets))
        pattern = command.replace(f"--seed {seed}", "--seed")
        command = f"the same, --seed {seed}" if pattern == before else command
        before = pattern
        rows.append(
            f'<tr>{name_cell(label)}<td>{seed}</td><td class="left {css}">{escape(state)}'
            f"</td><td>{accuracy}</td><td>{rounds}</td><td>{seconds}</td>"
            f'<td class="left">{escape(name)}</td><td class="left wide"><code>{escape(command)}'
            "</code></td></tr>"
        )
    return (
        '<p class="quiet">Each run by itself. A run outside a sweep is written as the preset that '
        "is nearest to its settings, and what differs.</p>"
        '<div class="scroll" tabindex="0"><table><thead><tr><th>method / variant</th><th>seed</th>'
        '<th class="left">status</th><th>micro, last</th><th>rounds</th><th>time</th>'
        '<th class="left">folder</th><th class="left">command</th></tr></thead><tbody>'
        + "".join(rows)
        + "</tbody></table></div>"
    )


def name_cell(label: str, look: Look | None = None) -> str:
    """Return the first cell of a row; only long names may take a second line."""
    css = ' class="short"' if len(label) <= SHORT_LABEL else ""
    return f"<th{css}>{swatch(look) if look else ''}{escape(label)}</th>"


def swatch(look: Look) -> str:
    """Return a short line in a look, for tables and legends."""
    dash = f' stroke-dasharray="{" ".join(map(str, look.pattern))}"' if look.dash else ""
    return (
        '<svg class="swatch" style="display:inline-block;width:26px;height:10px;margin-right:7px" '
        f'viewBox="0 0 26 10" aria-hidden="true"><polyline class="line k{look.colour}"{dash} '
        'points="0,5 26,5"/></svg>'
    )
