"""Flags that change no result: a run may be continued with other values of them."""

FLAGS = {
    "preset",
    "output_dir",
    "checkpoint_every",
    "workers",  # A share of the cores: where a sum is rounded otherwise, the rounds are compared.
    "num_devices",
    "distributed",
    "coordinator_address",
    "num_processes",
    "process_id",
    "ray_address",
    "cpus_per_run",
    "gpus_per_run",
    "chunk_size",
    "redundancy",  # Adds to the records, and changes nothing else in them.
    "data_dir",
    "download",
    "cache_dir",
    "unreadable",  # Files that are left out change the version of the data, which is compared.
}
