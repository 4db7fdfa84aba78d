import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.settings import PromptSettings
from pipeline.datasets import captioned
from pipeline.evaluation import protocols
from pipeline.ingest.sources.chestxray14 import CHESTXRAY14_CLASSES as CHESTXRAY14
from pipeline.ingest.sources.chexpert import CHEXPERT_CLASSES as CHEXPERT
from pipeline.storage.index import write_studies
from pipeline.study import Study, View
from pipeline.text import prompts
from pipeline.text.prompts import PromptError, PromptSentences, expand
from stages import prompts as prompts_stage

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ROOT / "pipeline" / "text" / "prompts.yaml"
GLORIA = TRAINING.with_name("prompts_gloria.yaml")
SMALL = """
default: {positive: ["{}."], negative: ["no {}.", "[there is, ] no [visible, ] {}."], uncertain: ["possible {}."]}
classes:
  No Finding: {positive: ["the lungs are clear."], negative: [], uncertain: []}
  Mass: {expressions: ["[pulmonary, lung] mass"]}
"""


@pytest.fixture(scope="module")
def ours() -> PromptSentences:
    return prompts.load_templates(TRAINING)


def marked(classes: Iterable[str]) -> PromptSentences:
    """Sentences that say which class and value they are of: "Mass|1|0."."""
    return PromptSentences({c: {v: tuple(f"{c}|{v}|{i}." for i in range(4)) for v in (1, 0, -1)} for c in classes})


def said(text: str | None) -> list[tuple[str, int]]:
    assert text is not None and text.endswith(".")
    parts = [part.split("|") for part in text[:-1].split(". ")]
    return [(name, int(value)) for name, value, _ in parts]


def test_expand_takes_every_combination_the_last_bracket_fastest() -> None:
    assert expand("[there is, ] no [visible, definite] {}.", "mass") == [
        "There is no visible mass.",
        "There is no definite mass.",
        "No visible mass.",
        "No definite mass.",
    ]
    assert expand("the [[left, right] lung, SVC], as seen [, here].") == [
        f"The {where}, as seen{end}." for where, end in product(("left lung", "right lung", "SVC"), ("", " here"))
    ]


@pytest.mark.parametrize(
    "template", ["a [b.", "a b].", "a [b, [c] d.", "a {name}.", "", " ", ".", "[, a]", "a [b]] c."]
)
def test_expand_refuses_what_it_cannot_read(template: str) -> None:
    with pytest.raises(PromptError):
        expand(template, "mass")


@pytest.mark.parametrize(
    ("template", "word", "why"),
    [
        ("[a, b]" * 30 + " c.", "", "too many"),
        (f"[{'a,' * 300}a] [{'b,' * 300}b].", "", "too many"),
        ("a [b, c] {}{}{}.", "x" * 1_000_000, "too many"),
        ("[" * 2000 + "a" + "]" * 2000 + ".", "", "brackets in one another"),
        ("a" * 20_000 + ".", "", "longer than"),
    ],
)
def test_a_template_cannot_ask_for_more_than_memory_holds(template: str, word: str, why: str) -> None:
    with pytest.raises(PromptError, match=why) as error:
        expand(template, word)
    assert len(str(error.value)) < 150


def test_a_values_sentences_are_bounded_together(tmp_path: Path) -> None:
    many = f"[{', '.join(map(str, range(300)))}]"
    text = SMALL.replace('"[pulmonary, lung] mass"', f'"{many} mass"').replace("no {}.", f"{many} of {'x' * 100} {{}}.")
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(PromptError, match=r"Mass\.negative: .*characters"):
        prompts.load_templates(tmp_path / "bad.yaml")


def test_a_classs_expressions_are_bounded_together(tmp_path: Path) -> None:
    """Each has 4,096 alternatives of 60 characters; there are 100 of them, all but one letter the same."""
    many = "".join(f"[{'a' * 5}, {'b' * 5}]" for _ in range(12))
    spec = ", ".join(f'"{many} {n}"' for n in range(100))
    (tmp_path / "bad.yaml").write_text(SMALL.replace('"[pulmonary, lung] mass"', spec))
    tracemalloc.start()
    with pytest.raises(PromptError, match=r"Mass\.\w+: the expressions have more than"):
        prompts.load_templates(tmp_path / "bad.yaml")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 64 << 20


