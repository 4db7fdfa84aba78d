"""Masks by study: their statistics, and what they must not depend on."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from pipeline.config.records import ParamsError
from pipeline.models.dropout_kernel import keyed_dropout
from pipeline.models.encoders import ImageTower, TextTower
from pipeline.models.keyed_dropout import Rows, StudyDropout, draw_by_study
from pipeline.models.keyed_random import keyed_mask, mix_bits, row_keys
from tests.conftest import BERT, SWIN, run_python

KEYS = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, 64))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def seeds(keys=KEYS, layers=3):
    rows = Rows()
    rows.layers = layers
    rows.are(keys)
    return rows.seeds


def test_mixing_is_the_published_arithmetic():
    """In numpy's unsigned numbers: the finaliser of splitmix64, and one of 32 bits."""
    a = np.random.default_rng(1).integers(0, 2**64, 1000, dtype=np.uint64)
    x = (a ^ (a >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    assert np.array_equal(mix_bits(torch.from_numpy(a.view(np.int64))).numpy().view(np.uint64), x)
    b = a.astype(np.uint32)
    y = (b ^ (b >> np.uint32(16))) * np.uint32(0x7FEB352D)
    y = (y ^ (y >> np.uint32(15))) * np.uint32(0x846CA68B)
    y ^= y >> np.uint32(16)
    assert np.array_equal(mix_bits(torch.from_numpy(b.view(np.int32))).numpy().view(np.uint32), y)


@pytest.mark.parametrize("shape", [(60, 96), (4, 50, 50)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_met_and_values_are_independent(shape, rate):
    mask = keyed_mask(seeds()[0], shape, rate).double()
    assert mask.shape == (64, *shape)
    spread = (rate * (1 - rate)) ** 0.5
    z = (mask - rate) / spread
    n = z[0].numel()
    assert abs(z.mean()) < 4 / (64 * n) ** 0.5
    per_row = z.flatten(1).mean(1) * n**0.5  # of independent values: standard normal
    assert per_row.std() == pytest.approx(1, abs=0.35) and per_row.abs().max() < 4.5
    for axis in range(1, z.ndim):  # neighbours along each axis, and rows of the batch
        for step in (1, 2, 16):
            size = z.shape[axis]
            product = z.narrow(axis, step, size - step) * z.narrow(axis, 0, size - step) if size > step else z[:0]
            assert product.numel() == 0 or abs(product.mean()) < 4.5 / product.numel() ** 0.5
    between = (z.flatten(1) @ z.flatten(1).T / n).fill_diagonal_(0)
    assert between.abs().max() < 5 / n**0.5


@pytest.mark.parametrize("keys", [torch.arange(64), torch.arange(64) << 32, KEYS])
def test_rows_layers_samples_and_kinds_are_independent(keys):
    """Also where the keys are close to one another."""
    shape, masks = (40, 64), []
    for kind in (0, 1):
        for layer in seeds(row_keys(keys, kind, 2)):
            masks.append(keyed_mask(layer, shape, 0.5).flatten(1).double() * 2 - 1)
    rows = torch.cat(masks)  # 2 kinds x 3 layers x 128 rows
    between = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
    assert between.abs().max() < 6.2 / rows.shape[1] ** 0.5  # the largest of 294,528 pairs
    assert (between * rows.shape[1] ** 0.5).std() == pytest.approx(1, abs=0.02)


def test_a_mask_does_not_depend_on_batch_or_padding():
    whole = keyed_mask(seeds()[1], (4, 50, 50), 0.1)
    assert torch.equal(keyed_mask(seeds(KEYS[20:30])[1], (4, 30, 30), 0.1), whole[20:30, :, :30, :30])
    assert torch.equal(keyed_mask(seeds()[1], (50, 32), 0.1)[:, :7], keyed_mask(seeds()[1], (7, 32), 0.1))


def test_kept_values_are_scaled_and_whole_rows_go_together():
    rows = Rows()
    values, paths = StudyDropout(0.25, rows), StudyDropout(0.25, rows, whole_rows=True)
    rows.are(KEYS)
    x = torch.rand(64, 5, 8) + 1
    out = values(x)
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert kept.double().mean() == pytest.approx(0.75, abs=0.04)
    path = paths(x)
    kept = path.flatten(1).ne(0)
    assert set(kept.sum(1).tolist()) == {0, 40} and kept[:, 0].double().mean() == pytest.approx(0.75, abs=0.2)
    assert torch.equal(values(x), out)  # a second pass drops the same
    windows = x.repeat_interleave(3, dim=0)  # rows cut in parts draw for each part
    parts = values(windows).unflatten(0, (64, 3))
    assert not torch.equal(parts[:, 0] != 0, parts[:, 1] != 0)
    assert torch.equal(paths(windows).unflatten(0, (64, 3))[:, 0], path)
    values.eval()
    assert values(x) is x


def test_training_without_keys_is_an_error():
    rows = Rows()
    layer = StudyDropout(0.1, rows)
    rows.are(None)
    with pytest.raises(RuntimeError, match="keys of the rows"):
        layer(torch.ones(2, 3))


@pytest.mark.parametrize("kind", ["bert", "roformer"])
def test_evaluation_is_what_transformers_computes(kind):
    options = {**SIZES, "max_position_embeddings": 48, "model_type": kind}
    torch.manual_seed(0)
    plain = AutoModel.from_config(AutoConfig.for_model(vocab_size=30, **options)).eval()
    tower = TextTower(replace(BERT, args=options), 30, True).eval()
    tower.model.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.randint(1, 30, (4, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [3], [5], [8]])).long()
    expected = plain(input_ids=tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(tower(tokens, mask), expected[torch.arange(4), mask.sum(1) - 1])


def test_attention_of_bert_in_training_is_softmax_dropout_product():
    """Against numpy-like arithmetic written out, with the mask that the layer draws."""
    options = {**SIZES, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "model_type": "bert"}
    tower = TextTower(replace(BERT, args=options), 30, True).train()
    attention = tower.model.encoder.layer[0].attention.self
    seen = {}
    attention.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out[0]))
    tokens, mask = torch.randint(1, 30, (64, 9)), torch.ones(64, 9, dtype=torch.long)
    mask[:, 6:] = 0
    tower(tokens, mask, KEYS)
    q, k, v = (
        f(seen["x"]).view(64, 9, 2, 16).transpose(1, 2) for f in (attention.query, attention.key, attention.value)
    )
    weights = (q @ k.transpose(2, 3) / 4)[..., :6].softmax(-1)
    kept = ~keyed_mask(tower.rows.seeds[0], (2, 9, 9), 0.1)[..., :6]
    expected = (weights * kept / 0.9 @ v[:, :, :6]).transpose(1, 2).flatten(2)
    assert not kept.all()
    torch.testing.assert_close(seen["out"], expected)


@pytest.mark.parametrize("kind", ["bert", "roformer"])
def test_nothing_else_in_the_text_tower_is_random(kind):
    tower = TextTower(replace(BERT, args={**SIZES, "model_type": kind}), 30, True).train()
    assert tower.rows.layers == 1 + 3 * 2  # embeddings; attention and two outputs of each block
    tokens, mask = torch.randint(1, 30, (8, 9)), torch.ones(8, 9, dtype=torch.long)
    state = torch.get_rng_state()
    first, second, other = (tower(tokens, mask, keys) for keys in (KEYS[:8], KEYS[:8], KEYS[8:16]))
    assert torch.equal(first, second) and not torch.isclose(first, other).any(dim=1).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(tower(tokens[3:5], mask[3:5], KEYS[3:5]), first[3:5], atol=1e-6)


def test_nothing_else_in_the_image_tower_is_random():
    rates = {"drop_path_rate": 0.5, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1}
    tower = ImageTower(replace(SWIN, args={**SWIN.args, **rates}), 32, True).train()
    images = torch.randint(0, 256, (8, 32, 32), dtype=torch.uint8)
    state = torch.get_rng_state()
    first, second, other = (tower(images, keys) for keys in (KEYS[:8], KEYS[:8], KEYS[8:16]))
    assert torch.equal(first, second) and not torch.isclose(first, other).any(dim=1).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(tower(images[3:5], KEYS[3:5]), first[3:5], atol=1e-5)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"drop_rate": 0.2}, "drop_rate 0.2 cannot be drawn by study"),
        ({"drop_block_rate": 0.1}, "DropBlock2d cannot be drawn by study"),
    ],
)
def test_what_cannot_be_drawn_by_study_is_an_error(args, says):
    model = timm.create_model("resnet50", layers=[1] * 4, channels=[8] * 4, num_classes=0, **args)
    with pytest.raises(ParamsError, match=rf"model\.image_encoders: resnet50: {says}"):
        draw_by_study(model, "model.image_encoders: resnet50")


