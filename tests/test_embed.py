"""What stages embed and embed_other write, against the model itself."""

import json
import shutil
import subprocess
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import vocabulary

from pipeline import adapters
from pipeline.adapters.weights import MissingWeights
from pipeline.config.load import load_params
from pipeline.config.params import Other
from pipeline.evaluation import embed, protocols, store
from pipeline.evaluation.candidates import candidate_texts
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.pictures import PreparedViews
from pipeline.models.checkpoint import load_model, save_model
from pipeline.models.cxr_clip import CxrClip
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.index import read_studies, write_studies
from pipeline.storage.pictures import encode
from pipeline.storage.shards import EncodedPicture, ShardWriter, load_view
from pipeline.study import Study, View
from pipeline.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SETS = protocols.load_protocol("paper").retrieval
PROMPTS = ["Cardiomegaly", "No Cardiomegaly", "Nodule", "Findings suggesting pneumonia."]
TEXTS = ["A scar of the base.", "The heart is normal and the lungs are clear.", "A scar of the base."]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Test sets of three studies each, and a training study that must not be embedded."""
    folder = tmp_path_factory.mktemp("index")
    labels = {
        "vindr_cxr": [{"Nodule": 1}, {"Cardiomegaly": 1, "Nodule": 1}, {"Cardiomegaly": 0}],
        "rsna": [{}, {}, {"Pneumonia": 1}],
    }
    for n, dataset in enumerate(("vindr_cxr", "rsna", "mimic_cxr")):
        studies = []
        with ShardWriter(folder / f"{dataset}-000000.tar") as writer:
            for i in range(4):
                image = np.random.default_rng([n, i]).integers(0, 256, (6, 7), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
                more = {"findings": TEXTS[i % 3]} if dataset == "mimic_cxr" else {"labels": labels[dataset][i % 3]}
                split = "test" if i < 3 else "train"
                study = Study(dataset, f"p{i}", f"s{i}", split, (View(f"{dataset}{i}", "PA"),), **more)
                studies.append(writer.write(study, [EncodedPicture(encode(image, 95), image.shape[1], image.shape[0])]))
        write_studies(folder / f"{dataset}.parquet", studies)
    return folder


def saved(folder, config, **changes):
    run = config(**changes)
    torch.manual_seed(3)
    words = Tokenizer.build(run.text_encoder, [*PROMPTS, *TEXTS] * 3)
    net = CxrClip(run, len(words), load_weights=False).eval()
    save_model(net, words, run, folder)
    return load_model(folder)


@pytest.mark.parametrize("encoder", ["resnet", "swin"])
def test_embeddings_are_the_models_and_maps_average_to_them(tmp_path, index, config, encoder):
    from conftest import RESNET, SWIN

    net, words, _ = saved(tmp_path / "m", config, image_encoder={"resnet": RESNET, "swin": SWIN}[encoder])
    embedder = embed.from_checkpoint(tmp_path / "m", batch_size=2)
    assert embedder.scale == pytest.approx(10.0)
    sources = ["mimic_cxr", "vindr_cxr", "rsna", "siim"][:3]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "missing.json").write_text("{}")  # of an earlier run
    counts = embed.write_embeddings(embedder, PROMPTS, SETS.values(), sources, index, tmp_path / "out")
    assert counts == {"mimic_cxr": 3, "vindr_cxr": 3, "rsna": 3}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{n}.npz" for n in (*sources, "prompts")}
    with torch.inference_mode():
        for dataset in sources:
            studies = read_studies(index / f"{dataset}.parquet", ("test",))
            found = np.load(tmp_path / "out" / f"{dataset}.npz")
            assert set(found) == ({"images", "texts"} if dataset == "mimic_cxr" else {"images"})
            pictures = np.stack([evaluation_crop(load_view(s.first_frontal), 32) for s in studies])
            wanted = net.encode_image(torch.from_numpy(pictures)).numpy()
            assert found["images"].dtype == np.float32
            assert np.abs(found["images"] - wanted).max() < 1e-5
        texts = candidate_texts(read_studies(index / "mimic_cxr.parquet", ("test",)), SETS["mimic_cxr"]).texts
        assert texts == TEXTS[:2]
        rows = np.concatenate([net.encode_text(*words([t])).numpy() for t in texts])
        assert np.abs(np.load(tmp_path / "out" / "mimic_cxr.npz")["texts"] - rows).max() < 1e-5
        stored = np.load(tmp_path / "out" / "prompts.npz")
        assert stored["texts"].tolist() == PROMPTS
        rows = np.concatenate([net.encode_text(*words([t])).numpy() for t in PROMPTS])
        assert stored["embeddings"].dtype == np.float32
        assert np.abs(stored["embeddings"] - rows).max() < 1e-5
        assert float(stored["scale"]) == pytest.approx(10.0)

        classes = {"vindr_cxr": {"Cardiomegaly": PROMPTS[0], "Nodule": PROMPTS[2]}, "rsna": {"Pneumonia": PROMPTS[3]}}
        assert embed.write_maps(net, embedder, 32, classes, sources, index, tmp_path / "out") == 3
        maps = np.load(tmp_path / "out" / "maps.npz")
        # Study 1 is the first with cardiomegaly; of those with a nodule, 0 is the first that is not taken
        assert list(zip(maps["dataset"], maps["position"], maps["text"], strict=True)) == [
            *[
                ("vindr_cxr", 1, "Cardiomegaly"),
                ("rsna", 2, "Findings suggesting pneumonia."),
                ("vindr_cxr", 0, "Nodule"),
            ]
        ]
        picture = load_view(read_studies(index / "vindr_cxr.parquet", ("test",))[1].first_frontal)
        batch = torch.from_numpy(evaluation_crop(picture, 32))[None]
        tower = net.image_tower
        seen = []
        last = tower.model.layer4 if encoder == "resnet" else tower.model.norm
        hook = last.register_forward_hook(lambda _, __, out: seen.append(out))
        pooled = tower(batch)
        hook.remove()
        places = seen[0].permute(0, 2, 3, 1) if encoder == "resnet" else seen[0]
        assert torch.allclose(places.mean(dim=(1, 2)), pooled, atol=1e-5)
        projected = net.image_projection(places)
        # the projection commutes with the average
        assert torch.allclose(projected.mean(dim=(1, 2)), net.image_projection(pooled), atol=1e-5)
        wanted = F.normalize(projected, dim=-1)[0] @ torch.from_numpy(rows[0])
        assert maps["maps"].dtype == np.float32
        assert np.abs(maps["maps"][0] - wanted.numpy()).max() < 1e-5


def test_how_many_processes_prepare_images_changes_nothing(tmp_path, index, config):
    saved(tmp_path / "m", config)
    views = [s.first_frontal for s in read_studies(index / "rsna.parquet", ("test",))]
    alone = embed.from_checkpoint(tmp_path / "m", batch_size=2)
    two = replace(alone, workers=2)
    ForkingPickler.dumps(PreparedViews(views, alone.prepare))  # spawned processes get it, too
    assert np.array_equal(two.embed_images(views), alone.embed_images(views)) and len(views) == 3
    assert np.array_equal(two.over(two.features, views), alone.over(alone.features, views))


def test_our_models_are_evaluated_under_the_autocast_of_evaluation(tmp_path, index, config, monkeypatch):
    """Which on a GPU is bfloat16: here on the CPU, too. Rows come out in float32, and near those in float32."""
    saved(tmp_path / "m", config)
    views = [s.first_frontal for s in read_studies(index / "rsna.parquet", ("test",))]
    embedder = embed.from_checkpoint(tmp_path / "m")
    ways = (
        lambda: embedder.embed_images(views),
        lambda: embedder.embed_texts(PROMPTS),
        lambda: embedder.over(embedder.features, views),
    )
    single = [way() for way in ways]
    monkeypatch.setattr(embed, "evaluation_autocast", lambda device: torch.autocast(device.type, torch.bfloat16))
    for way, wanted in zip(ways, single, strict=True):
        found = way()
        assert found.dtype == np.float32 and not np.array_equal(found, wanted)
        assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


def test_a_run_without_examples_has_no_map(tmp_path, index, config):
    net, _, _ = saved(tmp_path / "m", config)
    embedder = embed.from_checkpoint(tmp_path / "m")
    assert embed.write_maps(net, embedder, 32, {"siim": {"Pneumothorax": "x"}}, ["rsna"], index, tmp_path / "m") == 0
    assert len(np.load(tmp_path / "m" / "maps.npz")["maps"]) == 0


def test_local_scores_stand_beside_the_images(tmp_path, index):
    """A model of two functions: brightness, and the length of a text."""
    embedder = Embedder(
        prepare=lambda picture: picture[:8, :8].copy(),
        encode_images=lambda x: torch.stack([x.float().mean(dim=(1, 2)), torch.ones(len(x))], dim=1),
        encode_texts=lambda texts: torch.tensor([[float(len(t)), 1.0] for t in texts]),
        features=lambda x: x.float().flatten(1),
        size=8,
        scale=2.0,
        device=torch.device("cpu"),
        batch_size=2,
        local_scores=lambda x, texts: x.float().mean(dim=(1, 2))[:, None] * torch.tensor([len(t) for t in texts]),
    )
    embed.write_embeddings(embedder, PROMPTS, SETS.values(), ["rsna"], index, tmp_path / "out")
    studies = read_studies(index / "rsna.parquet", ("test",))
    means = np.array([load_view(s.first_frontal)[:8, :8].mean() for s in studies])
    found = np.load(tmp_path / "out" / "rsna.npz")["local"]
    assert found.dtype == np.float32
    assert np.allclose(found, means[:, None] * [len(t) for t in PROMPTS])


def test_missing_weights_leave_one_line(tmp_path):
    vocabulary(tmp_path / "w")
    out = tmp_path / "out"
    out.mkdir()
    (out / "rsna.npz").touch()  # of a time when the weights were there
    with pytest.raises(MissingWeights) as error:
        adapters.load_other(Other("gloria", str(tmp_path / "w"), "GLoRIA"))
    store.write_missing(out, str(error.value))
    assert [p.name for p in out.iterdir()] == ["missing.json"]
    assert store.why_missing(out) == json.loads((out / "missing.json").read_text())["missing"]
    assert "*.ckpt: not there" in store.why_missing(out)
    assert store.why_missing(tmp_path / "w") is None


def test_every_other_of_the_paper_profile_is_a_stage_and_its_folder_says_what_goes_there(tmp_path):

    record = load_params(ROOT / "profiles" / "paper.yaml")
    for other in record.others.values():
        assert (ROOT / other.weights / "README.md").is_file()
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copy(ROOT / "profiles" / "paper.yaml", tmp_path / "params.yaml")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["dvc", "init", "-q"], cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run(
        ["dvc", "stage", "list", "--name-only"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = {name for name in done.stdout.split() if "_other@" in name}
    assert found == {f"{stage}@{name}" for name in record.others for stage in ("embed_other", "few_shot_other")}
    assert len(found) == 22
