"""Codebooks against hand-computed steps, and the hierarchy around them."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import vqvae
from hps import HPS_VQVAE
from vqvae import VQVAE, Codebooks, VectorQuantizer, perplexity
from vqvae2_wrapper import VQVAE2Wrapper

SMALL = dict(hidden_channels=16, res_channels=4, nb_levels=2, scaling_rates=(2, 2), embed_dim=8, nb_entries=16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(x):
    """(N, D, H, W) as a list of all its vectors, (N * H * W, D)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def learn(books, x, chosen=None, generator=None):
    """Quantise (N, D, H, W) vectors by the first of some codebooks, which learns from them; what it said, and their usage."""
    weight = torch.ones(len(x)) if chosen is None else chosen.float()
    result = books[0](x, weight)
    return result, books.learn([x], [result.indices], weight, books.draws(generator))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def trained():
    """A small VQ-VAE in evaluation mode after a few steps and with codebooks from data, and a batch of odd size."""
    model = VQVAE(**SMALL)
    images = torch.rand(4, 1, 18, 14)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(images, torch.tensor([True, False, True, False])).reconstruction.square().mean().backward()
        optimizer.step()
    model.initialise_codebooks([images], seeded())
    return model.eval(), images


def test_every_vector_goes_to_its_nearest_entry():
    quantizer = VectorQuantizer(40, 5)
    x = torch.randn(3, 5, 6, 7)
    distances = torch.cdist(rows_of(x).double(), quantizer.codebook.double())
    result = quantizer(x, torch.ones(3))
    assert torch.equal(result.indices.flatten(), distances.argmin(1))
    assert torch.allclose(rows_of(result.code), quantizer.codebook[distances.argmin(1)], atol=1e-6)


def test_lookup_does_not_depend_on_how_many_rows_it_holds(monkeypatch):
    quantizer = VectorQuantizer(40, 5)
    vectors = torch.randn(100, 5)
    whole = quantizer.lookup(vectors)
    monkeypatch.setattr(vqvae, "LOOKUP_ROWS", 7)
    assert torch.equal(quantizer.lookup(vectors), whole)


def test_lookup_at_full_width_equals_the_argmin_of_all_distances_in_several_chunks():
    quantizer = VectorQuantizer(512, 64)
    vectors = torch.randn(2 * vqvae.LOOKUP_ROWS + 100, 64)
    distances = torch.cdist(vectors.double(), quantizer.codebook.double())
    indices = quantizer.lookup(vectors)
    # entries that are as near as single precision can tell may stand for one another
    own, least = distances.gather(1, indices[:, None])[:, 0], distances.min(1).values
    assert (own - least).max() < 1e-5
    assert (indices == distances.argmin(1)).float().mean() > 0.999


@pytest.mark.parametrize("entries", [512, 40, 7])  # in blocks of 32, of 8, of one
def test_of_equally_near_entries_the_first_is_taken_and_a_vector_that_is_no_number_gets_one(entries):
    quantizer = VectorQuantizer(entries, 3)
    # small whole numbers: distances are exact, and many are equal
    quantizer.codebook.copy_(torch.randint(-2, 3, (entries, 3)))
    vectors = torch.randint(-2, 3, (5000, 3)).float()
    distances = (vectors.double()[:, None] - quantizer.codebook.double()).square().sum(2)
    assert (distances == distances.min(1, keepdim=True).values).sum(1).max() > 1
    assert torch.equal(quantizer.lookup(vectors), distances.argmin(1))
    vectors[::3, 1] = math.nan
    indices = quantizer.lookup(vectors)
    assert indices.min() >= 0 and indices.max() < entries
    assert torch.equal(indices[1::3], distances[1::3].argmin(1))
    assert quantizer.lookup(vectors[:0]).shape == (0,)


