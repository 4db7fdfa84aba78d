"""Each adapter against the same computation written out with the modules its checkpoint was made of."""

import json
import os

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from checkpoints import (
    IDS,
    TEXTS,
    WORDS,
    bert,
    chexzero,
    chexzero_input,
    hidden_states,
    old_bert,
    pictures,
    prefixed,
    resnet,
    shake,
    stranger,
    swin,
    swin_tensors,
    vocabulary,
)
from PIL import Image
from torch import nn

from pipeline import adapters
from pipeline.adapters import gloria as gloria_adapter
from pipeline.adapters import hf_clip as hf_clip_adapter
from pipeline.adapters.weights import MissingWeights
from pipeline.config.params import Other
from pipeline.storage.foreign_weights import HARMLESS, read_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def load(adapter, folder, **more):
    return adapters.load_other(Other(adapter, str(folder), "X"), "cpu", **more)


def images_of(embedder):
    rows = embedder.encode_images(torch.from_numpy(np.stack([embedder.prepare(p) for p in pictures()])))
    return F.normalize(rows, dim=1)


def features_of(embedder):
    return embedder.features(torch.from_numpy(np.stack([embedder.prepare(p) for p in pictures()])))


def near(found, wanted, tolerance=1e-5):
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    assert found.shape == wanted.shape
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-3)  # else anything would do
    assert (found - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


def channels(grey, statistics=((0.0,) * 3, (1.0,) * 3)):
    """uint8 [H, W] -> [1, 3, H, W]."""
    rgb = torch.from_numpy(np.stack([grey] * 3).astype(np.float32) / 255)
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in statistics)
    return ((rgb - mean) / std)[None]


def short_side(picture, size, crop):
    """PIL alone: short side to ``size``, centre."""
    h, w = picture.shape
    h, w = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    resized = Image.fromarray(picture).resize((w, h), Image.Resampling.BILINEAR)
    left, top = round((w - crop) / 2), round((h - crop) / 2)
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))


# ---- CXR-CLIP


def cxr_clip(folder, tower="resnet"):
    """The release's file; gives the modules."""
    folder.mkdir(exist_ok=True)
    net, text = (resnet() if tower == "resnet" else swin()), bert()
    image_head, text_head = shake(nn.Linear(2048 if tower == "resnet" else 32, 24), 4), shake(nn.Linear(128, 24), 5)
    image = prefixed("image_encoder.resnet.", net) if tower == "resnet" else None
    state = {
        **(image or prefixed("image_encoder.image_encoder.", swin_tensors(net))),
        **old_bert("text_encoder.text_encoder.", text),
        **prefixed("image_projection.projection.", image_head),
        **prefixed("text_projection.projection.", text_head),
        "logit_scale": torch.tensor(2.5),
    }
    vocabulary(folder)
    with stranger("omegaconf.dictconfig.DictConfig") as cls:
        settings = cls()
        settings.content = {"name": "resnet50"}
        torch.save(
            {
                **{"model": state, "optimizer": {"state": {0: {"step": 3}}}, "scheduler": {"last_epoch": 2}},
                **{"config": settings, "epoch": 9, "train_loss": np.float64(1.5)},
            },
            folder / "r50_m.tar",
        )
    return net, text, image_head, text_head


@pytest.mark.parametrize("tower", ["resnet", "swin"])
def test_cxr_clip(tmp_path, tower):
    net, text, image_head, text_head = cxr_clip(tmp_path, tower)
    embedder = load("cxr_clip", tmp_path, batch_size=7)
    assert embedder.batch_size == 7
    assert embedder.scale == pytest.approx(np.exp(2.5))
    pooled = []
    for picture in pictures():
        x = channels(short_side(picture, 224, 224), IMAGENET if tower == "resnet" else HALF)
        pooled.append(net(x)[0] if tower == "resnet" else net(x).last_hidden_state[0, 0])
    near(features_of(embedder), torch.stack(pooled))
    near(images_of(embedder), F.normalize(image_head(torch.stack(pooled)), dim=1))
    rows = torch.stack([text_head(hidden_states(text, ids)[-1][-1]) for ids in IDS])
    near(embedder.embed_texts(TEXTS), F.normalize(rows, dim=1))


