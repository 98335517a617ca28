"""The page that a server shows: what it serves, and how it behaves in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import httpx
import parrot
import pytest
import tiny
from talker import Talker

from softprompt.artifact import load_prompt
from softprompt.config import load_config
from softprompt.data import load_examples
from softprompt.evaluation import Contest, evaluate
from softprompt.events import Sampled, to_line
from softprompt.report import MARK
from softprompt.serve.asking import Model
from softprompt.serve.guard import Keys
from softprompt.serve.own import start
from softprompt.serve.pages import HOME, Reports, last_part
from softprompt.serve.samples import Sample, samples_of
from softprompt.serve.service import Settings
from softprompt.training import train

MARKUP = "<img src=x onerror=alert(1)>"
WISH = "Repeat the drink."
TOKENS = 8
BOTH_SPEAK = "[...document.querySelectorAll('.answer > .said')].filter(one => one.textContent.length > 20).length === 2"


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """A run with an evaluation with answers."""
    place, base = tmp_path_factory.mktemp("page"), bases()
    rows = tiny.write_rows(place / "rows.jsonl", tiny.some_rows(24))
    held = tiny.write_rows(place / "held.jsonl", tiny.some_rows(8, lambda n: {"prompt": f"{MARKUP} 水 {n}", "completion": f"水 {n}"}))
    settings = [f"model.name={base.name}", "model.device=cpu", f"data.train={rows}", f"data.eval={held}", f"prompt.text={WISH}"]
    config = load_config(None, [*settings, "train.steps=3", f"train.out={place / 'polite'}"])
    list(train(config, base=base))
    prompt = load_prompt(place / "polite", base)
    evaluate(base, prompt, load_examples(str(held)), Contest(answers=True, max_new_tokens=TOKENS), out=place / "polite" / "evaluations")
    return place / "polite"


@pytest.fixture(scope="module")
def models(run):
    card = json.loads((run / "prompt" / "card.json").read_text(encoding="utf-8"))
    polite = Model("polite", "prompt", 0, card["num_virtual_tokens"], card, run / "prompt", run)
    other = replace(polite, name=MARKUP, card={**card, "text": MARKUP, "system": "Be brief.", "template": "chat"}, report=None)
    return [Model("tiny-base", "base", 0), polite, other, Model("both", "ensemble", 0, members=("polite", MARKUP))]


@pytest.fixture
def server(models):
    """The engine of a server without a key, and its address."""
    engine = Talker(models)
    with parrot.running(engine) as (address, _):
        engine.address = f"{address}/"
        yield engine


def get(address, **headers):
    return httpx.get(address, headers=headers, timeout=60)


# ---- what it serves --------------------------------------------------------------------------------------------------


def test_files_come_with_a_policy_and_a_browser_asks_whether_they_changed(server):
    kinds = {"": "text/html", "page/style.css": "text/css", "page/report.css": "text/css"}
    kinds |= {f"page/{name}.js": "text/javascript" for name in ("view", "sheet", "stream", "words")}
    for path, kind in kinds.items():
        answer = get(server.address + path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        again = get(server.address + path, **{"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content, answer.headers["cache-control"]) == (304, b"", "no-cache")
    for path in ("page/pages.py", "page/..%2fpages.py", "page/", "page/index.html"):
        assert get(server.address + path).status_code == 404
    assert set(kinds) - {"", "page/report.css"} | {"page/index.html"} == {f"page/{file.name}" for file in HOME.iterdir()}


def test_the_list_says_what_can_answer_and_gives_rows_to_try(server, run):
    base, polite, other, both = get(server.address + "page/models.json").json()
    assert (base["kind"], base["text"], base["report"], base["samples"]) == ("base", None, None, [])
    assert (polite["text"], polite["report"]) == (WISH, "page/report/polite")
    assert polite["virtual"] == len(WISH)
    assert polite["samples"] == [{"question": f"{MARKUP} 水 {n}", "wanted": f"水 {n}"} for n in range(6)]
    assert (other["name"], other["text"], other["system"], other["report"]) == (MARKUP, MARKUP, "Be brief.", None)
    assert both["members"] == ["polite", MARKUP]


def test_a_card_names_no_place_of_the_machine(server, run, bases):
    card = get(server.address + "page/card/polite").json()
    stored = json.loads((run / "prompt" / "card.json").read_text(encoding="utf-8"))
    assert stored["base"]["name"] == bases().name
    assert card == stored | {"base": stored["base"] | {"name": last_part(bases().name)}}
    assert "/" not in card["base"]["name"]
    assert [last_part(name) for name in ("google/gemma", r"C:\models\gemma", "/models/gemma/")] == ["google/gemma", "gemma", "gemma"]
    for name in ("tiny-base", "nobody", "..%2f..%2fpolite"):
        assert get(f"{server.address}page/card/{name}").status_code == 404


def test_rows_to_try_come_from_evaluations_else_from_the_run_itself(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (answers,) = copy.glob("evaluations/*/predictions.jsonl")
    with open(answers, "a", encoding="utf-8") as file:
        file.write('{"contestant": "base", "ro')  # a kill
    assert len(samples_of(copy)) == 6
    answers.write_text("{}\n[]\n", encoding="utf-8")
    assert samples_of(copy) == ()
    said = Sampled(3, (("水?", "水", "茶"), ("x" * 5_000, "too long", "茶")))
    with open(copy / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(to_line(said) + "\n")
    assert samples_of(copy) == (Sample("水?", "水"),)
    assert samples_of(tmp_path / "nowhere") == ()


def test_a_report_is_drawn_when_asked_for_and_again_when_its_run_has_changed(run, tmp_path):
    copy, reports = shutil.copytree(run, tmp_path / "run"), Reports()
    first = reports.drawn(copy)
    assert reports.drawn(copy) is first
    result = json.loads((copy / "result.json").read_text(encoding="utf-8"))
    (copy / "result.json").write_text(json.dumps(result | {"steps": 77}), encoding="utf-8")
    assert "finished after 3 steps" in first
    assert "finished after 77 steps" in reports.drawn(copy)


def test_reports_come_in_a_sandbox_and_what_is_missing_is_a_sentence(models, run, tmp_path):
    bad = shutil.copytree(run, tmp_path / "bad")
    (bad / "result.json").write_text("{", encoding="utf-8")
    with parrot.running(Talker([*models, replace(models[1], name="bad", report=bad)])) as (address, _):
        answer = get(address + "/page/report/polite")
        assert answer.status_code == 200
        assert MARK in answer.text
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "style-src 'unsafe-inline'", "sandbox"} <= set(policy)
        assert "<script" not in answer.text
        for name, status, sentence in (
            ("tiny-base", 404, "tiny-base lies in no run's folder: there is no report"),
            ("bad", 500, f"the report cannot be drawn: {bad / 'result.json'} is damaged"),
        ):
            answer = get(f"{address}/page/report/{name}")
            assert (answer.status_code, answer.text, answer.headers["content-type"]) == (status, sentence, "text/plain; charset=utf-8")


def test_what_the_page_shows_is_for_those_who_have_the_key(models):
    with parrot.running(Talker(models), Settings(Keys(["s3cret"]))) as (address, _):
        for path in ("page/models.json", "page/card/polite", "page/report/polite", "page/report/polite?key=x", "page/report/polite?key=é"):
            assert get(f"{address}/{path}").status_code == 401
        assert get(address).status_code == 200
        _, polite, *_ = get(address + "/page/models.json", Authorization="Bearer s3cret").json()
        assert get(f"{address}/{polite['report']}").status_code == 200
        assert get(f"{address}/{polite['report']}".replace("polite", "tiny-base")).status_code == 401, "a link opens one report"


def test_the_page_needs_no_torch(run):
    code = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom softprompt.serve.pages import Reports, pages\n"
        "from softprompt.serve.asking import Model\nfrom softprompt.serve.samples import samples_of\n"
        f"assert pages(None).routes and samples_of(Path({str(run)!r})) and Reports().drawn(Path({str(run)!r}))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'peft', 'sklearn') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


# ---- in a real browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium, found on this machine. Where CI is set its absence is a failure."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing = "no browser to look at the page with: apt-get install chromium fonts-noto-cjk"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """opened(address, width=390, color_scheme="dark"): the page, of which nothing may complain, or ask another host for anything.
    `noted`: parts of what the browser may write into its console, since the test wants an answer with an error."""
    contexts, troubles = [], []

    def open_page(address, width=1100, *, noted=(), **how):
        context = browser.new_context(viewport={"width": width, "height": 900}, **({"locale": "en-US"} | how))
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()

        page.on("console", lambda message: any(one in message.text for one in noted) or troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("request", lambda request: None if request.url.startswith((address, "data:")) else troubles.append(request.url))
        page.goto(address)
        until(page, "document.querySelector('#side-0').length || !document.querySelector('#unlock').hidden")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def until(page, expression):
    """Waits until an expression holds. Playwright's own way evaluates text, which the policy forbids."""
    for _ in range(1_000):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(10)
    raise AssertionError(f"never: {expression}")


