"""Checkpoints: where the bytes of every tensor lie, on this disk or on the Hub, and small reads.

dtypes              names and sizes of element types
safetensors_header  one file's header: parse, validate, build
span                a run of bytes in a file, and the tensor it stands for
coded               spans whose numbers are computed as they are read
arranged            elements of spans in another order
torch_bin           the spans of a torch `.bin` file, found without running its code
quantized           which tensors are quantized, and how they are computed
adapter             what a LoRA adapter adds to which matrix
weight_files        which files of a folder or repository hold the weights
checkpoint          a folder, file or Hub id opened as a whole
mapped_files        reading whole files in order, ahead of use
sampled_reads       small reads at any place
vocabulary          tokenizer files, and which rows of two embeddings hold the same token
"""
