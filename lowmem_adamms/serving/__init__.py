"""The search's model inside vLLM: one engine that stays up for all alphas.

vllm_model    the engine, seen from the search: apply an alpha, answer prompts
vllm_worker   what runs inside vLLM's workers: blended tensors, handed to its own weight loaders
"""
