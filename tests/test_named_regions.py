"""Does a report help where it names what is hidden? Phantoms are drawn with and without their findings, so that the
cells in which these show are known; they are hidden, and guessed with the report, with none and with another's."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pipeline.config.load import load_params
from pipeline.config.params import Bootstrap
from pipeline.config.run_config import Roles, run_config
from pipeline.evaluation import protocols, regenerate
from pipeline.evaluation.image_quality import psnr
from pipeline.evaluation.metrics import mean_with_interval, resamples
from pipeline.models.checkpoint import load_model
from pipeline.phantom.cases import Case
from pipeline.phantom.picture import render_picture
from pipeline.phantom.with_reports import mimic_cxr_ids, mimic_cxr_plan
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.shards import load_view
from tests.small_runs import ingested, trained

ROOT = Path(__file__).parents[1]
GRID = 4


def drawn(case: Case, findings, width: int, size: int) -> np.ndarray:
    """The first frontal view of a case as a model sees it, with these findings, uint8 [size, size]."""
    number, view = next((n, view) for n, view in enumerate(case.views) if view != "LATERAL")
    image = render_picture(case.patient, findings, view, width, case.view_seed(number)).image
    return evaluation_crop(np.round(image * 255).astype(np.uint8), size)


def named_cells(case: Case, width: int, size: int, grid: int) -> np.ndarray:
    """Cells that the findings change by more than 0.02 of the grey range on average, bool [grid, grid]."""
    healthy, ill = (drawn(case, findings, width, size).astype(float) for findings in ((), case.findings))
    side = size // grid
    return np.abs(ill - healthy).reshape(grid, side, grid, side).mean(axis=(1, 3)) > 0.02 * 255


def gains(filler, images: np.ndarray, cells: np.ndarray, texts: list[str], others: list[str]):
    """PSNR over hidden pixels with the matching report less that with none and with another's: float64 [N] each; and
    the pictures, uint8 [N, size, size] each way."""
    hidden, found, pictures = regenerate.pixels_of(cells, images.shape[1]), {}, {}
    for way, said in (("matching", texts), ("none", None), ("shuffled", others)):
        guess = filler.regenerate_scales(torch.from_numpy(images), torch.from_numpy(cells), said)[0].numpy()
        found[way] = psnr(images / 255.0, guess, hidden)
        pictures[way] = np.where(hidden, np.rint(255 * guess), images).astype(np.uint8)
    return {way: found["matching"] - found[way] for way in ("none", "shuffled")}, pictures


def test_cells_of_a_finding_are_on_its_side():
    one_sided = [
        c
        for c in mimic_cxr_plan(800, 0)
        if len(c.findings) == 1 and c.findings[0].side in ("right", "left") and c.findings[0].kind == "pleural effusion"
    ]
    assert len(one_sided) >= 5
    for case in one_sided:
        right, left = named_cells(case, 96, 48, GRID).reshape(GRID, 2, 2).any(axis=2).T
        mine, other = (right, left) if case.findings[0].side == "right" else (left, right)
        assert mine[2:].any() and not other.any() and not mine[0]
    healthy = next(c for c in mimic_cxr_plan(20, 0) if not c.findings)
    assert not named_cells(healthy, 96, 48, GRID).any()


def test_gains_are_those_of_a_model_that_reads():
    class Reads:
        """Right to 0.1 with the text "own", to 0.2 with others, to 0.3 with none."""

        def regenerate_scales(self, images, mask, texts):
            off = torch.tensor([{"own": 0.1, "other": 0.2}[t] for t in texts] if texts else [0.3] * len(images))
            return [images / 255 + off[:, None, None]]

    images = np.random.default_rng(0).integers(0, 150, (3, 8, 8), dtype=np.uint8)
    cells = np.zeros((3, GRID, GRID), dtype=bool)
    cells[:, 1] = True
    found, pictures = gains(Reads(), images, cells, ["own"] * 3, ["other"] * 3)
    assert found["none"] == pytest.approx([20 * np.log10(3)] * 3) and found["shuffled"] == pytest.approx(
        [20 * np.log10(2)] * 3
    )
    hidden = regenerate.pixels_of(cells, 8)
    assert (pictures["matching"][~hidden] == images[~hidden]).all()
    assert (np.abs(pictures["none"][hidden] - images[hidden].astype(float) - 0.3 * 255) <= 1).all()


@pytest.mark.drill
def test_a_report_that_names_what_is_hidden_helps(tmp_path):
    """3,000 pairs, 30 epochs with three quarters of the cells hidden, else the demo's mixed run."""
    p = load_params(ROOT / "profiles/demo.yaml")
    index = ingested(tmp_path, p, mimic_cxr=3000)
    run = run_config(p, "mixed")
    run = replace(
        run,
        roles=Roles(paired=("mimic_cxr",)),
        datasets=("mimic_cxr",),
        mixed=replace(run.mixed, mask_ratio=0.75),
        train=replace(run.train, epochs=30),
    )
    net, tokenizer, _ = load_model(trained(run, index, tmp_path / "run"), torch.device("cpu"))
    filler = regenerate.of_network(net, tokenizer, torch.device("cpu"))

    sample = regenerate.read_sample(index, protocols.load_protocol("paper").retrieval["mimic_cxr"], 400, p.seed)
    cases = {mimic_cxr_ids(case)[1]: case for case in mimic_cxr_plan(3000, p.seed)}
    cases = [cases[int(s.study.removeprefix("s"))] for s in sample.studies]
    size = run.image_size
    images = np.stack([evaluation_crop(load_view(s.first_frontal), size) for s in sample.studies])
    again = np.stack([drawn(c, c.findings, p.phantom.size, size) for c in cases])
    assert np.abs(images.astype(float) - again).mean(axis=(1, 2)).max() < 4  # two times JPEG and a resize apart
    cells = np.stack([named_cells(c, p.phantom.size, size, filler.grid) for c in cases])
    kept = np.flatnonzero(cells.any(axis=(1, 2)) & ~cells.all(axis=(1, 2)))
    texts, others = ([said[i] for i in kept] for said in (sample.texts, sample.others))
    found, pictures = gains(filler, images[kept], cells[kept], texts, others)
    bootstrap, metrics = Bootstrap(samples=1000), {}
    weights = resamples([sample.studies[i].patient for i in kept], bootstrap, p.seed)
    print(f"\n{len(kept)} test images, {cells[kept].mean():.0%} of their cells hidden")
    for way, values in found.items():
        metrics[way] = mean_with_interval(values, weights, bootstrap)
        m = metrics[way]
        print(f"gain over {way}: {m.value:+.3f} dB ({m.low:+.3f} to {m.high:+.3f})")
    save_examples(tmp_path / "named.png", images[kept], cells[kept], pictures, [cases[i] for i in kept])
    assert metrics["none"].low > 0 and metrics["shuffled"].low > 0


def save_examples(path: Path, images, cells, pictures, cases) -> None:
    """The first eight of one finding in at most half of the cells, two in a row: input, hidden, guessed without a
    report, with another's, with its own."""
    hidden = regenerate.pixels_of(cells, images.shape[1])
    columns = (images, np.where(hidden, 0, images), pictures["none"], pictures["shuffled"], pictures["matching"])
    fit = [i for i, c in enumerate(cases) if len(c.findings) == 1 and cells[i].mean() <= 0.5][:8]
    strips = [np.pad(np.hstack([column[i] for column in columns]), 2, constant_values=255) for i in fit]
    sheet = np.vstack([np.hstack(strips[n : n + 2]) for n in range(0, len(strips), 2)])
    cv2.imwrite(str(path), cv2.resize(sheet, None, fx=1.25, fy=1.25, interpolation=cv2.INTER_CUBIC))
    print(
        path,
        *(f"{c.findings[0].side} {c.findings[0].zone} {c.findings[0].kind}" for c in (cases[i] for i in fit)),
        sep="; ",
    )
