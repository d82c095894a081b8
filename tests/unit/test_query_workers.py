"""Query batch normalisation over the tokens of several workers."""

import copy
import pickle

import torch
import torch.distributed as dist
from torch import nn

from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory, RunState
from pkm_fairseq.memory.query import BatchQueryNorm

from ..workers import on_workers

WIDTH, WORLD = 6, 3


def world_group():
    """As a model's adapter hands it over."""
    return dist.group.WORLD


def norm_of(workers=None):
    """The same norm everywhere, in float64."""
    torch.manual_seed(1)
    norm = BatchQueryNorm(WIDTH, RunState(workers)).double()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    return norm


def tokens_of(counts, seed):
    """Tokens of each worker, far from zero, as a difference of sums of squares would mind."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) * (1 + i) + 1e4
        for i, n in enumerate(counts)
    ]


def loss_of(normed):
    """One that neither the mean nor the variance of a batch fixes."""
    ramp = torch.arange(1, WIDTH + 1, dtype=normed.dtype)
    return (normed.sin() * ramp).sum() + normed.pow(3).sum()


def close(one, other):
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def check_joint_batches(rank):
    """Forward, gradients and running statistics are those of one process with all tokens."""
    norm, alone = norm_of(world_group), norm_of()
    for seed, counts in enumerate([(5, 1, 0), (0, 7, 4), (1, 1, 0), (3, 3, 3)]):
        parts = tokens_of(counts, seed)
        own, whole = parts[rank].clone().requires_grad_(), torch.cat(parts).requires_grad_()
        normed, expected = norm(own), alone(whole)
        assert close(normed, expected.split(counts)[rank])
        loss_of(normed).backward()
        loss_of(expected).backward()
        assert close(own.grad, whole.grad.split(counts)[rank])
        for ours, theirs in zip(norm.parameters(), alone.parameters(), strict=True):
            dist.all_reduce(ours.grad)  # as data-parallel training does
            assert close(ours.grad, theirs.grad)
            ours.grad = theirs.grad = None
        for ours, theirs in zip(norm.buffers(), alone.buffers(), strict=True):
            assert close(ours, theirs)
    return norm


def check_dummy(rank):
    """What a dummy batch holds is in no statistic and gets no gradient."""
    norm, alone = norm_of(world_group), norm_of()
    parts = tokens_of((4, 5, 6), 9)
    own, whole = parts[rank].clone().requires_grad_(), torch.cat(parts[:2]).requires_grad_()
    with norm.run.dummy_batch(rank == 2):
        normed, expected = norm(own), alone(whole)
    loss = loss_of(normed) * (rank != 2)
    loss.backward()
    loss_of(expected).backward()
    if rank == 2:
        assert normed.shape == own.shape and not own.grad.any()
    else:
        assert close(normed, expected.split((4, 5))[rank])
        assert close(own.grad, whole.grad.split((4, 5))[rank])
    assert close(norm.running_var, alone.running_var)


def check_too_few(rank, norm):
    """Of one token on all workers together there are no statistics."""
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    for holder in (0, None):
        own = tokens_of((1,), 3)[0][: int(rank == holder)].requires_grad_()
        normed = norm(own)
        normed.sum().backward()
        with torch.no_grad():
            assert torch.equal(normed, copy.deepcopy(norm).eval()(own))
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def check_apart(rank, norm):
    """Evaluation and frozen statistics need nobody else."""
    if rank == 0:
        tokens = tokens_of((4,), 5)[0]
        in_evaluation = norm.eval()(tokens)
        norm.train().is_frozen = True
        assert torch.equal(norm(tokens), in_evaluation)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(norm)))
        assert torch.equal(copied(tokens), in_evaluation)
        norm.is_frozen = False


def check_memory(rank):
    """Through a whole memory: a worker whose batch is padding alone goes through both passes."""
    torch.manual_seed(2)
    config = MemoryConfig(n_keys=5, heads=2, knn=3, k_dim=4)
    memory = ProductKeyMemory(8, config, run=RunState(world_group)).double()
    alone = copy.deepcopy(memory)
    alone.run.workers = None
    x = torch.randn(WORLD, 4, 8, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    memory(x[rank], padding[rank]).pow(2).sum().backward()
    alone(x, padding).pow(2).sum().backward()
    for (name, ours), theirs in zip(memory.named_parameters(), alone.parameters(), strict=True):
        dist.all_reduce(ours.grad)
        assert close(ours.grad, theirs.grad), name


def check_half_precision(rank):
    """Statistics are float32 and reach buffers in half precision."""
    norm, alone = norm_of(world_group).bfloat16(), norm_of().bfloat16()
    parts = [part.sub(1e4).bfloat16() for part in tokens_of((5, 2, 4), 4)]
    normed, expected = norm(parts[rank]), alone(torch.cat(parts))
    assert normed.dtype == torch.float32 and norm.running_mean.dtype == torch.bfloat16
    assert torch.allclose(normed, expected.split((5, 2, 4))[rank], atol=1e-5)
    assert torch.equal(norm.running_mean, alone.running_mean)


def work(rank):
    norm = check_joint_batches(rank)
    check_dummy(rank)
    check_too_few(rank, norm)
    check_apart(rank, norm)
    check_memory(rank)
    check_half_precision(rank)


def test_workers_normalise_as_one_process_with_all_their_tokens(tmp_path):
    on_workers(WORLD, tmp_path, work)
