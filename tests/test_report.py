"""The report: what it shows of what runs left, what it refuses, and how it looks in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny

from softprompt.artifact import load_prompt
from softprompt.config import load_config
from softprompt.data import load_examples
from softprompt.errors import MissingPackage, RunError
from softprompt.evaluation import Contest, evaluate
from softprompt.events import Evaluated, Step, to_line
from softprompt.inspection import inspect
from softprompt.report import MARK, number, write_report
from softprompt.report.answers import compared
from softprompt.report.charts import Line, thinned
from softprompt.training import train

SCRIPT = "<script>alert('手机')</script> & more"


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    """Two runs on labelled rows of Chinese and HTML, each with an evaluation with answers; a bank; a run that was stopped."""
    place, base = tmp_path_factory.mktemp("report"), bases()
    words = (("好", "很喜欢"), ("坏", SCRIPT), ("一般", "还行吧"))
    rows = [{"text": f"{'很' * (n % 3)}{words[n % 3][1]} {n}", "label": words[n % 3][0]} for n in range(60)]
    labelled, held = tiny.write_rows(place / "l.jsonl", rows[:36]), tiny.write_rows(place / "h.jsonl", rows[36:])
    common = [f"model.name={base.name}", "model.device=cpu", "prompt.text=Judge 这个.", "train.examples_per_step=4", "train.eval_every=2"]
    common += [f"data.train={labelled}", f"data.eval={held}", "data.max_length=69"]
    for name, rate in (("标签", 0.25), ("again", 0.1)):
        config = load_config(None, [*common, "train.steps=6", f"optim.relative_lr={rate}", f"train.out={place / name}"])
        list(train(config, base=base))
        prompt = load_prompt(place / name, base)
        evaluate(base, prompt, load_examples(str(held)), Contest(answers=True, max_new_tokens=5), out=place / name / "evaluations")
    bank = 'prompt.bank=[{name="slow",optim={relative_lr=0.05}},{name="fast",prompt={length=3}}]'
    list(train(load_config(None, [*common, "train.steps=4", bank, f"train.out={place / 'bank'}"]), base=base))
    tiny.stop_after(load_config(None, [*common, "train.steps=9", f"train.out={place / 'half'}"]), 3)
    return place


@pytest.fixture
def copied(runs, tmp_path):
    """copied("bank"): a run that a test may change."""

    def copy(name):
        return Path(shutil.copytree(runs / name, tmp_path / name))

    return copy


class Tables(HTMLParser):
    """The tables of a page: by the name of the box they scroll in, their rows of cells."""

    def __init__(self, page):
        super().__init__()
        self.found, self.cell, self.text = {}, None, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("role") == "region":
            self.rows = self.found.setdefault(attributes["aria-label"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = tag

    def handle_endtag(self, tag):
        self.cell = None if tag == self.cell else self.cell

    def handle_data(self, data):
        self.text.append(data)
        if self.cell:
            self.rows[-1][-1] += data


def written(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def page_of(*folders, out=None):
    return write_report(folders, out or folders[0].parent / "page.html").read_text(encoding="utf-8")


# ---- what it shows -------------------------------------------------------------------------------------------------


def test_curves_are_drawn_and_their_numbers_are_those_of_the_log(runs):
    page = page_of(runs / "标签")
    rows = Tables(page).found["Numbers of 标签"][1:]
    events = [json.loads(line) for line in (runs / "标签" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held = {event["step"]: event["losses"][0] for event in events if event["event"] == "evaluated"}
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    assert [int(row[0]) for row in rows] == list(range(7))
    assert set(held) == {0, 2, 4, 6}
    for step, *cells in rows:
        logged = steps.get(int(step))
        of_step = [logged[key][0] for key in ("grad_norms", "lrs", "movements")] if logged else [None] * 3
        assert cells == [number(value) for value in (logged and logged["losses"][0], held.get(int(step)), *of_step)]
    for title in ("Loss", "Gradient norm", "Learning rate", "Movement of the rows"):
        assert re.search(rf'role="img" aria-label="{title}: 标签', page)
    first, last = steps[1]["movements"][0], steps[6]["movements"][0]
    assert f"Movement of the rows: 标签 from {first:.3g} to {last:.3g}" in page


def test_contestants_confusion_calibration_and_verdicts_are_those_of_the_evaluation(runs):
    page = page_of(runs / "标签")
    (file,) = (runs / "标签" / "evaluations").glob("*/evaluation.json")
    facts, tables = json.loads(file.read_text(encoding="utf-8")), Tables(page)
    contestants = {row[0]: row for row in tables.found["Contestants of 标签, 24 rows"][1:]}
    assert list(contestants) == ["bare base", "text prompt", "soft prompt"]
    for name, key in (("bare base", "base"), ("soft prompt", "prompt")):
        low, high = facts["intervals"][key]["accuracy"]
        assert f"{facts['contestants'][key]['accuracy']:.1%}{100 * low:.1f} to {100 * high:.1f}" in contestants[name]
        confusion = tables.found[f"Confusion of {name}, 标签, 24 rows"][1:]
        assert [row[0] for row in confusion] == facts["labels"]
        assert [list(map(int, row[1:])) for row in confusion] == facts["confusion"][key]
    bins = [row for row in tables.found["Bins of confidence, 标签, 24 rows"] if row[0] == "soft prompt"]
    assert [int(row[3]) for row in bins] == [rows for _, _, rows in facts["calibration"]["prompt"]]
    told = facts["verdicts"][-1]
    assert (told["first"], told["second"]) == ("prompt", "text")
    assert any(told["outcome"] in text and "soft prompt" in text and "text prompt" in text for text in tables.text)


def test_a_plain_run_shows_its_rows_data_settings_and_versions(runs, bases):
    folder = runs / "标签"
    tables, page = Tables(page_of(folder)), page_of(folder)
    (facts,) = written(folder, "inspection.json").values()
    rows = tables.found["Rows of 标签"][1:]
    assert len(rows) == len(facts["rows"]) > 5
    for row, fact in zip(rows, facts["rows"], strict=True):
        assert row[1:3] == [f"{fact['size']:.2f}", f"{fact['drift']:.2f}"]
        assert [float(cosine) for cosine in re.findall(r" (-?\d\.\d\d)", row[3])] == [round(cosine, 2) for _, cosine in fact["near"]]
    stored = load_prompt(folder, bases())
    measured = inspect(bases(), stored).as_dict()
    assert facts["cosines"] == measured["cosines"]
    assert [row["near"] for row in facts["rows"]] == [[list(pair) for pair in row["near"]] for row in measured["rows"]]
    assert "Cosine between rows, 标签" in page
    assert "Khashabi et al. (2022)" in page
    data = {row[0]: row[1:4] for row in tables.found["Rows of each split"]}
    cut = written(folder, "data.json")["train"]["num_cut"]
    assert data["training"] == ["36", "0", str(cut)]
    assert cut == 9, "the rows with the script and a number of two digits are one token longer than data.max_length"
    settings = {row[0]: row[1] for row in tables.found["Settings that are not the default"][1:]}
    assert settings["optim.relative_lr"] == "0.25"
    assert "optim.relative_lr" not in {row[0] for row in tables.found["Settings at their default"]}
    assert dict(tables.found["Versions"])["torch"] == written(folder, "run.json")["versions"]["torch"]


def test_answers_of_two_runs_stand_beside_each_other(runs, tmp_path):
    page = page_of(runs / "标签", runs / "again", out=tmp_path / "two.html")
    (sample,) = re.findall(r'<article class="sample" aria-label="Row 1">.*?</article>', page, flags=re.DOTALL)
    assert re.findall(r"<dt>(.*?)</dt>", sample)[2:] == ["bare base", "text prompt", "标签: soft prompt", "again: soft prompt"]
    said = {}
    for name in ("标签", "again"):
        (file,) = (runs / name / "evaluations").glob("*/predictions.jsonl")
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
        said |= {f"{name}: soft prompt": line["text"] for line in lines if (line["contestant"], line["row"]) == ("prompt", 0)}
    assert set(said) == {"标签: soft prompt", "again: soft prompt"}
    differing = {row[0]: row[1:] for row in Tables(page).found["Settings that are not the default"]}
    assert differing["optim.relative_lr"] == ["0.25", "0.1"]
    assert '<tr class="differs"><th scope="row">optim.relative_lr' in page
    assert '<tr><th scope="row">data.max_length' in page


def test_the_prompts_of_a_bank_have_a_column_and_a_line_each(runs):
    page = page_of(runs / "bank")
    glance = {row[0]: row[1:] for row in Tables(page).found["At a glance"]}
    result = written(runs / "bank", "result.json")["prompts"]
    assert glance[""] == ["slow", "fast"]
    assert glance["virtual tokens"] == ["13", "3"]
    assert [cell.split()[0] for cell in glance["held-out loss, best"]] == [number(one["eval_loss_after"]) for one in result.values()]
    assert len({line["lrs"][0] / line["lrs"][1] for line in steps_of(runs / "bank")}) == 1
    assert steps_of(runs / "bank")[0]["lrs"][0] != steps_of(runs / "bank")[0]["lrs"][1], "each prompt logs its own rate"
    assert re.search(r'aria-label="Learning rate: slow from .*?; fast from ', page)
    assert page.count("Cosine between rows, ") == 2


def steps_of(folder):
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event for event in events if event["event"] == "step"]


def test_an_unfinished_run_is_shown_as_far_as_it_is(copied):
    folder = copied("half")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "step", "step": 4, "los')  # a kill
    glance = {row[0]: row[1] for row in Tables(page_of(folder)).found["At a glance"]}
    assert glance["state"] == "unfinished, at step 3 of 9"
    assert glance["held-out loss, best"].endswith("step 2")
    assert "nearest tokens, with" not in page_of(folder)


def test_long_curves_are_thinned_and_said_to_be(copied, tmp_path):
    """The highest and the lowest stay, and tables stay short."""
    folder, num_steps = copied("half"), 30_000
    lines, started = [], next(line for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"started"' in line)
    for step in range(1, num_steps + 1):
        loss = 77.5 if step == 12_345 else 2 + 1 / step
        lines.append(to_line(Step(step, (loss,), (0.1,), (1.0,), (step / num_steps,), 8, 0.1)))
        if step % 10 == 0:
            held = 0.25 if step == 17_170 else 3 - step / num_steps
            lines.append(to_line(Evaluated(step, held, (held,))))
    (folder / "metrics.jsonl").write_text("\n".join([started, *lines, ""]), encoding="utf-8")
    page = page_of(folder)
    assert "rows of the step; dots: held-out rows; of every 60 steps the lowest and the highest are drawn; of every 24 evaluations" in page
    assert page.count("of every 60 steps the lowest and the highest are drawn") == 4
    assert len(page) < 1_000_000
    rows = Tables(page).found["Numbers of half"][1:]
    assert len(rows) < 50
    assert next(row for row in rows if row[0] == "17170")[2] == number(0.25)
    assert {int(row[0]) for row in rows} >= {1, num_steps}
    glance = {row[0]: row[1] for row in Tables(page).found["At a glance"]}
    assert glance["state"] == "unfinished, at step 30000 of 9"


def test_a_thinned_line_keeps_its_ends_and_what_stands_out():
    values = [float(at % 7) for at in range(10_000)]
    values[4321], values[8765] = 100.0, -100.0
    line, long = thinned(Line("loss", range(1, 10_001), values, number=3, faint=True), 100)
    assert (long, line.number, line.faint) == (200, 3, True)
    assert 100 <= len(line.x) == len(line.y) <= 102
    assert list(line.x) == sorted(line.x)
    assert (line.x[0], line.x[-1], line.y[0], line.y[-1]) == (1, 10_000, values[0], values[-1])
    assert {(4322, 100.0), (8766, -100.0)} <= set(zip(line.x, line.y, strict=True))
    whole = Line("loss", range(100), values[:100])
    assert thinned(whole, 100) == (whole, 1)


def test_inspect_adds_what_the_rows_are_worth(copied, bases, monkeypatch):
    from softprompt import cli

    folder = copied("标签")
    assert "Worth of a row" not in page_of(folder)
    for place in (folder / "checkpoints" / "step-000006", folder):
        monkeypatch.setattr("sys.argv", ["softprompt", "inspect", str(place), "model.device=cpu", "--rows", "4"])
        with pytest.raises(SystemExit):
            cli.main()
        assert ("Worth of a row" in page_of(folder)) == (place == folder), "a checkpoint is not the finished prompt"


def test_text_of_the_user_is_text(runs):
    page = page_of(runs / "标签")
    assert "<script" not in page.lower()
    assert "&lt;script&gt;alert(&#39;手机&#39;)&lt;/script&gt; &amp; more" in page


def test_a_page_needs_nothing_but_itself(runs):
    page = page_of(runs / "标签")
    assert set(re.findall(r'href="([^#"][^"]*)"', page)) == {"https://aclanthology.org/2022.naacl-main.266/"} | set(
        re.findall(r'xlink:href="(data:image/png;base64,[^"]*)"', page)
    )
    assert not re.search(r"\bsrc=|@import|url\((?!#)", page)


def test_a_report_needs_neither_torch_nor_the_base(runs, tmp_path):
    out = tmp_path / "page.html"
    code = (
        "import sys\nfrom softprompt import cli\n"
        f"sys.argv = ['softprompt', 'report', {str(runs / '标签')!r}, '--out', {str(out)!r}, '--json', {str(tmp_path / 'r.json')!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'peft', 'sklearn') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == [f"written to {out}", "[]"]
    assert MARK in out.read_text(encoding="utf-8")
    assert written(tmp_path, "r.json") == {"report": str(out), "runs": [str(runs / "标签")]}


@pytest.mark.parametrize(
    ("answer", "reference", "how", "pieces"),
    [
        ("tea ", "tea", "as the reference", [("same", "tea ")]),
        ("我要红茶", "我要绿茶", "with differences", [("same", "我要"), ("missing", "绿"), ("added", "红"), ("same", "茶")]),
        ("bring hot tea", "bring tea", "with differences", [("same", "bring "), ("added", "hot "), ("same", "tea")]),
        ('{"a": true}', '{"a": false}', "with differences", [("same", '{"a": '), ("missing", "false"), ("added", "true"), ("same", "}")]),
        ("绿 tea", "绿tea", "with differences", [("same", "绿"), ("added", " "), ("same", "tea")]),
        ("quite another thing", "茶", "different throughout", [("same", "quite another thing")]),
        (" \n", "tea", "different throughout", []),
    ],
)
def test_differences_are_marked_by_words_and_by_characters(answer, reference, how, pieces):
    assert compared(answer, reference) == (how, pieces)


# ---- what it refuses -----------------------------------------------------------------------------------------------


def test_a_report_is_replaced_and_nothing_else_is(copied):
    folder = copied("half")
    file = write_report([folder])
    file.write_text(MARK, encoding="utf-8")
    assert write_report([folder]) == file == folder / "report.html"
    assert "</html>" in file.read_text(encoding="utf-8")
    mine = folder / "config.toml"
    before = mine.read_bytes()
    with pytest.raises(RunError, match=r"config\.toml exists and was not written by softprompt report: choose another --out"):
        write_report([folder], mine)
    assert mine.read_bytes() == before
    with pytest.raises(RunError, match="is a folder: name a file"):
        write_report([folder], folder)
    with pytest.raises(RunError, match="cannot be written: No such file"):
        write_report([folder], folder / "no" / "page.html")


ODD = json.dumps(
    {"contestants": {"base": {}}, "intervals": {"base": {"loss": [1, 2]}}, "metric": "loss", "verdicts": [], "labels": ["a", "b"]}
    | {"confusion": {"base": [[1, 2], [3]]}, "calibration": None, "rows": 6, "supervised_tokens": 9}
)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", "{", r"result\.json is damaged$"),
        ("result.json", "[]", r"result\.json is damaged, or of another version of softprompt: Input should be"),
        ("inspection.json", '{"seed-0": {"rows": 3}}', r"inspection\.json is damaged, or .*: base: Field required"),
        ("data.json", '{"steps": 3}', r"data\.json is damaged, or .*: train: Field required"),
        ("metrics.jsonl", '{"event"\n{"event": "step"}\n', r"metrics\.jsonl:1: the line is damaged"),
        ("metrics.jsonl", '{"event": "step", "step": 1}\n', r"metrics\.jsonl:1: the line is damaged, or .*: losses: Field required"),
        ("metrics.jsonl", '[]\n', r"metrics\.jsonl:1: the line is damaged"),
        ("evaluations/x/evaluation.json", "\xff", r"evaluation\.json is damaged"),
        ("evaluations/x/evaluation.json", ODD, r"evaluation\.json is damaged, or .*: the confusion has another size than the labels"),
        ("evaluations/x/evaluation.json", '{"rows": 1}', r"evaluation\.json is damaged, or .*: contestants: Field required"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_sentence(copied, name, text, message):
    folder = copied("标签")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=message) as error:
        write_report([folder])
    assert "\n" not in str(error.value)
    assert not (folder / "report.html").exists()


def test_what_is_no_run_is_refused(runs, tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"is not a run folder \(no config\.toml\)"):
        write_report([tmp_path])
    with pytest.raises(RunError, match="give --out FILE"):
        write_report([runs / "half", runs / "bank"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"pip install 'softprompt\[report\]'"):
        write_report([runs / "half"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


# ---- in a real browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium, found on this machine. Where CI is set its absence is a failure."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing = "no browser to look at the report with: apt-get install chromium fonts-noto-cjk"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory):
    """Reports of one run, of two, of a bank, and of a run that was stopped."""
    place = tmp_path_factory.mktemp("pages")
    which = {"one": ["标签"], "two": ["标签", "again"], "bank": ["bank"], "half": ["half"]}
    return {name: write_report([runs / run for run in those], place / f"{name}.html") for name, those in which.items()}


@pytest.fixture
def opened(browser):
    """opened(file, width=390, color_scheme="dark"): the page, of which nothing may complain or ask for anything."""
    contexts, troubles = [], []

    def open_page(file, width=1100, **how):
        context = browser.new_context(viewport={"width": width, "height": 800}, **how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


WHICH = ["one", "two", "bank", "half"]


@pytest.mark.parametrize("which", WHICH)
def test_a_page_fits_every_width_and_looks_different_in_the_dark(opened, pages, which):
    shots = {}
    for width in (1100, 390, 320):
        for scheme in ("light", "dark"):
            page = opened(pages[which], width, color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            shots[width, scheme] = page.screenshot(full_page=True)
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 3 * 128) == (scheme == "dark")
            assert page.evaluate("[...document.querySelectorAll('svg.chart')].every(one => one.getBoundingClientRect().width > 150)")
    assert len(set(shots.values())) == len(shots)


@pytest.mark.parametrize("which", WHICH)
def test_everything_has_a_name_for_people_who_cannot_see_it(opened, pages, which):
    page = opened(pages[which])
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    nodes = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    named = {"image", "figure", "table", "link", "region", "heading", "navigation", "article", "DisclosureTriangle", "columnheader"}
    roles = {role for role, _ in nodes}
    assert {"image", "figure", "table", "link", "region", "heading"} <= roles, roles
    assert [role for role, name in nodes if role in named and not name.strip()] == []
    pictures = [name for role, name in nodes if role == "image"]
    assert len(set(pictures)) == len(pictures) >= 5
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(set(ids)) == len(ids)


def test_charts_take_the_colours_of_the_page(opened, pages):
    def stroke(scheme):
        page = opened(pages["two"], color_scheme=scheme)
        own = "[...document.querySelectorAll('svg.chart path')].map(one => getComputedStyle(one).stroke)"
        return {color for color in page.evaluate(own) if color != "none"}

    assert len(stroke("light")) > 3
    assert not stroke("light") & stroke("dark")


def test_chinese_is_drawn(opened, pages):
    """Without a font every character is the same box."""
    page = opened(pages["one"])
    assert page.locator("h1").inner_text() == "标签"
    drawn = page.evaluate(
        """[...'标签 '].map(character => {
            const canvas = document.createElement('canvas'), context = canvas.getContext('2d');
            context.font = getComputedStyle(document.querySelector('h1')).font;
            context.fillText(character, 20, 60);
            return canvas.toDataURL();
        })"""
    )
    assert len(set(drawn)) == 3, "apt-get install fonts-noto-cjk"


def test_text_of_the_user_does_nothing_in_the_browser(opened, pages):
    page = opened(pages["one"])
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    assert page.get_by_text(SCRIPT).count() > 0
    assert page.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("which", WHICH)
def test_a_page_prints_whole_and_light(opened, pages, which):
    page = opened(pages[which], color_scheme="dark")
    shut = "document.querySelector('details:not([open]) table').checkVisibility({contentVisibilityAuto: true})"
    assert not page.evaluate(shut)
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") > 1
    page.emulate_media(media="print")
    page.wait_for_function(shut, timeout=20_000)  # what is folded on the screen is printed; laid out with the next frame
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
