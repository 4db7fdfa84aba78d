"""Protocols: what the paper's and the others' files say, written out; and files of a user's own, good and bad."""

import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.evaluation import protocols
from pipeline.evaluation.protocols import FOLDER, ProtocolError
from pipeline.ingest.sources.chestxray14 import CHESTXRAY14_CLASSES as CHESTXRAY14
from pipeline.text import prompts

NAMES = sorted(p.stem for p in FOLDER.glob("*.yaml"))
OWN = {
    "test_sets": {
        "mine": {
            "dataset": "siim",
            "prompts": {"positive": ["{} is there"], "negative": ["no {}"], "classes": ["Pneumothorax"]},
            "aggregate": "mean",
            "score": "softmax",
            "metric": "auc",
        }
    }
}
SEARCH = {"dataset": "openi", "text": ["impression"], "candidates": "distinct", "studies": "frontal"}
LISTS = {"A": ["a", "b", "c"], "B": ["d"]}


def write(folder, raw, name="own.yaml"):
    (folder / name).write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return str(folder / name)


def own(**changes):
    """``OWN`` with keys of its test set changed; ``prompts`` is replaced as a whole."""
    return {"test_sets": {"mine": {**OWN["test_sets"]["mine"], **changes}}}


def found(**changes):
    """``OWN`` with a retrieval set, keys of it changed."""
    return {**OWN, "retrieval": {"mine": {**SEARCH, **changes}}}


def task(protocol, name):
    return protocols.load_protocol(protocol).tasks[name]


def test_the_papers_pairs_are_letter_for_letter():
    vindr = task("paper", "vindr_cxr")
    assert len(vindr.positive) == 18 and list(vindr.positive) == list(vindr.negative)
    assert (vindr.positive["Nodule/Mass"], vindr.negative["Nodule/Mass"]) == (["Nodule/Mass"], ["No Nodule/Mass"])
    assert vindr.negative["ILD"] == ["No ILD"] and not any(n.startswith(("Other", "No ")) for n in vindr.positive)
    siim, rsna = task("paper", "siim"), task("paper", "rsna")
    assert (siim.positive, siim.negative) == ({"Pneumothorax": ["Pneumothorax"]}, {"Pneumothorax": ["No Pneumothorax"]})
    assert rsna.positive == {"Pneumonia": ["Findings suggesting pneumonia."]}
    assert rsna.negative == {"Pneumonia": ["No evidence of pneumonia."]}


def test_the_papers_grid_has_its_sizes():
    grid = task("paper", "chexpert5x200").positive
    sizes = {name: len(texts) for name, texts in grid.items()}
    assert sizes == {"Atelectasis": 210, "Cardiomegaly": 15, "Consolidation": 192, "Edema": 18, "Pleural Effusion": 54}
    assert len(set(grid["Pleural Effusion"])) == 36
    assert grid["Atelectasis"][:2] == [f"subsegmental atelectasis at the {s} lung zone" for s in ("mid", "upper")]
    assert grid["Atelectasis"][-1] == "minimal residual atelectasis at the right lower lobe"
    assert "tiny bilateral pleural effusion" in grid["Pleural Effusion"]  # location before subtype
    assert all(text == " ".join(text.split()) for texts in grid.values() for text in texts)


def test_our_prompts_are_the_positive_sentences_of_training():
    found = task("paper_prompts", "chexpert5x200").positive
    ours = prompts.load_templates(Path(prompts.__file__).with_name("prompts.yaml"))
    assert list(found) == list(task("paper", "chexpert5x200").positive)
    assert {name: tuple(texts) for name, texts in found.items()} == {name: ours.sentences(name, 1) for name in found}
    assert "There is pleural effusion." in found["Pleural Effusion"] and len(found["Edema"]) == 7


