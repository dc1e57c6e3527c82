"""The live model: loaded once, its language weights re-blended in place at any alpha.

The loop is the one that writes checkpoints, so that what is evaluated is what would be written, bit
for bit. Base values come from the base's own files, never from the live parameters: nothing drifts.
Leaves to others: where things fit (`placement.py`), transformers' names (`loading.py`), bytes on a
card (`device.py`), answers (`generate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..checkpoints.dtypes import DTYPES, parse_dtype
from ..checkpoints.mapped_files import MappedFiles
from ..checkpoints.span import Span
from ..closing import Closing
from ..errors import FormatError, PlacementError
from ..mapping import kinship
from ..mapping.alphas import Alpha, resolve
from ..mapping.plan import Plan
from ..merging.loop import Source, run
from ..merging.sources import download
from . import device_source as device
from . import transformers_model as loading
from .free_memory import measure
from .live_sink import LiveSink, bytes_of
from .placement import Placement, Quantize, place

if TYPE_CHECKING:
    from ..prompts import Prompt
    from .draft_decoding import Settings
    from .prompt_encoder import Encoder

CHUNK = 16 << 20
"""Bytes compared at a time when the loaded parameters are checked against the files."""


class LiveModel(Closing):
    """A plan's base, loaded once through transformers, at whatever alpha was applied last.

    plan: from `make_plan`. device: "cpu" or "cuda"; quantize: "nf4", "int8" (bitsandbytes) or
    "none"; dtype: a name such as "bf16". What is None is decided by `placement.place` from the
    memory there is. force: load also what looks unrelated. processor: the base's, if it was read
    before. `model` is the transformers module, `vision` the names of its parameters outside the
    decoder, `alpha` the last one applied.
    Raises PlacementError, FormatError, MappingError or RecipeError before anything is loaded, and
    FormatError if what transformers loaded is not what the files hold.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: str | None = None,
        dtype: str | None = None,
        quantize: Quantize | Literal["none"] | None = None,
        trust_remote_code: bool = False,
        placement: Placement | None = None,
        force: bool = False,
        processor: Any = None,
    ) -> None:
        if not force:
            kinship.check(plan)
        download(plan)
        spoken = parse_dtype(dtype).name if dtype else plan.options["dtype"]
        self.plan, self.trust_remote_code = plan, trust_remote_code
        self.placement = placement or place(
            plan, measure(), device=device, quantize=quantize, dtype=spoken
        )
        self.alpha: Alpha | None = 0.0
        self._processor = processor
        self._encoder: Encoder | None = None
        self._answerer: Any = None
        self.model = self._load(spoken)
        self._files = MappedFiles(keep=self.placement.sources_stay)
        try:
            self._source, self._kernel = self._backend()
            self._sink, self.vision = self._join()
        except BaseException:
            self._files.close()
            raise

    def _load(self, dtype: str | None) -> Any:
        """The base as transformers loads it, where the placement says; dtype None: as on disk."""
        base, where = self.plan.base, self.placement
        if base.folder is None:
            raise FormatError(f"{base.path}: a bare file cannot be run; give its folder")
        if where.device == "cuda" and not torch.cuda.is_available():
            # --vram may plan for any card; to load on it, torch must see one
            raise PlacementError(
                "the model was placed on a CUDA card, but torch sees none; --vram 0 does without,"
                " or install a torch build for CUDA and its driver"
            )
        return loading.load_model(
            base.folder,
            device=where.device,
            dtype=(DTYPES[dtype].torch if dtype else None) or "auto",
            quantize=where.quantize,
            trust_remote_code=self.trust_remote_code,
        )

    def _join(self) -> tuple[LiveSink, frozenset[str]]:
        """The way into the parameters, checked against the files, and the vision side's names."""
        base, layout = self.plan.base, self.plan.base_layout
        groups, ignored = loading.join(self.model, list(base.tensors))
        check_loaded(self.model, self.plan, groups, self._files)
        vision = frozenset(group.target for group in groups if group.names[0] in layout.kinds)
        return LiveSink(self.model, self.plan, groups, ignored, self._source), vision

    def apply(self, alpha: Alpha, progress: Callable[[int], None] | None = None) -> None:
        """Blend base and donor into the loaded parameters, at one alpha or at one by layer."""
        alpha = resolve(alpha, self.plan)
        self.alpha = None
        self._sink.forget()  # what an interrupted apply left
        run(
            self.plan,
            alpha,
            self._sink,
            kernel=self._kernel,
            source=self._source,
            window=device.WINDOW,
            progress=progress,
        )
        if self.placement.device == "cuda":
            torch.cuda.synchronize()
        self.alpha = alpha

    @property
    def encoder(self) -> Encoder:
        """Prompts to this model's inputs; one for its lifetime, as it remembers what it encoded."""
        from .prompt_encoder import Encoder

        if self._encoder is None:
            self._encoder = Encoder(
                self.model,
                self.plan.base.path,
                processor=self._processor,
                trust_remote_code=self.trust_remote_code,
            )
        return self._encoder

    def generate(
        self, prompts: Sequence[Prompt | str], settings: Settings | None = None
    ) -> list[str]:
        """Greedy answers at the alpha applied last, one per prompt, in their order."""
        from .answerer import Answerer

        if self._answerer is None or (settings and settings != self._answerer.settings):
            self._answerer = Answerer(self, settings)
        answers: list[str] = self._answerer(prompts)
        return answers

    def close(self) -> None:
        """Unmap the files and drop the model."""
        self._sink.close()
        self._files.close()
        self.model = self._encoder = self._answerer = None

    def _backend(self) -> tuple[Source, Any]:
        """Source and kernel for where the model lies."""
        if self.placement.device == "cpu":
            from ..kernels.select import select_kernel

            return self._files, select_kernel(self.plan.dtypes)[0]
        from ..kernels import gpu

        where = self.placement.device
        source = device.DeviceSource(self.plan, self._files, self.placement, where)
        return source, gpu.select_kernel(where, self.plan.dtypes)[0]