def test_ema_step_equals_one_computed_by_hand():
    quantizer = VectorQuantizer(3, 2)
    entries = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, -5.0]])
    counts = torch.tensor([2.0, 1.0, 1e-5])  # as rare as the third entry is, Laplace smoothing halves it
    quantizer.codebook.copy_(entries)
    quantizer.ema_count.copy_(counts)
    quantizer.ema_sum.copy_(entries * counts[:, None])
    x = torch.tensor([[0.2, 0.4], [-0.4, 0.0], [1.5, 0.9], [0.3, 0.0]]).t().reshape(1, 2, 2, 2)
    learn(Codebooks([quantizer], decay=0.9, revive_threshold=0), x)
    expected_counts = torch.tensor([0.9 * 2 + 0.1 * 3, 0.9 * 1 + 0.1 * 1, 0.9e-5])
    expected_sums = torch.tensor([[0.1 * 0.1, 0.1 * 0.4], [0.9 + 0.15, 0.9 + 0.09], [4.5e-5, -4.5e-5]])
    total = 2.1 + 1.0 + 0.9e-5
    smoothed = (expected_counts + 1e-5) / (total + 3e-5) * total
    assert torch.allclose(quantizer.ema_count, expected_counts, rtol=1e-5)
    assert torch.allclose(quantizer.ema_sum, expected_sums, rtol=1e-5)
    assert torch.allclose(quantizer.codebook, expected_sums / smoothed[:, None], rtol=1e-5)


def test_samples_past_the_quantiser_keep_their_values_and_touch_no_statistics():
    mixed, alone = (Codebooks([VectorQuantizer(10, 4)]) for _ in range(2))
    alone.load_state_dict(mixed.state_dict())
    x = torch.randn(4, 4, 5, 5)
    chosen = torch.tensor([True, False, True, False])
    result, usage = learn(mixed, x, chosen, seeded())
    only, usage_alone = learn(alone, x[chosen], None, seeded())
    assert torch.equal(result.code[~chosen], x[~chosen])
    assert torch.equal(result.code[chosen], only.code)
    assert torch.allclose(result.error[chosen], only.error)
    assert torch.equal(usage, usage_alone)
    for name, value in mixed.state_dict().items():
        assert torch.allclose(value, alone.state_dict()[name], atol=1e-6), name


def test_a_batch_of_which_nothing_is_quantised_leaves_the_entries_where_they_are():
    books = Codebooks([VectorQuantizer(10, 4)])
    before = books[0].codebook.clone()
    _, usage = learn(books, torch.randn(2, 4, 5, 5), torch.zeros(2, dtype=torch.bool))
    assert torch.allclose(books[0].codebook, before, atol=1e-6)
    assert perplexity(usage) == 1
    assert VQVAE(**SMALL)(torch.rand(2, 1, 8, 8), torch.zeros(2)).commitment_loss == 0


@pytest.mark.parametrize("poisoned", [None, 0, 1, 2])
def test_all_levels_learn_at_once_what_each_would_alone(poisoned):
    """Also if one of them is not finite, which then stands still; in evaluation all do."""
    books = Codebooks([VectorQuantizer(20, 4) for _ in range(3)], decay=0.7, revive_threshold=0.9)
    alone = copy.deepcopy(books)
    x = [torch.randn(2, 4, side, side + 1) for side in (8, 4, 2)]
    if poisoned is not None:
        x[poisoned][0, 1, 1, 1] = math.nan
    weight, draws = torch.tensor([1.0, 0.0]), books.draws(seeded())
    indices = [book(each, weight).indices for book, each in zip(books, x, strict=True)]
    before = copy.deepcopy(books.state_dict())
    usage = books.eval().learn(x, indices, weight, draws)
    assert all(torch.equal(value, before[name]) for name, value in books.state_dict().items())
    assert not books.train().learn(x, indices, torch.zeros(2), draws).any()  # of no sample nothing is learnt
    assert all(torch.equal(value, before[name]) for name, value in books.state_dict().items())
    assert torch.equal(usage, books.learn(x, indices, weight, draws))
    for level, book in enumerate(alone):
        own = Codebooks([book], decay=0.7, revive_threshold=0.9)
        assert torch.equal(own.learn([x[level]], [indices[level]], weight, draws[level : level + 1])[0], usage[level])
        changed = (books[level].codebook - before[f"{level}.codebook"]).abs().amax(1) > 0
        assert changed.any() == (level != poisoned)
        for name, value in book.state_dict().items():
            assert torch.allclose(books[level].state_dict()[name], value, atol=1e-6), (level, name)


