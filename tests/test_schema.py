"""params.schema.json: it is what the records say, editors find it, and it agrees with the reader."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.config.load import load_params
from pipeline.config.params import Params
from pipeline.config.records import ParamsError
from pipeline.config.schema import SCHEMA_FILE, params_schema

ROOT = Path(__file__).parents[1]
PROFILES = sorted(ROOT.glob("profiles/*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))


def test_the_file_is_what_the_records_say():
    assert json.loads(SCHEMA_FILE.read_text()) == params_schema(), "run: python -m pipeline.config.schema"
    jsonschema.Draft202012Validator.check_schema(params_schema())


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *PROFILES], ids=lambda p: p.name)
def test_an_editor_finds_the_schema_beside_every_profile(path):
    head, _, name = path.read_text().splitlines()[0].partition("$schema=")
    assert head == "# yaml-language-server: " and (path.parent / name).resolve() == SCHEMA_FILE
    assert not list(VALIDATOR.iter_errors(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("train", "epochs", value) for value in (0, 4.5, "four", True)),
        *(("train", "lr", value) for value in (1.5, True, "fast")),
        *(("loss", "mvs", 1), ("loss", "mvz", 1), ("loss", "mlm_rate", 0.995), ("augment", "crop_scale", [0.8])),
        *(("model", "temperature", 0), ("ingest", "jpeg_quality", 101), ("sampling", "unit", "patient")),
        ("runs", "swin_m", {"like": "resnet_m", "loss": {"mvs": "no"}}),
        ("runs", "swin_m", {"like": "resnet_m", "train": {"epoch": 3}}),
    ],
)
def test_schema_and_reader_refuse_the_same(tmp_path, section, key, value):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw[section][key] = value
    assert list(VALIDATOR.iter_errors(raw))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError):
        load_params(tmp_path / "params.yaml")


def test_keys_are_described():
    loss = params_schema()["$defs"]["Loss"]
    assert "one another's positives" in loss["properties"]["label_positives"]["description"]
    assert "bound 1 / temperature" in loss["description"]
    described = [p for d in params_schema()["$defs"].values() for p in d["properties"].values() if "description" in p]
    assert len(described) > 40 and Params.__doc__ == params_schema()["description"]