def test_the_protocols_of_others():
    grid = task("paper", "chexpert5x200").positive
    for name, key, count in (("gloria", "chexpert5x200", 5), ("medclip", "chexpert5x200", 10)):
        drawn = task(name, key)
        assert {c: len(texts) for c, texts in drawn.positive.items()} == dict.fromkeys(grid, count)
        assert all(set(texts) <= set(grid[c]) for c, texts in drawn.positive.items())
        assert drawn.rule.aggregate == "max" and not drawn.negative
    gloria = task("gloria", "chexpert5x200").rule
    assert gloria.local and gloria.z_score and not task("medclip", "chexpert5x200").rule.z_score
    assert task("medclip", "chexpert5x200_ensemble").positive == task("medclip", "chexpert5x200").positive
    assert task("chexzero", "siim").negative == {"Pneumothorax": ["no Pneumothorax"]}
    assert list(task("chexzero", "vindr_cxr").positive) == list(task("paper", "vindr_cxr").positive)
    biovil = task("biovil", "rsna")
    assert len(biovil.positive["Pneumonia"]) == len(biovil.negative["Pneumonia"]) == 4
    assert biovil.rule.aggregate == "embedding"


def test_the_papers_retrieval_sets():
    found = protocols.load_protocol("paper").retrieval
    longer = ("findings", "impression")  # of equally long ones the findings
    wanted = {"chexpert5x200": ("chexpert", ("impression",)), "mimic_cxr": ("mimic_cxr", longer)}
    wanted["openi"] = ("openi", longer)
    assert {name: (rule.dataset, rule.text) for name, rule in found.items()} == wanted
    assert list(found) == list(wanted)  # the order of the results
    assert {(r.candidates, r.studies, r.split) for r in found.values()} == {("distinct", "frontal", "test")}


def test_a_first_protocol_without_retrieval_sets_is_an_error_where_there_are_reports(tmp_path):
    mine = protocols.load_protocol(write(tmp_path, OWN))
    assert protocols.retrieval_sets(mine, ["rsna", "chestxray14"]) == {}
    with pytest.raises(ProtocolError, match="own, the first, has no retrieval sets, and mimic_cxr, openi could be"):
        protocols.retrieval_sets(mine, ["openi", "rsna", "mimic_cxr"])
    paper = protocols.load_protocol("paper")
    assert protocols.retrieval_sets(paper, ["openi"]) == paper.retrieval
    for name in NAMES:  # what other projects publish is another quantity
        assert (protocols.load_protocol(name).retrieval != {}) is (name == "paper")


def test_all_prompts_stand_once_in_the_order_of_first_appearance(tmp_path):
    lists = {"A": ["x", "y"], "B": ["y", "x", "z"]}
    path = write(tmp_path, own(prompts={"lists": lists}, score="cosine"))
    assert protocols.prompt_texts([path]) == ["x", "y", "z"]
    texts = protocols.prompt_texts([*NAMES, path])
    assert len(texts) == len(set(texts)) and set(texts) >= {"x", "Pneumonia", "no Pneumonia", "No Pneumothorax"}
    for name in NAMES:
        for found in protocols.load_protocol(name).tasks.values():
            for side in (found.positive, found.negative):
                assert {text for some in side.values() for text in some} <= set(texts)


def test_a_file_of_ones_own(tmp_path):
    path = write(tmp_path, OWN)
    mine = protocols.load_protocol(path)
    assert mine.name == "own" and mine.tasks["mine"].positive == {"Pneumothorax": ["Pneumothorax is there"]}
    assert protocols.classes_of(mine, "siim") == ["Pneumothorax"]
    with pytest.raises(ProtocolError, match="own, the first, measures no AUC on rsna"):
        protocols.classes_of(mine, "rsna")
    with pytest.raises(ProtocolError, match="two are named own"):
        protocols.load_protocols([path, "paper", path])
    shutil.copy(
        Path(prompts.__file__).with_name("prompts.yaml"), tmp_path / "sentences.yaml"
    )  # a file is relative to the protocol
    spec = {"file": "sentences.yaml", "classes": ["Edema"]}
    assert (
        len(protocols.load_protocol(write(tmp_path, own(prompts=spec, score="cosine"))).tasks["mine"].positive["Edema"])
        == 7
    )
    other = write(tmp_path, own(prompts={"as_in": f"{path}/mine"}, score="cosine"), "other.yaml")
    write(tmp_path, own(prompts={"lists": LISTS}, score="cosine"))
    assert protocols.load_protocol(other).tasks["mine"].positive == LISTS


