"""Flags that change no result: a directory may be continued with others."""

FLAGS = {
    "preset",
    "output_dir",
    "checkpoint_every",
    "chunk_size",
    "data_dir",
    "download",
    "cache_dir",
    "unreadable",  # What is left out is not of the data, whose version is compared.
}
