"""The step: head and loss against torch's own, any way of computing a step against the plain one, out of memory included."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_invariants import ALL, FAMILIES, encoded_rows, loss_and_gradient, rows_alike, some_prompt
from torch.nn.functional import cross_entropy

from softprompt.config import ModelConfig
from softprompt.engine import head as head_module
from softprompt.engine import step as step_module
from softprompt.engine.batch import CPU_BATCH_COST, GPU_BATCH_COST, cut_by_length
from softprompt.engine.head import Head
from softprompt.engine.loading import load_base
from softprompt.engine.loss import TokenIds, TopTokens, head_losses
from softprompt.engine.memory import CPU_TOKENS, activation_bytes, token_budget
from softprompt.engine.precise import float32_products
from softprompt.engine.prefix import checkpointed
from softprompt.engine.step import StepSettings, step_gradients
from softprompt.errors import ModelError, RunError

VOCABULARY, HIDDEN, TOKENS = 1000, 16, 37


def some_head(**how) -> Head:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(VOCABULARY, generator=generator) if how.pop("biased", False) else None
    return Head(torch.randn(VOCABULARY, HIDDEN, generator=generator), bias, **how)


def some_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, HIDDEN, generator=generator), torch.randint(VOCABULARY, (TOKENS,), generator=generator)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of columns and of tokens, so that the walk has somewhere to go."""
    monkeypatch.setattr(head_module, "TOKENS", 16)
    monkeypatch.setitem(head_module.BLOCK_NUMBERS, "cpu", 1)


def oracle(head: Head, hidden, targets) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    losses = cross_entropy(head.logits(hidden), targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), hidden)[0]


@pytest.mark.parametrize("how", [{}, {"biased": True}, {"scale": 0.3}, {"cap": 5.0}, {"biased": True, "scale": 2.0, "cap": 9.0}])
def test_the_head_is_torchs_cross_entropy(small_blocks, how):
    head, (hidden, targets) = some_head(**how), some_tokens()
    expected, expected_grad = oracle(head, hidden, targets)
    losses, grad = head.losses(hidden, TokenIds(targets), 0.0)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    alone, nothing = head.losses(hidden, TokenIds(targets), None)
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)
    assert nothing is None


@pytest.mark.parametrize("how", [{}, {"biased": True, "scale": 2.0, "cap": 9.0}])
def test_many_targets_after_few_states_alone_or_of_an_ensemble(small_blocks, how):
    head, (states, targets) = some_head(**how), some_tokens()
    source = torch.arange(TOKENS) // 2
    losses, likeliest = head.losses_after(states[None], source, targets)
    assert torch.equal(likeliest, head.logits(states).argmax(dim=-1)[source] == targets)
    torch.testing.assert_close(losses, oracle(head, states[source], targets)[0], rtol=1e-5, atol=1e-5)
    members = torch.stack([states, states.flip(0)])
    agreed = head.logits(members).log_softmax(dim=-1).mean(dim=0)
    targets[0] = agreed[source[0]].argmax()
    losses, likeliest = head.losses_after(members, source, targets)
    torch.testing.assert_close(losses, cross_entropy(agreed[source], targets, reduction="none"))
    assert torch.equal(likeliest, agreed.argmax(dim=-1)[source] == targets)
    assert likeliest[0]


@pytest.mark.parametrize("rest", [0.0, 0.3])
@pytest.mark.parametrize("how", [{}, {"biased": True}, {"scale": 0.3}, {"cap": 5.0}, {"biased": True, "scale": 2.0, "cap": 9.0}])
def test_a_teachers_likeliest_tokens_are_torchs_divergence_of_k_and_one_classes(small_blocks, how, rest):
    head, (hidden, _) = some_head(**how), some_tokens()
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:5] for _ in range(TOKENS)])
    given = (1 - rest) * torch.rand(TOKENS, 5, generator=generator).softmax(dim=1)

    def divergence(states):
        own = head.logits(states).softmax(dim=1).gather(1, ids)
        both = [torch.cat([part, (1 - part.sum(dim=1, keepdim=True)).clamp(min=1e-12)], dim=1) for part in (own, given)]
        return torch.nn.functional.kl_div(both[0].log(), both[1], reduction="none").sum(dim=1)

    leaf = hidden.double().requires_grad_()
    head64 = replace(head, weight_VH=head.weight_VH.double(), bias_V=None if head.bias_V is None else head.bias_V.double())
    head, head32 = head64, head
    expected = divergence(leaf)
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    losses, grad = head32.losses(hidden, TopTokens(ids, given), 0.0)
    torch.testing.assert_close(losses, expected.detach().float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-3, atol=1e-4)
    assert expected.min() > 0.1
    alone, nothing = head32.losses(hidden, TopTokens(ids, given), None)
    torch.testing.assert_close(alone, losses, rtol=1e-4, atol=1e-4)
    assert nothing is None


