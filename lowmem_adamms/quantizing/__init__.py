"""Outputs that bitsandbytes quantized, as transformers would save them.

quantized_layout  which tensors are quantized, and the tensors that each becomes
quantizing_sink   the stage between loop and disk that quantizes
quantization      how the output of a plan is quantized; handed to the writer of a merge
"""
