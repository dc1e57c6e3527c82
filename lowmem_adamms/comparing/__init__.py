"""Two checkpoints compared without merging them: how far apart, where, and whether related.

pairing     which tensors can be compared, and what only one side has
similarity  distance and cosine of paired tensors, from a sample of their elements
comparison  both checkpoints and the verdict: of one ancestor or not
table       a comparison on the terminal
page        a comparison as an HTML page
"""
