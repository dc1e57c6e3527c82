"""The one loop: run(plan, alpha, sink). A disk writer and a live model are both just sinks.

Output is produced in windows: consecutive pieces of consecutive tensors, at most WINDOW bytes,
blended by one kernel call per triple of dtypes and alpha (nearly always one: layers are larger than
windows). A window crosses tensor bounds, so that a layer's many small tensors cost one call, and a
tensor's bounds, so that a 1 GB embedding costs no more memory than a bias. While one window is
blended the pages of the next are brought in and the sink deals with the last. Leaves to others:
joining (`join.py`), arithmetic (`kernels/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoints.mapped_files import MappedFiles, read_ahead
from ..checkpoints.span import Span
from ..errors import RecipeError
from ..mapping.alphas import Alpha, alpha_of, resolve
from ..mapping.plan import Part, Plan, Step

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes
    from ..kernels.select import Kernel

WINDOW = 8 << 20
"""Bytes of output per window."""
LARGEST_ITEM = 4
"""Bytes of an F32 element: a window with less room left takes no more."""
AHEAD = 3
"""Windows whose pages are brought in before they are needed."""
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80}
_MAY_OVERFLOW = frozenset(
    (base, donor, out)
    for out, wider in (("F16", {"BF16", "F32"}), ("BF16", {"F32"}))
    for base in ("F16", "BF16", "F32")
    for donor in ("F16", "BF16", "F32")
    if {base, donor} & wider
)
"""Triples of dtypes of which a finite blend may be too large for the output's."""


class Source(Protocol):
    """Where the bytes of base and donor come from: `stream.Files`, or a device's memory."""

    def view(self, span: Span) -> Any:
        """A span's bytes, as the kernel takes them; valid until its window is done."""

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        """Calls, for any thread, that bring a span nearer before it is needed."""

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        """A call, for any thread, that lets go of a span, if there is anything to let go of."""


class Sink(Protocol):
    """Where results go. Calls come from one thread, in the order of the plan's steps."""

    def wants(self, step: Step) -> bool:
        """Whether the step is still to be done."""

    def copy(self, step: Step, offset: int, span: Span) -> None:
        """Take `span`'s bytes verbatim as those of the output tensor from byte `offset`."""

    def slot(self, step: Step, offset: int, nbytes: int) -> Bytes:
        """A writable buffer for bytes `offset` to `offset + nbytes` of the output tensor."""

    def commit(self) -> None:
        """All slots handed out since the last commit are filled."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one output tensor from byte `offset`; donor None means the base is cast.

    What is only cast has alpha 0: blended with itself at another it need not come out the same.
    """

    step: Step
    offset: int
    base: Span
    donor: Span | None
    nbytes: int
    alpha: float

    @property
    def spans(self) -> tuple[Span, ...]:
        """The input bytes it needs."""
        return (self.base, self.donor) if self.donor else (self.base,)

    @property
    def dtypes(self) -> tuple[str, str, str]:
        """Of base, donor and output."""
        donor = self.donor or self.base
        return self.base.dtype.name, donor.dtype.name, self.step.dtype.name


@dataclass(frozen=True, slots=True)
class Copy:
    """A stretch that is taken verbatim. Its pages are brought in, but evicted by the sink."""

    step: Step
    offset: int
    span: Span

    @property
    def spans(self) -> tuple[Span, ...]:
        """The input bytes it needs."""
        return (self.span,)

    @property
    def nbytes(self) -> int:
        """Bytes of output."""
        return self.span.nbytes


Window = list[Piece] | Copy