def test_a_step_learns_from_what_its_loss_says(bases):
    """A teacher that is sure of the next tokens is the next tokens; one that is not teaches something else."""
    base, rows, soft = bases(), encoded_rows(), some_prompt(bases())

    def of_a_teacher(sure):
        def loss(base, hidden_NH, batch, tolerance):
            return head_losses(base, hidden_NH, TopTokens(batch.targets_N[:, None], torch.full((len(hidden_NH), 1), sure)), tolerance)

        return loss

    plain, gradient = loss_and_gradient(base, soft, rows, 40)
    sure, same = loss_and_gradient(base, soft, rows, 40, loss=of_a_teacher(1.0))
    assert sure == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(same, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    unsure, other = loss_and_gradient(base, soft, rows, 40, loss=of_a_teacher(0.5))
    assert unsure < plain
    assert (other - gradient).norm() > 0.1 * gradient.norm()


@pytest.mark.parametrize("how", [{"scale": 2.0}, {"scale": 1.5, "biased": True}, {"scale": 2.0, "cap": 20.0}])
@pytest.mark.parametrize("tolerance", [0.2, 0.01])
def test_what_the_head_leaves_out_is_bounded(small_blocks, monkeypatch, how, tolerance):
    monkeypatch.setattr(head_module, "SAFETY", 4)
    head, (hidden, targets) = some_head(**how), some_tokens()
    exact, exact_grad = head.losses(hidden, TokenIds(targets), 0.0)
    losses, grad = head.losses(hidden, TokenIds(targets), tolerance)
    error = (grad - exact_grad).norm(dim=1)
    torch.testing.assert_close(losses, exact, rtol=1e-5, atol=1e-5)
    assert error.max() > 1e-4, "nothing was left out: nothing was tested"
    assert error.max() <= tolerance * head.scale * head.weight_VH.norm(dim=1).max()


def test_huge_logits_neither_overflow_nor_vanish(small_blocks):
    head, (hidden, targets) = some_head(scale=300.0), some_tokens()
    losses, grad = head.losses(hidden, TokenIds(targets), 1e-3)
    torch.testing.assert_close(losses, oracle(head, hidden, targets)[0], rtol=1e-4, atol=1e-2)
    assert grad.isfinite().all()
    assert losses.max() > 500, "the logits are not huge"


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_activations_give_the_same_gradient(bases, family):
    base, rows, soft = bases(family), encoded_rows(), some_prompt(bases(family))
    loss, gradient = loss_and_gradient(base, soft, rows, 28)
    again, checkpointed_gradient = loss_and_gradient(base, soft, rows, 28, checkpoint_activations=True)
    assert again == loss
    torch.testing.assert_close(checkpointed_gradient, gradient, rtol=1e-5, atol=1e-8)


def test_checkpointing_keeps_less(bases):
    base, rows, soft = bases("llama", num_hidden_layers=8), encoded_rows(), some_prompt(bases("llama", num_hidden_layers=8))

    def kept(**how) -> int:
        return tiny.numbers_kept(lambda: loss_and_gradient(base, soft, rows, 1000, **how))

    plain = kept()
    layers = [module for module in base.model.modules() if "forward" in vars(module)]
    assert kept(checkpoint_activations=True) < 0.7 * plain
    assert [module for module in base.model.modules() if "forward" in vars(module)] == layers, "the layers are as they were"


def test_a_backbone_without_marked_layers_cannot_be_checkpointed():
    with pytest.raises(ModelError, match="checkpoint_activations"), checkpointed(torch.nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("family", ALL)
def test_prompts_together_get_the_gradients_of_each_alone(bases, family, alike):
    base = bases(family)
    prompts = [some_prompt(base, 6), some_prompt(base, 3, "after_bos", seed=2), some_prompt(base, 6, seed=3)]
    rows = [rows_alike()] * 3 if alike else [encoded_rows(0), encoded_rows(1)[:2], encoded_rows(2)]
    leaves = [replace(prompt, rows_PH=prompt.rows_PH.clone().requires_grad_()) for prompt in prompts]
    losses, _ = step_gradients(base, leaves, rows, StepSettings(40))
    for prompt, own, leaf, loss in zip(prompts, rows, leaves, losses.tolist(), strict=True):
        alone, gradient = loss_and_gradient(base, prompt, own, 40)
        assert loss == pytest.approx(alone, rel=1e-5)
        torch.testing.assert_close(leaf.rows_PH.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_out_of_memory_cuts_the_micro_batch_and_keeps_the_gradient(bases, monkeypatch, when):
    base, rows, soft = bases(), encoded_rows(), some_prompt(bases())
    loss, gradient = loss_and_gradient(base, soft, rows, 1000)
    sizes = []
    forward, grad = base.backbone.forward, torch.autograd.grad

    def short_of_memory(*args, **how):
        count = sizes[-1]
        if count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def measured(*args, **how):
        sizes.append(len(how["inputs_embeds"]))
        if when == "forward":
            short_of_memory()
        return forward(*args, **how)

    def limited(*args, **how):
        gradients = grad(*args, **how)
        if when == "backward" and torch.is_tensor(args[1][0]):
            short_of_memory()
        return gradients

    monkeypatch.setattr(base.backbone, "forward", measured)
    monkeypatch.setattr(torch.autograd, "grad", limited)
    rows_PH = soft.rows_PH.clone().requires_grad_()
    again, allowed = step_gradients(base, [replace(soft, rows_PH=rows_PH)], [rows], StepSettings(1000))
    assert max(sizes) == 4, "the whole batch was tried"
    assert allowed < 1000, "the next steps are told"
    assert again.item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(rows_PH.grad, gradient, rtol=1e-3, atol=1e-6)


def test_a_single_row_that_does_not_fit_is_said_so(bases, monkeypatch):
    def never(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_module, "batch_losses", never)
    with pytest.raises(RunError, match="out of memory with a single row"):
        loss_and_gradient(bases(), some_prompt(bases()), encoded_rows(), 1000)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_precision_base_computes_the_prompt_in_float32(tmp_path, family):
    folder = tiny.tiny_folder(tmp_path / "base", family)
    half = load_base(ModelConfig(name=str(folder), dtype="bfloat16", device="cpu"))
    assert half.dtype == torch.bfloat16
    soft = some_prompt(half)
    prefix = soft.prefix(half)
    half.model.float()  # the same rounded weights, now multiplied in float32 throughout
    exact = soft.prefix(half)
    for ours, theirs in zip(prefix.tensors, exact.tensors, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_products_in_float32_have_the_gradient_of_float32():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator).to(torch.bfloat16)
    bias = torch.randn(5, generator=generator).to(torch.bfloat16)
    for with_bias, transposed in itertools.product((True, False), repeat=2):
        if transposed and not with_bias:
            continue
        states = torch.randn(3, 7, generator=generator, requires_grad=True)
        expected = states @ weight.float().t() + (bias.float() if with_bias else 0)
        (gradient,) = torch.autograd.grad(expected.square().sum(), states)
        with float32_products():
            if transposed:
                product = torch.addmm(bias, states, weight.t())
            else:
                product = torch.nn.functional.linear(states, weight, bias if with_bias else None)
            (ours,) = torch.autograd.grad(product.square().sum(), states)
        torch.testing.assert_close(product, expected)
        torch.testing.assert_close(ours, gradient)


@pytest.mark.parametrize("lengths", [[9, 8, 7], [200, 10, 9, 190, 11], [30] * 5, [250, 120, 119, 60, 3], [7]])
@pytest.mark.parametrize("budget", [1, 100, 400])
@pytest.mark.parametrize("batch_cost", [CPU_BATCH_COST, GPU_BATCH_COST])
def test_no_other_cut_computes_fewer_tokens(lengths, budget, batch_cost):
    def cost(groups):
        return sum(max(lengths[i] for i in group) * len(group) + batch_cost for group in groups)

    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = []
    for marks in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [0, *(index + 1 for index, mark in enumerate(marks) if mark), len(lengths)]
        cuts.append([longest_first[first:end] for first, end in itertools.pairwise(ends)])
    allowed = [cut for cut in cuts if all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= budget for g in cut)]
    found = cut_by_length(lengths, budget, batch_cost)
    assert sorted(map(sorted, found)) in [sorted(map(sorted, cut)) for cut in allowed]
    assert cost(found) == min(cost(cut) for cut in allowed)


def test_a_micro_batch_has_as_many_bytes_in_half_precision(bases, tmp_path, monkeypatch):
    half = load_base(ModelConfig(name=bases().name, device="cpu", dtype="bfloat16"))
    cpu = torch.device("cpu")
    budgets = [token_budget(base.backbone, cpu, None) for base in (bases(), half)]
    assert budgets == [CPU_TOKENS, 2 * CPU_TOKENS]
    monkeypatch.setattr("softprompt.engine.memory.virtual_memory", lambda: SimpleNamespace(available=200 * activation_bytes(half.backbone)))
    assert token_budget(half.backbone, cpu, None) == 100  # half of the free memory
    assert token_budget(half.backbone, cpu, 7) == 7
