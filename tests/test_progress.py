"""A run followed from Python: its events pass as they are; a real kernel keeps one display up to date, a terminal shows its lines."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from softprompt import Evaluated, Event, Finished, Searching, Started, Step, Warned, cli, show_progress
from softprompt.screen import notebook
from softprompt.screen.console import console
from softprompt.screen.run import draw_run

ROOT = Path(cli.__file__).parents[2]
RESULT = {
    "steps": 40, "train_loss": 0.5, "eval_loss_before": 5.0, "eval_loss_after": 0.6, "seconds": 20.0, "samples_per_second": 8.0,
    "peak_bytes": 10**9, "prompt": "runs/<a>&b/prompt", "prompts": {"seed-0": {"findings": ["the <rate> is high"]}},
}  # fmt: skip


def started(num_steps: int = 40, **changes: object) -> Started:
    told = {"num_train": 100, "num_eval": 9, "num_rejected": 0, "notes": {"seed-0": "text"}, "num_trainable": 10, "num_parameters": 100}
    return Started(**{"run": Path("runs/<a>&b"), "base": "b", "num_steps": num_steps, "first_step": 0, "row_rms": 0.1, **told, **changes})


def step(number: int, loss: float) -> Step:
    return Step(number, (loss,), (0.1,), (1.0,), (0.1,), 800, 0.5)


def a_run() -> list[Event]:
    """The events of a run of 40 steps whose losses are known."""
    steps = [step(number, 5 / number) for number in range(1, 41)]
    warned = Warned(20, ("seed-0",), "rate", "the <rate> is high")
    return [started(), Evaluated(0, 5.0, (5.0,)), *steps[:20], Evaluated(20, 0.5, (0.5,)), warned, *steps[20:], Finished(RESULT)]


def story(events: list[Event]) -> notebook.Story:
    told = notebook.Story(10)
    for event in events:
        told.hear(event)
    return told


# ---- in a terminal -------------------------------------------------------------------------------------------------


def test_a_terminal_shows_what_train_shows_and_events_pass():
    with console.capture() as captured:
        passed = list(show_progress(iter(a_run()), log_every=7))
    with console.capture() as wanted:
        draw_run(a_run(), 7)
    assert passed == a_run()
    assert captured.get() == wanted.get()
    assert captured.get().count("tokens/s") == 5


def test_events_come_one_by_one():
    given = []

    def events():
        for event in a_run():
            given.append(event)
            yield event

    with console.capture():
        following = show_progress(events())
        assert next(following) == given[-1]
        assert len(given) == 1
        following.close()


def test_neither_torch_nor_ipython_is_loaded():
    code = (
        "import sys, softprompt\nfor event in softprompt.show_progress([]): pass\n"
        "print([name for name in ('torch', 'transformers', 'IPython', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the page ------------------------------------------------------------------------------------------------------


def svg(told: notebook.Story) -> ElementTree.Element:
    found = re.search(r"<svg.*</svg>", notebook.page(told))
    return ElementTree.fromstring(found[0])


def points(told: notebook.Story) -> list[list[tuple[float, float]]]:
    """The three lines of a chart: steps, their mean, held out."""
    lines = [element.get("points") for element in svg(told).iter("polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_the_page_shows_the_numbers_of_the_run():
    page = notebook.page(story(a_run()))
    mean = sum(5 / number for number in range(31, 41)) / 10
    for part in (
        "<b>done</b>",
        "step 40 of 40",
        "100 rows, 9 held out",
        f"training loss {mean:.4f}",
        "held-out loss 0.5000, 5.0000 before",
    ):
        assert part in page
    assert page.count("the &lt;rate&gt; is high") == 1
    assert "width:100.0%" in page
    assert "runs/&lt;a&gt;&amp;b/prompt" in page
    assert "<a>" not in page


def test_the_curves_are_the_losses():
    told = story(a_run()[:-1])
    raw, mean, held = points(told)
    assert (len(raw), len(mean), len(held)) == (40, 40, 2)
    assert [place for place, _ in held] == [notebook.LEFT, (notebook.LEFT + notebook.WIDTH - notebook.RIGHT) / 2]
    assert mean[-1][0] == notebook.WIDTH - notebook.RIGHT
    depths = [depth for _, depth in mean]
    assert depths == sorted(depths), "the loss falls at every step"
    values = [told.mean.points[at][1] for at in (0, -1)]
    assert values == pytest.approx([5.0, sum(5 / number for number in range(31, 41)) / 10])


def test_losses_that_fall_far_have_a_logarithmic_axis():
    near, far = (story([started(), *(step(n, 2.0 ** (-power * n)) for n in range(1, 41))]) for power in (0.01, 0.5))
    texts = [[element.text for element in svg(told).iter("text")] for told in (near, far)]
    assert "0.001" in texts[1]
    assert "0.001" not in texts[0]
    depths = [depth for _, depth in points(far)[1][15:]]
    gaps = {round(second - first, 0) for first, second in pairwise(depths)}
    assert len(gaps) <= 2, "a halving is a step of one height"


def test_a_long_run_has_few_points():
    told = story([started(50_000), *(step(number, 1 + 1 / number) for number in range(1, 50_001))])
    assert all(len(line) <= notebook.POINTS for line in points(told)[:2])
    assert len(notebook.page(told)) < 20_000


def test_a_long_run_takes_no_more_memory_than_a_short_one():
    steps, held = (step(number, float(number)) for number in range(1, 5001)), (Evaluated(number, 1.0, (1.0,)) for number in range(999))
    told = story([started(5000), *steps, *held])
    assert len(told.last) == 10
    assert notebook.POINTS / 2 <= len(told.raw.groups) == len(told.mean.groups) <= notebook.POINTS
    assert sum(count for _, _, count in told.raw.groups) == 5000
    assert told.raw.groups[-1][0] == 5000
    assert sum(total for _, total, _ in told.raw.groups) == sum(range(1, 5001))
    assert told.raw.points[0] == (32, sum(range(1, 33)) / 32)
    assert len(notebook.page(told)) < 60_000


@pytest.mark.parametrize("losses", [[float("nan")] * 3, [1.0, float("inf"), 2.0], [1.0, 1.0], [0.0, 0.0], [3.0]])
def test_losses_that_cannot_be_drawn_are_left_out(losses):
    told = story([started(), *(step(number, loss) for number, loss in enumerate(losses, 1)), Evaluated(3, losses[0], (losses[0],))])
    chart = notebook.chart(told)
    ElementTree.fromstring(chart)
    assert "nan" not in re.sub('aria-label="[^"]*"', "", chart)


def test_every_state_of_a_run_has_a_page():
    assert "<b>loading</b>" in notebook.page(story([]))
    searching = notebook.page(story([Searching(5, 20)]))
    assert "finding the rate" in searching
    assert "width:25.0%" in searching
    assert "no held-out rows" in notebook.page(story([started(num_eval=0)]))
    assert "3 rows rejected" in notebook.page(story([started(num_rejected=3)]))
    assert "2 prompts at once" in notebook.page(story([started(notes={"a": "", "b": ""})]))


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", ["#ffffff", "#111111", "#1e1e1e"])
def test_colours_are_seen_on_light_and_on_dark_paper(paper):
    for color in (notebook.TRAIN, notebook.HELD, notebook.WARN):
        dark, light = sorted([luminance(color), luminance(paper)])
        assert (light + 0.05) / (dark + 0.05) >= 3, f"{color} on {paper}: WCAG asks for 3 of graphics"


# ---- in a real kernel ----------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """kernel("code", ...) yields the notebook after each cell, executed in a kernel of its own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def execute(*cells: str):
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        client = NotebookClient(book, timeout=120, kernel_name="python3")
        with client.setup_kernel():
            for number, cell in enumerate(book.cells):
                client.execute_cell(cell, number)
                yield book

    return execute


