"""Run folders become one self-contained HTML page: no network, no script, nothing but what the runs have left."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt.atomic import write_text
from softprompt.errors import RunError
from softprompt.report.reading import Run, read_runs

MARK = '<meta name="generator" content="softprompt report">'
HOME = Path(__file__).parent


def write_report(paths: Sequence[Path], out: Path | None = None, *, num_rows: int = 12) -> Path:
    """Writes the report of these run folders, with sample answers to `num_rows` rows; to RUN/report.html where there is one run and
    no `out`. An earlier report is replaced, any other file is left alone. Returns its place.

    Raises RunError for what is no run, is damaged or cannot be written; MissingPackage without matplotlib.
    """
    if out is None and len(paths) > 1:
        raise RunError("a report of several runs lies in none of them: give --out FILE")
    file = out or paths[0] / "report.html"
    runs = read_runs(paths)
    _check_place(file)
    page = build_page(runs, num_rows)
    try:
        write_text(file, page)
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error.strerror}") from None
    return file


def _check_place(file: Path) -> None:
    if file.is_dir():
        raise RunError(f"{file} is a folder: name a file, e.g. {file / 'report.html'}")
    if file.exists() and MARK.encode() not in file.read_bytes()[:2000]:
        raise RunError(f"{file} exists and was not written by softprompt report: choose another --out")


def build_page(runs: Sequence[Run], num_rows: int) -> str:
    """The page as text."""
    from softprompt.report import sections
    from softprompt.report.answers import samples

    prompts = [prompt for run in runs for prompt in run.prompts]
    page = (
        environment()
        .get_template("page.html")
        .render(
            mark=MARK,
            runs=runs,
            prompts=prompts,
            curves=sections.curves(prompts),
            curve_numbers=[(prompt, sections.curve_numbers(prompt)) for prompt in prompts],
            lengths=sections.lengths(runs),
            contests=sections.contests(runs),
            samples=samples(runs, num_rows),
            row_charts=sections.row_charts(prompts),
            heatmaps=sections.heatmaps(prompts),
            settings=sections.settings(runs),
            versions=sections.versions(runs),
        )
    )
    return page.lstrip()


def environment() -> Any:
    """Where templates find each other, and what they write values with."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HOME), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters |= {"number": number, "size": size, "visible": visible, "language": language, "minutes": minutes}
    return found


# ---- values for people ---------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """A loss or the like; "-" for what was not measured."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.{digits}f}"


def size(num_bytes: float) -> str:
    """Bytes: 1.3 GB, 131 kB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def minutes(seconds: float) -> str:
    """A duration: 12.3 s, 4 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def visible(token: str) -> str:
    """A token whose spaces and control characters can be seen."""
    return json.dumps(token, ensure_ascii=False)[1:-1].replace('\\"', '"').replace(" ", "␣")


def language(text: str) -> str:
    """What a `lang` attribute says, so that Chinese and Japanese characters get their own shapes; empty where it cannot be told."""
    for code, pattern in (("ja", r"[\u3040-\u30ff]"), ("ko", r"[\uac00-\ud7af]"), ("zh", r"[\u3400-\u9fff]")):
        if re.search(pattern, text):
            return code
    return ""