def test_a_sample_depends_on_its_seed_and_keeps_the_lists_order(tmp_path):
    lists = {"A": [f"a{i:02}" for i in range(40)], "B": [f"a{i:02}" for i in range(40)], "C": ["c"]}

    def drawn(seed):
        spec = {"lists": lists, "sample": {"count": 10, "seed": seed}}
        return protocols.load_protocol(write(tmp_path, own(prompts=spec, score="cosine"))).tasks["mine"].positive

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert one == again and one["A"] != other["A"] and one["A"] != one["B"] and one["C"] == ["c"]
    assert one["A"] == sorted(set(one["A"])) and len(one["A"]) == 10
    assert len({text for seed in range(30) for text in drawn(seed)["A"]}) == 40


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"test_set": {}}, "test_set: unknown key (did you mean test_sets?)"),
        (own(agregate="max"), "test_sets.mine.agregate: unknown key (did you mean aggregate?)"),
        (own(aggregate="median"), "test_sets.mine.aggregate: 'median' is none of mean, max, embedding"),
        (own(score="sum"), "test_sets.mine.score: 'sum' is none of difference, softmax, cosine"),
        (own(metric="f1"), "test_sets.mine.metric: 'f1' is none of auc, accuracy"),
        (own(split="valid"), "test_sets.mine.split: 'valid' is none of test"),
        (own(dataset="vindr"), "test_sets.mine.dataset: 'vindr' is no test set; known are mimic_cxr"),
        (own(dataset="chestxray14"), "test_sets.mine.dataset: 'chestxray14' is no test set"),
        (own(score="cosine"), "test_sets.mine.score: cosine, but the test set has negative prompts"),
        (own(prompts={"lists": LISTS}), "test_sets.mine.score: softmax, but the test set has no negative prompts"),
        (own(local=True, aggregate="embedding"), "test_sets.mine.local: a local score is one prompt's"),
        (own(metric="accuracy"), "test_sets.mine.metric: accuracy needs two classes or more"),
        (own(prompts={}), "test_sets.mine.prompts: needs one of positive, grid, lists, file, as_in, has none"),
        (own(prompts={"lists": LISTS, "file": "x"}), "test_sets.mine.prompts: needs one of positive, grid, lists, fi"),
        (own(prompts={"positive": ["{}"]}), "test_sets.mine.prompts.classes: missing"),
        (own(prompts={"lists": LISTS, "classes": ["A"]}), "test_sets.mine.prompts.classes: not to be given beside l"),
        (own(prompts={"lists": LISTS, "negative": ["a"]}), "test_sets.mine.prompts.negative: not to be given beside"),
        (own(prompts={"positive": ["{}"], "classes": ["A", "A"]}), "test_sets.mine.prompts.classes: a class is named"),
        (own(prompts={"positive": ["{x}"], "classes": ["A"]}), "test_sets.mine.prompts.positive: '{x}': a brace is no"),
        (own(prompts={"positive": [" "], "classes": ["A"]}), "test_sets.mine.prompts.positive: a blank prompt"),
        (own(prompts={"positive": ["a"], "classes": ["A", "B"]}), "test_sets.mine.prompts.positive: 'a' is the same"),
        (own(prompts={"lists": {"A": ["a", " "]}}), "test_sets.mine.prompts: A has a blank prompt"),
        (own(prompts={"lists": {"A": []}}), "test_sets.mine.prompts: A has no prompt"),
        (own(prompts={"lists": {"A": "a"}}), "test_sets.mine.prompts.lists.A: expected a list"),
        (own(prompts={"grid": {"A": {"x": []}}}), "test_sets.mine.prompts.grid.A: expected lists of terms"),
        (
            own(prompts={"grid": {"A": {str(n): ["a", "b"] for n in range(40)}}}),
            "test_sets.mine.prompts.grid: too many",
        ),
        (
            own(prompts={"positive": ["{}" * 9999], "classes": ["A" * 999]}),
            "test_sets.mine.prompts.positive: more than 4,000,000",
        ),
        (own(dataset="x" * 9999), f"test_sets.mine.dataset: '{'x' * 56}... is no test set; known"),
        (own(prompts={"grid": {"A": {}}}), "test_sets.mine.prompts.grid.A: expected lists of terms"),
        (own(prompts={"grid": {"A": {"x": ["", "b"]}}}), "test_sets.mine.prompts: A has a blank prompt"),
        (own(prompts={"file": "gone.yaml", "classes": ["A"]}), "test_sets.mine."),
        (own(prompts={"as_in": "paper"}), "test_sets.mine.prompts.as_in: 'paper' is not <protocol>/<test set>"),
        (own(prompts={"as_in": "paper/sim"}), "test_sets.mine.prompts.as_in: "),
        (own(prompts={"as_in": "gloria/chexpert5x200"}), "test_sets.mine.prompts.as_in: gloria/chexpert5x200 itself r"),
        (own(prompts={"lists": LISTS, "sample": {"count": -1}}), "test_sets.mine.prompts.sample.count: -1 is outside"),
        ({"test_sets": {"a.b": OWN["test_sets"]["mine"]}}, "test_sets.a.b: a test set's name is letters, digits and"),
        (found(text=["conclusion"]), "retrieval.mine.text[0]: 'conclusion' is none of findings, impression"),
        (found(text="impression"), "retrieval.mine.text: expected a list"),
        (found(text=[]), "retrieval.mine.text: expected one section or more, each once"),
        (found(text=["findings", "findings"]), "retrieval.mine.text: expected one section or more, each once"),
        (found(candidates="all"), "retrieval.mine.candidates: 'all' is none of distinct"),
        (found(studies="any"), "retrieval.mine.studies: 'any' is none of frontal"),
        (found(split="valid"), "retrieval.mine.split: 'valid' is none of test"),
        (found(tie="findings"), "retrieval.mine.tie: unknown key"),
        (
            found(dataset="mimic"),
            "retrieval.mine.dataset: 'mimic' is none with reports: mimic_cxr, chexpert, ope",
        ),
        (found(dataset="rsna"), "retrieval.mine.dataset: 'rsna' is none with reports"),
        ({**OWN, "retrieval": {"a": SEARCH, "b": SEARCH}}, "retrieval.b.dataset: openi is searched by a already"),
        ({**OWN, "retrieval": {"a.b": SEARCH}}, "retrieval.a.b: a retrieval set's name is letters, digits and _"),
        ("test_sets: {a: {prompts: {}", "line "),
        ("", "the file: expected a mapping"),
    ],
)
def test_one_line_names_what_cannot_be_used(tmp_path, raw, says):
    path = write(tmp_path, raw)
    with pytest.raises(ProtocolError) as error:
        protocols.load_protocol(path)
    assert str(error.value).startswith(f"{path}: {says}") and "\n" not in str(error.value)
    assert len(str(error.value)) < len(path) + 250


