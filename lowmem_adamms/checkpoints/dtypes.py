"""The only dtype table: the names safetensors uses, their size, and which of them can be blended.

The list of names is that of the safetensors format (safetensors 0.8, `Dtype` in tensor.rs).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FormatError


@dataclass(frozen=True, slots=True)
class DType:
    """One element type. `bits` is per element; `torch` the name without `torch.`, if it has one."""

    name: str
    bits: int
    torch: str | None = None
    blendable: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes per element of a blendable dtype."""
        return self.bits // 8

    def nbytes(self, elements: int) -> int:
        """Bytes of `elements` elements; FormatError where they do not fill the last byte."""
        bits = self.bits * elements
        if bits % 8:
            raise FormatError(f"{elements} elements of {self.name} do not fill whole bytes")
        return bits // 8


_TABLE = (
    DType("BF16", 16, "bfloat16", blendable=True),
    DType("F16", 16, "float16", blendable=True),
    DType("F32", 32, "float32", blendable=True),
    DType("F64", 64, "float64"),
    DType("C64", 64, "complex64"),
    DType("I64", 64, "int64"),
    DType("I32", 32, "int32"),
    DType("I16", 16, "int16"),
    DType("I8", 8, "int8"),
    DType("U64", 64, "uint64"),
    DType("U32", 32, "uint32"),
    DType("U16", 16, "uint16"),
    DType("U8", 8, "uint8"),
    DType("BOOL", 8, "bool"),
    DType("F8_E4M3", 8, "float8_e4m3fn"),
    DType("F8_E5M2", 8, "float8_e5m2"),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    DType("F8_E8M0", 8, "float8_e8m0fnu"),
    DType("F6_E2M3", 6),
    DType("F6_E3M2", 6),
    DType("F4", 4),
)
DTYPES = {dtype.name: dtype for dtype in _TABLE}
FROM_TORCH = {dtype.torch: dtype for dtype in _TABLE if dtype.torch}
