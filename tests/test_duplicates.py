import json
from itertools import combinations

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import audit
from pipeline.audit import compare, copies, neighbours
from pipeline.audit.copies import find_pairs, images_of
from pipeline.storage.pictures import decode, encode
from pipeline.storage.shards import EncodedPicture, ShardError, ShardWriter
from pipeline.study import Study, View

MIN = audit.MIN_CORRELATION


def place(tar, pictures, dataset="siim"):
    """One study a picture, in one shard."""
    with ShardWriter(tar) as writer:
        return [
            writer.write(
                Study(dataset, f"p{n}", f"s{n}", "train", (View(f"v{n}"),)),
                [EncodedPicture(encode(p, 95), p.shape[1], p.shape[0])],
            )
            for n, p in enumerate(pictures)
        ]


def noise(seed, side=128):
    """A picture with detail of every size, unlike any other."""
    rng = np.random.default_rng(seed)
    layers = [cv2.resize(rng.normal(size=(k, k)), (side, side), interpolation=cv2.INTER_CUBIC) for k in (6, 16, 40, 96)]
    return np.clip(128 + 28 * sum(layers), 0, 255).astype(np.uint8)


@pytest.fixture
def coarse(monkeypatch):
    """A smaller space, fitted in a fraction of the time."""
    monkeypatch.setattr(neighbours, "DIMENSIONS", 64)
    monkeypatch.setattr(neighbours, "CUTS", 2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """180 phantom studies, two a patient, and a changed copy of every fifth: each change and each pair of them once;
    and of as many others a wide crop."""
    return list(audit.write_studies(tmp_path_factory.mktemp("planted") / "shard.tar", 180, 256, 3, True))


def test_planted_copies_are_found_and_other_pictures_of_a_patient_are_not(planted, tmp_path):
    counts = find_pairs(images_of([s for s, _ in planted]), tmp_path / "pairs.parquet", MIN)
    result = audit.score(planted, tmp_path / "pairs.parquet")
    assert len(audit.KINDS) == 36 and result["planted"] == 2 * 36 and counts["images"] > 340
    assert result["recall"] >= 70 / 72, result["missed"]
    assert result["recall_by_change"]["wide"][1] == 36
    assert counts["pairs"] * (1 - result["precision"]) <= 1


def test_one_archive_read_twice_is_copies_without_a_look(coarse, tmp_path, monkeypatch):
    pictures = [noise(n) for n in range(4)] + [np.full((64, 64), 90, np.uint8)]  # the last too flat to be compared
    pictures[4][0, 0] = 0
    once, again = (place(tmp_path / f"{d}.tar", pictures, d) for d in ("chestxray14", "chestxray14_official"))
    monkeypatch.setattr(copies, "_compare", None)
    counts = find_pairs(images_of([*once, *again]), tmp_path / "pairs.parquet", 0.99, 1)
    assert (counts["images"], counts["identical"], counts["pairs"]) == (10, 5, 5)
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [(r["dataset_a"], r["dataset_b"], r["study_a"], r["study_b"]) for r in rows] == [
        ("chestxray14", "chestxray14_official", f"s{n}", f"s{n}") for n in range(5)
    ]
    assert {(r["correlation"], r["inverted"], r["same_patient"]) for r in rows} == {(1.0, False, None)}


@pytest.mark.drill
def test_recall_and_precision_among_thousands(tmp_path):
    placed = list(audit.write_studies(tmp_path / "shard.tar", 3000, 256, 11, True))
    find_pairs(images_of([s for s, _ in placed]), tmp_path / "pairs.parquet", MIN)
    result = audit.score(placed, tmp_path / "pairs.parquet")
    found, of = result["recall_by_change"]["wide"]
    assert (result["planted"], of) == (1200, 600)
    assert result["recall"] >= 0.98 and found >= 0.95 * of and result["precision"] >= 0.995, json.dumps(result)


def test_workers_do_not_matter(planted, tmp_path, coarse, monkeypatch):
    monkeypatch.setattr(copies, "TASKS", 1)
    images = images_of([s for s, _ in planted])[-80:]
    for workers in (1, 2):
        find_pairs(images, tmp_path / f"{workers}.parquet", MIN, workers)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    assert pq.read_metadata(tmp_path / "1.parquet").num_rows > 3


def test_a_pair_stands_once_in_a_fixed_order_without_a_path(tmp_path, coarse):
    one, other = noise(1), noise(2)
    studies = place(
        tmp_path / "a.tar", [other, one, 255 - one, cv2.resize(one, (64, 64), interpolation=cv2.INTER_AREA)]
    )
    find_pairs(images_of(studies[::-1]), tmp_path / "pairs.parquet", MIN)
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [(r["study_a"], r["study_b"], r["inverted"]) for r in rows] == [
        ("s1", "s2", True),
        ("s1", "s3", False),
        ("s2", "s3", True),
    ]
    ids = [f"{name}_{side}" for side in "ab" for name in ("dataset", "patient", "study", "view", "split")]
    assert list(rows[0]) == [*ids, "correlation", "inverted", "same_patient"]
    assert rows[0]["same_patient"] is None and 0.9 < rows[0]["correlation"] <= 1


def test_same_patient_is_said_where_ids_mean_a_person(tmp_path, coarse):
    studies = place(tmp_path / "a.tar", [noise(1), noise(1)], "chexpert")
    find_pairs(images_of(studies), tmp_path / "pairs.parquet", MIN)
    assert [r["same_patient"] for r in pq.read_table(tmp_path / "pairs.parquet").to_pylist()] == [False]


def test_flat_and_equal_pictures_cost_little_and_are_counted(tmp_path, coarse):
    flat = [np.full((96, 96), 90 + n, np.uint8) for n in range(30)]
    for picture in flat:
        picture[:4, :4] = 200
    studies = place(tmp_path / "a.tar", [*flat, *[noise(1)] * 30, noise(2)])
    counts = find_pairs(images_of(studies), tmp_path / "pairs.parquet", MIN)
    assert (counts["flat"], counts["identical"], counts["pairs"]) == (30, 29, 29)
    assert counts["candidates"] < 40 and counts["full"] == 1  # the first of the equal ones represents all
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert {r["study_a"] for r in rows} | {r["study_b"] for r in rows} == {f"s{n}" for n in range(30, 60)}


def test_nothing_to_compare(tmp_path):
    assert find_pairs([], tmp_path / "pairs.parquet", MIN)["pairs"] == 0
    assert pq.read_table(tmp_path / "pairs.parquet").num_rows == 0
    studies = place(tmp_path / "a.tar", [noise(1)])
    assert find_pairs(images_of(studies), tmp_path / "pairs.parquet", MIN)["pairs"] == 0


def test_a_missing_shard_is_one_line(tmp_path):
    studies = place(tmp_path / "a.tar", [noise(1)])
    (tmp_path / "a.tar").rename(tmp_path / "b.tar")
    with pytest.raises(ShardError, match="no such shard"):
        find_pairs(images_of(studies), tmp_path / "pairs.parquet", MIN)


@pytest.mark.parametrize("rows, columns", [((12, 390), (16, 396)), ((100, 300), (20, 390)), ((4, 308), (96, 392))])
def test_registration_recovers_a_known_crop(rows, columns):
    big = noise(4, 400)
    part = np.ascontiguousarray(big[slice(*rows), slice(*columns)])
    truth = np.array([columns[0], rows[0], columns[1] - columns[0], rows[1] - rows[0]]) / 400
    other = noise(5, 380)
    a, b, c = (compare.thumbnail(picture)[0] for picture in (big, part, other))
    off = np.asarray(truth + np.array([0.02, -0.02, -0.03, 0.03]), np.float32)
    one = np.array([1, 1, -1], np.int8)
    guesses, is_in = compare.alike(
        np.stack([a, a, a]), np.stack([b, c, -b])[:, 0], np.stack([off] * 3), one, np.arange(3)
    )
    assert is_in.tolist() == [True, False, True] and np.abs(guesses[[0, 2]] - truth).max() < 0.01
    guess = guesses[0]
    value, frame = compare.look_closely(big, part, guess, 1)
    assert value > 0.95 and np.abs(frame - truth).max() < 0.001 and compare.may_be_cut(frame)
    assert compare.look_closely(big, 255 - part, guess, -1)[0] > 0.95
    assert compare.look_closely(big, other, guess, 1)[0] < 0.3


def test_more_than_a_quarter_of_a_side_is_no_copy(tmp_path):
    big = noise(4, 400)
    studies = place(tmp_path / "a.tar", [big, big[140:, :], big[90:310, 90:310]])
    find_pairs(images_of(studies), tmp_path / "pairs.parquet", MIN)
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [(r["study_a"], r["study_b"]) for r in rows] == [("s0", "s2")]


def test_small_pictures_need_more_agreement():
    found = [compare.agreement(0.9, side) for side in (0, 40, 80, 160, 192)]
    assert np.allclose(found, [1 - 0.1 * 160, 0.6, 0.8, 0.9, 0.9])


def test_soft_pictures_are_compared_where_they_have_detail(tmp_path):
    """What is encoded again differs most in the finest detail: of soft pictures nothing but noise is there."""
    pictures = []
    for n in range(12):
        soft = cv2.GaussianBlur(noise(n, 256), (0, 0), (4, 8, 12)[n % 3])
        again = decode(encode(soft, (70, 80)[n % 2]))
        assert 0 < np.abs(again.astype(int) - soft).max() <= 6
        pictures += [soft, again]
    find_pairs(images_of(place(tmp_path / "a.tar", pictures)), tmp_path / "pairs.parquet", MIN)
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    found = {(int(r["study_a"][1:]), int(r["study_b"][1:])) for r in rows}
    assert {tuple(sorted(pair)) for pair in found} == {(2 * n, 2 * n + 1) for n in range(12)}


def test_a_window_averages_what_lies_in_it():
    ramp = np.arange(neighbours.SIDE) + 0.5  # the mean of a part is its middle
    edges = np.linspace(0.03 * 64, 0.96 * 64, neighbours.GRID + 1)
    seen = neighbours.window(0.03, 0.96) @ ramp
    assert np.allclose(seen[1:-1], ((edges[:-1] + edges[1:]) / 2)[1:-1], atol=0.13)


def test_questions_are_the_looks_through_the_frames(thumbs):
    space = np.random.default_rng(0).normal(size=(neighbours.GRID**2, 20)).astype(np.float32)
    asked = neighbours.questions(thumbs[:3], space)
    assert asked.shape == (3, 1 + 2**4 + neighbours.CUTS**4, 20)
    for number, frame in enumerate(neighbours.frames()):
        seen = neighbours.look(thumbs[:3, 0 if number <= 2**4 else 1], frame)
        weight = neighbours.SMALL_WEIGHT if 0 < number <= 2**4 else 1
        assert np.allclose(asked[:, number], weight * neighbours.unit_rows(seen @ space), atol=1e-5)


@pytest.mark.parametrize(("most", "steps"), [(neighbours.SMALL_CROP, 2), (neighbours.MAX_CROP, neighbours.CUTS)])
def test_some_frame_is_near_every_crop(most, steps):
    cuts = np.random.default_rng(0).uniform(0, most, (500, 4))
    f = neighbours.frames().astype(float)
    sides = np.stack([f[:, 0], f[:, 1], 1 - f[:, 0] - f[:, 2], 1 - f[:, 1] - f[:, 3]], 1)
    assert np.abs(cuts[:, None] - sides).max(2).min(1).max() <= most / steps / 2 + 1e-6


@pytest.fixture
def thumbs():
    """300 thumbnails, of which each of the last 40 is one of the first 40, every other inverted."""
    first = [compare.thumbnail(noise(n, 64))[0] for n in range(260)]
    return np.stack([*first, *[-t if n % 2 else t // 2 * 2 for n, t in enumerate(first[:40])]])


def test_candidates_are_those_of_comparing_all_with_all(thumbs, coarse):
    found, crowded = neighbours.candidate_pairs(thumbs)
    pairs = set(zip(found.outer.tolist(), found.inner.tolist(), found.sign.tolist(), strict=True))
    flat = thumbs[:, 0].reshape(300, -1).astype(float)
    cosine = np.triu(flat @ flat.T / np.linalg.norm(flat, axis=1)[:, None] / np.linalg.norm(flat, axis=1), 1)
    near = {(int(i), int(j), int(np.sign(cosine[i, j]))) for i, j in np.argwhere(np.abs(cosine) > 0.9)}
    assert crowded == 0 and len(near) == 40
    assert {(min(o, i), max(o, i), s) for o, i, s in pairs} >= near
    assert len({frozenset(p[:2]) for p in pairs}) == len(pairs) and not any(o == i for o, i, _ in pairs)


def test_a_picture_has_no_more_candidates_than_are_kept_and_long_lists_are_split(thumbs, coarse, monkeypatch):
    rng = np.random.default_rng(0)
    alike = thumbs[:1] // 4 * 4 + rng.integers(0, 4, (400, 2, 64, 64)).astype(np.int8)  # all copies of one, none equal
    monkeypatch.setattr(neighbours, "MAX_LIST", 20)
    found, crowded = neighbours.candidate_pairs(np.concatenate([alike, thumbs[1:50]]))
    assert crowded > 300
    assert 300 < len(found.outer) <= 449 * neighbours.NEIGHBOURS


def test_the_changes_of_the_benchmark_are_what_they_say():
    image = audit.draw(0, 128, 0)[0][1]
    rng = np.random.default_rng(0)
    for kind in [*((name,) for name in audit.CHANGES), *combinations(audit.CHANGES, 2)]:
        changed = audit.change(image, kind, rng)
        assert changed.dtype == np.uint8 and not np.array_equal(changed, image), kind
    h, w = audit.crop(image, rng).shape
    assert 0.89 * image.shape[0] <= h and 0.89 * image.shape[1] <= w
