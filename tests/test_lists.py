"""Lists of images as people and their software write them: read as a careful person would, or refused with the line."""

import csv
import gzip
import io
import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.archive_params import Headings, Ingest, Source
from pipeline.ingest.build import IngestError, ingest_archive
from pipeline.ingest.sources import SourceError, open_archive, read_archive
from pipeline.ingest.sources.manifest import view_of
from pipeline.ingest.sources.tables import parse_label, whole_number
from pipeline.storage.index import read_studies
from pipeline.storage.shards import key
from pipeline.study import Reject, Study

NAMES = ("a.png", "b.png", "c.png", "d.png")


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24), dtype=np.uint8)).save(path)


class Reading:
    """What a manifest says: its studies, rejects and notes."""

    def __init__(self, root, content, names=(), **keys):
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (root / "list.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        source = Source("manifest", str(root), "", **{"manifest": "list.csv"} | keys)
        archive = open_archive("mine", source.path, root.parent / "cache")
        items = list(read_archive(archive, source, 0))
        self.studies = [item for item in items if isinstance(item, Study)]
        self.rejects = [item for item in items if isinstance(item, Reject)]
        self.notes, self.rows = archive.notes, archive.rows.total()

    def labels(self, cls="Edema"):
        return [study.labels.get(cls) for study in self.studies]


@pytest.fixture
def read(tmp_path):
    return lambda content, names=NAMES, **keys: Reading(tmp_path / "root", content, names, **keys)


def refused(read, content, *words, **keys):
    with pytest.raises(SourceError) as error:
        read(content, **keys)
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


# ---- how a file is written

ROWS = [
    ["image", "label:Edema", "report"],
    ["a.png", "1", "FINDINGS: Größe; 5, é."],
    ["b.png", "0", "FINDINGS: Clear\non both sides."],
]


def written(separator=",", encoding="utf-8", end="\r\n", head=""):
    out = io.StringIO()
    csv.writer(out, csv.excel, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_NONNUMERIC).writerows(ROWS)
    return (head + out.getvalue()).encode(encoding)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_any_separator_encoding_and_line_end(read, separator, encoding, end):
    found = read(written(separator, encoding, end))
    assert found.labels() == [1, 0] and not found.rejects
    assert [s.findings for s in found.studies] == ["Größe; 5, é.", "Clear on both sides."]
    assert any("cp1252" in note for note in found.notes) == (encoding == "cp1252")


def test_a_line_that_says_the_separator(read):
    assert read(written(";", "utf-8-sig", head="sep=;\r\n")).labels() == [1, 0]
    assert read(written("\t", "utf-16", head="sep=\t\r\n")).labels() == [1, 0]
    assert read(written("|", head='"sep=|"\n', end="\n")).labels() == [1, 0]


def test_a_list_may_be_packed(tmp_path):
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress(written()))
    source = Source("manifest", str(tmp_path), "", manifest="list.csv.gz")
    assert len([*read_archive(open_archive("mine", source.path, tmp_path / "cache"), source, 0)]) == 2


@pytest.mark.parametrize("header", ["Image,Label:Edema,View", "IMAGE , LABEL:Edema,view", ",image,label: Edema,View"])
def test_names_of_columns_in_any_case_and_columns_without_a_name(read, header):
    index = "0," if header.startswith(",") else ""
    (study,) = read(f"{header}\n{index}a.png,1,PA\n").studies
    assert study.labels == {"Edema": 1} and study.views[0].position == "PA"


@pytest.mark.parametrize("index", ["Unnamed: 0", "Unnamed: 0_level_0", ""])
def test_row_numbers_of_pandas_are_no_column(read, index):
    found = read(f"{index},image,label:Edema\n0,a.png,1.0\n1,b.png,0.0\n")
    assert found.labels() == [1, 0] and not found.notes


