"""Architectures: which role in the common decoder each tensor of a checkpoint has.

block        which part of a tensor holds a role
experts      what experts are called, and whose part of a stack is which expert's
respelling   names that files and transformers' modules spell differently
arch         what an architecture is, as data
names        the names under a prefix, and how well an architecture explains them
layout       a checkpoint read with an architecture
families/    the known architectures, as data
reader       a decoder under a given prefix, read with the one that explains most
structure    the language model of an unknown class
recognise    which of the known ones a checkpoint is of
declaration  what a user's own may hold, as a pydantic model
declare      a user's own, read from TOML and written as such
"""
