"""The one loop, run(plan, alpha, sink): what writes a checkpoint also re-blends the live model.

Output is produced in windows: consecutive pieces of consecutive tensors, at most WINDOW bytes,
blended by one kernel call per triple of dtypes and alpha (nearly always one: layers are larger than
windows); a mixture's by one per tensor. A window crosses tensor bounds, so that a layer's many
small tensors cost one call, and cuts tensors, so that a 1 GB embedding costs no more memory than a
bias. While one window is blended the pages of the next are brought in and the sink deals with the
last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoints.arranged import Arranged, spans_begun, spans_ended, view_side
from ..checkpoints.coded import CodedSpan
from ..checkpoints.dtypes import DTYPES
from ..checkpoints.mapped_files import MappedFiles, read_ahead
from ..checkpoints.span import Span
from ..errors import RecipeError
from ..mapping.alphas import Alpha, alpha_of
from ..mapping.mixture import MixedPart, Mixture
from ..mapping.plan import Part, Plan, Step
from .mix import Mix, make_mix, mix_pieces
from .stretch import Blend, Copy

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes
    from ..kernels.select import Kernel

WINDOW = 8 << 20
"""Bytes of output per window."""
LARGEST_ITEM = 4
"""Bytes of an F32 element: a window with less room left takes no more."""
AHEAD = 3
"""Windows whose pages are brought in before they are needed."""
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
_LARGEST = {"F16": ("65504", "bf16 or fp32"), "BF16": ("3.39e38", "fp32")}
"""By output dtype: its largest value, and which dtypes hold larger ones."""
_MAY_OVERFLOW = frozenset(
    (base, donor, out)
    for out, wider in (("F16", {"BF16", "F32"}), ("BF16", {"F32"}))
    for base in ("F16", "BF16", "F32")
    for donor in ("F16", "BF16", "F32")
    if {base, donor} & wider
)
"""Triples of dtypes of which a finite blend may be too large for the output's."""


class Source(Protocol):
    """Where the bytes of base and donor come from: `MappedFiles`, the Hub or a device's memory."""

    def view(self, span: Span) -> Any:
        """A span's bytes, as the kernel takes them; valid until the call from `release` is made."""

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        """Calls, for any thread, that bring a span nearer before it is needed."""

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        """A call, for any thread, that lets go of a viewed span, if there is anything to let go of.

        The loop makes these calls in the order in which it asked for them.
        """


class Sink(Protocol):
    """Where results go. Calls come from one thread, in the order of the plan's steps."""

    def wants(self, step: Step) -> bool:
        """Whether the step is still to be done."""

    def copy(self, step: Step, offset: int, content: Any) -> Future[None] | None:
        """Take bytes verbatim as those of the output tensor from byte `offset`.

        Returns a future where `content` is read after the call: it is done when that has ended.
        """

    def slot(self, step: Step, offset: int, nbytes: int) -> Any:
        """A writable buffer for bytes `offset` to `offset + nbytes` of the output tensor."""

    def commit(self) -> None:
        """All slots handed out since the last commit are filled."""


Window = Sequence[Blend | Mix] | Copy


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
    nonfinite: Callable[[str, int], None] | None = None,
) -> None:
    """Carry out the plan into the sink.

    RecipeError if a blended value does not fit the output's dtype, FormatError if an input file is
    shorter than its header says.

    alpha: as `alphas.resolve` returns it. kernel: works on the buffers that source and sink give;
    default: the CPU's. source: where input bytes come from; default: the mapped files, for this
    run. window: bytes of output per kernel call. evict: drop pages from the page cache once they
    were read. progress: called with the bytes of output produced since the last call. nonfinite:
    called, on the host only, with a tensor's name and how many values of it, of those just blended,
    are NaN or infinite.
    """
    if kernel is None:
        from ..kernels.select import select_kernel

        kernel, _ = select_kernel()
    with ExitStack() as stack:
        source = source or stack.enter_context(MappedFiles())
        # One reader a side: the kernel reads ahead well only where a file is read in order.
        sides = max((len(part.sides) for _, part in plan.parts), default=2)
        *readers, releaser = (
            stack.enter_context(ThreadPoolExecutor(1)) for _ in range(max(2, sides) + 1)
        )
        windows = _cut_windows(plan, alpha, sink, window or WINDOW)
        for todo in read_ahead(windows, _spans, source.prefetch, readers, AHEAD):
            written = None
            if isinstance(todo, Copy):
                written = sink.copy(todo.step, todo.offset, source.view(todo.span))
            else:
                _blend_window(plan, todo, sink, source, kernel, nonfinite)
            pieces = _pieces(todo)
            for span in spans_ended(side for piece in pieces for side in piece.sides):
                if release := source.release(span, evict=evict):
                    releaser.submit(_release_after, written, release)
            if progress:
                progress(sum(piece.nbytes for piece in pieces))