def open_sheet(page, opener):
    page.click(opener)
    page.wait_for_selector("dialog[open]")


def ask(page, text):
    page.fill("#question", text)
    page.press("#question", "Control+Enter")


def answered(page):
    page.wait_for_selector("#stop", state="hidden")
    return [[one.text_content() for one in turn.query_selector_all(".answer > .said")] for turn in page.query_selector_all("article")]


def choose(page, first, second):
    for side, kind in enumerate((first, second)):
        page.select_option(f"#side-{side}", kind)


def of(server, model):
    """What a model was asked so far."""
    asked = [one.text for one in server.asked if one.model == model]
    return [one if isinstance(one, str) else [{"role": turn.role, "content": turn.content} for turn in one] for one in asked]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 360, 320])
def test_the_page_fits_every_width_in_both_themes(opened, server, width, scheme):
    page = opened(server.address, width, color_scheme=scheme)
    choose(page, f"text {MARKUP}", f"prompt {MARKUP}")
    page.click("#settings summary")
    ask(page, "w" * 300 + " 水" * 60)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 3 * 128) == (scheme == "dark")
    boxes = [one.bounding_box() for one in page.query_selector_all(".answer")]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1100), "beside each other where there is room, else below each other"
    for opener in (".side .link", ".answer .link"):
        open_sheet(page, f"{opener} >> nth=0")
        assert page.evaluate("document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth")
        page.keyboard.press("Escape")


