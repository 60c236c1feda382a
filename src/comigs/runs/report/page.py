"""The page of a run: one self-contained HTML file that opens offline and runs no script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from comigs import text as f
from comigs.errors import UserError
from comigs.files import write_whole, writing
from comigs.runs.report import plots, provenance, tables
from comigs.runs.report.curves import MAX_PANELS, Curve, drift_points, loss_curves, share_curves
from comigs.runs.report.diagnostics import diagnoses
from comigs.runs.report.groups_table import groups_table
from comigs.runs.report.kept_models import kept_table
from comigs.runs.report.privacy_part import privacy_note, privacy_table
from comigs.runs.report.read import Run, read_run
from comigs.runs.report.results import results
from comigs.runs.report.routes_part import block_rules, parts_of
from comigs.runs.report.routing_heatmap import routing_heatmap
from comigs.runs.report.tasks_table import tasks_table
from comigs.runs.report.timeline import timeline
from comigs.runs.routes import Routes

HERE = Path(__file__).parent
PAGE = "report.html"
EVERYBODY, OWN_EYES = 0o666, 0o600  # modes of a file


def write_report(
    run_folder: str | Path, out: str | Path | None = None, routes: Sequence[Routes] = ()
) -> Path:
    """Write the page of one run, by default as PAGE in its folder, and return where it is.

    routes: of clients whose text the page is to hold; it is for its owner's eyes only then. The
    file is written whole or not at all. Raises UserError for a folder that is no run, a file that
    cannot be written, or one that is something else than a report.
    """
    folder = Path(run_folder)
    text = report_page(read_run(folder), routes)
    mode = OWN_EYES if routes else EVERYBODY
    return put_page(Path(out) if out else folder / PAGE, text, "report", mode)


def write_reports(
    run_folders: Iterable[str | Path],
    out: str | Path | None = None,
    routes: Sequence[Routes] = (),
) -> list[Path]:
    """Write the page of every run into its folder, or of a single run to `out`, with `routes`.

    Every run is read before anything is written. Raises UserError.
    """
    folders = [Path(folder) for folder in run_folders]
    if len(folders) == 1:
        return [write_report(folders[0], out, routes)]
    if out is not None:
        raise UserError(
            f"--out {out}: is for one run; "
            f"to see {len(folders)} side by side: comigs compare RUN..."
        )
    runs = [read_run(folder) for folder in folders]
    return [put_page(run.folder / PAGE, report_page(run), "report") for run in runs]


def report_page(run: Run, routes: Sequence[Routes] = ()) -> str:
    """Return the page of one run as HTML; equal runs and routes give equal bytes."""
    # A run that is not finished has no summary yet: its page says what its config says.
    told: dict[str, Any] = {
        "method": run.config.method,
        "base": run.config.base.name,
        "span": "so far",
        "perplexity_of_mean": None,
    }
    if run.summary is not None:
        told |= {"method": run.summary.method, "base": run.summary.base}
        told["span"] = "over the whole run"
        if run.summary.mean.test.perplexity_of_mean is not None:
            of_mean = f.perplexity(run.summary.mean.test.perplexity_of_mean)
            told["perplexity_of_mean"] = of_mean

    # A number and its unit stay on one line.
    headline = re.sub(r"(?<=\d) (?=[kMGT]?B|%)", "\N{NO-BREAK SPACE}", tables.headline(run))
    clients = results(run).clients
    uploaded = sum(client.uploaded_bytes for client in clients)
    return render(
        "report.html.j2",
        name=run.config.name,
        seed=run.config.seed,
        unfinished=run.summary is None,
        state=tables.state(run),
        headline=headline,
        signs=diagnoses(run),
        clients=tables.client_table(run),
        absences=tables.absence_table(run),
        kept=kept_table(run),
        tasks=tasks_table(run.tasks.clients, run.last_round),
        privacy=privacy_note(run),
        spent=privacy_table(run),
        num_clients=len(clients),
        two_ranks=any(c.specialist_rank not in (None, c.rank) for c in clients),
        heat=routing_heatmap(run),
        routes=parts_of(routes),
        rules=block_rules(routes),
        experts=tables.expert_share_table(run),
        settings=provenance.settings(run),
        config=run.config_text,
        uploaded=uploaded and f.size(uploaded),
        roles=tables.role_table(run),
        apart=tables.roles_apart(run),
        summed=run.config.privacy.secure_aggregation,
        costs=tables.cost_table(run),
        environment=provenance.environment_table(run),
        data=provenance.data_table(run),
        **told,
        **_pictures(run),
    )


def _pictures(run: Run) -> dict[str, Any]:
    """Return the plots, those that have anything to show."""
    curves, shares, drift = loss_curves(run), share_curves(run), drift_points(run)
    end = run.config.rounds
    pictures: dict[str, Any] = {
        "panels": [],
        "capped": len(run.clients) > MAX_PANELS,
        "share_plot": None,
        "share_clients": [],
        "drift_plot": None,
        "timeline": None,
        "groups": groups_table(run),
        "took": "",
        "work_lost": None,
    }
    # Clients are compared with each other, so their plots have the same axes.
    if curves:
        limits = plots.limits(curves)
        for of_client in curves:
            drawn = Markup(plots.loss_plot(of_client, end, limits))
            pictures["panels"].append((of_client.client, drawn))
    if shares:
        drawn = Markup(plots.curves_plot(shares, end, "generalist share", top=1))
        pictures["share_plot"] = drawn
    # Many clients are drawn in one grey, which needs no names.
    if len(shares) <= plots.MAX_COLOURS:
        pictures["share_clients"] = [curve.client for curve in shares]
    if (shown := timeline(run)) is not None:
        pictures["timeline"] = Markup(plots.timeline_plot(shown))
        pictures["took"] = shown.took
        if shown.work_lost is not None:
            pictures["work_lost"] = f.percent(shown.work_lost)
    if drift:
        drawn = Markup(plots.curves_plot([Curve("Drift", drift)], end, "drift"))
        pictures["drift_plot"] = drawn
    return pictures


def render(template: str, folder: Path = HERE, **values: Any) -> str:
    """Return a template of a folder as HTML, with this folder's frame and style sheet in it.

    Values are escaped.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    style = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def _harmless(value: Any) -> Any:
    """Return a value of a template as a page can show it; what is marked up is ours."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return f.harmless(value)
    return value


def mark(command: str) -> str:
    """Return what a page has near its beginning where `comigs COMMAND` wrote it (page.html.j2)."""
    return f'<meta name="generator" content="comigs {command}">'


def is_written_by(page: Path, command: str) -> bool:
    """Return whether `comigs COMMAND` wrote that page."""
    if not page.is_file():
        return False
    return mark(command) in page.read_text(encoding="utf-8", errors="replace")[:2000]


def require_own_page(path: Path, command: str) -> None:
    """Refuse to write over what `comigs COMMAND` did not write. Raises UserError."""
    if path.is_file() and not is_written_by(path, command):
        raise UserError(
            f"{path}: not written by comigs {command}, so it is kept; choose another file with "
            "--out"
        )


def put_page(path: Path, text: str, command: str, mode: int = EVERYBODY) -> Path:
    """Put a whole page there, or leave what was there. Raises UserError.

    command: what wrote it. mode: of the file, as in os.open.
    """
    require_own_page(path, command)
    with writing(path, "choose another file with --out"):
        fill = partial(Path.write_text, data=text, encoding="utf-8")
        write_whole(path, fill, mode)
    return path