def test_a_rate_of_one_is_an_error():
    with pytest.raises(ParamsError, match=r"a dropout rate of 1\.0 is outside"):
        draw_by_study(nn.Sequential(nn.Dropout(1.0)), "x")


INTERPRETED = """
import torch
from pipeline.models.dropout_kernel import by_triton, keyed_dropout
from pipeline.models.keyed_random import keyed_mask, stream_seeds

torch.manual_seed(0)
seeds = stream_seeds(torch.randint(-2**62, 2**62, (6,)))
shapes = [(6, 33, 40), (6, 3, 17, 17), (24, 2, 16, 16), (6, 5), (12, 7, 3), (6, 8, 5, 5)]
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape in shapes:
        for whole in (False, True):
            x = torch.randn(shape).to(dtype)
            if whole and len(shape) == 4:
                x = x.to(memory_format=torch.channels_last)
            mine, theirs = keyed_dropout(x, seeds, 0.3, whole), by_triton(x, seeds, 0.3, whole)
            mask = keyed_mask(seeds, () if whole else (shape[0] // 6, *shape[1:]), 0.3)
            mask = mask.view(-1, *[1] * len(shape)) if whole else mask
            by_hand = (x.unflatten(0, (6, -1)).masked_fill(mask, 0) * (1 / (1 - 0.3))).flatten(0, 1)
            assert torch.equal(mine, by_hand), (dtype, shape, whole)
            assert torch.equal(theirs == 0, by_hand == 0), (dtype, shape, whole)
            close = dict(rtol=2**-7, atol=0) if dtype == torch.bfloat16 else dict(rtol=0, atol=0)
            torch.testing.assert_close(theirs, by_hand, **close)  # the interpreter cuts bfloat16 off, a GPU rounds
            assert theirs.stride() == x.stride()
x = torch.randn(6, 5, 7).transpose(1, 2)
theirs = by_triton(x, seeds.T.contiguous().T, 0.3, False)
assert torch.equal(theirs, keyed_dropout(x, seeds, 0.3, False)) and theirs.stride() == torch.empty_like(x).stride()
try:
    by_triton(torch.zeros(6, 1, 1, 1, 1, 1), seeds, 0.3, False)
except ValueError as error:
    print(error)
"""