def test_appearance_and_language_can_be_chosen_and_are_kept(opened, server):
    page = opened(server.address, color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.select_option("#appearance", "dark")
    page.select_option("#language", "zh")
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    page.wait_for_selector("h1:text('同一个问题，两个回答')")
    assert page.evaluate(paper) == dark
    page.select_option("#appearance", "")
    assert page.evaluate(paper) == light


def test_the_page_speaks_the_browsers_language_and_has_every_word_in_both(opened, server):
    page = opened(server.address, locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh"
    shown = page.inner_text("body")
    for word in ("同一个问题，两个回答", "tiny-base 上的 2 个软提示", "polite 的文本提示", "提问", "可以试试的任务样题", "设置"):
        assert word in shown
    left = page.evaluate("[...document.querySelectorAll('[data-word]')].filter(one => !/[\\u4e00-\\u9fff]/.test(one.textContent)).length")
    assert left == 0, "every word of the page itself"
    trees = page.evaluate(
        "import('./page/words.js').then(({WORDS}) => Object.values(WORDS).map(words => JSON.stringify(words, "
        "(name, value) => typeof value === 'string' || typeof value === 'function' ? 0 : value)))"
    )
    assert len(trees) == 2
    assert json.loads(trees[0]) == json.loads(trees[1])
    assert page.evaluate("import('./page/words.js').then(({startingLanguage}) => startingLanguage('xx'))") == "zh"
    assert opened(server.address, locale="fr-FR").inner_text("h1") == "One question, two answers"


def test_both_answers_come_at_once_and_say_what_they_cost(opened, server):
    page = opened(server.address)
    ask(page, "for ever")
    until(page, BOTH_SPEAK)
    assert page.get_attribute("#turns", "aria-busy") == "true"
    page.keyboard.press("Escape")
    ask(page, "水 on the way")
    assert answered(page)[1] == [f"{name} 说：水 on the way <b>bold</b> &amp; so on" for name in ("tiny-base", "polite")]
    assert page.get_attribute("#turns", "aria-busy") == "false"
    assert page.inner_text("#status") == "Both answers are there."
    costs = [re.sub(r"\d+\.\d\d s", "TIME", one.inner_text().replace("\n", " ")) for one in page.query_selector_all(".cost")]
    common = "Answer 9 tokens First token TIME Total TIME Prompt tokens 1,200{} Cached 20"
    assert costs == [common.format(""), common.format(f" + {len(WISH)} virtual")]
    seconds = [float(one) for one in re.findall(r"(\d+\.\d\d) s", page.inner_text(".cost"))]
    assert seconds[0] < seconds[1]


def test_a_text_prompt_is_asked_as_an_evaluation_asks_it(opened, server):
    """The base, with the text in front of the system turn of the rows; in the first turn where the template knows no system."""
    page = opened(server.address, noted=["status of 400"])
    choose(page, f"text {MARKUP}", "base tiny-base")
    ask(page, "hello")
    answered(page)
    hello = [{"role": "user", "content": "hello"}]
    wish = f"{MARKUP}\nBe brief."
    assert sorted(of(server, "tiny-base"), key=len) == [hello, [{"role": "system", "content": wish}, *hello]]
    server.asked.clear()
    page.click("#anew")
    ask(page, "no system")
    answered(page)
    asked = [{"role": "user", "content": "no system"}]
    told, *others = sorted(of(server, "tiny-base"), key=len, reverse=True)
    assert told == [{"role": "system", "content": wish}, *asked]
    assert sorted(others, key=str) == [[{"role": "user", "content": f"{wish}\nno system"}], asked]


def test_where_the_prompt_learned_from_plain_dialogue_so_is_its_text_prompt_asked(opened, server):
    page = opened(server.address)
    assert [page.input_value(f"#side-{side}") for side in (0, 1)] == ["text polite", "prompt polite"]
    for text in ("one", "two"):
        ask(page, text)
        ((said, _), *_) = reversed(answered(page))
    first, second = of(server, "tiny-base")
    assert first == f"{WISH}\n\nHuman: one\n\nAssistant:"
    assert second == f"{first} {said.replace('two', 'one')}\n\nHuman: two\n\nAssistant:"
    assert server.asked[0].stops == ("\n\nHuman:",) or server.asked[1].stops == ("\n\nHuman:",)


def test_a_template_that_the_base_is_not_asked_in_is_spoken_of(opened, models):
    base, polite, *_ = models
    own = replace(polite, name="own", card={**polite.card, "template": "{{ prompt }}:"})
    with parrot.running(Talker([base, polite, own])) as (address, _):
        page = opened(f"{address}/")
        sentence = "Asked in the base's own template, not in that of the prompt."
        assert page.inner_text(".facts >> nth=0").count(sentence) == 0
        page.select_option("#side-0", "text own")
        assert page.inner_text(".facts >> nth=0").count(sentence) == 1


def test_settings_go_along_and_wrong_ones_do_not(opened, server):
    page = opened(server.address)
    page.click("#settings summary")
    page.fill("#temperature", "3")
    ask(page, "hello")
    assert page.evaluate("document.activeElement.id") == "temperature"
    assert not page.query_selector_all("article")
    page.fill("#temperature", "0.7")
    page.fill("#tokens", "9")
    page.fill("#seed", "5")
    ask(page, "hello")
    answered(page)
    assert len(server.asked) == 2
    for one in server.asked:
        assert (one.sampling.temperature, one.sampling.max_new_tokens, one.sampling.seed) == (0.7, 9, 5)


def test_each_side_keeps_its_own_conversation(opened, server):
    page = opened(server.address)
    choose(page, "base tiny-base", "prompt polite")
    said = []
    for text in ("one", "two"):
        ask(page, text)
        said = answered(page)
    for side, name in enumerate(("tiny-base", "polite")):
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": said[0][side]}, {"role": "user", "content": "two"}]
        assert of(server, name) == [turns[:1], turns]
    assert said[0][0] != said[0][1]
    choose(page, "base tiny-base", f"prompt {MARKUP}")
    ask(page, "three")
    answered(page)
    assert len(of(server, "tiny-base")[-1]) == 5
    assert of(server, MARKUP) == [[{"role": "user", "content": "three"}]], "another speaker has not said what the first one said"
    page.click("#anew")
    ask(page, "four")
    assert len(answered(page)) == 1
    assert of(server, "tiny-base")[-1] == [{"role": "user", "content": "four"}]


@pytest.mark.parametrize("how", ["key", "button"])
def test_stopping_frees_the_server_and_forgets_the_turn(opened, server, how):
    page = opened(server.address)
    ask(page, "for ever")
    until(page, BOTH_SPEAK)
    page.keyboard.press("Escape") if how == "key" else page.click("#stop")
    (stopped,) = answered(page)
    assert all(len(said) > 20 for said in stopped), "what has come stays"
    assert page.inner_text(".answer >> nth=0").endswith("Stopped. This turn is no part of the conversation.")
    assert page.evaluate("document.activeElement.id") == "question"
    parrot.until(lambda: len(server.given_up) == 2)
    ask(page, "next")
    answered(page)
    assert of(server, "polite")[-1] == [{"role": "user", "content": "next"}]


def test_what_others_say_is_text(opened, server):
    page = opened(server.address)
    choose(page, f"text {MARKUP}", f"prompt {MARKUP}")
    ask(page, MARKUP)
    assert answered(page) == [[f"{name} 说：{MARKUP} <b>bold</b> &amp; so on" for name in ("tiny-base", MARKUP)]]
    assert page.inner_text(".asked") == MARKUP
    open_sheet(page, ".side .link >> nth=0")
    assert page.inner_text("#sheet-title") == f"The card of {MARKUP}"
    assert f"\t{MARKUP}\n" in page.inner_text("#sheet-body")
    assert page.evaluate("document.querySelectorAll('img, b').length") == 0


def test_thoughts_and_the_end_of_an_answer_are_said(opened, server):
    page = opened(server.address)
    ask(page, "think")
    answered(page)
    page.click("summary:text('Thoughts') >> nth=1")
    assert page.inner_text("details .said >> nth=1") == "hm, hm"
    ask(page, "long")
    answered(page)
    assert "The answer reached the most tokens allowed." in page.inner_text(".answer >> nth=3")


def test_what_goes_wrong_is_said_where_the_answer_would_stand(opened, server):
    page = opened(server.address, noted=["status of 429"])
    ask(page, "busy")
    answered(page)
    assert [one.inner_text() for one in page.query_selector_all(".trouble")] == ["too many requests wait (try again in 7 s)"] * 2
    ask(page, "break")
    answered(page)
    assert [one.inner_text() for one in page.query_selector_all(".trouble")][2:] == ["this server made a mistake; its log says more"] * 2
    ask(page, "hello")
    assert "polite 说：hello" in answered(page)[-1][1]
    assert of(server, "polite")[-1] == [{"role": "user", "content": "hello"}], "a turn that failed is no part of the conversation"


def test_a_server_that_goes_away_is_spoken_of(opened, models):
    with parrot.running(Talker(models)) as (address, server):
        page = opened(f"{address}/", noted=["net::ERR_INCOMPLETE_CHUNKED_ENCODING", "net::ERR_CONNECTION_REFUSED"])
        ask(page, "for ever")
        until(page, BOTH_SPEAK)
        server.should_exit = True
        answered(page)
        ask(page, "hello")
        answered(page)
    told = [one.inner_text() for one in page.query_selector_all(".trouble")]
    assert told == ["The server broke the answer off."] * 2 + ["The server cannot be reached."] * 2


def test_a_row_to_try_is_put_into_the_question_and_its_answer_is_shown(opened, server):
    page = opened(server.address)
    assert len(page.query_selector_all("#samples button")) == 6
    page.click("#samples button >> nth=2")
    assert page.input_value("#question") == f"{MARKUP} 水 2"
    assert server.asked == []
    page.keyboard.press("Control+Enter")
    answered(page)
    assert page.inner_text(".wanted") == "Wanted: 水 2"
    choose(page, "base tiny-base", f"prompt {MARKUP}")
    assert page.is_hidden("#tries")


def test_the_report_is_one_click_away(opened, server):
    page = opened(server.address)
    with page.context.expect_page() as coming:
        page.click("a:text('Report of its run') >> nth=0")
    report = coming.value
    report.wait_for_selector("h1:text('polite')")
    assert report.evaluate("getComputedStyle(document.querySelector('table')).borderCollapse") == "collapse", "its styles may be used"


def test_a_key_is_asked_for_and_forgotten_with_the_tab(opened, models):
    with parrot.running(Talker(models), Settings(Keys(["s3cret"]))) as (address, _):
        page = opened(f"{address}/", noted=["status of 401"])
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.is_hidden("#asking")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The server does not know this key.")
        page.fill("#key", "s3cret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#unlock", state="hidden")
        until(page, "document.activeElement.id === 'question'")
        ask(page, "hello")
        assert "polite 说：hello" in answered(page)[0][1]
        open_sheet(page, ".answer .link >> nth=0")
        code = page.inner_text("#sheet-body")
        assert "s3cret" not in code
        assert "Authorization: Bearer $API_KEY" in code
        assert page.evaluate("Object.values(localStorage).concat(document.cookie).join()").count("s3cret") == 0
        page.reload()
        until(page, "document.querySelector('#side-0').length")
        other = page.context.new_page()
        other.goto(address)
        other.wait_for_selector("#unlock", state="visible")


def test_the_code_asks_the_same(opened, server):
    page = opened(server.address)
    choose(page, f"text {MARKUP}", "prompt polite")
    ask(page, 'it\'s "水" \\ $HOME `id`\nand more')
    answered(page)
    wanted = {one.model: one for one in server.asked}
    for side, name in enumerate(("tiny-base", "polite")):
        open_sheet(page, f".answer .link >> nth={side}")
        for way, command in enumerate((["sh", "-c"], [sys.executable, "-c"])):
            text = page.text_content(f"pre >> nth={way}")
            server.asked.clear()
            said = subprocess.run([*command, text], capture_output=True, text=True, timeout=60, check=True).stdout
            assert f"{name} 说：it's" in said
            assert server.asked == [wanted[name]]
        page.keyboard.press("Escape")


def test_the_page_can_be_used_by_keyboard_alone(opened, server):
    page = opened(server.address)
    focused = "document.activeElement.id || document.activeElement.textContent"
    assert page.evaluate(focused) == "question"
    page.mouse.click(1, 1)
    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
    facts = ["Card", "Report of its run"]
    tries = "Questions of the task to try"
    assert order == ["language", "appearance", "side-0", *facts, "side-1", *facts, "question", "Ask", tries, f"{MARKUP} 水 0"]
    page.focus("#side-0")
    page.keyboard.press("ArrowUp")
    assert page.input_value("#side-0") == "base tiny-base"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.evaluate(focused) == "close"
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "Card", "back to where the sheet was opened"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("hello")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert "polite 说：hello" in answered(page)[0][1]
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"


def test_everything_has_a_name_for_a_screen_reader(opened, server):
    page = opened(server.address)
    page.click("#settings summary")
    ask(page, "think")
    answered(page)
    open_sheet(page, ".answer .link >> nth=0")
    shown = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    page.keyboard.press("Escape")
    shown += page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "combobox", "textbox", "spinbutton", "log", "article", "dialog", "group", "DisclosureTriangle"}
    found = [(one["role"]["value"], one["name"]["value"]) for one in shown if not one["ignored"] and one["role"]["value"] in roles]
    assert [role for role, name in found if not name and role != "group"] == []
    assert {role for role, _ in found} >= {"button", "link", "combobox", "textbox", "spinbutton", "log", "article", "group", "dialog"}
    assert {name for role, name in found if role == "combobox"} == {"Language", "Appearance", "First answer", "Second answer"}
    assert {"The card of polite", "The request to polite as code", "Copy: curl"} <= {name for role, name in found if role == "button"}
    live = page.query_selector("#turns")
    assert (live.get_attribute("role"), live.get_attribute("aria-live")) == ("log", "polite")


def test_nothing_moves_for_those_who_want_it_still(opened, server):
    for motion, name in (("reduce", "none"), ("no-preference", "blink")):
        page = opened(server.address, reduced_motion=motion)
        ask(page, "for ever")
        page.wait_for_selector(".said:not(:empty)")
        assert page.evaluate("getComputedStyle(document.querySelector('.answer > .said'), '::after').animationName") == name
        page.keyboard.press("Escape")
        answered(page)


def test_the_page_gets_the_answers_that_an_evaluation_gets(opened, run, bases):
    """Over the real engine: a prompt and its text prompt."""
    (file,) = run.glob("evaluations/*/predictions.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    wanted = {(one["contestant"], one["row"]): one["text"] for one in lines}
    with parrot.running(start(bases(), {"polite": run})) as (address, _):
        page = opened(f"{address}/")
        page.click("#settings summary")
        page.fill("#tokens", str(TOKENS))
        for row in range(4):
            ask(page, f"{MARKUP} 水 {row}")
            assert answered(page) == [[wanted["text", row], wanted["prompt", row]]]
            assert page.inner_text(".wanted") == f"Wanted: 水 {row}"
            page.click("#anew")
    assert len({wanted[name, row] for name in ("text", "prompt") for row in range(4)}) > 2, "all say the same: nothing was compared"