def test_gradient_passes_straight_through():
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    weight = torch.randn(2, 4, 3, 3)
    code = VectorQuantizer(10, 4)(x, torch.ones(2)).code
    assert torch.equal(torch.autograd.grad((code * weight).sum(), x)[0], weight)


def test_commitment_loss_is_the_mean_squared_distance_to_the_entry():
    quantizer = VectorQuantizer(2, 2)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    x = torch.tensor([[1.0, 2.0], [9.0, 10.0], [50.0, 50.0]])[:, :, None, None].requires_grad_()
    weight = torch.tensor([1.0, 1.0, 0.0])
    error = quantizer(x, weight).error
    assert error.tolist() == [(1 + 4) / 2, (1 + 0) / 2, 40**2]
    loss = (error * weight).sum() / 2
    # d/dz of ||z - e||^2 / (2 * 2): the entry gets no gradient, and a sample past the quantiser no loss
    expected = torch.tensor([[0.5, 1.0], [-0.5, 0.0], [0.0, 0.0]])
    assert torch.allclose(torch.autograd.grad(loss, x)[0].flatten(1), expected)


@pytest.mark.parametrize(
    ("counts", "expected"), [([3.0] * 8, 8), ([5.0, 0.0, 0.0], 1), ([1.0, 1.0, 2.0], 2**1.5), ([0.0, 0.0], 1)]
)
def test_perplexity_is_the_exponential_of_the_entropy(counts, expected):
    assert perplexity(torch.tensor(counts)).item() == pytest.approx(expected, rel=1e-5)


def test_revival_reseeds_exactly_the_rarely_used_entries_from_quantised_samples():
    entries = torch.tensor([[0.0, 0.0], [4.0, 0.0], [50.0, 0.0], [0.0, 4.0], [4.0, 4.0], [0.0, 50.0]])
    counts = torch.tensor([4.0, 4.0, 0.2, 4.0, 0.6, 0.1])
    revived, plain = (VectorQuantizer(6, 2) for _ in range(2))
    for quantizer in (revived, plain):
        quantizer.codebook.copy_(entries)
        quantizer.ema_count.copy_(counts)
        quantizer.ema_sum.copy_(entries * counts[:, None])
    # entries 0, 1, 3 and 4 serve four vectors each; the second sample, far off, is not quantised
    near = entries[[0, 1, 3, 4]].repeat(4, 1) + 0.1 * torch.randn(16, 2)
    x = torch.stack([near, near + 1000]).transpose(1, 2).reshape(2, 2, 4, 4)
    for quantizer, threshold in ((revived, 0.1), (plain, 0.0)):
        learn(Codebooks([quantizer], decay=0.9, revive_threshold=threshold), x, torch.tensor([True, False]))
    dead = plain.ema_count < 0.1 * plain.ema_count.mean()
    assert dead.nonzero().flatten().tolist() == [2, 5]
    assert torch.equal(revived.codebook[~dead], plain.codebook[~dead])
    assert torch.equal(revived.ema_count[~dead], plain.ema_count[~dead])
    for entry in revived.codebook[dead]:
        assert (near == entry).all(1).any()
    assert torch.allclose(revived.ema_count[dead], plain.ema_count.mean() / 3)
    assert torch.allclose(revived.ema_sum[dead], revived.codebook[dead] * revived.ema_count[dead, None])


def test_revival_draws_vectors_in_proportion_to_their_squared_error():
    quantizer = VectorQuantizer(4001, 1)
    quantizer.codebook.fill_(1000.0)[0] = 0.0  # one entry serves all; the others are dead
    quantizer.ema_count.fill_(1e-3)[0] = 1e5
    quantizer.ema_sum.copy_(quantizer.codebook * quantizer.ema_count[:, None])
    values = torch.tensor([0.0, 1.0, -2.0, 3.0])
    learn(Codebooks([quantizer], decay=1.0), values.view(1, 1, 2, 2), generator=seeded())
    drawn = (quantizer.codebook[1:] == values).float().mean(0)
    assert torch.allclose(drawn, values**2 / 14, atol=0.04)  # five standard errors of 4000 draws
    assert drawn[0] == 0


