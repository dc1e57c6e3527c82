"""The live sink: one loaded model, whose language weights are re-blended in place at any alpha.

The loop is the one that writes checkpoints, so that what is evaluated is what would be written, bit
for bit. Base values come from the base's own files, never from the live parameters: nothing drifts.
Leaves to others: where things fit (`placement.py`), transformers' names (`loading.py`), bytes on a
card (`device.py`), answers (`generate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import device, kinship, loading
from .checkpoint import Span
from .dtypes import DTYPES, from_user
from .errors import FormatError, MappingError, PlacementError
from .merge import Source, check_alpha, run
from .placement import Placement, measure, place
from .plan import Plan, Step
from .stream import Files

if TYPE_CHECKING:
    from .generate import Settings
    from .prompts import Prompt

CHUNK = 16 << 20
"""Bytes compared at a time when the loaded parameters are checked against the files."""


class LiveModel:
    """A plan's base, loaded once through transformers, at whatever alpha was applied last.

    plan: from `make_plan`. device: "cpu" or "cuda"; quantize: "nf4", "int8" (bitsandbytes) or
    "none"; dtype: a name such as "bf16". What is None is decided by `placement.place` from the
    memory there is. force: load also what looks unrelated. `model` is the transformers module,
    `vision` the names of its parameters outside the decoder, `alpha` the last one applied.
    Raises PlacementError, FormatError, MappingError or RecipeError before anything is loaded, and
    FormatError if what transformers loaded is not what the files hold.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: str | None = None,
        dtype: str | None = None,
        quantize: Any = None,
        trust_remote_code: bool = False,
        placement: Placement | None = None,
        force: bool = False,
    ) -> None:
        if not force:
            kinship.check(plan)
        self.plan = plan
        spoken = from_user(dtype).name if dtype else plan.options["dtype"]
        self.placement = placement or place(
            plan, measure(), device=device, quantize=quantize, dtype=spoken
        )
        folder = plan.base.folder
        if folder is None:
            raise FormatError(f"{plan.base.path}: a bare file cannot be run; give its folder")
        if self.placement.device == "cuda" and not torch.cuda.is_available():
            # --vram may plan for any card; to load on it, torch must see one
            raise PlacementError(
                "the model was placed on a CUDA card, but torch sees none; --vram 0 does without,"
                " or install a torch build for CUDA and its driver"
            )
        self.model = loading.load_model(
            folder,
            device=self.placement.device,
            dtype=(DTYPES[spoken].torch if spoken else None) or "auto",
            quantize=self.placement.quantize,
            trust_remote_code=trust_remote_code,
        )
        self.trust_remote_code = trust_remote_code
        self.alpha: float | None = 0.0
        self._answerer: Any = None
        self._files = Files(keep=self.placement.sources_stay)
        try:
            self._source, self._kernel, self._window = self._backend()
            groups, ignored = loading.join(self.model, list(plan.base.tensors))
            check_loaded(self.model, plan, groups, self._files)
            kinds = plan.base_layout.kinds
            self.vision = frozenset(group.target for group in groups if group.names[0] in kinds)
            self._sink = LiveSink(self.model, plan, groups, ignored, self._source)
        except BaseException:
            self._files.close()
            raise

    def apply(self, alpha: float, progress: Callable[[int], None] | None = None) -> None:
        """Blend base and donor at `alpha` into the loaded parameters."""
        alpha = check_alpha(alpha)
        self.alpha = None
        self._sink.forget()  # what an interrupted apply left
        run(
            self.plan,
            alpha,
            self._sink,
            kernel=self._kernel,
            source=self._source,
            window=self._window,
            progress=progress,
        )
        if self.placement.device == "cuda":
            torch.cuda.synchronize()
        self.alpha = alpha

    def generate(
        self, prompts: Sequence[Prompt | str], settings: Settings | None = None
    ) -> list[str]:
        """Greedy answers at the alpha applied last, one per prompt, in their order."""
        from .generate import Answerer

        if self._answerer is None or (settings and settings != self._answerer.settings):
            self._answerer = Answerer(self, settings)
        answers: list[str] = self._answerer(prompts)
        return answers

    def close(self) -> None:
        """Unmap the files and drop the model."""
        self._sink.close()
        self._files.close()
        self.model = self._answerer = None

    def __enter__(self) -> LiveModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _backend(self) -> tuple[Source, Any, int]:
        """Source, kernel and window for where the model lies."""
        if self.placement.device == "cpu":
            from .kernels.select import select

            return self._files, select(self.plan.dtypes)[0], device.WINDOW
        from .kernels import gpu

        where = self.placement.device
        source = device.DeviceSource(self.plan, self._files, self.placement, where)
        return source, gpu.kernel(where, self.plan.dtypes)[0], device.WINDOW


