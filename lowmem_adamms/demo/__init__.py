"""The embedded pair: two small trained multimodal models of one ancestor, and questions for them.

pair  the pair as it lies here, and writing it to a folder
exam  questions whose answers are known, and how many a model answers right

`base` (Qwen2-VL) was tuned on colours, shapes, counts and sums, `donor` (LLaVA-OneVision) on
charts, counts, places and first letters; `bench/zoo/` trained both. `prompts.jsonl` has questions
without answers, for the search; `eval.jsonl` has others with them, to judge the result.
"""
