"""The page in a real Chromium: the whole flow by mouse and keyboard, its looks, its manners."""

import itertools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright import sync_api

import jaxtune
from jaxtune.serve.api.service import Service
from jaxtune.serve.store import keys, states
from tests.serve import conftest, seeded

Page, expect = sync_api.Page, sync_api.expect
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
DEMO = Path(jaxtune.__file__).parent / "demo" / "train.jsonl"
VIEWS = ("data", "new", "jobs", "compare", "playground", "models")
FACES = {
    "light": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}},
    "chinese": {"viewport": {"width": 1280, "height": 860}, "locale": "zh-CN"},
}
NAMELESS = """() => [...document.querySelectorAll("input, select, textarea, button, a, dialog, [role], [tabindex='0']")]
  .filter((e) => e.checkVisibility() && !["status", "alert", "note", "log"].includes(e.getAttribute("role")))
  .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()
    || (e.getAttribute("aria-labelledby") && document.getElementById(e.getAttribute("aria-labelledby")).textContent)))
  .map((e) => e.outerHTML)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[tuple[str, Service, dict[str, str]]]:
    """The service with jobs in it, and a chat that answers by itself."""
    service = conftest.make_service(tmp_path_factory.mktemp("page"))
    made = seeded.fill(service)
    seeded.add_file(service, "animals.jsonl", b"".join(DEMO.read_bytes().splitlines(keepends=True)[:40]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "make_app", seeded.chatting(conftest.make_app))
        with conftest.serving(service) as url:
            yield url, service, made
    service.database.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with sync_api.sync_playwright() as p:
        found = p.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield found
        found.close()


class Visit:
    """A tab, and what it did that it should not have done."""

    def __init__(self, browser: sync_api.Browser, url: str, **face) -> None:
        self.context = browser.new_context(reduced_motion="reduce", **face)
        self.page, self.url, self.faults = self.context.new_page(), url, []
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda m: self.heard(m.type, m.text))
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.on("request", self.asked)
        self.refused: list[int] = []  # statuses of answers that a test provokes
        self.page.on("response", lambda r: self.refused.append(r.status) if r.status >= 400 else None)

    def heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and "Failed to load resource" not in text:
            self.faults.append(text)

    def asked(self, request: sync_api.Request) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.faults.append(f"asked {request.url}")

    def go(self, view: str) -> Page:
        self.page.goto(f"{self.url}/#/{view}")
        expect(self.page.locator("h1")).to_be_visible()
        return self.page


@pytest.fixture
def visit(browser, site, request) -> Iterator[Visit]:
    made = Visit(browser, site[0], **FACES[getattr(request, "param", "light")])
    yield made
    made.context.close()
    assert made.faults == []


def test_from_file_to_job(visit: Visit, site, tmp_path: Path):
    _, service, _ = site
    page = visit.go("data")
    (tmp_path / "mine.jsonl").write_bytes(b"".join(DEMO.read_bytes().splitlines(keepends=True)[:30]))
    page.get_by_label("Drop files here").set_input_files(tmp_path / "mine.jsonl")
    page.get_by_role("link", name="mine.jsonl").click()
    expect(page.get_by_text("This file can be trained on.")).to_be_visible(timeout=60_000)
    expect(page.locator("mark", has_text="The beaver eats leaves.")).to_be_visible(timeout=60_000)
    expect(page.get_by_role("img", name=re.compile("Tokens of an example"))).to_be_visible()
    page.get_by_role("link", name="Tune a model on it").click()
    expect(page.get_by_label("Training file")).to_have_value(re.compile("file-"))
    page.get_by_label("Suffix").fill("mine")
    page.get_by_label("Epochs").fill("99")
    page.get_by_role("button", name="Start the job").click()
    epochs = page.get_by_label("Epochs")
    expect(epochs).to_have_attribute("aria-invalid", "true")
    expect(epochs).to_be_focused()
    assert "99 is above 50" in page.locator(f"#{epochs.get_attribute('id')}-wrong").inner_text()
    epochs.fill("2")
    page.get_by_text("The same with the OpenAI client").click()
    expect(page.locator("code", has_text='"n_epochs": 2')).to_be_visible()
    page.get_by_role("button", name="Start the job").click()
    expect(page.get_by_role("heading", level=1, name="mine")).to_be_visible()
    expect(page.locator(".head .state")).to_have_text("Checking files")
    job = page.url.rpartition("/")[2]

    with service.database.write() as session:
        states.move(session, job, states.QUEUED, "Files validated, moving job to queued state")
        started = states.move(session, job, states.RUNNING, "Fine-tuning job started")
        started.progress = {"step": 2, "total_steps": 8, "tokens_per_second": 900.0}
        for step, loss in ((1, 2.0), (2, 1.5)):
            data = {"step": step, "total_steps": 8, "train_loss": loss}
            states.say(session, job, f"Step {step}/8: training loss={loss}", data=data)
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "25")
    expect(page.locator("polyline")).to_have_count(1)
    expect(page.get_by_role("list", name="Events")).to_contain_text("Fine-tuning job started")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".head .state")).to_have_text("Paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".head .state")).to_have_text("Queued")
    page.get_by_role("button", name="Cancel job").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel job").click()
    expect(page.locator(".head .state")).to_have_text("Cancelled")
    expect(page.get_by_role("button", name="Pause")).to_have_count(0)
    assert visit.refused == [400]


def test_curves_are_read_by_keys_and_pointer(visit: Visit, site):
    page = visit.go(f"jobs/{site[2]['first']}")
    chart = page.get_by_role("slider", name=re.compile("^Loss"))
    expect(chart).to_have_attribute("aria-valuetext", re.compile("step 120: Training loss 0.1"))
    chart.focus()
    page.keyboard.press("ArrowLeft")
    expect(chart).to_have_attribute("aria-valuenow", "119")
    page.keyboard.press("Home")
    expect(page.locator(".chart .legend").first).to_contain_text("step 1")
    chart.hover()
    expect(chart).to_have_attribute("aria-valuenow", re.compile("^(5|6)"))
    page.get_by_text("As a table").first.click()
    expect(page.get_by_role("region", name="Loss").get_by_role("row", name=re.compile("^120 "))).to_be_visible()
    page.get_by_text("Log", exact=True).click()
    expect(page.locator("pre.log")).to_contain_text("step 2  loss 1.98")
    assert page.get_by_role("link", name="Try the checkpoint of step 80").count() == 1


def test_runs_are_compared(visit: Visit, site):
    page = visit.go("compare")
    expect(page.locator("polyline")).to_have_count(2)
    expect(page.get_by_role("row", name=re.compile("Rate multiplier.*differs"))).to_be_visible()
    page.get_by_role("checkbox", name=re.compile("^animals …")).check()
    expect(page.locator("polyline")).to_have_count(3)
    assert page.url.count("ftjob-") == 3
    page.get_by_label("Measure").select_option("full_valid_loss")
    expect(page.get_by_text("None of the chosen jobs has measured this.")).to_be_visible()


def test_two_models_answer_side_by_side(visit: Visit, site):
    page = visit.go("playground")
    page.get_by_label("Message", exact=True).fill("What does the heron eat?")
    page.keyboard.press("Enter")
    tuned = page.get_by_role("log", name="The other")
    expect(tuned).to_contain_text("The heron eats fish. <img src=x>")  # as text
    expect(page.get_by_role("log", name="One model")).to_contain_text("long story")
    expect(tuned).to_contain_text("6 tokens in")
    assert page.locator(".talk img").count() == 0
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("Tell it slowly")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    expect(tuned).to_contain_text("stopped")
    page.get_by_label("Message", exact=True).fill("Now break")
    page.get_by_role("button", name="Send").click()
    expect(tuned.get_by_role("alert")).to_contain_text("the model was unloaded")
    page.get_by_role("button", name="Start over").click()
    expect(tuned).to_contain_text("Answers appear here")
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Temperature").fill("hot")
    page.get_by_label("Message", exact=True).fill("Hi")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")


def test_models_are_looked_at_taken_away_and_deleted(visit: Visit, site, tmp_path: Path):
    _, service, _ = site
    seeded.add_job(service, "to-go")
    page = visit.go("models")
    page.get_by_role("button", name=re.compile("^Model card of ft:demo:local:to-go:[^:]+$")).click()
    expect(page.get_by_role("dialog")).to_contain_text("<b>Not bold</b>")
    page.keyboard.press("Escape")
    with page.expect_download() as taken:
        page.get_by_role("button", name=re.compile("^Download ft:demo:local:to-go:[^:]+ as an adapter$")).click()
    taken.value.save_as(tmp_path / "model.zip")
    assert len(zipfile.ZipFile(tmp_path / "model.zip").namelist()) == 2
    delete = page.get_by_role("button", name=re.compile("^Delete ft:demo:local:to-go:[^:]+:ckpt-step-40"))
    delete.click()
    page.get_by_role("dialog").get_by_role("button", name="Keep").click()
    expect(delete).to_be_visible()
    delete.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(delete).to_have_count(0)


def test_keyboard_alone(visit: Visit):
    page = visit.go("data")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.get_by_role("link", name="Jobs", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1, name="Jobs")).to_be_focused()
    expect(page.get_by_role("link", name="Jobs", exact=True)).to_have_attribute("aria-current", "page")
    page.keyboard.press("Tab")
    expect(page.get_by_role("main").get_by_role("link", name="New job")).to_be_focused()


@pytest.mark.parametrize("visit", FACES, indirect=True)
def test_every_view_fits_and_is_named(visit: Visit, site, request):
    face = request.node.callspec.params["visit"]
    for view in (*VIEWS, f"jobs/{site[2]['first']}", f"jobs/{site[2]['failed']}"):
        page = visit.go(view)
        page.wait_for_load_state("networkidle") if view in ("data", "new") else None
        assert page.evaluate(NAMELESS) == [], view
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, view
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))")
        assert levels.count(1) == 1, view
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), (view, levels)
        assert page.locator("main, nav, header").count() == 3
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(17, 19, 21)" if face == "dark" else "rgb(244, 244, 241)")
    assert page.evaluate("document.documentElement.lang") == ("zh-Hans" if face == "chinese" else "en")


def test_language_and_appearance_are_switched_and_kept(visit: Visit):
    page = visit.go("jobs")
    page.get_by_label("Language").select_option("zh")
    expect(page.get_by_role("heading", level=1)).to_have_text("任务")
    page.get_by_label("外观").select_option("dark")
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("任务")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 19, 21)"


def test_key_is_asked_for_and_kept_in_the_tab(browser, tmp_path: Path):
    service = conftest.make_service(tmp_path)
    with service.database.write() as session:
        _, secret = keys.add(session, "me", "mine", "user", None)
    with conftest.serving(service) as url:
        visit = Visit(browser, url, **FACES["light"])
        visit.page.goto(url)
        dialog = visit.page.get_by_role("dialog", name="This service asks for a key")
        dialog.get_by_label("Key").fill("sk-wrong")
        visit.page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("Incorrect API key")
        dialog.get_by_label("Key").fill(secret)
        visit.page.keyboard.press("Enter")
        expect(visit.page.get_by_text("No files yet")).to_be_visible()
        expect(visit.page.get_by_role("dialog")).to_have_count(0)
        assert visit.page.evaluate("JSON.stringify({...localStorage})").count("sk-") == 0
        assert visit.page.evaluate("sessionStorage.getItem('jaxtune.key')") == secret
        assert set(visit.refused) == {401}
        assert visit.faults == []
        visit.context.close()
    service.database.close()