# ---- GLoRIA


def gloria(folder):
    folder.mkdir(exist_ok=True)
    net, text = resnet(), bert()
    whole, local = shake(nn.Linear(2048, 128), 6), shake(nn.Conv2d(1024, 128, 1, bias=False), 7)
    state = {
        **prefixed("gloria.img_encoder.model.", net),
        **prefixed("gloria.img_encoder.global_embedder.", whole),
        **prefixed("gloria.img_encoder.local_embedder.", local),
        **old_bert("gloria.text_encoder.model.", text),
    }
    vocabulary(folder)
    with (
        stranger("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint") as callback,
        stranger("pytorch_lightning.utilities.parsing.AttributeDict", dict) as settings,
    ):
        torch.save(
            {
                **{"epoch": 1, "global_step": 10, "pytorch-lightning_version": "1.1.4", "state_dict": state},
                **{"callbacks": {callback: {"best": torch.tensor(1.0)}}, "optimizer_states": [], "lr_schedulers": []},
                **{"hparams_name": "hparams", "hyper_parameters": settings(lr=1e-4)},
            },
            folder / "chexpert_resnet50.ckpt",
        )
    return net, text, whole, local


def gloria_input(picture):
    h, w = picture.shape
    size = (256, int(h * 256 / w)) if w > h else (int(w * 256 / h), 256)
    small = Image.fromarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
    square = Image.new("L", (256, 256))
    square.paste(small, ((256 - size[0]) // 2, (256 - size[1]) // 2))
    x = channels(np.asarray(square.crop((16, 16, 240, 240))), HALF)
    return nn.Upsample(size=(299, 299), mode="bilinear", align_corners=True)(x)


def test_gloria(tmp_path):
    net, text, whole, local = gloria(tmp_path)
    embedder = load("gloria", tmp_path)
    regions = []
    net.layer3.register_forward_hook(lambda _, __, out: regions.append(local(out)[0].flatten(1)))
    pooled = torch.stack([net(gloria_input(p))[0] for p in pictures()])
    near(features_of(embedder), pooled)
    near(images_of(embedder), F.normalize(whole(pooled), dim=1))
    layers = [torch.stack(hidden_states(text, ids)[-4:]).sum(dim=0) for ids in IDS]
    near(embedder.embed_texts(TEXTS), F.normalize(torch.stack([rows.sum(dim=0) / 97 for rows in layers]), dim=1))
    inputs = torch.from_numpy(np.stack([embedder.prepare(p) for p in pictures()]))
    scores = torch.zeros(len(regions), len(TEXTS))
    for m, (ids, rows) in enumerate(zip(IDS, layers, strict=True)):
        words = []  # the pieces of a word add up; [SEP] and zeros come after
        for i, row in zip(ids, rows, strict=True):
            if WORDS[i].startswith("##"):
                words[-1] = words[-1] + row
            else:
                words.append(row)
        pieces = len(ids) - 2
        words = torch.stack(words + [torch.zeros(128)] * 97)[1 : pieces + 1]
        for n, places in enumerate(regions):
            attention = torch.softmax(words @ places, dim=0)
            attention = torch.softmax(4 * attention, dim=1)
            contexts = attention @ places.T
            cosines = [
                float(w @ c / (w.norm() * c.norm()).clamp(min=1e-8)) for w, c in zip(words, contexts, strict=True)
            ]
            scores[n, m] = 5 * max(cosines)
    near(embedder.local_scores(inputs, TEXTS), scores)
    near(embedder.local_scores(inputs[:1], TEXTS[::-1])[0], scores[0].flip(0))  # other sentences, same model


def test_gloria_reads_words_as_its_project_does():
    assert gloria_adapter.gloria_words("1. Heart, clear.  Edema.\nNo\ufffdfinding 2. ok") == "heart clear no finding"
    assert (
        gloria_adapter.gloria_words("Pneumothorax") == "pneumothorax"
    )  # dropped there, where a class's name is no prompt
    assert gloria_adapter.gloria_words("café au lait") == "caf au lait"


# ---- MedCLIP


def medclip(folder, tower="resnet"):
    folder.mkdir(exist_ok=True)
    net, text = (resnet() if tower == "resnet" else swin()), bert()
    head, text_head = (
        shake(nn.Linear(n, 24, bias=False), s) for n, s in ((2048 if tower == "resnet" else 32, 8), (128, 9))
    )
    at = "vision_model.model."
    if tower == "resnet":
        vision = prefixed(at, net) | prefixed(f"{at}fc.", head)
    else:
        vision = prefixed(at, swin_tensors(net)) | prefixed("vision_model.projection_head.", head)
    state = {
        **vision,
        **old_bert("text_model.model.", text),
        **prefixed("text_model.projection_head.", text_head),
        "logit_scale": torch.tensor(7.0),
    }
    vocabulary(folder)
    torch.save(state, folder / "pytorch_model.bin")
    return net, text, head, text_head


@pytest.mark.parametrize("tower", ["resnet", "swin"])
def test_medclip(tmp_path, tower):
    net, text, head, text_head = medclip(tmp_path, tower)
    embedder = load("medclip", tmp_path)
    assert embedder.scale == pytest.approx(100, rel=1e-4)  # its bound
    pooled = []
    for picture in pictures():
        side = max(224, *picture.shape)
        before = [(side - n) // 2 for n in picture.shape]
        square = np.pad(picture, [(b, side - n - b) for b, n in zip(before, picture.shape, strict=True)])
        small = np.asarray(Image.fromarray(square).resize((224, 224), Image.Resampling.BICUBIC))
        x = channels(small, ((0.5862785803043838,) * 3, (0.27950088968644304,) * 3))
        pooled.append(net(x)[0] if tower == "resnet" else net(x).pooler_output[0])
    near(features_of(embedder), torch.stack(pooled))
    near(images_of(embedder), F.normalize(head(torch.stack(pooled)), dim=1))
    rows = []
    for ids in IDS:
        states = hidden_states(text, ids)
        rows.append(text_head((torch.stack([states[1], states[2], states[-1]]).mean(dim=0)).mean(dim=0)))
    near(embedder.embed_texts(TEXTS), F.normalize(torch.stack(rows), dim=1))


# ---- BioViL


def biovil(folder):
    folder.mkdir(exist_ok=True)
    net, text = resnet(), bert(pooler=False)
    projector = nn.Sequential(nn.Conv2d(2048, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
    shake(projector, 10)
    head = nn.Sequential(nn.Linear(128, 16), nn.GELU(), nn.LayerNorm(16, eps=1e-12), nn.Linear(16, 16))
    shake(head, 11)
    image = prefixed("encoder.encoder.", net) | prefixed("projector.model.", projector)
    image |= {"encoder.encoder.fc.weight": torch.ones(1000, 2048), "encoder.encoder.fc.bias": torch.ones(1000)}
    vocabulary(folder)
    torch.save(image, folder / "biovil_image_resnet50_proj_size_128.pt")
    words = old_bert("bert.", text) | {"cls.predictions.bias": torch.ones(4)}
    for at, name in ((0, "dense_to_hidden"), (2, "LayerNorm"), (3, "dense_to_output")):
        words |= prefixed(f"cls_projection_head.{name}.", head[at])
    torch.save(words, folder / "pytorch_model.bin")
    return net, text, projector, head


def test_biovil(tmp_path):
    net, text, projector, head = biovil(tmp_path)
    embedder = load("biovil", tmp_path)
    maps, pooled = [], []
    net.layer4.register_forward_hook(lambda _, __, out: maps.append(out))
    for picture in pictures():
        grey = picture.astype(float)
        grey = (grey - grey.min()) / (grey.max() - grey.min()) * 255
        pooled.append(net(channels(short_side(grey.astype(np.uint8), 512, 480)))[0])
    near(features_of(embedder), torch.stack(pooled))
    near(images_of(embedder), F.normalize(torch.cat([projector(m).mean(dim=(2, 3)) for m in maps]), dim=1))
    near(
        embedder.embed_texts(TEXTS), F.normalize(torch.stack([head(hidden_states(text, i)[-1][0]) for i in IDS]), dim=1)
    )


# ---- CheXzero


def test_chexzero_is_the_mean_of_its_members_cosines(tmp_path):
    members = chexzero(tmp_path)
    embedder = load("chexzero", tmp_path)
    inputs = [chexzero_input(picture) for picture in pictures()]
    texts = ["A photo of a cat", "a dog"]
    ids = [[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 320, 1929, 49407]]  # CLIP's, well known
    cosines, pooled = [], []
    for model in members:
        image = torch.cat([_rows(model.get_image_features(pixel_values=x)) for x in inputs])
        text = torch.cat([_rows(model.get_text_features(input_ids=torch.tensor([i]))) for i in ids])
        cosines.append(F.normalize(image, dim=1) @ F.normalize(text, dim=1).T)
        pooled.append(torch.cat([model.vision_model(pixel_values=x).pooler_output for x in inputs]))
    near(images_of(embedder) @ torch.from_numpy(embedder.embed_texts(texts)).T, torch.stack(cosines).mean(dim=0))
    near(features_of(embedder), torch.cat(pooled, dim=1))
    assert embedder.scale == pytest.approx(np.mean([float(m.logit_scale.exp()) for m in members]))


def _rows(found):
    return found if isinstance(found, torch.Tensor) else found.pooler_output


# ---- open_clip and transformers


def test_open_clip(tmp_path):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from safetensors.torch import save_file

    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    model = shake(CLIP(24, CLIPVisionCfg(**vision), CLIPTextCfg(**text)), 30)
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
    config["preprocess_cfg"] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    embedder = load("open_clip", tmp_path)
    x = torch.cat([channels(short_side(p, 64, 64), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))) for p in pictures()])
    assert embedder.size == 64
    near(images_of(embedder), F.normalize(model.encode_image(x), dim=1))
    ids = [[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 320, 1929, 49407]]
    padded = torch.tensor([i + [0] * (16 - len(i)) for i in ids])
    near(embedder.embed_texts(["a photo of a cat", "a dog"]), F.normalize(model.encode_text(padded), dim=1))
    # its own training checkpoints
    (tmp_path / "open_clip_model.safetensors").unlink()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "x", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_1.pt")
    near(images_of(load("open_clip", tmp_path)), images_of(embedder), 0)


def test_open_clip_with_a_bert_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from open_clip.model import CLIPVisionCfg, CustomTextCLIP

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    (tmp_path / "text").mkdir()
    transformers.BertConfig(vocab_size=len(WORDS), **sizes).save_pretrained(tmp_path / "text")
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    text = {"hf_model_name": "nobody/nothing", "hf_tokenizer_name": "nobody/nothing", "hf_proj_type": "mlp"}
    text |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 12}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    here = {**text, "hf_model_name": str(tmp_path / "text"), "hf_model_pretrained": False}
    model = shake(CustomTextCLIP(24, CLIPVisionCfg(**vision), here), 31)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    fast_tokenizer().save_pretrained(tmp_path)
    embedder = load("open_clip", tmp_path)
    rows = [model.encode_text(torch.tensor([i + [0] * (12 - len(i))])) for i in IDS]
    near(embedder.embed_texts(TEXTS), F.normalize(torch.cat(rows), dim=1))


def fast_tokenizer():
    from tokenizers import BertWordPieceTokenizer

    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    inner = BertWordPieceTokenizer({word: i for i, word in enumerate(WORDS)})._tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=20, **names)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_hf_clip(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = shake(transformers.CLIPModel(config), 40)
    else:
        text["projection_size"] = 64
        config = transformers.SiglipConfig(text_config={**text, "pad_token_id": 0}, vision_config=vision)
        model = shake(transformers.SiglipModel(config), 41)
    model.save_pretrained(tmp_path)
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2}
    transformers.CLIPImageProcessor(**crop, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    fast_tokenizer().save_pretrained(tmp_path)
    embedder = load("hf_clip", tmp_path)
    x = torch.cat([channels(short_side(p, 32, 32), HALF) for p in pictures()])
    near(images_of(embedder), F.normalize(_rows(model.get_image_features(pixel_values=x)), dim=1))
    rows = []
    for ids in IDS:
        ids = torch.tensor([ids if kind == "clip" else ids + [0] * (16 - len(ids))])
        mask = {"attention_mask": (ids != 0).long()}
        rows.append(_rows(model.get_text_features(input_ids=ids, **mask)))
    near(embedder.embed_texts(TEXTS), F.normalize(torch.cat(rows), dim=1))
    assert embedder.scale == pytest.approx(float(model.logit_scale.exp()))


def test_hf_clip_refuses_a_checkpoint_that_does_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "vocab_size": len(WORDS), "eos_token_id": 3, "bos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    fast_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: text_projection\.weight"):
        load("hf_clip", tmp_path)


# ---- every tensor, nothing else, and nothing run

FORMATS = {
    "cxr_clip": (cxr_clip, "r50_m.tar", "model", "image_encoder.resnet.conv1.weight"),
    "gloria": (gloria, "chexpert_resnet50.ckpt", "state_dict", "gloria.img_encoder.local_embedder.weight"),
    "medclip": (medclip, "pytorch_model.bin", "", "text_model.projection_head.weight"),
    "biovil": (biovil, "pytorch_model.bin", "", "cls_projection_head.dense_to_output.bias"),
    "chexzero": (chexzero, "best_1.pt", "", "visual.ln_post.weight"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder for each format, made once; a test changes one file and puts it back."""
    with torch.inference_mode():
        folders = {name: tmp_path_factory.mktemp(name) for name in FORMATS}
        for name, folder in folders.items():
            FORMATS[name][0](folder)
    return folders


def refused(made, adapter, change):
    """The one line with which a changed checkpoint is refused."""
    _, name, at, key = FORMATS[adapter]
    path = made[adapter] / name
    content = read_weights(path)
    before = path.read_bytes()
    state = dict(content[at] if at else content)
    change(state, key)
    torch.save({**{k: v for k, v in content.items() if k in ("epoch", at)}, at: state} if at else state, path)
    try:
        with pytest.raises(ValueError) as error:
            load(adapter, made[adapter])
    finally:
        path.write_bytes(before)
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 500
    return text


@pytest.mark.parametrize("adapter", FORMATS)
def test_a_square_of_the_embedders_size_is_not_resized(made, adapter):
    """So the crops of few-shot's augmentation are resized once."""
    embedder = load(adapter, made[adapter])
    square = np.random.default_rng(3).integers(0, 256, (embedder.size,) * 2, dtype=np.uint8)
    square[:, 100] = np.arange(embedder.size) % 256  # black and white are among the grey levels, for BioViL
    wanted = {"gloria": square[16:-16, 16:-16], "biovil": square[16:-16, 16:-16]}.get(adapter, square)
    if adapter == "chexzero":
        x = torch.from_numpy((square.astype(np.float32) - 101.48761) / 83.43944)
        wanted = F.interpolate(x[None, None], size=(64, 64), mode="bicubic")[0, 0].numpy()
    found = embedder.prepare(square)
    assert found.shape == wanted.shape and np.abs(found.astype(np.float32) - wanted).max() < 1e-5


def test_the_size_of_a_model_of_transformers_is_its_processors(tmp_path):
    side = hf_clip_adapter._side
    assert side(transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32), tmp_path) == 40
    assert side(transformers.SiglipImageProcessor(size={"height": 48, "width": 48}), tmp_path) == 48
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: size: neither"):
        side(transformers.CLIPImageProcessor(size={"longest_edge": 40}), tmp_path)


@pytest.mark.parametrize("adapter", FORMATS)
def test_every_tensor_is_accounted_for(made, adapter):
    key = FORMATS[adapter][3]
    end = key.rsplit(".", 1)[1]
    text = refused(made, adapter, lambda state, key: state.pop(key))
    assert f"missing: {key}" in text or f"lacks {key.removesuffix(end)}*" in text
    stray = key.rsplit(".", 1)[0] + ".stray"
    assert "stray" in refused(made, adapter, lambda state, _: state.update({stray: torch.ones(2)}))
    assert "elsewhere" in refused(made, adapter, lambda state, _: state.update({"elsewhere": torch.ones(2)}))
    text = refused(made, adapter, lambda state, key: state.update({key: torch.ones(3, 5, 2, 2)}))
    assert end in text or "matrix" in text


def test_three_of_many_keys_are_named(made):
    def many(state, _):
        state.update({f"odd.{i}": torch.ones(1) for i in range(9)})

    text = refused(made, "medclip", many)
    assert "odd.0, odd.1, odd.2 and 6 more" in text


def test_only_the_known_buffer_may_be_left_over(made):
    text = refused(made, "medclip", lambda s, _: s.update({"text_model.model.embeddings.position_idx": torch.ones(1)}))
    assert "position_idx" in text


def test_swins_index_must_be_the_one_of_its_window(tmp_path):
    medclip(tmp_path, "swin")
    load("medclip", tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    key = next(k for k in state if k.endswith("relative_position_index"))
    state[key] = state[key].flip(0)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not the index of a window of 7 x 7"):
        load("medclip", tmp_path)


def test_an_entry_of_training_that_is_not_known_is_named(tmp_path):
    cxr_clip(tmp_path)
    content = read_weights(tmp_path / "r50_m.tar")
    torch.save({"model": content["model"], "hook": 1}, tmp_path / "r50_m.tar")
    with pytest.raises(ValueError, match="hook"):
        load("cxr_clip", tmp_path)


def test_another_berts_words_are_refused(made):
    words = made["medclip"] / "tokenizer" / "vocab.txt"
    before = words.read_text()
    words.write_text(before + "more\n")
    try:
        with pytest.raises(ValueError, match=f"has {len(WORDS) + 1} words where the checkpoint has {len(WORDS)}"):
            load("medclip", made["medclip"])
        words.unlink()
        with pytest.raises(MissingWeights, match=r"vocab\.txt: not there"):
            load("medclip", made["medclip"])
    finally:
        words.write_text(before)


class Runs:
    """What a hostile file does: name a function and its argument."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["system", "eval", "stand-in's method"])
def test_a_checkpoint_that_would_run_something_is_refused(tmp_path, kind):
    marker = tmp_path / "ran"
    path = tmp_path / "w.tar"
    if kind == "system":
        torch.save({"model": {"w": torch.ones(1)}, "config": Runs(marker)}, path)
    elif kind == "eval":
        torch.save({"model": {"w": torch.ones(1)}, "config": _Call(eval, f"open({str(marker)!r}, 'w')")}, path)
    else:
        with stranger("omegaconf.grammar.Secret") as cls:
            torch.save({"model": {"w": torch.ones(1)}, "config": cls()}, path)
    with pytest.raises(ValueError) as error:
        load("cxr_clip", tmp_path)
    assert str(error.value).startswith(f"{path}: holds ")
    assert str(error.value).endswith("; refused")
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not marker.exists()


class _Call:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def test_settings_come_out_empty_and_no_class_is_imported(tmp_path):
    cxr_clip(tmp_path)  # its class is gone again
    found = read_weights(tmp_path / "r50_m.tar")
    assert vars(found["config"]) == {}
    assert not any(
        name.startswith(("os.", "posix.", "subprocess", "builtins.eval", "builtins.get")) for name in HARMLESS
    )


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02K\x01."])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "w.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.tar") as error:
        load("cxr_clip", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("adapter", [*FORMATS, "open_clip", "hf_clip"])
def test_missing_weights_say_which_file_goes_where(tmp_path, adapter):
    (tmp_path / "README.md").write_text("get it")
    with pytest.raises(MissingWeights, match=r"not there; .*README\.md says where to get it"):
        load(adapter, tmp_path)


def test_two_checkpoints_are_not_guessed_at(tmp_path):
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="several files could be meant"):
        load("cxr_clip", tmp_path)
