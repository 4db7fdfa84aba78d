"""The card of a list: what it holds and is enough for, without a name, a text or a decoded picture."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config.archive_params import About, Headings
from pipeline.config.records import read_record
from pipeline.ingest.describe import card
from pipeline.ingest.sources import SourceError

ROOT = Path(__file__).parents[1]
HEADER = "image,patient,study,veiw,view,split,label:Edema,label:COVID-19,report\n"


def described(tmp_path, rows, header=HEADER, names=range(9), **keys):
    root = tmp_path / "archive"
    root.mkdir(exist_ok=True)
    for n in names:
        (root / f"{n}.png").touch()  # no picture: none is opened
    (root / "list.csv").write_text(header + rows)
    return card(root / "list.csv", root, tmp_path / "cache", Headings(**keys))


ROWS = (
    '0.png,p1,s0,,PA,train,1,0,"FINDINGS: Mrs Zanzibar has edema. IMPRESSION: Edema, 3 cm."\n'
    '1.png,p1,s0,,L,train,1,,"FINDINGS: Mrs Zanzibar has edema. IMPRESSION: Edema, 3 cm."\n'
    '2.png,p2,s1,,AP,valid,-1,1,"FINDINGS: Clear."\n'
    '3.png,p3,s2,,PA,test,0,1,"HISTORY: Cough."\n'
    '4.png,p4,s3,,PA,test,1,0,"IMPRESSION: Quokka."\n'
    '4.png,p4,s3,,PA,test,1,0,"IMPRESSION: Quokka."\n'
    "gone.png,p5,s4,,PA,test,0,,\n"
    "5.png,p6,s5,,PA,test,maybe,,\n"
)


def test_everything_is_counted(tmp_path):
    lines = described(tmp_path, ROWS).split("\n")
    for wanted in (
        "rows: 8, of which 1 are rejected",
        "studies: 5 of 5 patients",
        "images: 6, of which 1 are not there",
        "rows that list an image again: 1",
        "splits: train 1, valid 1, test 3",
        "views: AP 1, LATERAL 1, PA 4",
        "texts: 3 studies with one, 1 with one of which nothing is used",
        "sections: both 1, findings alone 1, impression alone 1",
        "label Edema: positive 2, negative 2, uncertain 1, blank 0",
        "label COVID-19: positive 2, negative 2, uncertain 0, blank 1",
        "  1 x label:Edema is none of 1, 0, -1, blank",
        "  note: list.csv: column 'veiw' is not read (did you mean view?)",
        "  zero-shot classification of 2 of 2 classes, and a linear probe",
        "  retrieval of 1 test studies' reports",
    ):
        assert wanted in lines, wanted


def test_no_name_and_no_text_is_shown(tmp_path):
    said = described(tmp_path, ROWS)
    assert not re.search("Zanzibar|Quokka|edema has|Cough|p1\\b|s0\\b|png", said)
    shapes = said.split("texts, letters as x:\n")[1].split("\nenough")[0].split("\n")
    assert shapes == [
        "  findings: xxx xxxxxxxx xxx xxxxx. | impression: xxxxx, 9 xx.",
        "  findings: xxxxx.",
        "  lead: xxxxx.",
    ]


def test_its_last_line_is_what_params_may_say(tmp_path):
    about = yaml.safe_load(described(tmp_path, ROWS).split("\n")[-1].strip())["about"]
    found = read_record(About, about)
    assert found == About("", "reports", ("Edema", "COVID-19"), False, ("classification",))


def test_what_is_not_enough_is_said(tmp_path):
    said = described(tmp_path, "0.png,,,,,,1,,\n1.png,,,,,,0,,\n")
    assert "zero-shot classification of 0 of 1 classes" in said and "no test study: a column split names" in said
    said = described(tmp_path, "0.png,,,,,test,1,,\n1.png,,,,,test,0,,\n")
    assert "classification of 1 of 1 classes; a probe needs all three splits" in said
    with pytest.raises(SourceError, match="no column 'image'"):
        described(tmp_path, "0.png\n", "picture\n")


def test_the_command(tmp_path):
    described(tmp_path, ROWS)
    path = tmp_path / "archive" / "list.csv"

    def call(*words):
        command = [sys.executable, "-m", "stages.describe", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert call(path).stdout == described(tmp_path, ROWS) + "\n"
    for words, says in (((tmp_path / "none.csv",), "not found"), ((path, tmp_path / "cache"), "not below")):
        done = call(*words)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and says in done.stderr