def spans_in_order(plan: Plan, alpha: Alpha, sink: Sink, window: int) -> Iterator[list[Span]]:
    """The input spans of each window that `run` will ask for, in its order."""
    for todo in _cut_windows(plan, alpha, sink, window):
        yield spans_begun(side for piece in _pieces(todo) for side in piece.sides)


def _pieces(window: Window) -> Sequence[Blend | Mix | Copy]:
    return [window] if isinstance(window, Copy) else window


def _spans(window: Window) -> Iterator[list[Span]]:
    return (spans_begun(piece.sides) for piece in _pieces(window))


def _release_after(written: Future[None] | None, release: Callable[[], None]) -> None:
    """Let go of a span, once the sink does not read it any more."""
    if written is not None:
        wait([written])
    release()


def _blend_window(
    plan: Plan,
    window: Sequence[Blend | Mix],
    sink: Sink,
    source: Source,
    kernel: Kernel,
    nonfinite: Callable[[str, int], None] | None,
) -> None:
    """Fill a slot for each piece, with one kernel call per triple of dtypes and alpha."""
    calls: dict[tuple[tuple[str, str, str], float], list[tuple[Any, Any, Any]]] = {}
    mixed: list[tuple[Mix, Sequence[Any]]] = []
    checked: list[tuple[Blend | Mix, Sequence[Any]]] = []
    for piece in window:
        views = [view_side(side, source.view) for side in piece.sides]
        slot = sink.slot(piece.step, piece.offset, piece.nbytes)
        if isinstance(piece, Mix):
            mixed.append((piece, [*views, slot]))
            continue
        buffers = views[0], views[-1], slot  # what is only cast, with itself
        calls.setdefault((piece.dtypes, piece.alpha), []).append(buffers)
        if piece.dtypes in _MAY_OVERFLOW or (nonfinite and len(piece.sides) > 1):
            checked.append((piece, buffers))
    for (dtypes, alpha), parts in calls.items():
        kernel(parts, dtypes, alpha, plan.rounds_stochastically)
    mix_pieces(mixed)
    for done, content in (*checked, *mixed):
        count = _count_nonfinite(done, content)
        if count and nonfinite and (isinstance(done, Mix) or len(done.sides) > 1):
            nonfinite(done.step.name, count)
    sink.commit()


def _count_nonfinite(piece: Blend | Mix, buffers: Sequence[Bytes]) -> int:
    """How many values are NaN or infinite.

    RecipeError if finite ones became infinite, which no later pass could tell from the rest. On the
    host only: what a search tries on a device, a merge writes from the host.
    """
    import numpy as np

    from ..kernels import reference

    if not isinstance(buffers[-1], np.ndarray):
        return 0
    *inputs, out = (
        buffer.view(reference.STORAGE[dtype])
        for buffer, dtype in zip(buffers, piece.dtypes, strict=True)
    )
    *dtypes, out_dtype = piece.dtypes
    infinity, sign = _INFINITY[out_dtype], 1 << 8 * out.itemsize - 1
    # As signed and as unsigned numbers: two passes that need no memory, nearly always enough
    signed = out.view(f"i{out.itemsize}")
    if not out.size or (signed.max() < infinity and out.max() < infinity | sign):
        return 0
    places = np.flatnonzero((out & (sign - 1)) >= infinity)
    was_finite = np.logical_and.reduce(
        [
            np.isfinite(reference.widen(bits[places], dtype))
            for bits, dtype in zip(inputs, dtypes, strict=True)
        ]
    )
    if lost := int(was_finite.sum()):
        largest, wider = _LARGEST.get(out_dtype, ("3.40e38", "fp32"))
        raise RecipeError(
            f"{piece.step.name}: {lost} or more values do not fit into {out_dtype}, whose largest"
            f" is {largest}, and would be written as infinite; choose"
            f" `dtype` {wider} and another `out`"
        )
    return len(places)


