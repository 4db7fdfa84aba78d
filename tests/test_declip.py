"""DeCLIP's terms against numpy, its queue against a deque, its draws against their rates; and a real training."""

import math
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config.params import Loss
from pipeline.config.records import ParamsError
from pipeline.models.checkpoint import load_model
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.masked_tokens import MaskedWords, WordMask
from pipeline.text import eda
from pipeline.text.tokenizer import Tokenizer
from pipeline.training import loop
from pipeline.training.batches import TrainingSet, ValidationSet
from pipeline.training.distributed import Process
from pipeline.training.losses import Embeddings
from pipeline.training.methods import method_of as method_of_run
from pipeline.training.methods.cxr_clip import CxrClipMethod
from pipeline.training.methods.declip import DeclipMethod, SimSiam, TextQueue, neighbour_loss
from pipeline.training.sampling import draw_texts, label_key
from pipeline.training.step import compute_gradients
from tests.conftest import make_config
from tests.step_ranks import CASES, WORDS, batch_of, method_of, model
from tests.test_losses import info_nce, unit

CPU = torch.device("cpu")
DECLIP = {"mvs_weight": 0.4, "icl_weight": 0.0, "tcl_weight": 0.0, "nn_weight": 0.2, "simsiam_weight": 0.2}
DECLIP |= {"mlm_weight": 0.2, "queue": 20}
MANY = 10_000


# nearest neighbours


def test_the_queue_is_a_deque_of_the_latest_texts():
    rng = np.random.default_rng(0)
    queue, expected = TextQueue(7, 3), deque(maxlen=7)
    for count in (3, 3, 4, 1, 7, 10, 2, 15):  # wraps around, fills exactly, is larger than the queue
        texts = unit(rng, count, 3).astype(np.float32)
        queue.push(torch.from_numpy(texts))
        expected.extend(texts)
        held = queue.texts[: queue.seen].numpy()
        oldest = queue.seen % 7 if queue.seen >= 7 else 0
        assert np.array_equal(np.roll(held, -oldest, axis=0), np.stack(expected))
    again = TextQueue(7, 3)
    again.load_state_dict(queue.state_dict())
    assert again.seen == queue.seen == 45 and torch.equal(again.texts, queue.texts)


def test_the_nearest_is_the_remembered_text_of_the_largest_cosine():
    rng = np.random.default_rng(1)
    queue, texts = TextQueue(30, 4), unit(rng, 6, 4).astype(np.float32)
    assert torch.equal(queue.nearest(torch.from_numpy(texts)), torch.from_numpy(texts))  # nothing to remember yet
    known = unit(rng, 9, 4).astype(np.float32)
    queue.push(torch.from_numpy(known))
    expected = [max(known, key=lambda k, t=t: float(k @ t)) for t in texts]
    assert np.array_equal(queue.nearest(torch.from_numpy(texts)).numpy(), np.stack(expected))
    single = TextQueue(30, 4)
    single.push(torch.from_numpy(known[:1]))
    away = torch.from_numpy(-known[:1])  # an empty place would be nearer
    assert np.array_equal(single.nearest(away).numpy(), known[:1])


@pytest.mark.parametrize("mvs", [True, False])
def test_the_neighbour_term_is_numpys_in_one_direction(mvs):
    rng = np.random.default_rng(2)
    i1, i2, t1, t2 = (unit(rng) for _ in range(4))
    known = unit(rng, 12)
    queue = TextQueue(12, 7).double()
    queue.push(torch.tensor(known))
    near = {k: known[(t @ known.T).argmax(1)] for k, t in (("t1", t1), ("t2", t2))}

    def one_way(images, texts, scale):
        logits = scale * images @ texts.T
        return -np.mean([logits[i, i] - math.log(np.exp(logits[i]).sum()) for i in range(len(images))])

    pairs = [(i, near[t]) for i in (i1, i2) for t in ("t1", "t2")] if mvs else [(i1, near["t1"])]
    e = Embeddings(*(torch.tensor(x, requires_grad=True) for x in (i1, t1, i2, t2)))
    loss = neighbour_loss(e, queue, torch.tensor(9.0), Loss(mvs=mvs), 0, 1)
    assert loss.item() == pytest.approx(np.mean([one_way(i, t, 9.0) for i, t in pairs]), rel=1e-9)
    loss.backward()
    assert e.image1.grad.abs().sum() > 0 and e.text1.grad is None  # the target is held still