class LiveSink:
    """Windows go where the parameters lie: into their memory, or by way of a staging buffer."""

    def __init__(
        self,
        model: Any,
        plan: Plan,
        groups: Sequence[loading.Group],
        ignored: Sequence[str],
        source: Source,
    ) -> None:
        self._source = source
        self._host = isinstance(source, Files)
        self._touched: list[_Target] = []
        self._targets: dict[str, _Target] = {}
        steps = {step.name: step for step in plan.steps}
        merged = {name for name, step in steps.items() if step.action == "interpolate"}
        if lost := merged & set(ignored):
            raise MappingError(
                f"{plan.base.path}: transformers does not load {sorted(lost)[0]} into"
                f" {type(model).__name__}; what it would say cannot be searched"
            )
        for group in groups:
            if merged & set(group.names):
                self._add(model, group, steps)

    def wants(self, step: Step) -> bool:
        """Whether the live model holds the step and alpha changes it."""
        return step.name in self._targets

    def copy(self, step: Step, offset: int, span: Span) -> None:
        """Bytes that are the base's or the donor's as they are."""
        slot = self.slot(step, offset, span.nbytes)
        slot[...] = self._source.view(span)
        self.commit()

    def slot(self, step: Step, offset: int, nbytes: int) -> Any:
        """Bytes of a parameter, or of a staging buffer on the same device."""
        target = self._targets[step.name]
        self._touched.append(target)
        return self._view(target.slot(step.name, offset, nbytes))

    def commit(self) -> None:
        """Hand on what was staged."""
        for target in self._touched:
            target.flush()
        self._touched = []

    def forget(self) -> None:
        """Drop what was staged and not committed."""
        for target in self._targets.values():
            target.forget()
        self._touched = []

    def close(self) -> None:
        """Let go of the parameters."""
        self._targets, self._touched = {}, []

    def _view(self, buffer: torch.Tensor) -> Any:
        """What the kernel works on: numpy on the host, torch on a device."""
        return buffer.numpy() if self._host else buffer

    def _add(self, model: Any, group: loading.Group, steps: dict[str, Step]) -> None:
        param = model.get_parameter(group.target)
        if any(param.data_ptr() == other.param.data_ptr() for other in self._targets.values()):
            # Embedding and head, equal on disk: what is written separately may come to differ.
            loading.untie(model, group.target)
            param = model.get_parameter(group.target)
        members = [steps[name] for name in group.names]
        target: _Target
        if group.converter is not None or loading.is_quantized(param) or not param.is_contiguous():
            target = _Whole(model, group, members, param)
        elif _torch_dtype(members[0]) == param.dtype:
            target = _InPlace(param)
        else:
            target = _Cast(param, _torch_dtype(members[0]))
        self._targets |= dict.fromkeys(group.names, target)


class _Target(Protocol):
    """Where one group's bytes go."""

    param: torch.Tensor

    def slot(self, name: str, offset: int, nbytes: int) -> torch.Tensor: ...
    def flush(self) -> None: ...
    def forget(self) -> None: ...