def _cut_windows(plan: Plan, alpha: Alpha, sink: Sink, size: int) -> Iterator[Window]:
    """All the work the sink wants, in order: copies and blends, neither beyond `size` bytes."""
    window: list[Blend | Mix] = []
    free_bytes = size
    for step in plan.steps:
        if not sink.wants(step):
            continue
        offset = 0
        for part in step.parts:
            whole = choose_work(plan, step, offset, part, alpha)
            if isinstance(whole, Copy):
                if window:
                    yield window
                    window, free_bytes = [], size
                yield from _cut_copy(whole, size)
                offset += whole.nbytes
                continue
            share = _memory_share(whole)
            least = LARGEST_ITEM * share
            # What is arranged is put together at once if it can be
            if window and free_bytes < (whole.nbytes if whole.is_arranged else least):
                yield window
                window, free_bytes = [], size
            for piece in _cut_blend(whole, free_bytes // share, size // share):
                window.append(piece)
                free_bytes -= piece.nbytes * share
                if free_bytes < least:
                    yield window
                    window, free_bytes = [], size
            offset += whole.nbytes
    if window:
        yield window


def _memory_share(whole: Blend | Mix) -> int:
    """How much memory it takes, in bytes for each byte of output: what is computed counts too."""
    computed = [side.dtype.bits for side in whole.sides if isinstance(side, CodedSpan)]
    return 1 + -(-sum(computed) // whole.step.dtype.bits)


def choose_work(
    plan: Plan, step: Step, offset: int, part: Part, alpha: Alpha
) -> Blend | Mix | Copy:
    """What is to be done with a whole part."""
    sides: tuple[Span | Arranged, ...] = (part.base,)
    weight = 0.0
    if isinstance(plan, Mixture):
        if isinstance(part, MixedPart) and part.donor:
            shares = plan.shares(part, alpha)
            lone = plan.find_lone(part, shares)
            if lone is None:
                return make_mix(plan, step, offset, part, shares)
            sides = (lone,)
    else:
        assert not isinstance(alpha, tuple)
        weight = alpha_of(alpha, part.role)
        sides = _sides(part, weight)
    nbytes = step.dtype.nbytes(part.base.elements)
    if len(sides) > 1:
        return Blend(step, offset, nbytes, sides, weight)
    if _is_stored(sides[0]) and sides[0].dtype == step.dtype:
        return Copy(step, offset, nbytes, sides)
    return Blend(step, offset, nbytes, sides, 0.0)


def _is_stored(side: Span | Arranged) -> bool:
    """Whether its bytes are in a file as they are wanted."""
    return isinstance(side, Span) and not isinstance(side, CodedSpan)


def _sides(part: Part, alpha: float) -> tuple[Span | Arranged, ...]:
    """What a part is made of at this alpha: at 0 the base alone, at 1 the donor alone."""
    if part.donor is None or alpha == 0:
        return (part.base,)
    return (part.donor,) if alpha == 1 else (part.base, part.donor)


def _cut_copy(whole: Copy, size: int) -> Iterator[Copy]:
    """A copied part in pieces of `size` bytes."""
    span = whole.span
    for start in range(span.start, span.stop, size):
        stop = min(start + size, span.stop)
        stretch = Span(span.path, DTYPES["U8"], start, stop, (stop - start,))
        yield Copy(whole.step, whole.offset + start - span.start, stretch.nbytes, (stretch,))


def _cut_blend(whole: Blend | Mix, first_bytes: int, size: int) -> Iterator[Blend | Mix]:
    """A blended part in pieces: the first of `first_bytes` of output, the others of `size`."""
    itemsize = whole.step.dtype.itemsize
    elements, done = whole.nbytes // itemsize, 0
    while done < elements:
        count = min(elements - done, first_bytes // itemsize)
        yield whole.cut(done, count)
        done += count
        first_bytes = size