# SimSiam


def forward(module, x):
    """A Sequential in numpy, BatchNorm by the batch."""
    for layer in module:
        if isinstance(layer, torch.nn.Linear):
            x = x @ layer.weight.detach().numpy().T + (0 if layer.bias is None else layer.bias.detach().numpy())
        elif isinstance(layer, torch.nn.BatchNorm1d):
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + layer.eps)
            x = x * layer.weight.detach().numpy() + layer.bias.detach().numpy()
        else:
            x = np.maximum(x, 0)
    return x


def cosine(a, b):
    return np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)])


def test_simsiam_is_numpys_and_its_targets_are_held_still():
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    head = SimSiam(5, 12, 6).double().train()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    e1, e2 = rng.normal(size=(2, 8, 5)) * 3
    targets = forward(head.projector, e1), forward(head.projector, e2)

    def numpys(x1, x2):
        p1, p2 = (forward(head.predictor, forward(head.projector, x)) for x in (x1, x2))
        return -(cosine(p1, targets[1]) + cosine(p2, targets[0])) / 2

    x1, x2 = (torch.tensor(x, requires_grad=True) for x in (e1, e2))
    value = head(x1, x2)
    assert value.item() == pytest.approx(numpys(e1, e2), rel=1e-9)
    value.backward()
    for index in ((0, 0), (3, 2), (7, 4)):
        up, down = e1.copy(), e1.copy()
        up[index] += 1e-6
        down[index] -= 1e-6
        slope = (numpys(up, e2) - numpys(down, e2)) / 2e-6
        assert x1.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_simsiam_has_the_published_widths():
    widths = [
        (m.in_features, m.out_features)
        for part in (SimSiam(512).projector, SimSiam(512).predictor)
        for m in part
        if isinstance(m, torch.nn.Linear)
    ]
    assert widths == [(512, 1024), (1024, 1024), (1024, 1024), (1024, 512), (512, 1024)]


# words taken out


@pytest.fixture(scope="module")
def words():
    special = torch.isin(torch.arange(40), torch.tensor([0, 1, 2, 3, 39]))
    return WordMask(special, torch.arange(4, 39), mask_id=3, rate=0.15)


def texts_of(count, length=20):
    rng = np.random.default_rng(4)
    tokens = torch.from_numpy(rng.integers(0, 40, (count, length)))
    mask = (torch.arange(length) < torch.from_numpy(rng.integers(3, length + 1, count))[:, None]).long()
    return tokens, mask, torch.from_numpy(rng.integers(2**62, size=count))


def test_fifteen_percent_are_asked_for_and_four_of_five_are_masked(words):
    tokens, mask, keys = texts_of(MANY)
    said, asked = words.take_out(tokens, mask, keys)
    special = torch.isin(tokens, torch.tensor([0, 1, 2, 3, 39]))
    could, was = mask.bool() & ~special, asked >= 0
    assert not (was & ~could).any()  # neither special tokens nor padding
    assert torch.equal(asked[was], tokens[was]) and torch.equal(said[~was], tokens[~was])
    n = int(could.sum())
    assert n > 80_000 and was.sum() / n == pytest.approx(0.15, abs=0.004)
    masked, kept = said[was] == 3, said[was] == tokens[was]
    assert masked.double().mean() == pytest.approx(0.8, abs=0.012)
    other = said[was][~masked & ~kept]
    assert len(other) / len(masked) == pytest.approx(0.1 * 34 / 35, abs=0.009)  # one of 35 words is the same by chance
    assert set(other.tolist()) == set(range(4, 39))
    counts = np.bincount(other.numpy())[4:39]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 80  # chi square of 34: 1e-5
    by_place = (was & could).double().sum(0) / could.double().sum(0)
    assert (by_place - 0.15).abs().max() < 0.025


