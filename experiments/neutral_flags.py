"""Flags that change no result: a run may be continued with other values of them."""

FLAGS = {
    "preset",
    "output_dir",
    "checkpoint_every",
    "chunk_size",
    "data_dir",
    "download",
    "cache_dir",
    "unreadable",  # Files that are left out change the version of the data, which is compared.
}
