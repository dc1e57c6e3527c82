"""One loaded model at any alpha: where it goes, its parameters, prompts in, answers out.

free_memory         how much RAM and card memory is free
cpu_4bit            what bitsandbytes cannot run on a CPU
model_size          how large a model is in memory
placement           where the model and the weights it is blended from are
placement_text      the same in words
placing             where they go
search_time         how long a search would take
transformers_model  loading through transformers, and its parameters
conversions         which tensors on disk become which parameters
load_check          that the loaded parameters are those of the files
device_source       base and donor bytes on a card
live_sink           where the loop's output enters the parameters
held_weights        the base loaded whole, re-blended in place
decoder_layers      the base loaded without its decoder layers, and where their tensors belong
layer_turnstile     batches that share each reading of a layer
streamed_layers     two buffers that layers are blended into as they run
vocabulary_table    embedding and head, of which only rows in use are blended
streamed_weights    the base of which only two layers are in memory
processor           a checkpoint's processor or tokenizer
prompt_encoder      prompts to model inputs
vision_cache        vision features, computed once
draft_decoding      greedy decoding of one batch that verifies drafts first
answerer            answers to a prompt set
live_model          all of it as one object, `LiveModel`
"""