def test_the_default_negatives_are_the_papers_grammar(ours: PromptSentences) -> None:
    adjectives = ("visible", "definite", "obvious", "appreciable", "evident")
    tails = ["", "radiographic evidence for ", *(f"{a} " for a in adjectives)]
    tails += ["convincing evidence of ", "definite evidence of ", "evidence of ", "convincing signs of "]
    paper = {f"{head}no {tail}edema" for head in ("there is ", "") for tail in tails}
    paper |= {f"no edema is {verb}" for verb in ("visible", "present", "noted")}
    assert len(paper) == 25
    expected = paper - {"there is no convincing signs of edema"}
    sentences = ours.sentences("Edema", 0)
    assert {s.lower().replace("pulmonary edema", "edema").rstrip(".") for s in sentences} == expected
    assert len(sentences) == 24


def test_sizes_are_those_of_the_paper(ours: PromptSentences) -> None:
    expressions = {"Edema": 1, "Pneumonia": 1, "Fracture": 2, "Mass": 2, "Nodule": 6, "Hernia": 3, "Support Devices": 1}
    for name, n in expressions.items():
        assert [len(ours.sentences(name, v)) for v in (1, 0, -1)] == [7 * n, 24 * n, 55 * n], name
    assert [len(ours.sentences("Cardiomegaly", v)) for v in (1, 0)] == [119, 183]
    assert [len(ours.sentences("Enlarged Cardiomediastinum", v)) for v in (1, 0)] == [160, 135]


def test_every_class_has_plain_sentences(ours: PromptSentences) -> None:
    assert {*CHEXPERT, *CHESTXRAY14} == set(ours.pools) == set(prompts.PROMPT_CLASSES)
    for name, value in product(ours.pools, (1, 0, -1)):
        sentences = ours.sentences(name, value)
        assert bool(sentences) == (name != "No Finding" or value == 1)
        for text in sentences:
            assert text[0].isupper() and text[-1] == "." and text.count(".") == 1 and "  " not in text
            assert not set(text) & set("[]{},")
    assert all("no" in s.lower().split() for s in ours.sentences("Pneumonia", 0))
    assert all("support device" in s.lower() and "devices" not in s for s in ours.sentences("Support Devices", 0))
    assert all("other" in s for s in ours.sentences("Pleural Other", 0))
    with pytest.raises(PromptError, match=r"Cardiomegally.*did you mean Cardiomegaly"):
        ours.sentences("Cardiomegally", 1)
    with pytest.raises(PromptError, match="2"):
        ours.sentences("Cardiomegaly", 2)


def test_no_sentence_stands_for_two_values_of_a_class(ours: PromptSentences) -> None:
    for name in ours.pools:
        sentences = [text for value in (1, 0, -1) for text in ours.sentences(name, value)]
        assert len(sentences) == len(set(sentences)), name


def test_chexpert_caption_says_every_label_once_as_it_is() -> None:
    labels = {"Edema": 1, "Mass": 0, "Hernia": -1, "Nodule": 0}
    table = marked([*labels, "Fracture"])
    rng = np.random.default_rng(0)
    drawn = [prompts.caption(labels, table, rng) for _ in range(400)]
    assert all(sorted(said(text)) == sorted(labels.items()) for text in drawn)
    assert len({tuple(said(text)) for text in drawn}) == 24  # every order
    # every sentence about equally often: 100 expected, five standard deviations allowed
    for i in range(4):
        assert abs(sum(f"Edema|1|{i}." in text for text in drawn if text) - 100) < 45


def test_chestxray14_caption_says_positives_and_three_random_negatives() -> None:
    labels = {name: int(name in ("Mass", "Edema")) for name in CHESTXRAY14}
    rng = np.random.default_rng(1)
    drawn = [said(prompts.caption(labels, marked(CHESTXRAY14), rng, negatives=3)) for _ in range(400)]
    counts = dict.fromkeys(CHESTXRAY14, 0)
    for items in drawn:
        assert len(items) == 5 and {name for name, value in items if value} == {"Mass", "Edema"}
        for name, value in items:
            assert labels[name] == value
            counts[name] += 1
    assert counts["Mass"] == counts["Edema"] == 400
    # each of twelve negatives in a quarter of the draws: 100 expected
    assert all(55 < count < 145 for name, count in counts.items() if not labels[name])


def test_caption_names_all_negatives_where_there_are_fewer() -> None:
    text = prompts.caption({"Mass": 0, "Edema": 1}, marked(["Mass", "Edema"]), np.random.default_rng(0), negatives=3)
    assert sorted(said(text)) == [("Edema", 1), ("Mass", 0)]
    text = prompts.caption({"Mass": 0, "Edema": 1}, marked(["Mass", "Edema"]), np.random.default_rng(0), negatives=0)
    assert said(text) == [("Edema", 1)]


