import json
import re

import numpy as np
import pytest

from jaxtune import cli, explaining
from jaxtune.errors import UserError
from jaxtune.explaining import figures, page
from tests.explaining.conftest import WRONG


def test_a_report_holds_all_of_it(report, classifier):
    night, day = report["inputs"]
    assert (night["answer"], day["answer"]) == ("night", "day")
    a = night["attributions"]
    assert sum(a["scores"]["integrated_gradients"]) == pytest.approx(a["value"] - a["baseline_value"], rel=0.01)
    assert len(night["tokens"]) == len(a["scores"]["occlusion"]) == len(night["attention"]["rollout"])
    assert night["lens"]["answer"][-1] == pytest.approx(night["likeliest"][0][1], abs=1e-5)
    assert night["lens"]["rank"][-1] == 0
    assert all(0 < v < 1 for v in report["changes"]["cka"])
    assert {w["name"] for w in report["changes"]["weights"]} >= {"layers/0/mlp/up_proj/weight"}
    assert report["influence"]["inputs"][0]["harmful"][0]["origin"].endswith(f":{WRONG + 1}")
    assert report["influence"]["inputs"][0]["harmful"][0]["answer"] == "day"


def test_the_page_stands_alone_and_escapes_what_it_shows(report, tmp_path):
    files = explaining.write(report, tmp_path / "why")
    html = files[1].read_text()
    assert [f.name for f in files] == ["explain.json", "explain.html"]
    assert json.loads(files[0].read_text()) == report
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "default-src 'none'" in html
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?![\"'#]|data:)", html)
    anchors = re.findall(r'href="#([\w-]+)"', html)
    assert anchors == ["about", "input-0", "input-1", "changes", "influence"]
    assert all(f'id="{a}"' in html for a in anchors)


def test_remarks_stand_on_the_page(report):
    assert "misses &lt;much&gt;" in page.html({**report, "remarks": ["misses <much>"]})


def test_colours_and_bars_say_how_much():
    assert figures.colour(1.0, 2.0) == "background:rgba(46,160,110,0.425)"
    assert figures.colour(-4.0, 2.0) == "background:rgba(220,90,60,0.850)"
    assert "left:25.0%;width:25.0%" in figures.bar(-1.0, 2.0)
    assert figures.heat(np.eye(2), ["<a>", ""], ["b", "c"], "share").count("<text") == 4


def test_the_verb(classifier, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"text": "moon 1 + 2", "label": "day"}) + "\n" + json.dumps({"text": "sun", "label": "day"})
    )
    with pytest.raises(SystemExit) as done:
        cli.main(["explain", str(classifier), "--file", str(rows), "--answer", "--parts", "attributions"])
    assert done.value.code == 0
    found = json.loads((classifier / "explain" / "explain.json").read_text())
    assert [(x["name"], x["answer"]) for x in found["inputs"]] == [(f"{rows}:1", "day"), (f"{rows}:2", "day")]
    assert "changes" not in found
    assert "written to" in capsys.readouterr().out


def test_what_is_asked_wrongly(classifier):
    with pytest.raises(UserError, match="nothing to explain was given"):
        explaining.explain(str(classifier), [], explaining.Wish())
    with pytest.raises(UserError, match="'heads' is not known; allowed: attributions, inside, changes"):
        explaining.explain(str(classifier), ["sun"], explaining.Wish(parts=["heads"]))
    with pytest.raises(UserError, match="the row gives no answer to explain"):
        explaining.explain(str(classifier), ["sun"], explaining.Wish(answer=True, parts=()))
    with pytest.raises(UserError, match="--baseline 'mean' is not known; allowed: pad, zero"):
        explaining.explain(str(classifier), ["sun"], explaining.Wish(baseline="mean"))
    with pytest.raises(UserError, match="--influence: demo is no run folder"):
        explaining.explain("demo", ["sun"], explaining.Wish(influence=2))
