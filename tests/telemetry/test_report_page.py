"""The page shows the run, runs nothing that the run brought along, and can be used by everybody."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from robustloader.cli import main
from robustloader.report import RunReader, read_run
from robustloader.report.page import make_page
from tests.support.browser import browse, needs_chromium
from tests.support.runs import BEGIN, envelope, fault, made_run, started, write_run

ROOT = Path(__file__).parents[2]
AXE = Path(os.environ.get("AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--"


class Outline(HTMLParser):
    """The elements of a page, and the text of those that matter here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside.append("/" + tag)

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] not in ("script", "style"):
            self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def island(self, page: str) -> Any:
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]


def page_of(*runs: Any) -> str:
    reader = RunReader()
    reader.open("run.jsonl")
    for lines in runs:
        for line in lines:
            reader.add("run.jsonl", json.dumps(line).encode())
    return make_page(reader.run(), made_at=BEGIN)


def test_the_verdict_comes_first_and_the_rest_is_there() -> None:
    """One h1 with the verdict; throughput, waiting, workers, faults with names, restarts and memory below it."""
    page = page_of(made_run(wait_s=0.06, deaths=3, faults=30))
    outline = Outline(page)
    text = " ".join(outline.text)
    assert outline.count("h1") == 1 and "The loop waits for data" in text
    charts = [attributes["data-chart"] for _, attributes in outline.tags if "data-chart" in attributes]
    assert charts == ["rate", "loop", "lanes", "pool", "memory"]
    assert "WorkerCrashed" in text and "SIGSEGV" in text and "n000000" in text
    data = outline.island(page)["ranks"][0]
    assert len(data["lanes"]) == 8 and len(data["marks"]) >= 2
    assert {len(data[name]) for name in ("begin", "end", "rate", "wait", "step", "pool", "memory")} == {
        len(data["end"])
    }


def test_nothing_is_loaded_from_elsewhere() -> None:
    """No element names an address, and the policy of the page allows none."""
    outline = Outline(page_of(made_run(epochs=2)))
    for tag, attributes in outline.tags:
        address = attributes.get("src") or attributes.get("href") or ""
        assert not address or address.startswith("#"), (tag, address)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    policy = next(a["content"] for tag, a in outline.tags if tag == "meta" and "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'") and "unsafe-inline' script" not in policy


def hostile_run() -> list[dict[str, Any]]:
    lines = list(made_run(rank=HOSTILE, epochs=1, deaths=1))
    return [
        {**lines[0], "host": HOSTILE, "versions": {HOSTILE: HOSTILE}},
        *lines[1:],
        fault(BEGIN + 5, HOSTILE, 0, HOSTILE, message=HOSTILE, traceback=HOSTILE, error_type=HOSTILE, action=HOSTILE),
        envelope("PoolShrunk", BEGIN + 6, HOSTILE, workers=1, reason=HOSTILE),
        *made_run(rank="1", epochs=1),
    ]


def test_what_the_run_says_is_text() -> None:
    """Names, messages, tracebacks, hosts and ranks cannot bring an element into the page."""
    outline = Outline(page_of(hostile_run()))
    assert outline.count("script") == 3
    assert outline.count("img") == 0
    assert HOSTILE in "".join(outline.text)