def displays(cell: nbformat.NotebookNode) -> list[dict[str, str]]:
    return [output.data for output in cell.outputs if output.output_type == "display_data"]


def said(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def test_a_notebook_shows_a_run_as_it_goes_on(kernel, make_config):
    config = make_config("train.steps=6", "train.eval_every=2")
    cells = kernel(
        "from pathlib import Path\nfrom softprompt import Evaluated, load_config, show_progress, train\n"
        f"config = load_config({config.model_dump(exclude_none=True)!r})",
        "events = show_progress(train(config))\nseen = []\nfor event in events:\n    seen.append(event)\n"
        "    if isinstance(event, Evaluated) and event.step == 2:\n        break",
        "seen += events\nprint([type(event).__name__ for event in seen])",
        "from softprompt.runlog import RunFolder\nprint(seen == [event for _, event in RunFolder.reopen(Path(config.train.out)).follow()])",
    )
    next(cells)
    (shown,) = displays(next(cells).cells[1])
    assert "training, step 2 of 6" in shown["text/plain"]
    assert "width:33.3%" in shown["text/html"]
    assert "<svg" in shown["text/html"]
    book = next(cells)
    (shown,) = displays(book.cells[1])
    assert "done, step 6 of 6" in shown["text/plain"]
    assert displays(book.cells[2]) == []
    assert said(book.cells[2]).count("'Step'") == 6
    assert said(next(cells).cells[3]) == "True\n"


def test_a_notebook_says_where_a_run_was_stopped(kernel):
    cells = kernel(
        "import sys\nfrom test_progress import a_run\nfrom softprompt import show_progress",
        "for event in show_progress(a_run()):\n    if getattr(event, 'step', 0) == 12:\n        break",
        "def broken():\n    yield from a_run()[:9]\n    raise KeyboardInterrupt\n"
        "try:\n    list(show_progress(broken()))\nexcept KeyboardInterrupt:\n    print('interrupted')",
        "print(show_progress(a_run()).__name__)",
    )
    *_, book = cells
    for cell, number in ((book.cells[1], 12), (book.cells[2], 7)):
        (shown,) = displays(cell)
        assert f"stopped, step {number} of 40" in shown["text/plain"]
        assert "train(config, resume=True)" in shown["text/html"]
    assert said(book.cells[2]) == "interrupted\n"
    assert said(book.cells[3]) == "displayed\n"
