"""Training samples a second of the loader at the reference size, against the steps that an H100 could take at most.

Nothing is measured on a GPU: its time is computed as the longest of what FLOPs and memory traffic take.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from rates import parser, prepare, seconds

from files.cache import PreparedCache
from files.prepared import Record
from helper import format_table
from hps import HPS_DIFFUSION, HPS_VQVAE, HParams
from loading.batches import make_loader
from loading.mammograms import RecordDataset
from preprocessing.phantom import generate_phantom
from running.command_line import positive_int
from running.distributed import worker_count
from running.scripts import run_script
from vqvae import VQVAE

H100_FLOPS, H100_BYTES = (
    989e12,
    3.35e12,
)  # dense bfloat16 tensor cores, HBM3, a second (NVIDIA's data sheet of the SXM card)
UTILISATION = 0.4  # of the FLOPs, in convolutions and products: more is seldom seen
BANDWIDTH = 0.8  # of the data sheet's, as benchmarks/plan.py assumes it
UNET_FLOPS = 4 * 3.31e12  # a checkpointed sample of the posterior mean, the quicker phase; benchmarks/unet.py counts it
HPS = HPS_VQVAE["cbis-ddsm"]


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, of two bytes a number as under autocast; views are free."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [v for v in (*args, *(out if isinstance(out, (tuple, list)) else [out])) if isinstance(v, Tensor)]
            self.bytes += sum(2 * v.numel() for v in tensors)
        return out


def gpu_samples() -> dict[str, tuple[float, float]]:
    """Most samples a second that an H100 could train, by stage: at all of its bandwidth, and at `BANDWIDTH` of it."""
    model = VQVAE(**HPS.arguments(VQVAE)).train()
    image = torch.rand(1, *HPS.image_shape)
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        output = model(image)
        (nn.functional.mse_loss(output.reconstruction, image) + output.commitment_loss).backward()
    compute, memory = flops.get_total_flops() / (UTILISATION * H100_FLOPS), traffic.bytes / H100_BYTES
    print(
        f"stage 1 on an H100, a sample: {flops.get_total_flops() / 1e12:.2f} TFLOP, {compute * 1e3:.2f} ms; "
        f"{traffic.bytes / 1e9:.1f} GB of traffic, {memory * 1e3:.2f} ms"
    )
    return {
        "stage 1": (1 / max(compute, memory), 1 / max(compute, memory / BANDWIDTH)),
        "stage 2": (UTILISATION * H100_FLOPS / UNET_FLOPS,) * 2,  # of its products alone
    }


def loader_samples(records: list[Record], hps: HParams, cache: PreparedCache, workers: int, count: int) -> float:
    """Samples a second of a training loader over prepared images, from its second epoch on."""
    data = RecordDataset([records[i % len(records)] for i in range(count)], hps, "train", cache=cache)
    loader = make_loader(data, hps.batch_size, shuffle=True, workers=workers)
    for _ in loader:  # starts the workers
        pass

    def epoch() -> None:
        for _ in loader:
            pass

    return count / seconds(epoch)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--count", type=positive_int, default=64, help="samples of an epoch (default: 64)")
    args = arguments.parse_args()
    prepare(args)
    torch.set_num_threads(1)  # as in a worker
    workers = 0 if args.busy else worker_count(HPS.nb_workers)  # a worker's processor time does not count as this one's
    stages = {"stage 1": HPS.updated(degrade_on_device=True), "stage 2": HPS_DIFFUSION["cbis-ddsm"]}
    stages["stage 2, degrade_on_device"] = stages["stage 2"].updated(degrade_on_device=True)
    limits = gpu_samples()
    rows = []
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as name:
        root, records = Path(name), []
        for i in range(4):
            pixels = (generate_phantom(0, i, tuple(HPS.image_shape)).image[0] * 255).byte().numpy()
            Image.fromarray(pixels).save(root / f"{i}.png")
            records.append(Record(path=root / f"{i}.png", key=f"{i}.png", patient=str(i)))
        cache = PreparedCache(root / "cache", HPS.image_shape)
        cache.build(records, progress=False)
        for stage, hps in stages.items():
            own = sorted(loader_samples(records, hps, cache, workers, args.count) for _ in range(args.rounds))
            own = own[len(own) // 2]
            at_four = own / max(1, workers) * HPS.nb_workers
            row = [stage, f"{own:.0f}", f"{at_four:.0f}"]
            for needed in limits[stage.partition(",")[0]]:
                row += [f"{needed:.0f}", f"{at_four / needed:.2f}"]
            rows.append(row)
    header = ("", "samples/s", f"at {HPS.nb_workers} workers", "H100 at most", "ratio")
    print(format_table((*header, f"at {BANDWIDTH} of its bandwidth", "ratio"), rows))
    print(
        f"{workers or 'no'} workers, and from them what {HPS.nb_workers} on as many cores load; prepared images of "
        f"{HPS.image_shape[1]} x {HPS.image_shape[2]} in the system's file cache; the GPU never waits where the ratio is above 1"
    )


if __name__ == "__main__":
    run_script(main)
