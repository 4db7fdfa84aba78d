"""Who may read what is written: its owner, whatever the umask was; folders that git and DVC made are closed."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from pipeline.storage.atomic import replacing, write_text
from pipeline.storage.index import write_rejects, write_studies
from pipeline.storage.shards import EncodedPicture, ShardWriter
from pipeline.study import Reject
from pipeline.tracking import work_folders
from tests.conftest import make_study

ROOT = Path(__file__).parents[1]
RUN = """
import os, sys
from importlib import import_module
os.umask(0)
if __name__ == "__main__":
    import stages
    for words in (line.split() for line in sys.argv[1:]):
        sys.argv = words
        module = import_module(f"stages.{words[0]}")
        stages.run(words[0], module.main)
"""


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_handed():
    before = os.umask(0)
    yield
    os.umask(before)


def test_files_are_their_owners_alone_whatever_the_umask(tmp_path, open_handed):
    """As in a worker of a cluster's scheduler, whose umask is not ours to set."""
    write_text(tmp_path / "a.json", "{}")
    for name, write in {
        "b.npz": lambda path: np.savez(path.open("wb"), a=np.zeros(3)),
        "c.safetensors": lambda path: save_file({"a": torch.zeros(3)}, path),
        "d.pt": lambda path: torch.save({"a": torch.zeros(3)}, path),
    }.items():
        with replacing(tmp_path / name) as partial:
            write(partial)
            assert mode(partial) == 0o600  # before it is whole, too
    (tmp_path / "e.txt").write_text("of an earlier version")
    assert mode(tmp_path / "e.txt") == 0o666
    write_text(tmp_path / "e.txt", "new")
    study = make_study(1)
    with ShardWriter(tmp_path / "f.tar") as writer:
        writer.write(study, [EncodedPicture(b"x", 1, 1)] * len(study.views))
        assert {mode(path) for path in tmp_path.glob("f.tar*")} == {0o600}
    write_studies(tmp_path / "g.parquet", [study])
    write_rejects(tmp_path / "h.parquet", [Reject("mimic_cxr", "x.jpg", "image", "why")])
    assert {path.name[0]: oct(mode(path)) for path in tmp_path.iterdir()} == dict.fromkeys("abcdefgh", "0o600")


def test_a_small_run_leaves_nothing_to_others(tmp_path):
    """Settings to corpus with an umask of 0 and in folders that git and DVC made: worker processes and records, too."""
    params = yaml.safe_load((ROOT / "profiles" / "micro.yaml").read_text())
    params["sources"] = {"mimic_cxr": params["sources"]["mimic_cxr"]}
    params["phantom"] = {"size": 64, "archives": {"mimic_cxr": 20}}
    params |= {"runs": {"one": {"image_encoder": "resnet", "datasets": ["mimic_cxr"]}}, "main": ["one"], "others": {}}
    params |= {
        "ablations": [],
        "prompt_ablations": [],
        "compositions": [],
        "control": "",
        "tracking": {"enabled": True},
    }
    params["evaluate"] |= {"official": {"runs": []}, "regeneration": {"runs": []}}
    params["evaluate"]["few_shot"]["fine_tune"]["runs"] = []
    params["ingest"]["workers"] = 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    for folder in ("data/embeddings", ".dvc/cache/files/md5", "state", "mlartifacts"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mlflow.db").touch()
    for path in (
        tmp_path / "data",
        tmp_path / ".dvc",
        tmp_path / "state",
        tmp_path / "mlartifacts",
        tmp_path / "mlflow.db",
    ):
        path.chmod(0o777)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    words = ["settings", "phantom", "ingest mimic_cxr", "audit", "prompts", "back_translate", "corpus"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_ROOT": str(tmp_path)}
    done = subprocess.run((sys.executable, str(script), *words), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "data/index/mimic_cxr.json").read_text())["written_images"]
    assert len(list((tmp_path / "state/tracking").glob("*/record.json"))) == 6
    for path in ("data", ".dvc", "state", "mlartifacts", "mlflow.db"):
        assert mode(tmp_path / path) & 0o077 == 0, path
    was_there = {tmp_path / "data" / "embeddings"}
    written = [p for p in (*tmp_path.glob("data/**/*"), *tmp_path.glob("state/**/*")) if p not in was_there]
    assert len(written) > 60 and not [p for p in written if mode(p) != (0o700 if p.is_dir() else 0o600)]


@pytest.mark.parametrize(
    ("before", "after"), [(0o755, 0o700), (0o2775, 0o2770), (0o2755, 0o2750), (0o700, 0o700), (0o777, 0o700)]
)
def test_a_folder_is_closed_to_others_and_one_that_is_shared_stays_so(tmp_path, monkeypatch, before, after):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    kept = os.umask(0o022)
    try:
        for name in ("data", ".dvc", "elsewhere"):
            Path(name).mkdir()
            Path(name).chmod(before)
        Path("state").symlink_to("elsewhere")
        for _ in range(2):
            work_folders.keep_private()
            assert {mode(Path(name)) for name in ("data", ".dvc", "elsewhere")} == {after}
        assert os.umask(0o022) == 0o077
    finally:
        os.umask(kept)


def test_a_folder_of_somebody_else_costs_a_line(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    Path("data").mkdir()
    Path("data").chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refused)
    kept = os.umask(0o022)
    try:
        work_folders.keep_private()
    finally:
        os.umask(kept)
    assert capsys.readouterr().err == "data: may be read by others than its owner (Operation not permitted)\n"
