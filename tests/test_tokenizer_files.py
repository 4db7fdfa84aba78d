"""Tokenizers of other people that would make long texts, draw at random or panic: refused in one line."""

import base64
import io
import json

import pytest
import torch
import transformers
from checkpoints import TEXTS

from pipeline.config.params import TextEncoder
from pipeline.config.records import ParamsError
from pipeline.storage.torch_archive import Refused
from pipeline.text.tokenizer import Tokenizer
from tests.foreign import TOKENIZER_MAP, bert_folder, change, clip_folder, load, one_line, rows
from tests.test_adapters import FORMATS, fast_tokenizer

pytestmark = pytest.mark.usefixtures("guard")


def replace(content, pattern="a"):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def compiled(*texts, trie=b"\0" * 4):
    """A table of letters as sentencepiece compiles it."""
    table = len(trie).to_bytes(4, "little") + trie + b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def sequence(*parts):
    return {"type": "Sequence", "normalizers": list(parts)}


def template(*names, ids=(2,)):
    single = [{"Sequence": {"id": name, "type_id": 0}} for name in names]
    tokens = {"[CLS]": {"id": "[CLS]", "ids": list(ids), "tokens": ["[CLS]"] * len(ids)}}
    first = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": [first, *single], "pair": pair, "special_tokens": tokens}


@pytest.mark.parametrize(
    ("step", "value"),
    [
        ("normalizer", replace("b" * 5000)),
        ("normalizer", replace("b" * 100, "")),
        ("normalizer", sequence(*[replace("aa")] * 30)),
        ("normalizer", sequence(sequence(replace("a" * 9)), sequence(replace("a" * 9)))),
        ("normalizer", sequence(*[{"type": "Prepend", "prepend": "a" * 900}] * 1000)),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 5000}),
        ("normalizer", sequence(*[{"type": "ByteLevel"}] * 30)),
        ("normalizer", sequence(*[{**replace("a"), "pattern": {"Regex": "(?=.)"}}] * 30)),
        ("normalizer", sequence(*[replace("a", "")] * 30)),
        ("normalizer", sequence(*[{"pattern": {"String": "a"}, "content": "a" * 8}] * 30)),
        ("normalizer", sequence(*[compiled("b" * 30)] * 4)),
        ("normalizer", compiled("b" * 5000)),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "_" * 2000, "prepend_scheme": "always", "split": True}),
        ("post_processor", template("A", "A")),
        ("post_processor", {"type": "Sequence", "processors": [template("A", "A")] * 30}),
        ("post_processor", template("A", ids=[2] * 5000)),
        ("padding", {"strategy": {"Fixed": 1 << 30}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}),
    ],
)
def test_a_tokenizer_makes_no_long_text_of_a_short_one(guard, step, value):
    path = bert_folder_with(guard, **{step: value})
    for call in (
        lambda: Tokenizer.load(guard, 16),
        lambda: Tokenizer.build(TextEncoder(str(guard), max_tokens=16), []),
    ):
        one_line(call, f"{path}: its steps")


def bert_folder_with(folder, **steps):
    """A text encoder's folder with other steps in its tokenizer."""
    bert_folder(folder)
    (folder / "vocab.txt").unlink()
    fast_tokenizer().save_pretrained(folder)
    change(folder / "tokenizer.json", **steps)
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": sequence(replace("▁", " "), replace('"', "``"), {"type": "Prepend", "prepend": "▁"})},
        {"post_processor": {"type": "Sequence", "processors": [template("A"), template("A", ids=[2, 3])]}},
        {"padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}},
        "sentencepiece",
    ],
)
def test_steps_of_published_tokenizers_are_read(guard, steps):
    if steps == "sentencepiece":
        steps = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table_of_sentencepiece()}}
    else:
        steps.get("padding", {}).update(pad_type_id=0, pad_token="[PAD]")
    path = bert_folder_with(guard, **steps)
    wanted = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert Tokenizer.load(guard, 64).tokenizer(TEXTS)["input_ids"] == wanted(TEXTS)["input_ids"]


def table_of_sentencepiece():
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 3), model_writer=model, **options)
    read = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    return base64.b64encode(read.normalizer_spec.precompiled_charsmap).decode()


@pytest.mark.parametrize("normalizer", [compiled(trie=b""), compiled("b")])
def test_a_damaged_tokenizer_is_one_line_though_its_library_panics(guard, normalizer, monkeypatch):
    """In the first case where it is read, in the second where it is given a text."""
    path = bert_folder_with(guard, normalizer=normalizer)
    named = TextEncoder(str(guard), max_tokens=16)
    says = "model.text_encoder.name: ", "could not be loaded (PanicException)"
    one_line(lambda: Tokenizer.build(named, []), *says, error=ParamsError)
    content = path.read_bytes()
    FORMATS["medclip"][0](guard)
    (guard / "tokenizer" / "vocab.txt").unlink()
    (guard / "tokenizer" / "tokenizer.json").write_bytes(content)
    one_line(lambda: load("medclip", guard), f"{guard / 'tokenizer'}: not a tokenizer (PanicException)")
    (clip_folder(guard) / "tokenizer.json").write_bytes(content)
    one_line(lambda: load("hf_clip", guard), f"{guard}: transformers cannot load this model (PanicException)")


def test_of_a_tokenizers_settings_only_what_is_read_is_checked(guard):
    FORMATS["medclip"][0](guard)
    change(guard / "tokenizer" / "tokenizer_config.json", auto_map=TOKENIZER_MAP, do_lower_case=True)
    load("medclip", guard)


def test_an_old_name_of_clips_processor_is_known(guard):
    wanted = rows(load("hf_clip", clip_folder(guard)))
    old = {"image_processor_type": "CLIPFeatureExtractor", "feature_extractor_type": "CLIPFeatureExtractor"}
    change(guard / "preprocessor_config.json", **old)
    assert all(map(torch.equal, rows(load("hf_clip", guard)), wanted))


def test_a_tokenizer_that_draws_is_refused(tmp_path):
    path = bert_folder_with(tmp_path, normalizer=None)
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "model": {**table["model"], "dropout": 0.5}}))
    one_line(lambda: Tokenizer.load(tmp_path, 16), f"{path}: model.dropout: ", error=Refused)