def test_caption_depends_on_the_seed_alone(ours: PromptSentences) -> None:
    labels = dict.fromkeys(CHESTXRAY14, 0) | {"Hernia": 1}
    first = [prompts.caption(labels, ours, np.random.default_rng(s), 3) for s in range(20)]
    turned = dict(reversed(labels.items()))
    assert first == [prompts.caption(turned, ours, np.random.default_rng(s), 3) for s in range(20)]
    assert len(set(first)) > 15


def test_nothing_to_say_is_none_and_never_an_empty_caption(ours: PromptSentences) -> None:
    rng = np.random.default_rng(0)
    assert prompts.caption({}, ours, rng) is None
    assert prompts.validation_caption({}, ours) is None
    assert prompts.caption({"No Finding": 0}, ours, rng) is None
    assert prompts.caption({"Edema": 0}, ours, rng, negatives=0) is None
    with pytest.raises(PromptError, match="Oedema"):
        prompts.caption({"Oedema": 1}, ours, rng)


def test_validation_caption_is_positives_only_in_fixed_order(ours: PromptSentences) -> None:
    labels = {"Support Devices": 1, "Edema": 1, "Fracture": 0, "Pneumonia": -1}
    expected = "Pulmonary edema. Support devices."
    assert prompts.validation_caption(labels, ours) == expected
    assert prompts.validation_caption(dict(reversed(labels.items())), ours) == expected
    normal = ours.sentences("No Finding", 1)[0]
    assert prompts.validation_caption(dict.fromkeys(CHESTXRAY14, 0), ours) == normal
    assert prompts.validation_caption({"No Finding": 1}, ours) == normal


def test_pools_alone_give_the_same_captions(ours: PromptSentences, tmp_path: Path) -> None:
    ours.subset(CHESTXRAY14).write_pools(tmp_path / "c.json")
    pools = prompts.read_pools(tmp_path / "c.json")
    assert pools == ours.subset(CHESTXRAY14) and list(pools.pools) == list(ours.subset(CHESTXRAY14).pools)
    assert set(pools.pools) == {*CHESTXRAY14, "No Finding"}
    raw = json.loads((tmp_path / "c.json").read_text())
    assert raw["Hernia"].keys() == {"1", "0", "-1"} and raw["Mass"]["1"][0] == "Pulmonary mass."
    labels = {name: int(name in ("Nodule", "Atelectasis")) for name in CHESTXRAY14}
    for seed in range(10):
        a, b = (prompts.caption(labels, p, np.random.default_rng(seed), 3) for p in (ours, pools))
        assert a == b
    assert prompts.validation_caption(labels, pools) == prompts.validation_caption(labels, ours)
    (tmp_path / "c.json").write_text('{"Mass": {"1": []}}')
    for name in ("c.json", "absent.json"):
        with pytest.raises(PromptError, match=name):
            prompts.read_pools(tmp_path / name)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL)
    table = prompts.load_templates(path)
    assert table.sentences("Mass", 1) == ("Pulmonary mass.", "Lung mass.")
    # "no {}." and the empty alternatives of the second template say the same: kept once
    assert len(table.sentences("Mass", 0)) == len(set(table.sentences("Mass", 0))) == 8
    with pytest.raises(PromptError, match="Edema, Hernia"):
        table.subset(["Mass", "Hernia", "Edema"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  Mass:", "  Mas:", ["classes.Mas", "unknown class", "did you mean Mass"]),
        ("{expressions:", "{expresions:", ["classes.Mass.expresions", "unknown key"]),
        ('["possible {}."]', '["possible {}.", " "]', ["default.uncertain", "blank"]),
        ('["possible {}."]', '["possible."]', ["default.uncertain", "possible."]),
        ('["possible {}."]', '["possible {}"]', ["uncertain", "full stop"]),
        ('["possible {}."]', '["[possible {}."]', ["[possible {}.", "not closed"]),
        ("[pulmonary, lung] mass", "[pulmonary, lung mass", ["Mass", "not closed"]),
        ('"[pulmonary, lung] mass"', "7", ["Mass", "7", "quotes"]),
        ('["[pulmonary, lung] mass"]', "[]", ["classes.Mass.expressions", "empty list"]),
        ("Mass: {", "Mass: [", ["line 5", "YAML"]),
        ('["the lungs are clear."]', "[]", ["No Finding", "positive"]),
        ("default:", "defaults:", ["defaults", "unknown key"]),
        ("default:", "like: gone\ndefault:", ["like", "gone", "not found"]),
        ("default:", "like: like.yaml\ndefault:", ["classes.Mass", "expected a mapping of"]),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in SMALL
    (tmp_path / "bad.yaml").write_text(SMALL.replace(old, new))
    (tmp_path / "like.yaml").write_text(SMALL.replace('{expressions: ["[pulmonary, lung] mass"]}', "words"))
    with pytest.raises(PromptError) as error:
        prompts.load_templates(tmp_path / "bad.yaml")
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in ["bad.yaml", *words]), message


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, dict[str, int]]], Path]]:
    """Run the stage's main() in an empty folder, on an index with these labels by data set."""
    monkeypatch.chdir(tmp_path)

    def run(labels: dict[str, dict[str, int]]) -> Path:
        for name, values in labels.items():
            studies = [Study(name, "1", str(i), "train", (View("1"),), labels=v) for i, v in enumerate(({}, values))]
            write_studies(tmp_path / "data" / "index" / f"{name}.parquet", studies)
        datasets = tuple(name for name in captioned() if name in labels)
        settings = PromptSettings(str(TRAINING), str(GLORIA), datasets)
        monkeypatch.setattr(prompts_stage, "read_settings", lambda cls, name: settings)
        monkeypatch.setattr(prompts_stage, "load_machine", lambda: SimpleNamespace(tracking=False))
        prompts_stage.main()
        return tmp_path / "data" / "prompts"

    yield run


