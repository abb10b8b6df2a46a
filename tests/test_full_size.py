"""The reference sizes without a GPU: fake CUDA tensors under autocast, and one real stage-1 step on the CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import helper
import trainer
from diffusion import make_diffusion
from hps import HPS_DIFFUSION, HPS_VQVAE
from loading.batches import Batch, Meta, SampleKey
from loading.mammograms import PhantomDataset
from trainer import DiffusionTrainer, VQVAETrainer, amp_dtype
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

CUDA = torch.device("cuda")


@pytest.fixture
def fake_cuda(monkeypatch):
    """Fake CUDA tensors on a machine without a driver; generators, which have no fake, give way to the global one."""
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(trainer, "seeded_generator", lambda *key, device=None: None)
    # the models are built on the device already, and a module of fake tensors cannot be moved
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
    with FakeTensorMode():
        yield


def fake_batch(channels: int, height: int, width: int) -> Batch:
    metas = [Meta(f"{i}.png", SampleKey(0, i, i)) for i in range(4)]
    images = torch.rand(2, 4, channels, height, width, device=CUDA)
    return Batch(images[0], images[1], metas, torch.full((4,), 0.2, device=CUDA))


def make(kind, *args, **kwargs):
    """A trainer on empty data; weights under `torch.device("cuda")` as a user's would be after `.to`."""
    empty = PhantomDataset(HPS_VQVAE["phantom"], "train")
    return kind("cbis-ddsm", *args, CUDA, empty, empty, amp=amp_dtype(CUDA, True), **kwargs)


def losses_stay_on_the_gpu(stage: DiffusionTrainer, batch: Batch) -> None:
    """Of either phase."""
    for epoch, words in ((0, {"loss"}), (stage.mean_epochs, {"loss", "l_simple"})):
        stage.epoch = epoch
        stage.model.variable.mean_model.requires_grad_(stage.trains_mean)
        with torch.autocast("cuda", stage.amp):
            result = stage.loss(batch)
        assert result.logs.keys() == words
        assert result.loss.device.type == "cuda" and result.loss.dtype == torch.float32 and result.loss.requires_grad


def test_stage_1_forward_and_loss_at_the_reference_size_stay_on_the_gpu(fake_cuda):
    hps = HPS_VQVAE["cbis-ddsm"]
    with CUDA:
        vqvae = VQVAE(**hps.arguments(VQVAE))
    stage = make(VQVAETrainer, hps, vqvae.train())
    batch = fake_batch(*hps.image_shape)
    with torch.autocast("cuda", stage.amp):
        result = stage.loss(batch)
    assert result.loss.device.type == "cuda" and result.loss.dtype == torch.float32 and result.loss.requires_grad
    assert vqvae.encode(batch.clean).shape == (4, 128, 256, 192)
    assert all(value.device.type == "cuda" for value in result.logs.values())


def test_stage_2_loss_at_the_reference_size_stays_on_the_gpu(fake_cuda):
    hps, hps_vqvae = HPS_DIFFUSION["cbis-ddsm"], HPS_VQVAE["cbis-ddsm"]
    with CUDA:
        first_stage = VQVAE2Wrapper(VQVAE(**hps_vqvae.arguments(VQVAE)))
        model = make_diffusion(hps)
    stage = make(DiffusionTrainer, hps, model.train(), first_stage=first_stage)
    losses_stay_on_the_gpu(stage, fake_batch(*hps.image_shape))
    cond = model.normalize(first_stage.encode(torch.rand(1, *hps.image_shape, device=CUDA)))
    with torch.no_grad():
        view = model.view(cond, torch.full((1,), 0.2, device=CUDA))
        prediction = model.predict(torch.randn_like(cond), torch.full((1,), 999, device=CUDA), view)
    assert prediction.x_start.shape == (1, 128, 256, 192) and prediction.eps.device.type == "cuda"


def test_the_model_in_the_box_trains_and_restores_on_the_gpu(fake_cuda):
    hps, hps_vqvae = HPS_DIFFUSION["mammogram"], HPS_VQVAE["mammogram"]
    with CUDA:
        first_stage = VQVAE2Wrapper(VQVAE(**hps_vqvae.arguments(VQVAE)))
        model = make_diffusion(hps)
    stage = make(DiffusionTrainer, hps, model.train(), first_stage=first_stage)
    batch = fake_batch(1, 96, 96)
    losses_stay_on_the_gpu(stage, batch)
    with torch.no_grad():
        view = model.view(model.normalize(first_stage.encode(batch.degraded, batch.noise)), batch.level)
        prediction = model.predict(torch.randn_like(view.mean), torch.full((4,), 999, device=CUDA), view)
        latent = model.variable.restored(prediction.x_start, view)
        image = first_stage.decode(model.denormalize(latent), noise=batch.noise)
    assert image.shape == (4, 1, 96, 96) and image.device.type == "cuda"


@pytest.mark.parametrize("kind", [VQVAETrainer, DiffusionTrainer])
def test_a_step_of_the_optimiser_never_waits_for_the_gpu(fake_cuda, kind):
    """Reading a fake tensor raises; gradients are given, for fake CUDA tensors have no backward pass."""
    hps, words = HPS_VQVAE["mammogram"], {}
    with CUDA:
        model = VQVAE(**hps.arguments(VQVAE))
        if kind is DiffusionTrainer:
            words["first_stage"], hps = VQVAE2Wrapper(model), HPS_DIFFUSION["mammogram"]
            model = make_diffusion(hps)
    stage = make(kind, hps, model.train(), **words)
    stage.after_step = lambda: None  # the EMA's copy of fake tensors belongs to another fake mode
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        stage.optimizer_step()
    assert stage.step == 2 and all(parameter.grad is None for parameter in model.parameters())
    state = stage.optimizer.state[next(p for p in model.parameters() if p.requires_grad)]
    assert state["exp_avg"].device.type == "cuda" and stage.optimizer.param_groups[0]["fused"]


def test_a_tensor_left_on_the_cpu_fails_the_dry_run(fake_cuda):
    hps = HPS_VQVAE["cbis-ddsm"]
    with CUDA:
        vqvae = VQVAE(**hps.arguments(VQVAE))
    vqvae.quantizers[4].codebook = vqvae.quantizers[4].codebook.cpu()
    with pytest.raises(RuntimeError, match="device"):
        make(VQVAETrainer, hps, vqvae.train()).loss(fake_batch(*hps.image_shape))


def test_one_real_stage_1_step_at_full_resolution():
    hps = HPS_VQVAE["cbis-ddsm"].updated(batch_size=1, warmup_steps=1)
    torch.manual_seed(0)
    data = PhantomDataset(HPS_VQVAE["phantom"].updated(image_shape=[1, 1024, 768], crop_size=0), "train")
    stage = VQVAETrainer("phantom", hps, VQVAE(**hps.arguments(VQVAE)), torch.device("cpu"), data, data)
    batch = data[0]
    stage.model.initialise_codebooks([batch.clean], helper.seeded_generator("codebooks"))
    stage.model.train()
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    result = stage.loss(batch)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    stage.optimizer_step()
    moved = [name for name, p in stage.model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.startswith("downs.0") for name in moved) and any(name.startswith("ups.0") for name in moved)
