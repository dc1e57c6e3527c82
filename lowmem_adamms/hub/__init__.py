"""The Hugging Face Hub: reading repositories, and uploading a merge.

client.py       how the Hub is asked: one retry, one table of errors, huggingface_hub's settings
remote_file.py  ranges of one file
repository.py   a repository at one commit: what it holds, small files, downloads
upload.py       a merged folder becomes one commit
"""
