"""From a plan and an alpha to bytes: in a checkpoint folder, or in a live model.

sources        which inputs lie on the Hub, and having them in the cache
ring_buffer    memory for what is fetched ahead
range_source   inputs streamed from the Hub
first_pass     what a method must know of a tensor before it mixes it
stretch        a stretch of one output tensor and what goes into it
mix            a stretch of several models, and how it is mixed
loop           run(plan, alpha, sink), with the protocols of source and sink
shard_layout   which tensors each output file holds, and where
shard_file     one output file while it is written
journal        what a killed merge or search has done
disk_sink      where the loop's windows go: output files, written in threads
output_folder  whether it is usable, durable files, the move to final names
model_card     README.md, adamms.json and config.json of the output
writer         the merge itself
replacing      a new merge in the place of a complete one
verify         whether a merged folder is what it says
"""