def test_initialise_recovers_separated_clusters_exactly():
    centres = torch.randn(12, 4) * 10
    quantizer = VectorQuantizer(12, 4)
    # uneven clusters: a random choice of entries misses the rare ones, and k-means has to find them
    order = torch.randperm(12 + 11 * 60, generator=seeded())
    vectors = torch.cat([centres, centres[1:].repeat(60, 1)])[order]
    quantizer.initialise(vectors, 600.0, seeded())
    assert torch.cdist(centres, quantizer.codebook).amin(1).max() < 1e-4


def test_initialise_beats_entries_drawn_from_the_data():
    vectors = torch.randn(3000, 3)
    quantizer = VectorQuantizer(32, 3)
    quantizer.initialise(vectors, 500.0, seeded())
    drawn = min(torch.cdist(vectors, vectors[torch.randperm(3000)[:32]]).amin(1).square().mean() for _ in range(5))
    assert torch.cdist(vectors, quantizer.codebook).amin(1).square().mean() < 0.9 * drawn
    # statistics that stand for one batch of 500 vectors, and agree with the entries
    assert quantizer.ema_count.sum().item() == pytest.approx(500, rel=0.02)
    assert torch.allclose(quantizer.ema_sum / quantizer.ema_count[:, None], quantizer.codebook, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5])
def test_initialise_with_fewer_vectors_than_entries_leaves_each_of_them_an_entry(count):
    vectors = torch.randn(count, 3)
    quantizer = VectorQuantizer(16, 3)
    quantizer.initialise(vectors, float(count), seeded())
    assert quantizer.codebook.isfinite().all()
    assert torch.cdist(vectors, quantizer.codebook).amin(1).max() < 1e-4