def test_what_is_taken_out_is_the_draws_alone(words):
    tokens, mask, keys = texts_of(50)
    said, asked = words.take_out(tokens, mask, keys)
    longer = torch.nn.functional.pad(tokens, (0, 7)), torch.nn.functional.pad(mask, (0, 7))
    part = slice(20, 30)
    for got, expected in zip(words.take_out(longer[0][part], longer[1][part], keys[part]), (said, asked), strict=True):
        assert torch.equal(got[:, :20], expected[part])
    assert not torch.equal(words.take_out(tokens, mask, keys + 1)[1], asked)


def test_a_word_is_guessed_by_the_towers_own_embeddings():
    rng = np.random.default_rng(6)
    hidden, embedding = rng.normal(size=(3, 4, 6)), rng.normal(size=(40, 5))
    torch.manual_seed(1)
    head = MaskedWords(6, torch.nn.Embedding(40, 5)).double()
    with torch.no_grad():
        head.bias.copy_(torch.from_numpy(rng.normal(size=40)))
    asked = torch.tensor([[-1, 7, -1, 8], [-1, -1, -1, -1], [9, -1, -1, -1]])
    got = head(torch.tensor(hidden), asked, 3, torch.tensor(embedding)).detach().numpy()
    linear, _, norm = head.transform
    expected = np.zeros(3)
    for row, place in zip(*np.nonzero(asked.numpy() >= 0), strict=True):
        x = linear.weight.detach().numpy() @ hidden[row, place] + linear.bias.detach().numpy()
        x = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x])
        x = (x - x.mean()) / np.sqrt(x.var() + norm.eps)
        logits = embedding @ x + head.bias.detach().numpy()
        expected[row] -= logits[asked[row, place]] - math.log(np.exp(logits).sum())
    assert got == pytest.approx(expected, rel=1e-9) and got[1] == 0


# all together


def test_the_total_is_the_weighted_sum_of_the_terms():
    config = make_config(**CASES["declip"])
    loss = config.loss
    total, parts, _ = compute_gradients(method_of(model(config), config), batch_of(config))
    assert list(parts) == ["mvs", "tcl", "nn", "simsiam", "mlm"]
    weights = (loss.mvs_weight, loss.tcl_weight, loss.nn_weight, loss.simsiam_weight, loss.mlm_weight)
    expected = sum(w * p.item() for w, p in zip(weights, parts.values(), strict=True))
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert parts["mlm"].item() == pytest.approx(math.log(WORDS), abs=1.5) and -1 < parts["simsiam"].item() < 1


def test_contrast_and_guess_are_of_the_first_text_without_its_words():
    config = make_config(loss={**DECLIP, "mlm_rate": 0.5})
    net, batch, seen = model(config).eval(), batch_of(config), []
    real = net.encode_text
    net.encode_text = lambda *group: seen.append(group) or real(*group)
    _, parts, _ = compute_gradients(method_of(net, config), batch)
    plain, mask = ([row for group in part for row in group] for part in (batch.tokens, batch.mask))
    tokens, asked = ([row for group in seen for row in group[k]] for k in (0, 3))
    first, second = batch.order.view(2, -1).tolist()
    assert all(torch.equal(tokens[k], plain[k]) and (asked[k] < 0).all() for k in second)
    assert sum(not torch.equal(tokens[k], plain[k]) for k in first) >= 6
    assert sum(int((asked[k] >= 0).sum()) for k in first) > 20
    with torch.no_grad():
        images = [net.net.encode_image(part).numpy() for part in batch.images.chunk(2)]
        texts = [[net.net.encode_text(tokens[k][None], mask[k][None]) for k in rows] for rows in (first, second)]
    expected = np.mean([info_nce(i, torch.cat(t).numpy(), 10.0) for i in images for t in texts])
    assert parts["mvs"].item() == pytest.approx(expected, rel=1e-6)