class _InPlace:
    """The parameter's own memory: it has the dtype that is written."""

    def __init__(self, param: torch.Tensor) -> None:
        self.param, self._loaded = param, param.detach()
        self._bytes = bytes_of(param)

    def slot(self, name: str, offset: int, nbytes: int) -> torch.Tensor:
        return self._bytes[offset : offset + nbytes]

    def flush(self) -> None:
        _restore(self.param, self._loaded)

    def forget(self) -> None:
        pass


class _Cast:
    """A parameter of another dtype than is written: cast window by window, as a loader would."""

    def __init__(self, param: torch.Tensor, dtype: torch.dtype) -> None:
        self.param, self._loaded, self._dtype = param, param.detach(), dtype
        self._flat = self._loaded.view(-1)
        self._staged: list[tuple[int, torch.Tensor]] = []

    def slot(self, name: str, offset: int, nbytes: int) -> torch.Tensor:
        buffer = self._flat.new_empty(nbytes, dtype=torch.uint8)
        self._staged.append((offset // self._dtype.itemsize, buffer))
        return buffer

    def flush(self) -> None:
        for start, buffer in self._staged:
            values = buffer.view(self._dtype)
            self._flat[start : start + len(values)].copy_(values)
        self._staged = []
        _restore(self.param, self._loaded)

    def forget(self) -> None:
        self._staged = []


class _Whole:
    """Tensors that transformers converts, or bitsandbytes quantizes, when all of them are there."""

    def __init__(
        self, model: Any, group: loading.Group, members: Sequence[Step], param: torch.Tensor
    ) -> None:
        self.param = param
        self._model, self._group, self._members = model, group, members
        self._device = param.device
        self._staged: dict[str, torch.Tensor] = {}
        self._missing = 0
        self.forget()

    def slot(self, name: str, offset: int, nbytes: int) -> torch.Tensor:
        if name not in self._staged:
            size = next(step.nbytes for step in self._members if step.name == name)
            self._staged[name] = self.param.new_empty(size, dtype=torch.uint8, device=self._device)
        self._missing -= nbytes
        return self._staged[name][offset : offset + nbytes]

    def flush(self) -> None:
        if self._missing or not self._staged:
            return
        tensors = [
            self._staged[step.name].view(_torch_dtype(step)).view(step.shape)
            for step in self._members
        ]
        self.forget()
        for name, value in loading.convert(self._group, tensors, self._model).items():
            loading.assign(self._model, name, value)

    def forget(self) -> None:
        self._staged = {}
        self._missing = sum(step.nbytes for step in self._members)


def _restore(param: torch.Tensor, loaded: torch.Tensor) -> None:
    """Give a parameter its memory back: a forward pass of bitsandbytes puts cast biases aside."""
    if param.data_ptr() != loaded.data_ptr():
        param.data = loaded


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as flat bytes."""
    return tensor.detach().view(-1).view(torch.uint8)


def check_loaded(model: Any, plan: Plan, groups: Sequence[loading.Group], files: Files) -> None:
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


def _same(param: torch.Tensor, span: Span, files: Files) -> bool:
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
        if let_go := files.behind(piece, evict=False):
            let_go()
    return True


def _chunks(span: Span) -> Iterator[Span]:
    size = span.dtype.itemsize
    for start in range(span.start, span.stop, CHUNK):
        stop = min(start + CHUNK, span.stop)
        yield replace(span, start=start, stop=stop, shape=((stop - start) // size,))


def _tensor(span: Span, files: Files) -> torch.Tensor:
    """A span of a mapped file as a torch tensor over the same memory."""
    dtype: torch.dtype = getattr(torch, span.dtype.torch or "")
    return device.as_tensor(files.view(span)).view(dtype).view(span.shape)


def _torch_dtype(step: Step) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, step.dtype.torch or "")
    return dtype