def test_the_kernel_of_the_gpu_drops_what_the_cpu_drops():
    """In Triton's interpreter, which computes on the CPU what a GPU would."""
    said = run_python(INTERPRETED, TRITON_INTERPRET="1")
    assert said == "keyed dropout of rows with 6 dimensions; there are 4 at most\n"


def test_dropout_goes_back_as_it_came():
    x = torch.randn(64, 7, 5, requires_grad=True)
    drop = StudyDropout(0.4, rows := Rows()).train()
    rows.are(KEYS)
    y = drop(x)
    y.backward(torch.ones_like(y))
    kept = (~keyed_mask(rows.seeds[0], (1, 7, 5), 0.4)).flatten(0, 1)
    assert torch.equal(x.grad, kept * (1 / 0.6)) and torch.allclose(y, x * kept / 0.6)
    assert torch.autograd.gradcheck(drop, torch.randn(64, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("kind", "more"),
    [("bert", {}), ("bert", {"is_decoder": True}), ("modernbert", {"local_attention": 8, "num_hidden_layers": 3})],
)
def test_a_model_looks_where_its_own_attention_looks(kind, more):
    """To all tokens, to those before, or within a window; half of the texts are padded."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **more, "vocab_size": 50, "pad_token_id": 0})
    config._attn_implementation = "eager"
    model = AutoModel.from_config(config).eval()
    tokens, mask = torch.randint(1, 50, (4, 24)), torch.ones(4, 24, dtype=torch.int64)
    mask[::2, 15:] = 0
    with torch.no_grad():
        theirs = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        draw_by_study(model, "x")
        model.eval()
        ours = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-5)


def test_the_operation_is_what_torch_expects_of_one():
    x = torch.randn(64, 5, 6).transpose(1, 2).requires_grad_()
    torch.library.opcheck(keyed_dropout, (x, seeds()[0], 0.3, False))
    torch.library.opcheck(keyed_dropout, (torch.randn(64, 3, 4, 4), seeds()[0], 0.3, True))