def test_each_step_remembers_its_first_texts_in_the_order_of_the_batch():
    config = make_config(loss={**DECLIP, "mlm_weight": 0.0})
    net, batch = model(config), batch_of(config)
    queue = net.heads.queue
    before = queue.texts.clone()
    compute_gradients(method_of(net, config), batch)
    assert queue.seen == 15 + 8 and torch.equal(queue.texts[3:15], before[3:15])
    with torch.no_grad():
        texts = torch.cat([net.net.encode_text(*group) for group in zip(batch.tokens, batch.mask, strict=True)])
    assert torch.allclose(torch.cat([queue.texts[15:], queue.texts[:3]]), texts[batch.order[:8]])


def test_no_term_of_declip_no_learner(config):
    words = Tokenizer.build(make_config().text_encoder, ["one two three"])
    plain = method_of_run(config(), words, Process(CPU))
    assert type(plain) is CxrClipMethod and plain.learner is plain.net and not plain.state
    for name, part in {"nn": "queue", "simsiam": "simsiam", "mlm": "words"}.items():
        run = config(loss={f"{name}_weight": 0.1, "queue": 9})
        method = method_of_run(run, words, Process(CPU))
        heads = method.learner.heads
        assert type(method) is DeclipMethod and method.terms == ("mvs", "icl", "tcl", name)
        assert [p for p in ("queue", "simsiam", "words") if getattr(heads, p) is not None] == [part]
    taken = method.collate.keywords["taker"]
    assert taken.special.nonzero().flatten().tolist() == sorted(words.tokenizer.all_special_ids)
    words.tokenizer.mask_token = None
    with pytest.raises(ParamsError, match=r"loss\.mlm_weight: the tokenizer .* has no \[MASK\]"):
        method_of_run(run, words, Process(CPU))


def test_a_declip_training_leaves_a_model_for_evaluation_alone(config, corpus, tmp_path):
    run = config(sampling={"unit": "image"}, augment={"text_method": "eda"}, loss={**DECLIP, "scale_limits": (20, 400)})
    folder, threads = corpus(run), torch.get_num_threads()
    try:
        paths = (tmp_path / name for name in ("model", "history.csv", "work"))
        loop.train_run(folder, *paths, lambda values, step: None)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    net, tokenizer, _ = load_model(tmp_path / "model")  # every key must match
    assert {n for n, _ in net.named_parameters()} == {n for n, _ in CxrClip(run, len(tokenizer)).named_parameters()}
    assert net.scale.item() == pytest.approx(20, rel=1e-5)  # begun at 10
    head, *rows = (tmp_path / "history.csv").read_text().splitlines()
    assert head.endswith(",mvs,icl,tcl,nn,simsiam,mlm,scale") and len(rows) == 2
    assert all(row.split(",")[8:11].count("") == 0 for row in rows)


# what is drawn


def test_unit_image_is_one_image_and_one_text_twice(config, studies, prompts):
    run = config(sampling={"unit": "image"})
    data, valid = (kind(studies, prompts, run) for kind in (TrainingSet, ValidationSet))
    for i, study in enumerate(studies):
        images, (first, second), *_ = data[0, i]
        assert len(images) == 2 and Counter(first.replace(".", "").split()) == Counter(second.replace(".", "").split())
        if study.labels and first.count(".") > 1 and len(set(first.split(". "))) > 1:
            assert first != second
        images, texts, *_ = valid[i]
        assert np.array_equal(*images) and texts[0] == texts[1]