def _update_half(rank, folder):
    """Body of one of two processes: an update on its half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    case = torch.load(folder / "case.pt", weights_only=True)
    books = Codebooks([VectorQuantizer(10, 4)], revive_threshold=0)
    books.load_state_dict(case["state"])
    own = slice(2 * rank, 2 * rank + 2)
    _, usage = learn(books, case["x"][own], case["chosen"][own])
    torch.save((books.state_dict(), usage), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_hold_the_codebook_of_one(tmp_path):
    books = Codebooks([VectorQuantizer(10, 4)], revive_threshold=0)
    x, chosen = torch.randn(4, 4, 5, 5), torch.tensor([True, False, True, True])
    torch.save({"state": books.state_dict(), "x": x, "chosen": chosen}, tmp_path / "case.pt")
    mp.spawn(_update_half, (tmp_path,), nprocs=2)
    _, usage = learn(books, x, chosen)
    for rank in range(2):
        state, usage_of_both = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(usage_of_both, usage)
        for name, value in books.state_dict().items():
            assert torch.allclose(state[name], value, atol=1e-6), name


@pytest.mark.parametrize(
    ("scaling_rates", "hidden", "embed", "channels", "size"),
    [
        ((4, 2, 2), 64, 16, 1, (32, 48)),
        ((4, 2, 2), 32, 16, 1, (37, 21)),
        ((2, 2, 2, 2), 32, 8, 2, (19, 33)),
        ((2, 3), 24, 12, 3, (7, 11)),
        ((2,), 4, 4, 1, (5, 3)),
    ],
)
def test_the_continuous_path_starts_as_the_identity(scaling_rates, hidden, embed, channels, size):
    model = VQVAE(channels, hidden, 8, 2, len(scaling_rates), scaling_rates, embed, 16)
    images = torch.rand(2, channels, *size)
    output = model(images, quantize=False)
    assert torch.allclose(output.reconstruction, images, atol=1e-5)
    assert (output.indices, output.commitment_loss) == ([], 0)


def test_encode_at_the_reference_values_gives_128_channels_at_a_quarter_of_the_size():
    settings = HPS_VQVAE["cbis-ddsm"]
    with torch.device("meta"):
        model = VQVAE(**settings.arguments(VQVAE))
        features = model.encode(torch.empty(2, *settings.image_shape))
        output = model.eval()(torch.empty(2, *settings.image_shape), quantize=False)
    assert features.shape == (2, 128, 256, 192)
    assert output.reconstruction.shape == (2, 1, 1024, 768)


def test_encode_pads_sides_by_their_border(trained):
    model, images = trained
    rows, columns = (torch.arange(math.ceil(side / 4) * 4).clamp(max=side - 1) for side in (18, 14))
    assert torch.allclose(model.encode(images), model.encode(images[:, :, rows][..., columns]), atol=1e-6)


def test_codes_alone_give_the_quantised_reconstruction(trained):
    model, images = trained
    output = model(images)
    assert [tuple(index.shape) for index in output.indices] == [(4, 10, 8), (4, 5, 4)]
    assert torch.allclose(model.decode_codes(output.indices, (18, 14)), output.reconstruction, atol=1e-5)


def test_a_mixed_batch_equals_its_samples_on_their_own_paths(trained):
    model, images = trained
    mixed = model(images, torch.tensor([True, False, False, True])).reconstruction
    quantised, continuous = (model(images, quantize).reconstruction for quantize in (True, False))
    assert (quantised - continuous).abs().max() > 1e-2
    assert torch.allclose(mixed[[0, 3]], quantised[[0, 3]], atol=1e-5)
    assert torch.allclose(mixed[[1, 2]], continuous[[1, 2]], atol=1e-5)


def test_codebooks_initialised_on_few_distinct_patches_code_them_exactly():
    model = VQVAE(**SMALL).eval()
    blocks = torch.rand(3, 4, 4)  # three values of the coarse level and twelve residuals of the fine one
    grid = torch.randint(3, (2, 5, 6), generator=seeded())
    images = blocks[grid].transpose(2, 3).reshape(2, 1, 20, 24)
    before = F.mse_loss(model(images).reconstruction, images)
    model.initialise_codebooks([images[:1], images[1:]], seeded())
    output = model(images)
    assert before > 0.1
    assert torch.allclose(output.reconstruction, images, atol=1e-4)
    # the coarse level alone says of each of its four patches of 2 x 2 pixels what they are on average
    model.quantizers[0].codebook.zero_()
    patches = images.view(2, 1, 5, 2, 2, 6, 2, 2)
    average = patches.mean((3, 6), keepdim=True).expand_as(patches).reshape_as(images)
    assert torch.allclose(model.decode_codes(output.indices), average, atol=1e-4)


def test_gradients_reach_every_parameter_after_two_steps():
    model = VQVAE(**SMALL)
    images = torch.rand(4, 1, 16, 16)
    model.initialise_codebooks([images], seeded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(images, torch.tensor([True, True, False, False]))
        (F.mse_loss(output.reconstruction, images) + 0.25 * output.commitment_loss).backward()
        optimizer.step()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


@pytest.mark.parametrize(
    ("change", "word"), [({"scaling_rates": (2, 2, 2)}, "scaling_rates"), ({"embed_dim": 32}, "embed_dim")]
)
def test_settings_that_clash_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        VQVAE(**SMALL | change)


def test_the_wrapper_keeps_the_first_stage_frozen(trained):
    model, images = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapper = VQVAE2Wrapper(model.train()).train()
    assert not any(parameter.requires_grad for parameter in wrapper.parameters())
    z = wrapper.encode(images)
    wrapper.decode(z, quantize=True)
    for name, value in wrapper.vqvae.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_wrapper_gives_the_paths_and_codes_of_the_vqvae(trained):
    model, images = trained
    quantised, continuous = model(images), model(images, quantize=False)
    wrapper = VQVAE2Wrapper(model)
    z = wrapper.encode(images)
    assert torch.allclose(wrapper.decode(z, shape=(18, 14)), continuous.reconstruction)
    assert torch.allclose(wrapper.decode(z, quantize=True, shape=(18, 14)), quantised.reconstruction)
    assert all(torch.equal(a, b) for a, b in zip(wrapper.codes(z), quantised.indices, strict=True))


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (1, 5)])
def test_latent_shape_is_the_shape_that_encode_returns(size):
    wrapper = VQVAE2Wrapper(VQVAE(**SMALL))
    expected = (16, *(math.ceil(side / 4) * 2 for side in size))
    assert wrapper.latent_shape(*size) == tuple(wrapper.encode(torch.rand(1, 1, *size)).shape[1:]) == expected
