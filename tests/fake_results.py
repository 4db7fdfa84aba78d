"""What ingest, training and evaluation would have written, made up: every figure can be told from every other."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pipeline.config.params import Params
from pipeline.config.records import read_record
from pipeline.evaluation.candidates import text_digest
from pipeline.evaluation.metric_key import read_key
from pipeline.reporting.results import load_results, load_summaries
from pipeline.storage.index import write_studies
from pipeline.storage.shards import EncodedPicture, ShardWriter
from pipeline.study import Study, View

M, C, C14 = "mimic_cxr", "chexpert", "chestxray14"
EVALUATED = {"vindr_cxr": ["Cardiomegaly", "Pleural effusion"], "rsna": ["Pneumonia"], "siim": ["Pneumothorax"]}
RETRIEVAL = ("chexpert5x200", "mimic_cxr", "openi")
PLAIN = {"loss": {"mvs": False, "icl_weight": 0.0, "tcl_weight": 0.0}}
PARAMS = {
    "seed": 7,
    "sources": {
        d: {"reader": d, "path": f"/somewhere/of/jane/{d}", "stamp": "x"} for d in (M, C, C14, *EVALUATED, "openi")
    },
    "phantom": {"archives": {M: 20}},
    "ingest": {},
    "prompts": {"file": "pipeline/text/prompts.yaml"},
    "sampling": {},
    "augment": {},
    "model": {"image_encoders": {"resnet": {"name": "resnet50"}, "swin": {"name": "swin_tiny"}}, "text_encoder": {}},
    "loss": {},
    "train": {},
    "runs": {
        "swin_mcc": {"image_encoder": "swin", "datasets": [C14, M, C]},
        "swin_mc": {"image_encoder": "swin", "datasets": [M, C]},
        "resnet_mc": {"image_encoder": "resnet", "datasets": [C, M]},
        "resnet_m": {"image_encoder": "resnet", "datasets": [M]},
        "swin_m": {"image_encoder": "swin", "datasets": [M]},
        "resnet_mcc": {"image_encoder": "resnet", "datasets": [M, C, C14]},
        **{n: {"image_encoder": "resnet", "datasets": [M, C], **PLAIN} for n in ("clip", "clip_study", "clip_aug")},
        "clip_mvs": {"image_encoder": "resnet", "datasets": [M, C], "loss": {"icl_weight": 0.0, "tcl_weight": 0.0}},
        "clip_icl": {"image_encoder": "resnet", "datasets": [M, C], "loss": {"tcl_weight": 0.0}},
        "shuffled": {"image_encoder": "resnet", "datasets": [M, C, C14], "train": {"shuffle_pairs": True}},
    },
    "main": ["swin_mcc", "swin_mc", "resnet_mc", "resnet_m", "swin_m", "resnet_mcc"],  # not in the paper's order
    "ablations": ["clip", "clip_study", "clip_aug", "clip_mvs", "clip_icl", "resnet_mc"],
    "control": "shuffled",
    "evaluate": {
        "protocols": ["paper"],
        "few_shot": {"shares": {"p10": 0.1, "p100": 1.0}, "epochs": {"p10": 3, "p100": 1}},
    },
    "tracking": {"enabled": False},
}
SMALL = {  # one run, for what does not depend on their number
    "runs": {"resnet_mcc": PARAMS["runs"]["resnet_mcc"]},
    "main": ["resnet_mcc"],
    "ablations": [],
    "control": "",
}
TEXTS = {
    "mimic_cxr": "Small left pleural effusion. Heart size is normal.",
    "openi": "No acute cardiopulmonary abnormality.",
}


def params(**changes) -> Params:
    """The parameters above with some top-level keys replaced."""
    return read_record(Params, {**PARAMS, **changes})


def value(run: str, metric: str) -> float:
    """The made-up figure of a metric: the control is at chance, the others anywhere from 0.55 to 0.95."""
    noise = zlib.crc32(f"{run} {metric}".encode()) / 2**32
    if run == "shuffled":
        return 0.5 + 0.04 * (noise - 0.5) if metric.endswith("auc") else 0.1 + 0.05 * noise
    return 0.55 + 0.4 * noise


def measured(run: str, *names: str) -> dict[str, dict]:
    """Made-up figures as a result file holds them."""
    return {name: stored(name, value(run, name)) for name in names}


def stored(name: str, v: float, **changes) -> dict:
    """A figure as a result file holds it."""
    return {**read_key(name).record(), "value": v, "low": v - 0.031, "high": min(1.0, v + 0.022), "n": 240, **changes}


RECALLS = [f"{d}_r{k}" for d in RETRIEVAL for k in (1, 5, 10)]


def recalls(run: str) -> list[float]:
    return [value(run, name) for name in RECALLS]


def picture(seed: int, size: int = 96) -> bytes:
    """Two dark ellipses on grey with noise, as JPEG bytes."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    lungs = ((x - 0.45) ** 2 / 0.1 + y**2 / 0.5 < 1) | ((x + 0.45) ** 2 / 0.1 + y**2 / 0.5 < 1)
    noise = np.random.default_rng(seed).normal(0, 10, (size, size))
    out = io.BytesIO()
    Image.fromarray(np.clip(np.where(lungs, 60, 170) + noise, 0, 255).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


def studies(dataset: str, count: int = 4) -> list[Study]:
    out = []
    for i in range(count):
        view = View(id=f"{dataset}{i}", position="AP" if i % 2 else "PA")
        text = TEXTS.get(dataset)
        labels = {} if text else {"Pneumonia": i % 2, "Cardiomegaly": int(i == 3)}
        out.append(Study(dataset, f"p{i}", f"s{i}", "test", (view,), f"{i} {text}" if text else None, text, labels))
    return out


def write_dataset(root: Path, dataset: str, phantom: bool = True, **changes) -> list[Study]:
    """Shards (relative to ``root``), index and summary of one data set; the studies with their places."""
    index = root / "data" / "index"
    with ShardWriter(root / "data" / "shards" / dataset / f"{dataset}-000000.tar") as writer:
        placed = [
            writer.write(s, [EncodedPicture(picture(zlib.crc32(s.views[0].id.encode())), 96, 96)])
            for s in studies(dataset)
        ]
    write_studies(index / f"{dataset}.parquet", placed)
    listed = {"train": {"studies": 70, "images": 91}, "valid": {"studies": 6, "images": 8}}
    listed["test"] = {"studies": 4, "images": 5}
    summary = {
        "dataset": dataset,
        "reader": dataset,
        "labels_only": False,
        "listed": listed,
        "written": {**listed, "train": {"studies": 69, "images": 90}},
        "found_images": 104,
        "written_images": 103,
        "rejected_images": 1,
        "reasons": {"not an image": 1},
        "phantom": phantom,
        "notes": ["CheXpert5x200 list absent: a seeded list drawn by the same rule is used"] if dataset == C else [],
        **changes,
    }
    (index / f"{dataset}.json").write_text(json.dumps(summary))
    return placed


def write_results(root: Path, p: Params, run: str, examples: dict) -> None:
    results = root / "data" / "results"
    for kind in ("zero_shot", "few_shot", "retrieval", "pretrain"):
        (results / kind / run).mkdir(parents=True, exist_ok=True)
    place = f"{run}/0"
    zero = measured(run, *(f"{d}_zs_auc" for d in EVALUATED), "chexpert5x200_zs_accuracy")
    strength = 1.0 if run == "shuffled" else 2.0 + 6 * value(run, "strength")
    tpr = (np.linspace(0, 1, 21) ** (1 / strength)).tolist()
    curve = {"fpr": np.linspace(0, 1, 21).tolist(), "tpr": tpr}
    body = {
        "run": place,
        "metrics": zero,
        "classes": {},
        "curves": {d: dict.fromkeys(classes, curve) for d, classes in EVALUATED.items()},
        "notes": ["vindr_cxr: Pneumonia: no AUC, 0 of 240 test images are positive"],
    }
    (results / "zero_shot" / f"{place}.json").write_text(json.dumps(body))
    if run in p.main:
        probe = measured(run, *(f"{d}_{share}_auc" for d in EVALUATED for share in ("p10", "p100")))
        (results / "few_shot" / f"{place}.json").write_text(json.dumps({"run": place, "metrics": probe, "notes": []}))
    found = measured(run, *RECALLS)
    total = sum(recalls(run))
    found["rsum"] = {**read_key("rsum").record(), "value": total, "low": total - 0.2, "high": total + 0.1}
    pools = {
        d: {"queries": 80, "candidates": 80, "chance": {"r1": 0.0125, "r5": 0.0625, "r10": 0.125}} for d in RETRIEVAL
    }
    body = {"run": place, "metrics": found, "pools": pools, "examples": examples, "notes": []}
    (results / "retrieval" / f"{place}.json").write_text(json.dumps(body))
    epochs = [
        f"{e},{10 * (e + 1)},0.001,{4 / (e + 1):.4f},{4.2 / (min(e, 5) + 1) + 0.1 * e:.4f},3,1,1,14" for e in range(8)
    ]
    head = "epoch,step,lr,train_loss,valid_loss,mvs,icl,tcl,scale"
    (results / "pretrain" / f"{place}.csv").write_text("\n".join([head, *epochs]) + "\n")


def make(root: Path, p: Params | None = None, real: tuple[str, ...] = ()) -> Params:
    """A whole working directory below ``root``; data sets in ``real`` are not marked as phantoms."""
    p = p or params()
    examples = {}
    for dataset in p.sources:
        placed = write_dataset(root, dataset, dataset not in real)
        if dataset in TEXTS:
            near = [*(s.findings for s in placed[:2]), TEXTS[dataset], *(s.findings for s in placed[2:])]
            top = [{"text": text_digest(text), "score": 0.9 - 0.1 * i} for i, text in enumerate(near)]
            own = {"image": placed[0].first_frontal.digest, "text": text_digest(TEXTS[dataset]), "rank": 3}
            examples[dataset] = [{**own, "top": top}]
    for run in p.runs:
        write_results(root, p, run, examples)
    (root / "data" / "audit").mkdir(parents=True, exist_ok=True)
    for suffix in ("md", "csv"):
        (root / "data" / "audit" / f"leakage.{suffix}").write_text("as the audit writes it\n")
    return p


def load(root: Path, p: Params):
    """Summaries, results and missing files, as the stage reads them."""
    summaries = load_summaries(root / "data" / "index", p.sources)
    return summaries, *load_results(root / "data" / "results", p.runs, p.main)


def save_params(root: Path, **changes) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump({**PARAMS, **changes}))