@pytest.mark.parametrize("header", ["image,label:Edema,label:Edema", "image,Image", "image,label:Edema,LABEL:EDEMA"])
def test_two_columns_of_one_name_are_an_error(read, header):
    refused(read, f"{header}\na.png,1,0\n", "two columns are named")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('image,report,label:Edema\na.png,"FINDINGS: 5" tube. Clear.",1\nb.png,x,0\n', "line 2:"),
        ('image,report\na.png,x\nb.png,"not closed\nc.png,FINDINGS: y\n', "line 3:"),
        ('sep=;\nimage;report\na.png;x\nb.png;"a ""quoted"" word and no end\nc.png;y\n', "line 4:"),
    ],
)
def test_a_quote_that_is_not_closed_is_an_error_with_its_line(read, content, line):
    refused(read, content, line, "a quote in a cell is not closed")


def test_a_separator_in_a_text_without_quotes_costs_the_row(read):
    found = read("image,report\na.png,FINDINGS: Clear, no mass.\nb.png,FINDINGS: Clear.\n")
    assert [s.findings for s in found.studies] == ["Clear."]
    (reject,) = found.rejects
    assert (reject.item, reject.kind) == ("line 2", "row") and "needs quotes" in reject.reason


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(90), b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(90)])
def test_a_workbook_is_named(read, content):
    refused(read, content, "Excel workbook", "save the sheet as CSV")


def test_what_is_no_encoding_we_know_is_named(read):
    refused(read, b"image,report\na.png,\x81\x8d\n", "neither UTF-8")


def test_columns_that_are_not_read_are_told(read):
    found = read("image,veiw,Pneumonia,note\na.png,PA,1,x\nb.png,AP,,y\n")
    assert found.notes == [
        "list.csv: column 'veiw' is not read (did you mean view?)",
        "list.csv: column 'Pneumonia' is not read; if it is a label, name it 'label:Pneumonia'",
        "list.csv: column 'note' is not read",
    ]
    refused(read, "Images\na.png\n", "no column 'image'", "did you mean Images?")


def test_a_header_that_is_no_header_is_said_in_a_line(read):
    for header in ("image\x0cstudy\n", f"{'image' * 999}\n", f"image,{'x' * 9000},{'x' * 9000}\n"):
        with pytest.raises(SourceError) as error:
            read(f"{header}a.png\n")
        assert str(error.value).isprintable() and len(str(error.value)) < 300
    found = read(f"image,{'y' * 9000},label:{'z' * 9000},a\x07b\na.png,,maybe,\nb.png,,1,\n")
    assert all(note.isprintable() and len(note) < 200 for note in found.notes) and len(found.notes) == 2
    assert [len(r.reason) < 200 for r in found.rejects] == [True]


# ---- identity

ODD = ["老片一.png", "老片二.png", "Tórax.png", "Pórax.png", "ﷺ.png", "a b/ü.png", "😀.png"]


def test_a_study_is_not_known_by_a_part_of_its_name(read):
    names = ["p1/frontal.png", "p2/frontal.png", "p3/frontal.png"]
    found = read("image,label:Edema\n" + "".join(f"{n},{int(i == 0)}\n" for i, n in enumerate(names)), names)
    assert found.labels() == [1, 0, 0] and len({s.study for s in found.studies}) == 3
    assert [s.views[0].path for s in found.studies] == names


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("disk", ["NFC", "NFD"])
def test_names_of_any_script_in_any_form(read, form, disk):
    listed = "".join(f"{unicodedata.normalize(form, name)},{n % 2}\n" for n, name in enumerate(ODD))
    found = read(f"image,label:Edema\n{listed}", [unicodedata.normalize(disk, name) for name in ODD])
    assert len({s.study for s in found.studies}) == len(ODD) and all(s.views[0].path for s in found.studies)
    assert found.labels() == [n % 2 for n in range(len(ODD))]


@pytest.mark.parametrize("listed", [r"images\a.png", "./images/a.png", r".\images\\a.png", "{root}/images/a.png"])
def test_a_place_may_be_written_otherwise(read, tmp_path, listed):
    listed = listed.format(root=tmp_path / "root")
    (study,) = read(f"image\n{listed}\n", ["images/a.png"]).studies
    assert study.views[0].path == "images/a.png"
    assert study.study == read("image\nimages/a.png\n", ["images/a.png"]).studies[0].study


