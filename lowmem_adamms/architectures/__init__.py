"""Architectures: which role in the common decoder each tensor of a checkpoint has.

block        which part of a tensor holds a role
experts      what experts are called, and whose part of a stack is which expert's
respelling   names that files and transformers' modules spell differently
layout       what an architecture is, and a checkpoint's layout read with one
families/    the known architectures, as data
recognise    which of them a checkpoint is of
declaration  what a user's own may hold, as a pydantic model
declare      a user's own, read from TOML and written as such
"""
