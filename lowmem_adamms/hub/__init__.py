"""The Hugging Face Hub: reading repositories, and uploading a merge.

client       how the Hub is asked: one retry, one table of errors, huggingface_hub's settings
remote_file  ranges of one file
repository   a repository at one commit: what it holds, small files, downloads
upload       a merged folder becomes one commit
"""