def test_ten_thousand_ids_of_any_letters_come_out_as_they_went_in(tmp_path):
    rng = np.random.default_rng(0)
    points = np.concatenate([np.arange(0x21, 0xD800), np.arange(0xE000, 0x2FA20)])
    letters = [c for c in map(chr, points) if c.isprintable() and c not in '",' and not c.isspace()]
    near = ["1.2", "1-2", "1/2", "1_2", "a", "A", "a_b", "1%2E2", "1%2", "%5F", "_", "__", "a%"]
    ids = [*near, *("".join(rng.choice(letters, rng.integers(1, 60))) for _ in range(5000))]
    pairs = {(ids[int(rng.integers(len(ids)))], ids[n % len(ids)]) for n in range(10_000)}
    pairs |= {("a", "b_1"), ("a_b", "1"), ("a_b_1", "a_b_1"), ("x" * 300, "y" * 300), ("x" * 300, "y" * 299 + "z")}
    pairs = sorted({tuple(unicodedata.normalize("NFC", i) for i in pair) for pair in pairs})
    rows = [["image", "patient", "study"], *([f"{n}.png", *pair] for n, pair in enumerate(pairs))]
    with (tmp_path / "list.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    source = Source("manifest", str(tmp_path), "", manifest="list.csv")
    studies = [*read_archive(open_archive("mine", source.path, tmp_path / "cache"), source, 0)]
    assert [(s.patient, s.study) for s in studies] == pairs
    keys = {key(study) for study in studies}
    assert len(keys) == len(pairs) > 9_900
    assert all(len(k) <= 80 and k.isascii() and not set(k) & set("./ ") for k in keys)


def test_files_a_mac_leaves_beside_each_are_no_files(read):
    names = [*NAMES, "._a.png", "__MACOSX/._b.png", "__MACOSX/b.png", "x/._list.csv"]
    (archive,) = {tuple(read_names(read, names))}
    assert set(archive) == {*NAMES, "list.csv"}


def read_names(read, names):
    read("image\na.png\n", names)
    root = Path(read.__closure__[0].cell_contents) / "root"
    return open_archive("mine", str(root), root.parent / "cache").names


# ---- what a row says


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        *[(c, 1) for c in ("1", "1.0", "1.00", "+1", "1,0", "True", "TRUE", "yes", "Y", "positive", "Present")],
        *[(c, 0) for c in ("0", "0.0", "-0", "False", "no", "N", "negative", "absent")],
        *[(c, -1) for c in ("-1", "-1.0", "\u22121", "uncertain")],
        *[(c, None) for c in ("", "nan", "NaN", "NA", "N/A", "None", "null", "<NA>")],
    ],
)
def test_spellings_of_a_label(read, cell, value):
    assert parse_label(cell) == value
    row = f'a.png,"{cell}"\nb.png,1\n'
    assert read(f"image,label:Edema\n{row}").labels() == [value, 1]


@pytest.mark.parametrize("cell", ["2", "0.5", "-2", "1e3", "maybe", "?", "x"])
def test_other_values_cost_the_row(read, cell):
    found = read(f"image,label:Edema\na.png,{cell}\nb.png,1\n")
    assert found.labels() == [1] and found.rows == 2
    (reject,) = found.rejects
    assert (reject.item, reject.kind) == ("line 2", "row") and reject.reason.startswith("label:Edema")
    assert (cell in reject.reason) == (cell[-1].isdigit() and "e" not in cell)


@pytest.mark.parametrize(
    ("said", "view"),
    [
        *[(s, "PA") for s in ("PA", "pa", "PA ERECT", "postero-anterior", "P.A.", "Chest X-ray PA", "Frontal PA")],
        *[(s, "AP") for s in ("AP", "AP SUPINE", "AP Erect", "ap portable", "antero_posterior")],
        *[(s, "LATERAL") for s in ("L", "LAT", "Lateral", "LL", "left lateral", "Lateral view", "LATERAL (LEFT)")],
        *[("Frontal", "FRONTAL"), ("", ""), ("unknown", ""), ("oblique", None), ("APPLE", None), ("LAO", None)],
    ],
)
def test_spellings_of_a_view(said, view):
    assert view_of(said) == view


