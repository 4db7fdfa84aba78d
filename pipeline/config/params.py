"""params.yaml as typed, frozen, validated records; an unknown or ill-typed key is one clear error that names it."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.config.archive_params import Audit, Ingest, Phantom, Source
from pipeline.config.records import (
    MANY,
    RECORD,
    Count,
    Decay,
    Flag,
    Inside,
    Insides,
    LessThanAll,
    Limits,
    Name,
    NameOrNone,
    Names,
    Number,
    Part,
    Pixels,
    Positive,
    Ranks,
    Scales,
    Seed,
    Seeds,
    Share,
    Texts,
    Weight,
    Whole,
)

ADAPTERS = ("cxr_clip", "gloria", "medclip", "biovil", "chexzero", "open_clip", "hf_clip")  # of pipeline/adapters


Deviation = Annotated[Number, Field(ge=0.001, le=10)]  # of grey in [0, 1]


@dataclass(frozen=True, config=RECORD)
class PromptFiles:
    """The file of training templates, and another one for runs that say ``prompts: ablation``."""

    file: str
    ablation: str = "pipeline/text/prompts_gloria.yaml"


@dataclass(frozen=True, config=RECORD)
class BackTranslation:
    """Reports said in other words by two MarianMT models, before training (paper section 4.2).

    ``forward`` and ``back`` are hub names or local folders; both empty: no back-translation.
    """

    forward: str = ""  # from English into another language, such as Helsinki-NLP/opus-mt-en-it
    back: str = ""  # and from that into English, such as Helsinki-NLP/opus-mt-it-en
    beams: Annotated[Whole, Field(ge=2, le=100)] = 5
    temperature: Annotated[Number, Field(gt=0, le=100)] = 1.5
    max_tokens: Annotated[Whole, Field(ge=8, le=MANY)] = 128  # of a sentence; longer ones are cut at words
    batch_size: Positive = 32  # sentences of a text translated at a time
    workers: Positive = 1  # processes, which take turns on the CUDA devices
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, config=RECORD)
class Sampling:
    """What one draw from a study is (paper section 3.1)."""

    unit: Literal["study", "image"] = "study"
    negatives: Annotated[Whole, Field(ge=1, le=14)] = 3  # a study without any positive must say something


@dataclass(frozen=True, config=RECORD)
class Augment:
    """Image and text augmentation (paper section 4.2)."""

    image: Flag = True
    crop_scale: Scales = (0.8, 1.1)  # of the area; a crop larger than the image is the whole of it
    clahe: Share = 0.5
    brightness: Share = 0.1
    contrast: Share = 0.2
    text: Flag = True
    text_method: Literal["swap", "eda"] = "swap"  # what ``text`` does; see ``pipeline.training.sampling.draw_texts``


@dataclass(frozen=True, config=RECORD)
class ImageEncoder:
    """A timm model: its name, where its first weights come from, mean and deviation that its three input channels are
    normalised with (of grey in [0, 1]; ImageNet's unless given), and extra arguments."""

    name: str
    pretrained: Flag = True  # whether hub weights are loaded
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    args: dict[str, Any] = field(default_factory=dict)
    weights: str = ""  # in place of pretrained: a file of its weights, or a folder with one; their names are timm's


@dataclass(frozen=True, config=RECORD)
class TextEncoder:
    """A BERT: by hub name or local folder, or (``name`` empty) a small one with a tokenizer trained on the corpus."""

    name: str = ""
    vocabulary: Count = 2000  # pieces of words, if the tokenizer is trained
    args: dict[str, Any] = field(default_factory=dict)
    max_tokens: Annotated[Whole, Field(ge=3, le=1 << 16)] = 256  # of a text, begin and end included


@dataclass(frozen=True, config=RECORD)
class MixedModel:
    """The one transformer of mixed runs (``pipeline.models.mixed``): image tokens of ``scales`` scales and words.

    A token of scale k covers patch * 2**k pixels a side. ``mask_ratio`` of the coarsest scale's cells are hidden.
    """

    patch: Annotated[Whole, Field(ge=2, le=1024)] = 14
    scales: Annotated[Whole, Field(ge=1, le=8)] = 3
    width: Annotated[Whole, Field(ge=4, le=MANY)] = 768
    layers: Annotated[Whole, Field(ge=1, le=1000)] = 12
    heads: Annotated[Whole, Field(ge=1, le=1000)] = 12
    mask_ratio: Inside = 0.5


@dataclass(frozen=True, config=RECORD)
class Model:
    """Both encoders and the shared space; ``mixed``: what takes the encoders' place in mixed runs."""

    image_encoders: dict[Name, ImageEncoder]
    text_encoder: TextEncoder
    dim: Annotated[Whole, Field(ge=1, le=1 << 16)] = 512
    temperature: Annotated[Number, Field(gt=0, le=MANY)] = 0.07  # before training; the cosines are divided by it
    image_size: Pixels = 224
    mixed: MixedModel = field(default_factory=MixedModel)


@dataclass(frozen=True, config=RECORD)
class Loss:
    """A method: the weight of each term, and what the terms look at. The defaults are CXR-CLIP (paper section 3.3).

    ``scale_limits`` bound 1 / temperature, the factor on the cosines, in training (``model.temperature`` is its start).

    ``pipeline.training.losses`` computes the contrastive terms, ``pipeline.training.methods`` those of DeCLIP and of
    mixed runs; a table of methods is in docs/training.md.
    """

    mvs: Flag = True  # image-text term over all four pairs, else over the first alone
    mvs_weight: Weight = 1.0
    icl_weight: Weight = 1.0
    tcl_weight: Weight = 0.5
    nn_weight: Weight = 0.0
    simsiam_weight: Weight = 0.0
    mlm_weight: Weight = 0.0
    label_positives: Flag = False  # studies with the same labels are one another's positives in the image-text term
    label_smoothing: LessThanAll = 0.0
    scale_limits: Limits = (0.0, 100.0)  # of 1 / temperature
    queue: Positive = 65536  # texts among which nn looks for the nearest
    mlm_rate: Annotated[Number, Field(ge=0.01, le=0.99)] = 0.15  # of the tokens
    regeneration_weight: Weight = 0.0  # hidden regions of an image, at every scale (mixed runs)
    alignment_weight: Weight = 0.0  # image and text of a pair, each by itself (mixed runs)


@dataclass(frozen=True, config=RECORD)
class Train:
    """Optimisation (paper section 4.2)."""

    launcher: str = "python"
    epochs: Positive = 15
    batch_size: Annotated[Whole, Field(ge=2, le=MANY)] = 128
    micro_batch: Count = 0  # studies of a process whose activations are held at a time; 0 = all
    length_groups: Annotated[Whole, Field(ge=1, le=64)] = 4  # texts of a batch are padded to the longest of their group
    compile: Flag = False
    lr: Part = 5e-5
    weight_decay: Decay = 1e-4
    warmup_epochs: Weight = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count = 0  # of torch on CPU, which round otherwise when they are more; 0 = one a core
    workers: Count = 0
    shuffle_pairs: Flag = False
    patience: Count = 0  # epochs without a better validation loss that end a training; 0 = none do
    save_minutes: Weight = 10.0  # between savings of the training state; it is saved after each epoch, too
    timeout_minutes: Annotated[Number, Field(ge=0.05, le=MANY)] = 10.0  # of silence that end the training


@dataclass(frozen=True, config=RECORD)
class Run:
    """One training: what it uses, and the keys it sets otherwise than the sections do.

    In params.yaml a run may be ``like`` another one and name its differences alone; ``load`` fills in the rest.

    A run of CXR-CLIP names ``image_encoder`` and ``datasets``; a mixed run its sources by role instead, and
    ``datasets`` is then all of them.
    """

    image_encoder: NameOrNone = ""
    datasets: Names = ()
    paired: Names = ()
    images: Names = ()
    texts: Names = ()
    paired_fraction: Share = 1.0  # of the pairs that stay whole; of another one image and text are used apart
    like: NameOrNone = ""
    prompts: Literal["file", "ablation"] = "file"  # which one of Prompts its captions are made with
    sampling: dict[str, Any] = field(default_factory=dict)
    augment: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mixed and not self.datasets:
            object.__setattr__(self, "datasets", (*self.paired, *self.images, *self.texts))

    @property
    def mixed(self) -> bool:
        """Whether it names sources by role."""
        return bool(self.paired or self.images or self.texts)


@dataclass(frozen=True, config=RECORD)
class Other:
    """Somebody else's trained model, evaluated beside the runs (docs/models.md)."""

    adapter: str  # a module of pipeline/adapters
    weights: str  # the folder of its files; it must exist, and may hold none of them
    model: str  # its name in the tables, and so its backbone and data
    backbone: str = ""
    data: str = ""
    trained_on: Names = ()  # the data sets among ours: what its clean test images are clean of


@dataclass(frozen=True, config=RECORD)
class FineTune:
    """Fine-tuning of the whole image encoder on labels: of which runs, on which shares, and the recipe."""

    runs: Names = ()
    shares: dict[Name, Part] = field(default_factory=dict)
    epochs: dict[Name, Positive] = field(default_factory=dict)
    lr: Part = 5e-5
    weight_decay: Decay = 1e-4
    batch_size: Positive = 64


@dataclass(frozen=True, config=RECORD)
class FewShot:
    """Linear probe: shares of the training set by label, and the recipe."""

    shares: dict[Name, Part]
    epochs: dict[Name, Positive]
    subset: Literal["stratified", "random"] = "stratified"  # random: one draw that looks at no label
    seeds: Seeds = (0,)  # a repetition each, with its own subset; metrics are their means
    lr: Part = 5e-5
    weight_decay: Decay = 1e-4
    batch_size: Positive = 256
    draws: Positive = 30  # augmentation draws of an image that the probe's epochs see in turn
    fine_tune: FineTune = field(default_factory=FineTune)


@dataclass(frozen=True, config=RECORD)
class Official:
    """Classification on ChestX-ray14's official test list: of which runs, and at which shares of ``FewShot``, linear or
    fine-tuned."""

    runs: Names = ()
    shares: Names = ()


@dataclass(frozen=True, config=RECORD)
class Bootstrap:
    """Resamples of the test set and the confidence of the interval."""

    samples: Positive = 1000
    confidence: Inside = 0.95


@dataclass(frozen=True, config=RECORD)
class Retrieval:
    """The K of R@K."""

    k: Ranks = (1, 5, 10)


@dataclass(frozen=True, config=RECORD)
class Regeneration:
    """Hidden regions of test images guessed again: by which mixed runs, and at which shares of hidden cells."""

    runs: Names = ()
    ratios: Insides = (0.25, 0.5, 0.75)
    images: Count = 0  # at most so many of a test set; 0 = all


@dataclass(frozen=True, config=RECORD)
class Evaluate:
    """Everything after training."""

    few_shot: FewShot
    protocols: Texts = ("paper", "paper_prompts")  # names, or paths of files; tables show the first
    official: Official = field(default_factory=Official)
    regeneration: Regeneration = field(default_factory=Regeneration)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    retrieval: Retrieval = field(default_factory=Retrieval)
    batch_size: Positive = 256
    threads: Count = 0  # of torch on CPU, which round otherwise when they are more; 0 = one a core


@dataclass(frozen=True, config=RECORD)
class Report:
    """What the page may show."""

    show_patient_data: Flag = False


@dataclass(frozen=True, config=RECORD)
class Tracking:
    """MLflow."""

    enabled: Flag = True


@dataclass(frozen=True, config=RECORD)
class Params:
    """The whole of params.yaml. ``seeds``: of trainings, each added to ``seed``; every run is trained with each."""

    seed: Seed
    sources: dict[Name, Source]
    phantom: Phantom
    ingest: Ingest
    prompts: PromptFiles
    sampling: Sampling
    augment: Augment
    model: Model
    loss: Loss
    train: Train
    runs: dict[Name, Run]
    main: Names
    ablations: Names
    control: NameOrNone
    evaluate: Evaluate
    audit: Audit = field(default_factory=Audit)
    back_translation: BackTranslation = field(default_factory=BackTranslation)
    seeds: Seeds = (0,)
    prompt_ablations: Names = ()
    compositions: Names = ()
    others: dict[Name, Other] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    tracking: Tracking = field(default_factory=Tracking)
