"""The search for alpha: where is the model surest, or where do its answers change least?

answer_text       when two answers are the same, and when one is no answer
measures          what the score D of an alpha is
scoring           answers by alpha, their differences, D, and the best alpha
resampling        how sure D and the choice are
verdict           whether to merge at all
notes             what weakens a choice, in words
search            `search`, which asks, and `choose`, for answers that exist already
in_turn           the search over several donors, one after the other
session           answers from one live model, recorded as they come
session_of_plan   the session of a plan: its model, and the journal of its answers
recorded_answers  the answers of an earlier search
"""