@pytest.mark.parametrize("word", ["validation", "Validation", "dev", "val", "VALIDATE", "tune"])
def test_spellings_of_a_split(read, word):
    found = read(f"image,split\na.png,train\nb.png,{word}\nc.png,TEST\nd.png,Training\n")
    assert [s.split for s in found.studies] == ["train", "valid", "test", "train"]


def test_a_split_that_loses_all_its_rows_is_an_error(read):
    refused(read, "image,split\na.png,train\nb.png,later\nc.png,test\n", "line 3: split is none of", "no row is valid")
    assert len(read("image,split\na.png,train\nb.png,valid\nc.png,test\nd.png,tset\n").rejects) == 1


# ---- rows that contradict one another


def test_a_row_twice_is_one_view(read):
    (study,) = read("image,label:Edema,study\na.png,1,s\n./a.png,1.0,s\nb.png,,s\n").studies
    assert [v.path for v in study.views] == ["a.png", "b.png"] and study.labels == {"Edema": 1}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("image,label:Edema\na.png,1\na.png,0\nb.png,1\n", "two values of label:Edema"),
        ("image,study,label:Edema\na.png,s,1\nc.png,s,-1\nb.png,t,1\n", "two values of label:Edema"),
        ("image,study\na.png,s\na.png,t\nb.png,u\n", "listed for another study"),
        ("image,view\na.png,PA\na.png,LATERAL\nb.png,PA\n", "two views"),
        (
            "image,study,report\na.png,s,FINDINGS: Clear.\nc.png,s,FINDINGS: Not so.\nb.png,t,FINDINGS: Ok.\n",
            "two texts",
        ),
    ],
)
def test_of_rows_that_contradict_one_another_none_is_taken(read, rows, why):
    found = read(rows)
    assert [v.path for s in found.studies for v in s.views] == ["b.png"]
    assert [r.item for r in found.rejects] == ["line 2", "line 3"] and all(why in r.reason for r in found.rejects)
    assert found.rows == 3


def test_a_row_that_says_nothing_contradicts_nothing(read):
    (study,) = read(
        "image,study,split,view,label:Edema,report\na.png,s,,,,HISTORY: x.\nb.png,s,test,,1,\n"
        "a.png,s,test,PA,,FINDINGS: Clear.\nc.png,s,,AP,1,\n"
    ).studies
    assert (study.split, study.labels, study.findings) == ("test", {"Edema": 1}, "Clear.")
    assert [(v.path, v.position) for v in study.views] == [("a.png", "PA"), ("b.png", ""), ("c.png", "AP")]
    (study,) = read("image,study,split\na.png,s,\n").studies
    assert study.split == "train"


@pytest.mark.parametrize("blank", ["NA", "nan", "None", "<NA>", "NULL"])
def test_what_software_writes_for_nothing_says_nothing(read, blank):
    found = read(
        f"image,patient,study,split,view,report\na.png,{blank},{blank},{blank},{blank},{blank}\n"
        f"b.png,{blank},{blank},test,PA,{blank}\nc.png,p,{blank},,,FINDINGS: Clear.\n"
    )
    assert [(s.patient == s.study, s.split) for s in found.studies] == [
        (True, "train"),
        (True, "test"),
        (False, "train"),
    ]
    assert [s.findings for s in found.studies] == [None, None, "Clear."] and not found.rejects


@pytest.mark.parametrize("rows", ["a.png,,s\nb.png,p,s\n", "a.png,p,s\nb.png,,s\n", "a.png,,s\nb.png,p,s\na.png,,s\n"])
def test_a_row_without_a_patient_is_of_its_studys(read, rows):
    (study,) = read(f"image,patient,study\n{rows}").studies
    assert (study.patient, study.study, [v.path for v in study.views]) == ("p", "s", ["a.png", "b.png"])


@pytest.mark.parametrize(
    "header", ["label:Edema,LABEL: edema", "label:\u00d6dem,label:O\u0308dem", "label:,label:Edema"]
)
def test_a_class_is_in_one_column(read, header):
    refused(read, f"image,{header}\na.png,1,0\n", "column", "no class, or one that another column has")


