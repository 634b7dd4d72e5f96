"""Weight formats, and how weights are rounded to them and packed for the kernels."""

from gemma2.quantization.packed_model import PACKED_FORMATS, SECOND_PLANE, PackedModel, packed_shapes

__all__ = ["PACKED_FORMATS", "SECOND_PLANE", "PackedModel", "packed_shapes"]