@pytest.mark.parametrize("ranks", [1, 64])
def test_a_long_run_is_a_small_page(ranks: int) -> None:
    """A thousand epochs, or many ranks with many workers, stay below 3 MB."""
    epochs = 1_000 // ranks
    page = page_of(*(made_run(rank=str(r), epochs=epochs, epoch_s=60, faults=2_000 // ranks) for r in range(ranks)))
    assert len(page.encode()) < 3_000_000
    data = Outline(page).island(page)
    assert all(30 <= len(rank["end"]) <= 1_200 for rank in data["ranks"])


def test_a_pause_is_no_line() -> None:
    """Between two processes of one job there is a gap in the charts."""
    first = list(made_run(epochs=1, deaths=0))
    later = [{**line, "time": line["time"] + 9_000, "pid": 7} for line in made_run(epochs=1, deaths=0)]
    page = page_of(first + later)
    assert Outline(page).island(page)["ranks"][0]["rate"].count(None) == 1


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0; the verdict is printed as well."""
    run, target = write_run(tmp_path / "run.jsonl", wait_s=0.06), tmp_path / "out.html"
    assert main(["report", str(run), "-o", str(target)]) == 0
    assert target.read_text("utf-8").startswith("<!doctype html>")
    printed = capsys.readouterr()
    assert "input-bound" in printed.out and str(target) in printed.out and printed.err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "run.jsonl"]


def test_json_is_the_run_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints one document, and writes no page."""
    files = [str(write_run(tmp_path / f"{r}.jsonl", rank=str(r), wait_s=0.01 + 0.06 * r, epochs=2)) for r in range(2)]
    assert main(["report", *files, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["slowest_rank"] == "1"
    assert [rank["rank"] for rank in told["ranks"]] == ["0", "1"]
    assert told["ranks"][0]["epochs"][0]["summary"]["batches"] > 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("damage", "status", "told"),
    [
        (lambda text: b"", 1, "no events yet"),
        (lambda text: b"\x00\n" + text, 1, "damaged"),
        (lambda text: text[:-9], 0, "the last line has no end"),
        (lambda text: text.replace(b'"schema": 1', b'"schema": 9'), 1, "newer robustloader"),
    ],
    ids=["empty", "damaged", "truncated", "newer"],
)
def test_damage_is_said_and_the_page_is_made(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
    status: int,
    told: str,
) -> None:
    """The status says whether something was lost; page and terminal say what."""
    run, target = write_run(tmp_path / "run.jsonl", epochs=1), tmp_path / "out.html"
    run.write_bytes(damage(run.read_bytes()))
    assert main(["report", str(run), "-o", str(target)]) == status
    assert told in capsys.readouterr().err
    assert told in target.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["report", "{tmp}/none.jsonl"], "cannot read {tmp}/none.jsonl: No such file"),
        (["report", "{tmp}"], "cannot read {tmp}"),
        (["report", "{tmp}/run.jsonl", "-o", "{tmp}/none/page.html"], "cannot write {tmp}/none/page.html"),
        (["report", "{tmp}/run.jsonl", "-o", "{tmp}"], "cannot write {tmp}: it is a folder"),
        (["report", "{tmp}/run.jsonl", "-o", "."], "cannot write .: it is a folder"),
        (["report", "{tmp}/run.jsonl", "-o", "{tmp}/run.jsonl"], "is one of the files to read"),
        (["report"], "required: FILE"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    """Status 2, and one line that names the file."""
    text = write_run(tmp_path / "run.jsonl", epochs=1).read_bytes()
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert told.format(tmp=tmp_path) in capsys.readouterr().err
    assert (tmp_path / "run.jsonl").read_bytes() == text


def test_what_the_run_says_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences in the names of events and ranks come to the terminal as text."""
    run = tmp_path / "run.jsonl"
    lines = [*made_run(rank="\x1b[2J0", epochs=1), *made_run(rank="1\x07", epochs=1, wait_s=0.5)]
    lines.append(envelope("\x1b]0;owned\x07", BEGIN, "0"))
    run.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["report", str(run), "-o", str(tmp_path / "out.html")])
    told = capsys.readouterr()
    assert "]0;owned" in told.err and "is the slowest" in told.out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", told.out + told.err)


# --- in a browser -----------------------------------------------------------------------------------------------------


def shown(page: str, tmp_path: Path, *, fragment: str = "", script: str = "") -> str:
    """The document as Chromium has it when all scripts have run; ``script`` is added behind those of the page."""
    path = tmp_path / "page.html"
    if script:
        page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", f"<script>{script}</script></body>")
    path.write_text(page, encoding="utf-8")
    return browse(path, tmp_path / "profile", "--dump-dom", fragment=fragment)


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_charts_are_drawn(tmp_path: Path, theme: str) -> None:
    """All five, under the page's own content security policy, with words for those who do not see them."""
    dom = shown(page_of(made_run(epochs=3)), tmp_path, fragment=f"#theme={theme}")
    outline = Outline(dom)
    assert f'data-theme="{theme}"' in dom and 'data-ready="5"' in dom
    assert outline.count("canvas") == 5
    labels = [attributes["aria-label"] for _, attributes in outline.tags if attributes.get("role") == "img"]
    assert len(labels) == 5 and all(label and "no data" not in label for label in labels)


@needs_chromium
def test_an_empty_page_says_so(tmp_path: Path) -> None:
    """No chart, no error, and words."""
    assert "There is nothing to show yet" in shown(page_of([]), tmp_path)
    dom = shown(page_of([started(BEGIN, "0")]), tmp_path)
    assert "No batch yet" in dom and dom.count('<p class="nothing">No data yet.') == 5


@needs_chromium
def test_a_hostile_run_runs_nothing(tmp_path: Path) -> None:
    """The browser agrees with the parser above, with the content security policy taken away too."""
    for script in ("", "1;"):
        dom = shown(page_of(hostile_run()), tmp_path, script=script)
        assert "<title>owned" not in dom and 'data-ready="5"' in dom


@needs_chromium
def test_theme_and_rank_can_be_chosen(tmp_path: Path) -> None:
    """The button turns the theme, the list changes the charts' rank and the tables'."""
    script = """
      const said = [];
      const parts = () => [...document.querySelectorAll("[data-rank]")].filter((e) => !e.hidden);
      const visible = () => parts().map((e) => e.dataset.rank);
      const light = document.documentElement.dataset.theme;
      document.getElementById("theme").click();
      said.push(light + ">" + document.documentElement.dataset.theme);
      const rank = document.getElementById("rank");
      said.push("from " + rank.value);
      rank.value = "1"; rank.dispatchEvent(new Event("change"));
      said.push("only " + [...new Set(visible())].join());
      document.body.dataset.said = said.join("; ");
    """
    page = page_of(*(made_run(rank=str(r), epochs=2, wait_s=0.01 + 0.1 * (r == 2)) for r in range(3)))
    dom = shown(page, tmp_path, script=script, fragment="#theme=light")
    assert 'data-said="light&gt;dark; from 2; only 1"' in dom or 'data-said="light>dark; from 2; only 1"' in dom


@needs_chromium
def test_a_drag_zooms_all_charts_and_has_a_way_back(tmp_path: Path) -> None:
    """Drawn over the middle of the first chart; "Show all" is there only while something is left out."""
    script = """
      (async () => {
        const whole = document.getElementById("whole"), said = [];
        const rest = () => new Promise((done) => setTimeout(done, 50));
        const drawn = () => [...document.querySelectorAll(".plot canvas")].map((canvas) => canvas.toDataURL());
        const changed = (from) => drawn().filter((image, number) => image !== from[number]).length;
        await rest();
        const before = drawn();
        said.push(before.length + " charts", "hidden " + whole.hidden);
        const over = document.querySelector(".u-over"), room = over.getBoundingClientRect();
        const mouse = (what, share, target = over) => target.dispatchEvent(new MouseEvent(what, {
          bubbles: true, button: 0, movementX: 9, clientX: room.left + share * room.width, clientY: room.top + 40 }));
        mouse("mousemove", 0.3); mouse("mousedown", 0.3);
        mouse("mousemove", 0.5); mouse("mousemove", 0.6); mouse("mouseup", 0.6, document);
        await rest();
        said.push(changed(before) + " zoomed", "hidden " + whole.hidden);
        whole.click();
        await rest();
        over.dispatchEvent(new MouseEvent("mouseleave"));
        await rest();
        said.push(changed(before) + " differ", "hidden " + whole.hidden);
        document.body.dataset.said = said.join("; ");
      })();
    """
    dom = shown(page_of(made_run(epochs=3)), tmp_path, script=script, fragment="#theme=light")
    assert re.search('data-said="([^"]*)"', dom)[1] == (  # type: ignore[index]
        "5 charts; hidden true; 5 zoomed; hidden false; 0 differ; hidden true"
    )


@needs_chromium
def test_a_narrow_page_does_not_scroll_sideways(tmp_path: Path) -> None:
    """At 390 pixels only the tables scroll, within themselves."""
    (tmp_path / "inner.html").write_text(page_of(hostile_run()), encoding="utf-8")
    outer = """<body><iframe src="inner.html" style="width:390px;height:800px"></iframe><script>
      onload = () => { const page = document.querySelector("iframe").contentDocument.documentElement;
        document.body.dataset.width = page.scrollWidth + " in " + page.clientWidth; };</script></body>"""
    (tmp_path / "outer.html").write_text(outer)
    dom = browse(tmp_path / "outer.html", tmp_path / "profile", "--dump-dom", "--allow-file-access-from-files")
    width, room = map(int, re.search(r'data-width="(\d+) in (\d+)"', dom).groups())  # type: ignore[union-attr]
    assert width <= room


@needs_chromium
@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed (npm install axe-core, or AXE=…/axe.min.js)")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["full", "ranks", "empty"])
def test_axe_finds_nothing(tmp_path: Path, theme: str, kind: str) -> None:
    """The rules of WCAG 2.1 AA and axe's best practices, contrast included."""
    runs: dict[str, list[Any]] = {
        "full": [made_run(epochs=3)],
        "ranks": [made_run(rank=str(r), epochs=2, wait_s=0.01 + 0.1 * (r == 2)) for r in range(3)],
        "empty": [],
    }
    script = (
        AXE.read_text("utf-8").replace("</script", "<\\/script")
        + """;
      axe.run(document).then((found) => {
        const told = found.violations.map((v) => [v.id, v.nodes.map((n) => n.html.slice(0, 120))]);
        document.body.dataset.axe = JSON.stringify(told);
        document.body.dataset.passes = found.passes.length;
      });"""
    )
    dom = shown(page_of(*runs[kind]), tmp_path, fragment=f"#theme={theme}", script=script)
    body = next(attributes for tag, attributes in Outline(dom).tags if tag == "body")
    assert int(body["data-passes"] or 0) > 15
    assert json.loads(body["data-axe"] or "") == []


def test_the_vendored_library_is_whole() -> None:
    """The files are those whose digests the note beside them names."""
    import hashlib

    folder = ROOT / "robustloader" / "report" / "vendor"
    named = dict(re.findall(r"([0-9a-f]{64})  (\S+)", (folder / "README.md").read_text())[i][::-1] for i in range(2))
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in named} == named
    assert "MIT" in (folder / "uPlot.LICENSE").read_text()


def test_reading_a_run_again_gives_the_same(tmp_path: Path) -> None:
    """A page depends on nothing but the run and the time."""
    path = write_run(tmp_path / "run.jsonl", epochs=2)
    assert make_page(read_run([path]), made_at=1.0) == make_page(read_run([path]), made_at=1.0)
