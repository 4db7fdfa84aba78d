"""One step of a tiny mixed model, of all studies or of a process's share of them."""

from types import SimpleNamespace

import numpy as np
import torch

from pipeline.config.run_config import RunConfig
from pipeline.models.masked_tokens import WordMask
from pipeline.models.mixed import MixedNet
from pipeline.training.batches import StudyDraw
from pipeline.training.distributed import Process
from pipeline.training.methods.mixed import MixedBatch, MixedMethod, collate_mixed
from pipeline.training.step import compute_gradients
from tests.conftest import make_mixed

WORDS = 50
SPECIAL = [0, 1, 2, 3, 4]
# Kinds of the studies of a batch: p a pair, i an image, t a text. Of two processes the second one has, for example, no
# pair in "one side", no image in "texts there", and nobody has a pair in "lone".
CASES = {
    "even": "ppppiitt",
    "one side": "pipipipi",
    "texts there": "ptptptpt",
    "three to one": "pipppiti",
    "lone": "iitititi",
    "one pair": "iiptiiti",
}


class Ids:
    """A tokenizer whose texts are numbers with spaces between them."""

    tokenizer = SimpleNamespace(all_special_ids=SPECIAL, mask_token_id=4)

    def __len__(self) -> int:
        return WORDS

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(text.split(), dtype=np.int64) for text in texts]


def samples(kinds: str, size: int = 32) -> list[StudyDraw]:
    """Draws of an image, a text of 3 to 12 tokens between 2 and 3, or both."""
    made = []
    for place, kind in enumerate(kinds):
        rng = np.random.default_rng([9, place])
        image, words = rng.integers(0, 256, (size, size), dtype=np.uint8), rng.integers(5, WORDS, rng.integers(3, 13))
        text = " ".join(map(str, [2, *words, 3]))
        key = int(rng.integers(2**62))
        made.append(StudyDraw([image] if kind != "t" else [], [text] if kind != "i" else [], place, key))
    return made


def batch_of(drawn: list[StudyDraw], rank: int = 0, world: int = 1) -> MixedBatch:
    return collate_mixed(drawn[rank::world], Ids(), 32, WordMask.of(Ids(), 0.4))


def model(**changes) -> MixedNet:
    torch.manual_seed(3)
    return MixedNet(make_mixed(**changes), WORDS).double().train()


def method_of(net: MixedNet, config: RunConfig, rank: int = 0, world: int = 1) -> MixedMethod:
    return MixedMethod(net, Ids(), config, Process(torch.device("cpu"), rank, world))


def step(
    batch: MixedBatch,
    rank: int = 0,
    world: int = 1,
    dtype: torch.dtype = torch.float64,
    precision: str = "fp32",
    **loss,
) -> dict[str, torch.Tensor]:
    """Loss, parts and gradients of one step, by name."""
    config = make_mixed(loss={"label_smoothing": 0.1, **loss}, train={"precision": precision})
    net = model().to(dtype)
    total, parts, _ = compute_gradients(method_of(net, config, rank, world), batch)
    got = {f"loss.{name}": value for name, value in {"total": total, **parts}.items()}
    return got | {f"grad.{name}": p.grad for name, p in net.named_parameters()}
