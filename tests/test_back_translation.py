"""Back-translation on MarianMT models of random weights, built here: the real code on little data."""

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.load import load_params
from pipeline.config.params import BackTranslation
from pipeline.config.records import ParamsError
from pipeline.storage.index import read_studies, write_studies
from pipeline.study import Study, View
from pipeline.text import back_translation, marian
from pipeline.text.back_translation import back_translate, distinct_texts
from pipeline.text.marian import ENDLESS, WORDLESS, RoundTrip, TranslationError, cut_at_words
from pipeline.text.translations import TRANSLATIONS_FILE, Translations, read_translations, report_sections, text_hash

ROOT = Path(__file__).parents[1]
CAPTIONED = ("chexpert", "chestxray14")
SENTENCES = [
    "There is a small opacity at the left base.",
    "The heart is normal in size.",
    "No pneumothorax or effusion is seen.",
    "Lines and tubes are unchanged.",
    "Nothing else.",
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(folder: Path, seed: int, end: float = 1.5) -> Path:
    """A MarianMT model of one layer with the files of a published one; ``end`` is how much it likes to end."""
    import sentencepiece
    from transformers import MarianConfig, MarianMTModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{"sentence_iterator": iter(SENTENCES), "model_writer": model, "vocab_size": 60, "hard_vocab_limit": False},
        **{"minloglevel": 2, "num_threads": 1},
    )
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [spm.id_to_piece(i) for i in range(spm.get_piece_size())]
    words = ["</s>", "<unk>", *(p for p in pieces if not p.startswith("<")), "<pad>"]
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(model.getvalue())
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "it"}))
    pad = len(words) - 1
    config = MarianConfig(
        **{"vocab_size": len(words), "d_model": 16, "max_position_embeddings": 64, "init_std": 0.3},
        **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
        **{"pad_token_id": pad, "eos_token_id": 0, "decoder_start_token_id": pad, "forced_eos_token_id": 0},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = MarianMTModel(config)
    net.final_logits_bias[0, 0] = end
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> BackTranslation:
    folder = tmp_path_factory.mktemp("models")
    names = {key: str(make_model(folder / key, seed)) for seed, key in ((1, "forward"), (2, "back"))}
    return BackTranslation(**names, beams=2, max_tokens=32, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def trip(options) -> RoundTrip:
    return RoundTrip(options, 0, CPU)


def reports(numbers, dataset="mimic_cxr", split="train"):
    out = []
    for n in numbers:
        text = f"{SENTENCES[n % 5]} {SENTENCES[(n + 2) % 5]} Image {n}."
        ids = (dataset, f"p{n}", f"s{n}", split, (View(f"{n}", "PA"),))
        out.append(Study(*ids, findings=text, impression=None if n % 3 else f"As in {n}. {SENTENCES[n % 5]}"))
    return out


def write_index(path: Path, studies) -> Path:
    write_studies(path, studies)
    return path


def texts(studies):
    return [text for s in studies for text in report_sections(s, CAPTIONED)]


# one text


def test_a_translation_follows_from_seed_and_text_alone(options, trip):
    said = [trip(text) for text in texts(reports(range(6)))]
    torch.manual_seed(99)
    torch.rand(7)
    other = RoundTrip(replace(options, workers=3), 0, CPU)
    backwards = [other(text) for text in reversed(texts(reports(range(6))))]
    assert backwards[::-1] == said and other.fingerprint == trip.fingerprint
    assert sum(t is not None for t, _ in said) > len(said) / 2
    reseeded = RoundTrip(options, 1, CPU)
    assert reseeded.fingerprint != trip.fingerprint
    assert sum(reseeded(text) == one for text, one in zip(texts(reports(range(6))), said, strict=True)) <= 1


def test_the_temperature_is_that_of_the_draw(options):
    """Near 0 the likeliest continuation is always drawn, so that seeds no longer matter."""
    cold = [RoundTrip(replace(options, temperature=0.001), seed, CPU) for seed in (0, 1)]
    assert cold[0](SENTENCES[0]) == cold[1](SENTENCES[0])
    hot = [RoundTrip(options, seed, CPU)(SENTENCES[0]) for seed in range(4)]
    assert len(set(hot)) > 1


def test_beams_reach_the_model(options, monkeypatch):
    seen = []
    one = RoundTrip(replace(options, beams=3), 0, CPU).there
    real = one.model.forward
    monkeypatch.setattr(one.model, "forward", lambda *a, **k: seen.append(len(k["decoder_input_ids"])) or real(*a, **k))
    one("No effusion. Nothing else.", 0)
    assert set(seen) == {6}  # two sentences, three beams each


def test_the_sentences_of_a_text_are_a_batch_of_their_own(trip, monkeypatch):
    batches = []
    real = marian.Translator._batch
    monkeypatch.setattr(marian.Translator, "_batch", lambda self, parts: batches.append(parts) or real(self, parts))
    trip.there("1. One a. Two b. ___ Three c. Four d. Five e. Six f.", 0)
    assert batches == [["One a.", "Two b.", "___ Three c.", "Four d."], ["Five e.", "Six f."]]


def test_what_has_no_letter_stays(trip):
    said = [trip.there("1. No effusion. 2. Nothing.", seed)[0] for seed in range(12)]
    assert all(text.startswith("1. ") and " 2. " in text for text in said if text) and len(set(said)) > 2


def test_a_sentence_that_vanishes_takes_the_text_along(trip, monkeypatch):
    real = marian.Translator._batch
    monkeypatch.setattr(marian.Translator, "_batch", lambda self, parts: [*real(self, parts)[:-1], " ."])
    assert trip("No effusion. Nothing else.") == (None, WORDLESS)


@pytest.mark.parametrize("text", ["", " ", "___", "1. 2. 3.", "…"])
def test_a_text_without_words_has_no_translation(trip, text):
    assert trip(text) == (None, WORDLESS)


@pytest.mark.parametrize(
    "text", ["</s> <pad> a.", ">>it<< a base.", "è 中文 tutto.", "x" * 500, "a\nb.\tc", "base " * 60, "\x00\x07 base"]
)
def test_odd_texts_are_translated_or_have_a_reason(trip, text):
    said, reason = trip(text)
    assert (said is None) == bool(reason) and (said, reason) == trip(text)
    assert said is None or not {"</s>", "<pad>"} & set(said.split())


def test_special_tokens_in_a_report_are_text(trip):
    ids = trip.there._encode("</s> a.")["input_ids"]
    assert ids.count(trip.there.tokenizer.eos_token_id) == 1 and ids[-1] == trip.there.tokenizer.eos_token_id


def test_a_sentence_without_end_is_not_cut_off_silently(options, tmp_path):
    endless = make_model(tmp_path / "endless", 0, end=-100.0)
    assert RoundTrip(replace(options, forward=str(endless)), 0, CPU)(SENTENCES[0]) == (None, ENDLESS)


def test_nothing_is_lost_in_cutting():
    rng = np.random.default_rng(3)
    letters = list("abcdef.!? ") * 3 + [" "] * 8
    for _ in range(300):
        text = "".join(rng.choice(letters, rng.integers(1, 120)))
        limit = int(rng.integers(3, 20))
        pieces = cut_at_words(text, len, limit)
        assert all(0 < len(piece) <= limit for piece in pieces)
        assert "".join("".join(pieces).split()) == "".join(text.split())
    assert cut_at_words("One two. Three four five. Six.", len, 12) == ["One two.", "Three four", "five.", "Six."]
    assert cut_at_words("abcdefghij k", len, 5) == ["abcde", "fghij", "k"]


# all texts


def run(options, folder, index, seed=0):
    out = folder / "out"
    summary = back_translate(
        options, seed, index if isinstance(index, list) else [index], out, folder / "work", CAPTIONED
    )
    return summary, (out / TRANSLATIONS_FILE).read_bytes()


def test_each_distinct_training_section_is_translated_once(options, trip, tmp_path):
    twice = replace(reports([0])[0], study="again")
    valid, unseen = reports([7], split="valid"), replace(reports([8])[0], views=())
    ours = write_index(tmp_path / "mimic_cxr.parquet", [*reports(range(4)), twice, *valid, unseen])
    labelled = [replace(s, labels={"Edema": 1}) for s in reports([9, 10], "chexpert")]
    theirs = write_index(tmp_path / "chexpert.parquet", labelled)  # captions are made of its labels
    wanted = list(dict.fromkeys(texts(reports(range(4)))))
    assert [text for _, text in distinct_texts([ours, theirs], CAPTIONED)] == wanted
    summary, _ = run(options, tmp_path, [ours, theirs])
    known = read_translations(tmp_path / "out" / TRANSLATIONS_FILE)
    expected = {text: trip(text)[0] for text in wanted}
    assert {text: known.get(text) for text in wanted} == expected
    assert len(known) == summary["translated"] == sum(said is not None for said in expected.values()) > 2
    assert summary["texts"] == len(wanted) == sum(v for k, v in summary.items() if k != "texts")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert known.get("A text nobody wrote.") is None


def test_only_what_is_missing_is_translated(options, tmp_path, monkeypatch):
    asked = []
    real = RoundTrip.__call__
    monkeypatch.setattr(RoundTrip, "__call__", lambda self, text: asked.append(text) or real(self, text))
    index = write_index(tmp_path / "a.parquet", reports(range(3)))
    first = run(options, tmp_path, index)
    assert sorted(asked) == sorted(texts(reports(range(3))))
    asked.clear()
    assert run(replace(options, workers=1, device="auto" if not torch.cuda.is_available() else "cpu"), tmp_path, index)
    assert run(options, tmp_path, index) == first
    grown = write_index(tmp_path / "a.parquet", reports([4, 1, 2, 0]))
    asked.clear()
    run(options, tmp_path, grown)
    assert asked == texts(reports([4]))
    shrunk = write_index(tmp_path / "a.parquet", reports(range(3)))
    assert run(options, tmp_path, shrunk) == first  # what is no longer asked for is not passed on
    asked.clear()
    run(options, tmp_path, shrunk, seed=5)
    assert len(asked) == len(texts(reports(range(3))))


def test_other_weights_under_the_same_name_are_other_models(options, tmp_path):
    index = write_index(tmp_path / "a.parquet", reports(range(2)))
    folder = make_model(tmp_path / "model", 1)
    own = replace(options, back=str(folder))
    first = run(own, tmp_path, index)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    make_model(folder, 2)
    assert run(own, tmp_path, index)[1] != first[1]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.text import back_translation, marian
from pipeline.config.params import BackTranslation

forward, back, index, folder, after = sys.argv[1:]
left, real = [int(after)], marian.RoundTrip.__call__

def once_more(self, text):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, text)

marian.RoundTrip.__call__ = once_more
back_translation.PART = 2
options = BackTranslation(forward, back, beams=2, max_tokens=32, batch_size=4, device="cpu")
back_translation.back_translate(options, 0, [Path(index)], Path(folder, "out"), Path(folder, "work"))
"""


def test_after_a_kill_it_goes_on(options, tmp_path, monkeypatch):
    index = write_index(tmp_path / "a.parquet", reports(range(5)))
    monkeypatch.setattr(back_translation, "PART", 2)
    whole = run(options, tmp_path / "whole", index)
    command = [sys.executable, "-c", KILLED, options.forward, options.back, str(index), str(tmp_path / "cut"), "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / "cut" / "out").exists()
    parts = sorted(p.name for p in (tmp_path / "cut" / "work").glob("*/*.parquet"))
    assert len(parts) == 2  # of 2 texts each, and the fifth text is lost
    asked = []
    real = RoundTrip.__call__
    monkeypatch.setattr(RoundTrip, "__call__", lambda self, text: asked.append(text) or real(self, text))
    (next((tmp_path / "cut" / "work").iterdir()) / "00.parquet.1.partial").write_bytes(b"half")
    assert run(options, tmp_path / "cut", index) == whole
    assert asked == texts(reports(range(5)))[4:]
    assert not list((tmp_path / "cut" / "work").glob("*/*.partial"))


def test_processes_share_the_work(options, tmp_path, monkeypatch):
    index = write_index(tmp_path / "a.parquet", reports(range(4)))
    monkeypatch.setattr(back_translation, "PART", 2)
    alone = run(options, tmp_path / "one", index)
    assert run(replace(options, workers=2), tmp_path / "two", index) == alone


def test_a_damaged_part_is_done_again_alone(options, tmp_path, trip, capfd, monkeypatch):
    monkeypatch.setattr(back_translation, "PART", 2)
    index = write_index(tmp_path / "a.parquet", reports(range(3)))
    whole = run(options, tmp_path, index)
    for cut in (0, 20):
        part = sorted((tmp_path / "work").glob("*/*.parquet"))[0]
        part.write_bytes(part.read_bytes()[:-cut] if cut else b"")
        others = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*/*.parquet") if p != part}
        capfd.readouterr()
        assert run(options, tmp_path, index) == whole
        assert f"{part}: damaged: starting anew" in capfd.readouterr().err.splitlines()
        assert others == {p: p.stat().st_mtime_ns for p in others}


# privacy


def test_no_word_of_a_report_is_kept_or_said(options, tmp_path, capfd, monkeypatch):
    secret = [replace(s, findings="Zanzibar quokka.", impression="Zanzibar again.") for s in reports([0])]
    index = write_index(tmp_path / "a.parquet", secret)
    summary, _ = run(options, tmp_path, index)
    for path in (*tmp_path.glob("out/*"), *tmp_path.glob("work/*/*")):
        columns = pq.read_table(path).schema.names if path.suffix == ".parquet" else []
        assert columns in ([], ["hash", "translation"], ["hash", "translation", "reason"])
        assert b"anziba" not in path.read_bytes() and "anziba" not in str(columns and pq.read_table(path).to_pydict())
    said = capfd.readouterr()
    assert "anziba" not in said.out + said.err + json.dumps(summary)

    def fail(self, parts):
        raise RuntimeError(f"cannot handle {parts[0]}")

    monkeypatch.setattr(marian.Translator, "_batch", fail)
    with pytest.raises(TranslationError) as error:
        run(options, tmp_path, index, seed=1)
    assert str(error.value) == "a text of 16 characters could not be translated (RuntimeError)"
    assert error.value.__cause__ is None and error.value.__suppress_context__


# models that are not there


def test_without_models_the_result_is_empty_and_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # nothing is loaded
    index = write_index(tmp_path / "a.parquet", reports(range(4)))
    summary, _ = run(BackTranslation(), tmp_path, index)
    assert (summary["texts"], summary["translated"]) == (len(texts(reports(range(4)))), 0)
    for part in ("opus-mt-en-it", "opus-mt-it-en", "sentence swap alone"):
        assert part in summary["note"]
    assert "\n" not in summary["note"] and len(read_translations(tmp_path / "out" / TRANSLATIONS_FILE)) == 0


def test_the_stage_says_it_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for profile, models in (("demo", None), ("demo", str(tmp_path / "empty"))):
        folder = tmp_path / str(bool(models))
        (folder / "data" / "index").mkdir(parents=True)
        text = (ROOT / "profiles" / f"{profile}.yaml").read_text().replace("enabled: true ", "enabled: false ")
        text = (
            text.replace('forward: "" ', f"forward: {models} ").replace('back: "" ', f"back: {models} ")
            if models
            else text
        )
        (folder / "params.yaml").write_text(text)
        for dataset in load_params(folder / "params.yaml").sources:
            write_index(
                folder / "data" / "index" / f"{dataset}.parquet", reports([0]) if dataset == "mimic_cxr" else []
            )
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-m", "stages.settings"], cwd=folder, env=env, check=True)
        command = [sys.executable, "-m", "stages.back_translate"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if models is None:
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout == f"back_translate: {back_translation.NEEDS}\n"
        else:
            assert done.returncode == 1 and done.stderr.count("\n") == 1
            assert done.stderr.startswith(f"back_translate: back_translation.forward: '{models}' could not be loaded (")
            assert not (folder / "data" / "back_translation").exists()


class Boom:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOOM"],))


def test_models_that_cannot_be_used_are_one_clear_error(options, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("BOOM", str(tmp_path / "boom"))

    def broken(change):
        folder = make_model(tmp_path / change.__name__, 0)
        change(folder)
        with pytest.raises(
            ParamsError,
            match=r"^back_translation\.back: .*(could not be loaded|not hold all weights|holds posix\.mkdir, which)",
        ) as e:
            RoundTrip(replace(options, back=str(folder)), 0, CPU)
        assert "\n" not in str(e.value)

    def no_weights(folder):
        (folder / "model.safetensors").unlink()

    def no_vocabulary(folder):
        (folder / "vocab.json").unlink()

    def no_sentencepiece_model(folder):
        (folder / "source.spm").unlink()

    def half_of_the_weights(folder):
        weights = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in weights.items() if "decoder.layers" not in k}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    def weights_of_another_size(folder):
        weights = load_file(folder / "model.safetensors")
        save_file({k: v[..., :3].contiguous() if "fc1" in k else v for k, v in weights.items()},
                  folder / "model.safetensors", {"format": "pt"})  # fmt: skip

    def code_in_a_pickle(folder):
        (folder / "model.safetensors").unlink()
        torch.save({"model.shared.weight": Boom()}, folder / "pytorch_model.bin")

    for change in (no_weights, no_vocabulary, no_sentencepiece_model, half_of_the_weights, weights_of_another_size,
                   code_in_a_pickle):  # fmt: skip
        broken(change)
    assert not (tmp_path / "boom").exists()
    with pytest.raises(ParamsError, match=r"back_translation\.max_tokens: .* takes 64 tokens at most"):
        RoundTrip(replace(options, max_tokens=65), 0, CPU)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TranslationError, match="needs the package sentencepiece"):
        RoundTrip(options, 0, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_there_is_an_error():
    assert marian.choose_device("auto") == marian.choose_device("cpu", 3) == CPU
    with pytest.raises(ParamsError, match=r"back_translation\.device: cuda was asked for"):
        marian.choose_device("cuda")


# the table


def test_the_table_finds_every_text_and_no_other(tmp_path):
    import pickle

    import pyarrow as pa

    said = {f"Text {i}.": f"Words {i}." for i in range(500)}
    rows = sorted(said, key=lambda t: t[::-1])
    table = pa.table(
        {"hash": pa.array([text_hash(t) for t in rows], pa.uint64()), "translation": [said[t] for t in rows]}
    )
    known = Translations(table)
    again = pickle.loads(pickle.dumps(known))
    assert all(known.get(t) == again.get(t) == said[t] for t in said)
    assert not any(known.get(f"Other {i}.") for i in range(500))
    few = known.of(["Text 3.", "Text 77.", "Other."])
    assert len(few) == 2 and few.get("Text 77.") == "Words 77." and few.get("Text 4.") is None
    known.write(tmp_path / "a.parquet")
    Translations(table.take(list(range(499, -1, -1)))).write(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert len(read_translations(tmp_path / "none.parquet")) == 0
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    write_index(tmp_path / "b.parquet", reports([1]))
    for name, says in (("a", "damaged, or not written"), ("b", "no table of translations; make it again")):
        with pytest.raises(ValueError, match=says):
            read_translations(tmp_path / f"{name}.parquet")


# the corpus


def test_the_corpus_carries_the_translations_of_its_own_training_reports(config, tmp_path):
    from pipeline.training.corpus import write_corpus

    everything = [*reports(range(4)), *reports([5], split="valid")]
    write_index(tmp_path / "index" / "mimic_cxr.parquet", everything)
    words = tmp_path / "words"

    def known(studies):
        import pyarrow as pa

        said = texts(studies)
        table = pa.table(
            {"hash": pa.array(map(text_hash, said), pa.uint64()), "translation": [f"Again: {t}" for t in said]}
        )
        Translations(table).write(words / TRANSLATIONS_FILE)

    def made(folder, **changes):
        out = tmp_path / folder
        return write_corpus(config(datasets=("mimic_cxr",), **changes), tmp_path / "index", tmp_path, out, words), out

    counts, out = made("none")
    assert "translations" not in counts and not (out / TRANSLATIONS_FILE).exists()
    known([*reports(range(3)), *reports([5, 40])])
    counts, out = made("some")
    assert counts["translations"] == len(texts(reports(range(3)))) and counts["mimic_cxr.train"] == 4
    own = read_translations(out / TRANSLATIONS_FILE)
    assert {t: own.get(t) for t in texts(everything)} == {
        **{t: f"Again: {t}" for t in texts(reports(range(3)))},
        **dict.fromkeys(texts([*reports([3]), *reports([5])])),
    }
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    known([*reports([41, 42]), *reports(range(3))])  # others come and go: the folder stays as it is
    made("some")
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    counts, out = made("some", augment={"text": False})
    assert "translations" not in counts and not (out / TRANSLATIONS_FILE).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_studies(out / "studies.parquet")) == 5
