"""The search for alpha: where do the answers change least?

Files, in reading order:
- answer_text.py: when two answers are the same, and when one is no answer
- sentence_distance.py: how far two answers lie apart in meaning
- scoring.py: answers by alpha, their differences, D, and the best alpha
- resampling.py: how sure D and the choice are
- notes.py: what weakens a choice, in words
- search.py: `search`, which asks, and `choose`, for answers that exist already
- session.py: answers from one live model, recorded as they come
- recorded_answers.py: answers that other tools recorded
"""