@pytest.mark.parametrize(("column", "cell"), [("patient", "1.2E+15"), ("study", "1,23457E+08"), ("patient", "5e+9")])
def test_an_id_that_a_spreadsheet_rounded_costs_the_row(read, column, cell):
    found = read(f'image,{column}\na.png,"{cell}"\nb.png,1.2E-15\nc.png,12E+3x\n')
    (reject,) = found.rejects
    assert reject.item == "line 2" and reject.reason.startswith(f"{column} is a number that a spreadsheet rounded")
    assert len(found.studies) == 2


def test_signs_of_no_width_are_no_part_of_a_cell(read):
    found = read(
        "\ufeffimage,\u200bstudy,label:Edema\u200b\na.png\u200b,\u200b7,1\u00ad\nb.png,7\u2060,1\nc.png,s\u200ct,0\n"
    )
    assert [s.study for s in found.studies] == ["7", "s\u200ct"] and found.labels() == [1, 0]
    assert [v.path for s in found.studies for v in s.views] == ["a.png", "b.png", "c.png"]


def test_two_files_of_one_name_in_two_forms_are_an_error(read):
    names = [unicodedata.normalize(form, "\u00e9.png") for form in ("NFC", "NFD")]
    refused(read, f"image\n{names[0]}\n{names[1]}\n", "line 3", "two Unicode forms", names=names)
    (study,) = read(f"image,study\n{names[0]},s\n{names[0]},s\n", names=names).studies
    assert study.views[0].path == names[0]


def test_a_row_that_is_not_utf8_where_others_are(read):
    rows = [
        "image,report",
        "a.png,FINDINGS: \u00dcber.",
        "b.png,FINDINGS: Caf\u00e9.",
        "c.png,FINDINGS: W\u00e4re.",
        "",
    ]
    found = read(b"\n".join(row.encode("latin-1" if row[:1] == "b" else "utf-8") for row in rows))
    assert [s.findings for s in found.studies] == ["\u00dcber.", "W\u00e4re."] and not found.notes
    assert [(r.item, r.reason) for r in found.rejects] == [("line 3", "it is not UTF-8, which other rows are")]


@pytest.mark.parametrize("values", [[["p"], ["q"]], [b"p", b"q"], [{"a": 1}, {"a": 2}]])
def test_a_parquet_column_that_holds_no_text_is_an_error(read, tmp_path, values):
    (tmp_path / "root").mkdir()
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "patient": values}), tmp_path / "root" / "l.parquet")
    with pytest.raises(SourceError, match=r"column 'patient' holds .*; write it as text"):
        read("image\n", manifest="l.parquet")


def test_a_section_by_itself_ends_where_somebody_signs(read):
    (study,) = read(
        'image,findings,impression\na.png,"FINDINGS: The film was read by two.","Normal.\nDictated by Dr. A. Person"\n'
    ).studies
    assert (study.findings, study.impression) == ("The film was read by two.", "Normal.")


def test_a_study_in_two_splits_is_an_error(read):
    refused(read, "image,study,split\na.png,s,train\nb.png,s,test\n", "line 3", "two splits")


# ---- the account


def mutated_lists(number):
    """A list of 40 rows in which some rows are damaged, each in its own way."""
    rng = np.random.default_rng(number)
    lines = ["image,study,label:Edema,split,view,report"]
    for n in range(40):
        cells = [f"{n % 37}.png", f"s{n % 29}", str(rng.integers(-1, 2)), "train", "PA", "FINDINGS: Clear lungs."]
        damage = int(rng.integers(12))
        if damage < len(cells):
            cells[damage] = ["", "x y", "5", '"a ""b"""', "é", ";", "nan"][int(rng.integers(7))]
        elif damage == 6:
            cells.append("more")
        elif damage == 7:
            cells = cells[: int(rng.integers(6))]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