def test_stage_writes_the_classes_of_the_index(stage: Callable[[dict[str, dict[str, int]]], Path]) -> None:
    out = stage({"chexpert": {"Edema": 1, "Fracture": -1}, "chestxray14": dict.fromkeys(CHESTXRAY14, 0), "rsna": {}})
    for kind, edema in (("file", "Pulmonary edema."), ("ablation", "Improvement in pulmonary edema.")):
        assert {path.name for path in (out / kind).iterdir()} == {"chexpert.json", "chestxray14.json"}
        pools = prompts.read_pools(out / kind / "chexpert.json").pools
        assert set(pools) == {"No Finding", "Edema", "Fracture"} and edema in pools["Edema"][1]
        assert set(prompts.read_pools(out / kind / "chestxray14.json").pools) == {"No Finding", *CHESTXRAY14}


def test_stage_makes_its_folder_without_label_data_sets(stage: Callable[[dict[str, dict[str, int]]], Path]) -> None:
    assert list(stage({"rsna": {"Pneumonia": 1}}).iterdir()) == []


def test_stage_names_a_class_without_templates(stage: Callable[[dict[str, dict[str, int]]], Path]) -> None:
    with pytest.raises(PromptError, match=r"chexpert: .* Scoliosis;"):
        stage({"chexpert": {"Edema": 1, "Scoliosis": 1}})


def test_glorias_sentences_are_those_of_the_protocol():
    """Word for word, but for the capital and the full stop; all that GLoRIA does not say is as in our own file."""
    ours, theirs = prompts.load_templates(TRAINING), prompts.load_templates(GLORIA)
    grid = protocols.load_protocol("paper").tasks["chexpert5x200"].positive
    for name, texts in grid.items():
        assert {s[0].lower() + s[1:].removesuffix(".") for s in theirs.pools[name][1]} == {t.strip() for t in texts}
        assert [theirs.pools[name][v] for v in (0, -1)] == [ours.pools[name][v] for v in (0, -1)]
    assert list(theirs.pools) == list(ours.pools)
    assert {name for name in ours.pools if ours.pools[name] != theirs.pools[name]} == set(grid)


def test_a_file_may_be_like_another_one(tmp_path):
    (tmp_path / "base.yaml").write_text(TRAINING.read_text())
    (tmp_path / "own.yaml").write_text(
        "like: base.yaml\ndefault: {negative: ['{} is absent.']}\n"
        "classes: {Edema: {expressions: [wet lungs]}, Mass: {positive: ['a mass.']}}\n"
    )
    found, base = prompts.load_templates(tmp_path / "own.yaml"), prompts.load_templates(TRAINING)
    assert found.pools["Edema"][0] == ("Wet lungs is absent.",) and found.pools["Edema"][1][0] == "Wet lungs."
    assert found.pools["Mass"][1] == ("A mass.",) and found.pools["Mass"][-1] == base.pools["Mass"][-1]
    assert found.pools["Hernia"][1] == base.pools["Hernia"][1]
    (tmp_path / "own.yaml").write_text("like: nowhere.yaml\n")
    with pytest.raises(prompts.PromptError, match=r"like: .*nowhere\.yaml: not found"):
        prompts.load_templates(tmp_path / "own.yaml")
