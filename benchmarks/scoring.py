"""How fast is scoring? Compares ways to compute ‖g_u‖² and g_u·g_S of a batch.

  python -m benchmarks.scoring

About 15 minutes on two cores, 8 GB of memory. The rivals: `pip install torch backpack-for-pytorch
opacus dattri-llm`; those that are not installed are left out.
Prints, for each model and batch size, a row for each contender: the median of its turns, its time
divided by that of `factored` (median and range over turns), and its peak memory without parameters
and images, in a new process whose program is compiled already. The contenders:

- factored: this library, all of the batch at a time;
- nnx: the same, of the network's twin in Flax NNX (vit_s has one);
- forward_backward: the gradient of the summed loss alone, in evaluation mode;
- vmap: `vmap(jax.grad)`, with 1 GiB of gradients at a time;
- torch_forward_backward: the same as forward_backward, if PyTorch is installed;
- torch_loop: a backward pass for one image after another;
- torch_vmap, backpack: `torch.func.vmap` of `grad`, and `BatchGrad` if BackPACK is installed, with
  1 GiB of gradients at a time;
- opacus, dattri_llm: ghost norms of these libraries, all of the batch at a time; ‖g_u‖² alone,
  without the product with g_S. Opacus has no BatchNorm and is given one in evaluation mode as a
  scale and a shift; dattri-llm has none.

vit_s is ViT-S/16 (width 384, 12 blocks) on images of 224×224; the others see 32×32. A contender
that takes its images in several parts is timed on one part (8 images in torch_loop; elsewhere 1 GiB
of gradients, 2 images of VGG-11 or 24 of ResNet-18), and the time is scaled to the batch; the
memory is that of one part. For fewer cores: `taskset -c 0 python -m benchmarks.scoring`.
"""

from absl import flags

from benchmarks import harness
from dynamical_jax.programs import binary

flags.adopt_module_key_flags(harness)

CONTENDERS = {
    "factored": "jax_contenders.factored",
    "nnx": "jax_contenders.nnx",
    "forward_backward": "jax_contenders.forward_backward",
    "vmap": "jax_contenders.vmap",
    "torch_forward_backward": "torch_contenders.forward_backward",
    "torch_loop": "torch_contenders.loop",
    "torch_vmap": "torch_contenders.vmap",
    "backpack": "torch_contenders.backpack",
    "opacus": "torch_contenders.opacus",
    "dattri_llm": "torch_contenders.dattri_llm",
}
BATCH_SIZES = {**harness.DEFAULT_BATCH_SIZES, "vit_s": (8,)}


def main(argv: list[str]) -> int | None:
    """Runs the comparison that the flags describe; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then compares the contenders for each model and batch size."""
    tasks, contenders, repetitions = harness.settings(CONTENDERS, BATCH_SIZES)
    report = harness.Report("scoring")
    print(report.head())
    with harness.worker_environment() as environment:
        for task in tasks:
            case = harness.compare(task, contenders, repetitions, environment)
            report.add(case)
            print("\n" + harness.table(case, "factored"), flush=True)
            rows = case["contenders"]
            if {"factored", "forward_backward"} <= set(rows):
                relative_time = harness.ratio(rows["factored"], rows["forward_backward"])
                print(f"  factored / forward_backward: {relative_time}")


if __name__ == "__main__":
    binary.launch(main)
