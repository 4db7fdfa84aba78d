import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from pipeline.config.params import ImageEncoder, TextEncoder
from pipeline.config.records import ParamsError
from pipeline.models.checkpoint import NOTE, load_model, save_model
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.encoders import ImageTower, TextTower
from pipeline.models.weights_file import DamagedWeights, load_weights, save_weights
from pipeline.text.tokenizer import MIN_PATIENTS, Tokenizer
from pipeline.training.corpus import report_texts
from tests.conftest import BERT, RESNET, SWIN

TEXTS = [f"There is a {thing} at the {place}." for thing in ("nodule", "scar") for place in ("apex", "base", "hilum")]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.build(BERT, TEXTS * 3)


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8))


def forward(net, images, tokenizer, texts=TEXTS):
    """All texts as one length group."""
    tokens, mask = tokenizer(texts)
    return net(images, (tokens,), (mask,))


def build(config, tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    return CxrClip(config(**changes), len(tokenizer)).eval()


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ({}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's, as timm documents its ResNets
        ({"mean": (0.1, 0.5, 0.9), "std": (0.5, 0.25, 0.2)}, (0.1, 0.5, 0.9), (0.5, 0.25, 0.2)),
    ],
)
def test_grey_becomes_three_normalised_channels(images, given, mean, std):
    tower = ImageTower(replace(RESNET, **given), 32, True).eval()
    seen = []
    tower.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower(images)
    for channel in range(3):
        expected = (images.numpy() / 255.0 - mean[channel]) / std[channel]
        np.testing.assert_allclose(seen[0][:, channel].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("encoder", [RESNET, SWIN])
def test_image_features_are_the_mean_over_places(images, encoder):
    tower = ImageTower(encoder, 32, True).eval()
    x = (images[:, None].float() / 255 - tower.mean) / tower.std
    places = tower.model.forward_features(x)
    channels_first = places if places.shape[1] == tower.width else places.permute(0, 3, 1, 2)
    expected = channels_first.flatten(2).mean(dim=2)
    assert expected.shape == (5, tower.width)
    torch.testing.assert_close(tower(images), expected, atol=1e-5, rtol=1e-4)


def test_text_is_pooled_at_its_last_token(tokenizer):
    """[SEP] ends each text; what else is in the batch does not change it."""
    tower = TextTower(BERT, len(tokenizer), True).eval()
    texts = [TEXTS[0], "Nodule.", f"{TEXTS[1]} {TEXTS[2]}"]
    tokens, mask = tokenizer(texts)
    assert mask.sum(1).tolist() != [mask.shape[1]] * 3
    pooled = tower(tokens, mask)
    for row, text in enumerate(texts):
        ids = tokenizer.tokenizer.encode(text)
        assert ids[0] == tokenizer.tokenizer.cls_token_id and ids[-1] == tokenizer.tokenizer.sep_token_id
        alone = tower.model(input_ids=torch.tensor([ids])).last_hidden_state[0, len(ids) - 1]
        torch.testing.assert_close(pooled[row], alone, atol=1e-5, rtol=1e-4)


def test_a_long_text_is_cut_and_still_ends_in_sep(tokenizer):
    tokens, mask = tokenizer([" ".join(TEXTS * 20)])
    assert tokens.shape == (1, 48) and mask.all()
    assert tokens[0, -1] == tokenizer.tokenizer.sep_token_id


def test_embeddings_have_unit_norm_and_are_the_projection(config, tokenizer, images):
    net = build(config, tokenizer)
    i, t, scale = forward(net, images, tokenizer)
    assert i.shape == (5, 16) and t.shape == (6, 16) and i.dtype == t.dtype == torch.float32
    for x in (i, t):
        np.testing.assert_allclose(np.linalg.norm(x.detach().numpy(), axis=1), 1, atol=1e-6)
    w, b = (p.detach().numpy() for p in net.image_projection.parameters())
    raw = net.image_tower(images).detach().numpy() @ w.T + b
    np.testing.assert_allclose(i.detach().numpy(), raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-5)
    assert scale.item() == pytest.approx(10.0, rel=1e-6)


def test_scale_is_learnable_and_at_most_100(config, tokenizer):
    net = build(config, tokenizer)
    net.scale.backward()
    assert net.log_scale.grad.item() == pytest.approx(10.0, rel=1e-5)  # d exp(x) = exp(x)
    for value, expected in ((math.log(99), 99), (math.log(101), 100), (9.0, 100)):
        net.log_scale.data.fill_(value)
        net.clamp_scale()
        assert net.scale.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("encoder", [RESNET, SWIN])
def test_a_saved_model_embeds_the_same(config, tokenizer, images, tmp_path, encoder):
    run = config(image_encoder=encoder)
    net = build(config, tokenizer, seed=3, image_encoder=encoder)
    net.train()
    forward(net, images, tokenizer)  # moves the running statistics of BatchNorm
    net.eval()
    save_model(net, tokenizer, run, tmp_path / "model")
    torch.manual_seed(99)
    other, words, again = load_model(tmp_path / "model")
    assert again == run and not other.training
    note = (tmp_path / "model" / "README.md").read_text()
    assert note.startswith("# tiny\n\nTrained on mimic_cxr, chexpert, chestxray14. A model can remember")
    assert all(f"`{file.name}`" in note for file in (tmp_path / "model").iterdir() if file.name != "README.md")
    assert all(map(torch.equal, words(TEXTS), tokenizer(TEXTS)))
    with torch.no_grad():
        assert all(map(torch.equal, forward(other, images, words), forward(net, images, tokenizer)))
    assert not list((tmp_path / "model").glob("*.partial"))


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_every_key_of_a_checkpoint_must_match(config, tokenizer, tmp_path, change):
    save_model(build(config, tokenizer), tokenizer, config(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del weights["image_projection.bias"]
    else:
        weights["stranger"] = torch.zeros(1)
    save_weights(tmp_path / "model.safetensors", weights)
    with pytest.raises(RuntimeError, match=r"image_projection\.bias|stranger"):
        load_model(tmp_path)


def test_no_changed_byte_of_weights_is_read(tmp_path):
    """Any one bit of the file, cuts, and a file that says nothing of its digest; numbers of every size survive."""
    weights = {
        "a.b": torch.randn(7, 3),
        "c": torch.tensor(2.5, dtype=torch.float16),
        "d": torch.arange(5),
        "e": torch.zeros(0, 4),
    }
    path, draw = tmp_path / "w.safetensors", np.random.default_rng(0)
    save_weights(path, weights)
    whole, read = path.read_bytes(), load_weights(path)
    assert read.keys() == weights.keys() and all(
        torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in weights.items()
    )
    save_file(weights, tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none")
    changed = [whole[:at] + bytes([whole[at] ^ 1 << draw.integers(8)]) + whole[at + 1 :] for at in range(len(whole))]
    changed += [whole[:at] for at in range(0, len(whole), 5)] + [whole + b"0", (tmp_path / "other").read_bytes()]
    same = 0
    for data in changed:
        path.write_bytes(data)
        try:
            found = load_weights(path)
        except DamagedWeights as error:
            assert str(error) == f"{path}: damaged, or not written by this pipeline; train again (dvc repro -f)"
        else:  # padding of the header
            assert found.keys() == weights.keys() and all(torch.equal(found[k], v) for k, v in weights.items())
            same += 1
    assert same <= 8 < len(changed)


def test_a_bert_of_a_folder_is_loaded_once_and_then_travels_with_the_model(config, tokenizer, images, tmp_path):
    """The way the hub's BioClinicalBERT goes, with a local folder in its place."""
    torch.manual_seed(5)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 48, **BERT.args}
    bert = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    vocabulary = sorted(tokenizer.tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "bert" / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in vocabulary))
    named = TextEncoder(str(tmp_path / "bert"), max_tokens=48)
    words = Tokenizer.build(named, [])
    assert torch.equal(words(TEXTS)[0], tokenizer(TEXTS)[0])
    run = config(text_encoder=named)
    net = CxrClip(run, len(words)).eval()
    assert all(map(torch.equal, net.text_tower.model.state_dict().values(), bert.state_dict().values()))
    save_model(net, words, run, tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
        assert f"`{file.name}`" in NOTE or file.name == "README.md"
    (tmp_path / "bert").rename(tmp_path / "gone")
    other, read, again = load_model(tmp_path / "model")
    assert again == replace(run, text_encoder=replace(named, name="bert"))
    with torch.no_grad():
        assert all(map(torch.equal, forward(other, images, read), forward(net, images, words)))


def test_a_bert_saved_in_half_precision_is_trained_in_single(config, tokenizer, tmp_path):
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 48, **BERT.args}
    bert = BertModel(BertConfig(**sizes), add_pooling_layer=False).half()
    bert.save_pretrained(tmp_path / "bert")
    tower = TextTower(TextEncoder(str(tmp_path / "bert"), max_tokens=48), len(tokenizer), True)
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    assert all(map(torch.equal, tower.model.state_dict().values(), bert.float().state_dict().values()))
    built = TextTower(TextEncoder(str(tmp_path / "bert"), max_tokens=48), len(tokenizer), False)  # for a checkpoint
    assert {p.dtype for p in built.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ImageTower(ImageEncoder("resnet18"), 32, True), "model.image_encoders: weights of resnet18 could not"),
        (
            lambda: ImageTower(ImageEncoder("resnet9999", False), 32, True),
            "model.image_encoders: timm cannot build res",
        ),
        (lambda: TextTower(TextEncoder("nobody/nothing"), 9, True), "model.text_encoder.name: 'nobody/nothing' could"),
        (lambda: Tokenizer.build(TextEncoder("nobody/nothing"), []), "model.text_encoder.name: 'nobody/nothing' could"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(make, says, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read once, at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ParamsError) as error:
        make()
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_weights_are_not_asked_for_when_a_checkpoint_fills_them(monkeypatch):
    import timm

    asked = []
    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: asked.append(k["pretrained"]) or real(*a, **{**k, "pretrained": False})
    )
    for wanted in (True, False):
        ImageTower(replace(RESNET, pretrained=True), 32, wanted)
    assert asked == [True, False]


def test_words_of_few_patients_are_not_learnt(tmp_path):
    """However often they are said, in whatever form; those of prompts are, and letters are."""
    many = [
        (f"p{n}", f"Stable cardiomegaly, seen before. Dr. {'Okonjo' if n < MIN_PATIENTS - 1 else 'Ng'}.")
        for n in range(20)
    ]
    one = [("p1", f"Zywieczka{end} Żywieczka was there.") for end in (",", ".", ";", "'s", ")", "") for _ in range(50)]
    built = Tokenizer.build(TextEncoder("", 5000, {}, 48), ["Qualm of a prompt."] * 2, [*many, *one])
    built.save(tmp_path)
    words = {*built.tokenizer.get_vocab()}
    assert {"cardiomegaly", "stable", "ng", "qualm", "z", "##z", "##w"} <= words
    pieces = [w.removeprefix("##") for w in words if len(w.removeprefix("##")) > 1]
    assert not [p for p in pieces if p in "zywieczka" or p in "okonjo"]
    for file in tmp_path.iterdir():
        assert not re.search("okonjo|wieczka", file.read_text(), re.IGNORECASE)
    assert built.tokenizer.unk_token_id not in built(["zywieczka okonjo"])[0]  # said letter by letter
    enough = Tokenizer.build(TextEncoder("", 5000, {}, 48), [], [(f"p{n}", "Dr. Okonjo.") for n in range(MIN_PATIENTS)])
    assert "okonjo" in enough.tokenizer.get_vocab()


def test_a_patient_in_two_data_sets_is_one(studies):
    few = {f"p{n}" for n in range(MIN_PATIENTS - 1)}
    of = [s for s in studies if s.patient in few and s.findings]
    both = [replace(s, dataset=name, findings="Dr. Okonjo.", impression=None) for s in of for name in ("one", "two")]
    assert {patient for patient, _ in report_texts(both)} == few
    built = Tokenizer.build(TextEncoder("", 5000, {}, 48), [], report_texts(both))
    assert "okonjo" not in built.tokenizer.get_vocab()


def test_a_tokenizer_trained_twice_is_the_same(tmp_path, studies):
    corpus = [text for s in studies for text in (s.findings, s.impression) if text]
    for name in "ab":
        Tokenizer.build(BERT, iter(corpus)).save(tmp_path / name)
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"}
    assert files["a"] == files["b"] and "tokenizer.json" in files["a"]
    built = Tokenizer.load(tmp_path / "a", 48)
    assert len(built) <= BERT.vocabulary
    decoded = built.tokenizer.decode(built(corpus[:1])[0][0], skip_special_tokens=True)
    assert decoded.replace(" ", "") == corpus[0].lower().replace(" ", "")