def run(
    plan: Plan,
    alpha: Alpha,
    sink: Sink,
    *,
    kernel: Kernel | None = None,
    source: Source | None = None,
    window: int | None = None,
    evict: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Carry out the plan into the sink, at one alpha or at one by layer or role.

    kernel: default is the CPU's; works on the buffers that source and sink give. source: default is
    the mapped files, for this run. window: bytes of output per kernel call, default WINDOW. evict:
    drop read pages from the page cache. progress: called with the bytes of output produced since
    the last call.
    """
    alpha = resolve(alpha, plan)
    if kernel is None:
        from ..kernels.select import select_kernel

        kernel, _ = select_kernel()
    with ExitStack() as stack:
        source = source or stack.enter_context(MappedFiles())
        # One reader a side: the kernel reads ahead well only where a file is read in order.
        *readers, releaser = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        windows = _windows(plan, alpha, sink, window or WINDOW)
        for todo in read_ahead(windows, _spans, source.prefetch, readers, AHEAD):
            if isinstance(todo, Copy):
                sink.copy(todo.step, todo.offset, todo.span)
            else:
                _blend(todo, sink, source, kernel)
            for piece in _pieces(todo):
                for span in piece.spans:
                    if let_go := source.release(span, evict=evict and isinstance(piece, Piece)):
                        releaser.submit(let_go)
            if progress:
                progress(sum(piece.nbytes for piece in _pieces(todo)))


def spans_in_order(plan: Plan, alpha: Alpha, sink: Sink, window: int) -> Iterator[list[Span]]:
    """The input spans of each window that `run` will ask for, in its order."""
    for todo in _windows(plan, alpha, sink, window):
        yield [span for piece in _pieces(todo) for span in piece.spans]


def _pieces(window: Window) -> Sequence[Piece | Copy]:
    return [window] if isinstance(window, Copy) else window


def _spans(window: Window) -> Iterator[tuple[Span, ...]]:
    return (piece.spans for piece in _pieces(window))


def _blend(window: list[Piece], sink: Sink, source: Source, kernel: Kernel) -> None:
    """One window: a slot for each piece, then one kernel call per triple of dtypes and alpha."""
    calls: dict[tuple[tuple[str, str, str], float], list[tuple[Bytes, Bytes, Bytes]]] = {}
    narrowed: list[tuple[Piece, tuple[Bytes, Bytes, Bytes]]] = []
    for piece in window:
        base = source.view(piece.base)
        donor = source.view(piece.donor) if piece.donor else base
        part = base, donor, sink.slot(piece.step, piece.offset, piece.nbytes)
        calls.setdefault((piece.dtypes, piece.alpha), []).append(part)
        if piece.dtypes in _MAY_OVERFLOW:
            narrowed.append((piece, part))
    for (dtypes, alpha), parts in calls.items():
        kernel(parts, dtypes, alpha)
    for piece, part in narrowed:
        _check_range(piece, part)
    sink.commit()


def _check_range(piece: Piece, part: tuple[Bytes, Bytes, Bytes]) -> None:
    """RecipeError if finite values became infinite, which no later pass could tell from the rest.

    On the host only: what a search tries on a device, a merge writes from the host.
    """
    import numpy as np

    from ..kernels import reference

    dtypes = piece.dtypes
    if not isinstance(part[2], np.ndarray):
        return
    base, donor, out = (
        buffer.view(reference.STORAGE[dtype]) for buffer, dtype in zip(part, dtypes, strict=True)
    )
    infinity = _INFINITY[dtypes[2]]
    # As signed and as unsigned numbers: two passes that need no memory, nearly always enough
    if not out.size or (out.view(np.int16).max() < infinity and out.max() < infinity | 0x8000):
        return
    found = np.flatnonzero((out & 0x7FFF) == infinity)
    sides = ((base, dtypes[0]), (donor, dtypes[1]))
    finite = (np.isfinite(reference.widen(side[found], dtype)) for side, dtype in sides)
    lost = int(np.logical_and(*finite).sum())
    if lost:
        largest, wider = {"F16": ("65504", "bf16 or fp32"), "BF16": ("3.39e38", "fp32")}[dtypes[2]]
        raise RecipeError(
            f"{piece.step.name}: {lost} or more values do not fit into {dtypes[2]}, whose largest"
            f" is {largest}, and would be written as infinite; choose --dtype {wider} and another"
            " -o"
        )


def _windows(plan: Plan, alpha: Alpha, sink: Sink, size: int) -> Iterator[Window]:
    """All the work the sink wants, in order: copies whole, everything else in windows."""
    window: list[Piece] = []
    room = size
    for step in plan.steps:
        if not sink.wants(step):
            continue
        offset = 0
        for part in step.parts:
            weight = alpha_of(alpha, part.role)
            base, donor = _sides(part, weight)
            if donor is None and base.dtype == step.dtype:
                if window:
                    yield window
                    window, room = [], size
                for start in range(base.start, base.stop, size):
                    stop = min(start + size, base.stop)
                    stretch = replace(base, start=start, stop=stop, shape=(stop - start,))
                    yield Copy(step, offset, stretch)
                    offset += stretch.nbytes
                continue
            nbytes = step.dtype.nbytes(base.elements)
            whole = Piece(step, offset, base, donor, nbytes, weight if donor else 0.0)
            for piece in _cut(whole, room, size):
                window.append(piece)
                room -= piece.nbytes
                offset += piece.nbytes
                if room < LARGEST_ITEM:
                    yield window
                    window, room = [], size
    if window:
        yield window


def _sides(part: Part, alpha: float) -> tuple[Span, Span | None]:
    """What a part is made of at this alpha: at 0 the base alone, at 1 the donor alone."""
    if part.donor is None or alpha == 0:
        return part.base, None
    return (part.donor, None) if alpha == 1 else (part.base, part.donor)


def _cut(whole: Piece, room: int, window: int) -> Iterator[Piece]:
    """A part in pieces: the first fills `room` bytes of output, the others a window each."""
    step, base, donor = whole.step, whole.base, whole.donor
    size = step.dtype.itemsize
    elements, done = whole.nbytes // size, 0
    while done < elements:
        take = min(elements - done, room // size)
        yield Piece(
            step,
            whole.offset + done * size,
            base.flat_slice(done, take),
            donor.flat_slice(done, take) if donor else None,
            take * size,
            whole.alpha,
        )
        done += take
        room = window