def test_every_row_of_ten_thousand_lists_is_in_a_study_or_rejected(tmp_path):
    source = Source("manifest", str(tmp_path), "", manifest="list.csv")
    archive = open_archive("mine", source.path, tmp_path / "cache")
    wrong = 0
    for number in range(10_000):
        content = mutated_lists(number)
        (tmp_path / "list.csv").write_text(content)
        archive.rows.clear()
        try:
            items = list(read_archive(archive, source, 0))
        except SourceError:
            continue
        rows = [line for line in content.split("\n")[1:] if line.strip(",; ")]
        lost = Counter(i.item for i in items if isinstance(i, Reject) and i.kind == "row")
        kept = {view.id for i in items if isinstance(i, Study) for view in i.views}
        wrong += archive.rows.total() != len(rows) or max(lost.values(), default=0) > 1 or not (kept or lost)
        listed = {line.split(",")[0] for line in rows}
        wrong += len(kept) > len(listed)
    assert not wrong


def ingested(root, content, names=NAMES, **keys):
    for n, name in enumerate(names):
        picture(root / "archive" / name, n)
    (root / "archive" / "list.csv").write_text(content)
    source = Source("manifest", str(root / "archive"), "", manifest="list.csv", **keys)
    out = root / "out"
    options = Ingest(short_side=16, shard_size=3, workers=1)
    summary = ingest_archive("mine", source, options, out / "shards", out / "mine.parquet", root / "work", 0)
    return summary, read_studies(out / "mine.parquet")


def test_an_account_is_settled_for_images_rows_texts_and_labels(tmp_path, capsys):
    rows = "".join(f"{n}.png,{n % 2},FINDINGS: Clear.,PA\n" for n in range(30))
    content = f"image,label:Edema,report,view\n{rows}30.png,-1,***,L\ngone.png,1,FINDINGS: Clear.,PA\n31.png,2,,PA\n"
    summary, studies = ingested(tmp_path, content, [f"{n}.png" for n in range(32)])
    assert (summary["found_images"], summary["written_images"], summary["rejected_images"]) == (32, 31, 1)
    assert summary["account"] == {
        "rows": {"found": 33, "written": 32, "rejected": 1},
        "texts": {"found": 32, "written": 30, "rejected": 2},
        "labels": {"found": 32, "written": 31, "rejected": 1},
    }
    assert summary["views"]["written"] == {"LATERAL": 1, "PA": 30} and len(studies) == 31
    assert summary["classes"] == {"Edema": {"positive": 15, "negative": 15, "uncertain": 1, "blank": 0}}
    printed = capsys.readouterr().out
    assert "rows: 33 found = 32 written + 1 rejected" in printed
    assert "texts: 32 found = 30 written + 2 rejected" in printed


def test_rows_count_against_what_may_be_rejected(tmp_path):
    rows = "".join(f"{n}.png,{'maybe' if n < 2 else 1}\n" for n in range(20))
    with pytest.raises(IngestError, match=r"10.0% of 20 rows rejected, .*label:Edema is none of") as error:
        ingested(tmp_path, f"image,label:Edema\n{rows}", [f"{n}.png" for n in range(20)])
    assert "maybe" not in str(error.value)  # a cell may be a name, where cells are in the wrong columns


@pytest.mark.parametrize(
    ("rows", "names", "why"),
    [
        ("image,split\na.png,train\nb.png,train\nx.png,test\ny.png,test\n", NAMES, "split test is lost"),
        ("image,report\na.png,--\nb.png,..\nc.png,1\n", NAMES, "all texts are lost"),
        ("image,label:A,label:B\na.png,1,\nb.png,1,\nx.png,,1\ny.png,,1\n", NAMES, "class B has lost all its positive"),
    ],
)
def test_what_is_lost_whole_is_an_error(tmp_path, rows, names, why):
    with pytest.raises(IngestError, match=why):
        ingested(tmp_path, rows, names)