@pytest.mark.parametrize("unit", ["study", "image"])
def test_eda_changes_the_last_text_alone(config, studies, prompts, unit, monkeypatch):
    run = config(augment={"text_method": "eda"}, sampling={"unit": unit})
    monkeypatch.setattr(eda, "eda_augmented", lambda text, rng: f"<{text}>")
    for study in studies[:40:3]:
        for count in (1, 2):
            texts = draw_texts(study, count, prompts.get(study.dataset), run, np.random.default_rng(0))
            assert len(texts) == count and texts[-1][0] == "<" and all("<" not in t for t in texts[:-1])
            if not study.labels:
                sections = [t for t in (study.findings, study.impression) if t]
                whole = {" ".join(sections)} if unit == "image" else set(sections)
                assert {t.strip("<>") for t in texts} <= whole
                if unit == "study" and count == len(sections) == 2:
                    assert {t.strip("<>") for t in texts} == whole
            elif unit == "image":
                assert len({t.strip("<>") for t in texts}) == 1


def test_eda_does_one_of_three_things_with_the_same_chance():
    words = [f"w{k}" for k in range(28)] + ["mild", "Opacity."]
    found, gone = Counter(), []
    for k in range(MANY):
        said = eda.eda_augmented(" ".join(words), np.random.default_rng([7, k])).split()
        if len(said) < len(words):
            assert [w for w in words if w in said] == said
            found["deletion"] += 1
            gone.append(len(words) - len(said))
        elif sorted(said) == sorted(words):
            assert sum(a != b for a, b in zip(said, words, strict=True)) in (0, 2)
            found["swap" if said != words else "nothing"] += 1
        else:
            (i,) = [i for i, (a, b) in enumerate(zip(said, words, strict=True)) if a != b]
            assert said[i] in {28: ["slight"], 29: ["Density."]}[i]
            found["synonym", i] += 1
    assert found["swap"] / MANY == pytest.approx(1 / 3, abs=0.02)
    assert found["synonym", 28] / MANY == pytest.approx(1 / 6, abs=0.015)
    assert found["synonym", 29] / MANY == pytest.approx(1 / 6, abs=0.015)
    assert found["deletion"] / MANY == pytest.approx((1 - 0.9**30) / 3, abs=0.02)
    assert sum(gone) / (found["deletion"] + found["nothing"]) == pytest.approx(3.0, abs=0.12)


def test_eda_of_very_short_texts():
    rng = np.random.default_rng(0)
    assert {eda.eda_augmented("Zero", rng) for _ in range(99)} == {"Zero"}
    assert {eda.eda_augmented("mild", rng) for _ in range(99)} == {"mild", "slight"}
    assert all(eda.eda_augmented("a b", rng) for _ in range(2000)) and eda.eda_augmented("", rng) == ""


def test_no_word_has_two_lines_of_synonyms():
    known = eda.synonyms()
    assert all(word == word.lower() and " " not in word for word in known)
    assert all(word in known[other] for word, others in known.items() for other in others)
    risky = {"no", "not", "without", "left", "right", "possible", "probable", "effusion", "edema", "pneumonia", "new"}
    assert not risky & set(known)


def test_labels_are_alike_where_the_same_classes_are_positive_and_uncertain(studies):
    labelled = [s for s in studies if s.labels]
    for a in studies:
        for b in labelled:
            sets = [{(c, v) for c, v in s.labels.items() if v} for s in (a, b)]
            same = a is b or (sets[0] == sets[1] and bool(sets[0]))
            assert (label_key(a) == label_key(b)) == same
    one = replace(labelled[0], labels={"A": 1, "B": -1, "C": 0}, patient="x")
    assert label_key(one) == label_key(replace(one, study="y", labels={"B": -1, "A": 1}))
    assert label_key(one) != label_key(replace(one, labels={"A": 1, "B": 1}))
    assert label_key(replace(one, labels={"C": 0})) != label_key(replace(one, labels={"C": 0}, study="y"))


def test_labels_reach_the_loss_where_it_asks(config, studies, prompts):
    run = config(loss={"label_positives": True})
    for kind, draw in ((TrainingSet, lambda i: (0, i)), (ValidationSet, lambda i: i)):
        assert all(kind(studies, prompts, run)[draw(i)].labels == label_key(s) for i, s in enumerate(studies))
        assert kind(studies, prompts, config())[draw(0)].labels == 0