def check_loaded(
    model: Any, plan: Plan, groups: Sequence[loading.Group], files: MappedFiles
) -> None:
    """Every parameter equals its bytes on disk, after transformers' own conversion, or FormatError.

    This proves that the join is right; a checkpoint that lacks a parameter is found here as well.
    """
    state = loading.state_of(model)
    covered: set[int] = set()
    for group in groups:
        spans = [plan.base.tensors[name] for name in group.names]
        param = state[group.target]
        if group.converter is None and not loading.is_quantized(param):
            same = _same(param, spans[0], files)
            covered.add(param.data_ptr())
        else:
            tensors = [_tensor(span, files).to(param.device) for span in spans]
            made = loading.convert(group, tensors, model)
            same = all(loading.equals(model, name, value) for name, value in made.items())
            covered |= {state[name].data_ptr() for name in made}
        if not same:
            raise FormatError(
                f"{plan.base.path}: {group.names[0]} is not what transformers loaded into"
                f" {group.target}; this version of transformers may read it differently"
            )
    for name, param in model.named_parameters():
        if param.data_ptr() not in covered:
            raise FormatError(
                f"{plan.base.path}: holds no weights for {name} of {type(model).__name__};"
                " its answers would be random"
            )
    _check_tied(plan, groups, state)


def _check_tied(plan: Plan, groups: Sequence[loading.Group], state: Mapping[str, Any]) -> None:
    """What the plan leaves out as tied must be: transformers keeps a head that differs on disk."""
    written = {step.name for step in plan.steps}
    kept = {state[group.target].data_ptr() for group in groups if written & set(group.names)}
    for group in groups:
        if not written & set(group.names) and state[group.target].data_ptr() not in kept:
            raise FormatError(
                f"{plan.base.path}: config.json ties {group.names[0]} to the embedding, but the two"
                " differ on disk; say tie_word_embeddings: false there to keep both"
            )


def _same(param: torch.Tensor, span: Span, files: MappedFiles) -> bool:
    """Whether a parameter holds a span's numbers, cast to its dtype, compared chunk by chunk."""
    if tuple(param.shape) != span.shape:
        return False
    flat = param.detach().reshape(-1)
    start = 0
    for piece in _chunks(span):
        values = _tensor(piece, files).to(param.device).to(param.dtype)
        if not torch.equal(bytes_of(flat[start : start + len(values)]), bytes_of(values)):
            return False
        start += len(values)
        if let_go := files.release(piece, evict=False):
            let_go()
    return True


def _chunks(span: Span) -> Iterator[Span]:
    count = CHUNK // span.dtype.itemsize
    for first in range(0, span.elements, count):
        yield span.flat_slice(first, min(count, span.elements - first))


def _tensor(span: Span, files: MappedFiles) -> torch.Tensor:
    """A span of a mapped file as a torch tensor over the same memory."""
    dtype = device.torch_dtype(span.dtype)
    return device.as_tensor(files.view(span)).view(dtype).view(span.shape)