def test_a_partial_archive_uses_what_is_there(tmp_path):
    """Of a hundred listed images ten are here: shards are full, the splits are the list's, and the summary says so."""
    rows = "".join(f"{n}.png,s{n},{'test' if n % 5 == 0 else 'train'}\n" for n in range(100))
    names = [f"{n}.png" for n in range(0, 100, 10)] + ["7.png"]
    summary, studies = ingested(tmp_path, f"image,study,split\n{rows}", names, present=True)
    assert sorted(s.study for s in studies) == sorted(f"s{name[:-4]}" for name in names)
    assert Counter(s.split for s in studies) == {"test": 10, "train": 1}
    assert summary["rejected_images"] == 0 and summary["found_images"] == 11
    assert "partial archive: 11 of the 100 images that its lists name are here" in summary["notes"]
    assert len(list((tmp_path / "out" / "shards").glob("*.tar"))) == 4  # of three studies each
    with pytest.raises(IngestError, match=r"of 100 images rejected.*sources.mine.present: true\)$"):
        ingested(tmp_path, f"image,study,split\n{rows}", names)


def test_uncertain_and_blank_are_no_negatives(tmp_path):
    summary, studies = ingested(tmp_path, "image,label:Edema\na.png,1\nb.png,-1\nc.png,\nd.png,0\n")
    assert [s.labels.get("Edema") for s in studies] == [1, -1, None, 0]
    assert summary["classes"]["Edema"] == {"positive": 1, "negative": 1, "uncertain": 1, "blank": 1}


# ---- lists of the paper's archives, saved again


def test_ids_that_pandas_made_numbers():
    assert [whole_number(c) for c in ("50000001.0", "7.5", "1.0", "s1.0", "007.0")] == [
        *("50000001", "7.5", "1", "s1.0", "007")
    ]


def test_a_parquet_file_says_the_same_as_its_csv(tmp_path):
    frame = pd.DataFrame(ROWS[1:], columns=ROWS[0])
    frame.to_parquet(tmp_path / "list.parquet")
    frame.rename(columns={"image": "Image"}).to_csv(tmp_path / "list.csv")  # with row numbers
    found = []
    for name in ("list.parquet", "list.csv"):
        source = Source("manifest", str(tmp_path), "", manifest=name)
        found.append([*read_archive(open_archive("mine", source.path, tmp_path / "cache"), source, 0)])
    assert found[0] == found[1] and len(found[0]) == 2


def test_reports_in_another_language(read):
    words = Headings(findings=("Befund",), impression=("Beurteilung",), before=("Fragestellung",), after=("Gruß",))
    content = (
        'image,report\na.png,"Fragestellung: Erguss?\nBEFUND: Kein Erguss.\nBeurteilung: Unauffällig.\nGruß\nDr. X"\n'
    )
    (study,) = read(content, headings=words).studies
    assert (study.findings, study.impression) == ("Kein Erguss.", "Unauffällig.")
    (study,) = read(content.replace("BEFUND", "FINDINGS"), headings=words).studies
    assert study.findings == "Kein Erguss."


def test_a_report_of_which_nothing_is_used_is_counted(read):
    found = read("image,report\na.png,HISTORY: Cough.\nb.png,FINDINGS: Clear.\nc.png,\n")
    assert [s.findings for s in found.studies] == [None, "Clear.", None]
    assert [(r.kind, r.item) for r in found.rejects] == [("text", "line 2")]


def test_no_name_and_no_text_is_in_a_reason(tmp_path):
    secret = "Zanzibar"
    cells = [f"{secret}.png", secret, secret, secret, f"{secret} quokka", secret]
    good = "".join(f"{n}.png,p,s{n},PA,,1\n" for n in range(1, 30))
    content = "image,patient,study,view,split,label:Edema\n" + good
    for n in (3, 5):
        row = [f"{n}{n}.png", "p", f"t{n}", "PA", "", "1"]
        row[n] = cells[n]
        content += ",".join(row) + "\n"
    try:
        summary, _ = ingested(tmp_path, content, [f"{n}.png" for n in range(1, 30)])
        said = json.dumps(summary)
    except IngestError as error:
        said = str(error)
    table = pq.read_table(tmp_path / "out" / "shards" / "rejects.parquet").to_pylist()
    assert len(table) >= 2
    # A view is said back: it is what tells which spelling is not known.
    assert secret not in said.replace(f"view '{secret}'", "") and "quokka" not in said