def test_chestxray14_asks_for_each_of_its_classes(tmp_path):
    protocol = protocols.load_protocol("chestxray14")
    (task,) = protocol.tasks.values()
    assert tuple(task.positive) == CHESTXRAY14 and task.rule.dataset == "chestxray14_official"
    assert (task.positive["Hernia"], task.negative["Hernia"]) == (["Hernia"], ["No Hernia"])
    assert protocols.measuring(["paper", "chestxray14"], "chestxray14_official") == protocol
    assert protocols.measuring(["medclip", "paper"], "rsna").name == "medclip"  # the first that does
    with pytest.raises(ProtocolError, match=r"none measures an AUC on chestxray14_official"):
        protocols.measuring(["paper", "paper_prompts"], "chestxray14_official")


def test_a_name_that_is_no_protocol(tmp_path):
    with pytest.raises(ProtocolError, match=r"'glorya' is none of .* \(did you mean gloria\?\)"):
        protocols.load_protocol("glorya")
    with pytest.raises(ProtocolError, match=r"gone\.yaml: not found"):
        protocols.load_protocol(str(tmp_path / "gone.yaml"))
    with pytest.raises(ProtocolError, match="rename the file"):
        protocols.load_protocol(write(tmp_path, OWN, "a.b.yaml"))
