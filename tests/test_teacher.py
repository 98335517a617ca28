"""A teacher's distribution over the whole vocabulary: against torch's own KL divergence, and against reading the text at every step."""

import pytest
import torch
from tiny import FAMILIES, tiny_base
from torch.nn.functional import kl_div, log_softmax

from softprompt.engine.divergence import compared, divergences, told
from softprompt.engine.head import Head
from softprompt.engine.prompt import SoftPrompt, no_prompt
from softprompt.engine.step import StepSettings, step_gradients
from softprompt.engine.teacher import Teacher, likeness
from softprompt.engine.tokens import Encoded

HEADS = {
    "plain": {},
    "bias": {"bias_V": torch.linspace(-1, 1, 700)},
    "scaled": {"scale": 0.25},
    "capped": {"cap": 3.0},
    "all": {"bias_V": torch.linspace(-1, 1, 700), "scale": 2.0, "cap": 5.0},
}


OPEN = torch.full((12,), -1)  # places of which nothing is sure


def head_of_kind(kind: str) -> Head:
    return Head(torch.randn(700, 16, generator=torch.Generator().manual_seed(0)), **HEADS[kind])


def reference(head: Head, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    student, teacher = (log_softmax(head.logits(states).double(), dim=1) for states in (student, teacher))
    return kl_div(student, teacher, log_target=True, reduction="none").sum(dim=1)


@pytest.mark.parametrize("kind", HEADS)
def test_the_walk_is_torchs_divergence(kind, monkeypatch):
    monkeypatch.setattr("softprompt.engine.head.BLOCK_NUMBERS", {"cpu": 1})  # blocks of 256: three of them
    monkeypatch.setattr("softprompt.engine.divergence.TOKENS", 5)
    head, draw = head_of_kind(kind), torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 12, 16, generator=draw)
    known = torch.randint(700, (12,), generator=draw)
    leaf = student.clone().requires_grad_()
    wanted = reference(head, leaf, teacher)
    (gradient,) = torch.autograd.grad(wanted.sum(), leaf)
    losses, found = divergences(head, student, told(head, teacher, OPEN[:12]), known, 0.0)
    assert found is not None
    assert losses == pytest.approx(wanted.detach().float(), abs=2e-5)
    assert found.numpy() == pytest.approx(gradient.numpy(), abs=2e-5)
    again, same = compared(head, student, told(head, teacher, OPEN[:12]), known)
    assert again == pytest.approx(losses, abs=1e-5)
    assert same.tolist() == (head.logits(student).argmax(1) == head.logits(teacher).argmax(1)).tolist()
    assert 0 < same.sum() < 12 or kind != "plain"


@pytest.mark.parametrize("kind", HEADS)
def test_what_is_sure_is_a_token_to_predict(kind, monkeypatch):
    monkeypatch.setattr("softprompt.engine.head.BLOCK_NUMBERS", {"cpu": 1})
    head, draw = head_of_kind(kind), torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 12, 16, generator=draw)
    known, sure = torch.randint(700, (12,), generator=draw), OPEN.clone()
    sure[[0, 5, 11]] = torch.tensor([3, 300, 699])
    teacher[sure >= 0] = 0.0
    leaf = student.clone().requires_grad_()
    certain = torch.nn.functional.cross_entropy(head.logits(leaf), sure.clamp(min=0), reduction="none")
    wanted = torch.where(sure < 0, reference(head, leaf, teacher).float(), certain)
    (gradient,) = torch.autograd.grad(wanted.sum(), leaf)
    said = told(head, teacher, sure)
    losses, found = divergences(head, student, said, known, 0.0)
    assert found is not None
    assert losses == pytest.approx(wanted.detach(), abs=2e-5)
    assert found.numpy() == pytest.approx(gradient.numpy(), abs=2e-5)
    again, same = compared(head, student, said, known)
    assert again == pytest.approx(losses, abs=1e-5)
    likeliest = torch.where(sure < 0, head.logits(teacher).argmax(1), sure)
    assert same.tolist() == (head.logits(student).argmax(1) == likeliest).tolist()


def test_what_a_tolerance_leaves_out_is_small():
    head, draw = head_of_kind("plain"), torch.Generator().manual_seed(1)
    student, teacher = 3 * torch.randn(2, 12, 16, generator=draw)
    known = torch.randint(700, (12,), generator=draw)
    exact, rough = (divergences(head, student, told(head, teacher, OPEN[:12]), known, tolerance)[1] for tolerance in (0.0, 2**-8))
    assert exact is not None
    assert rough is not None
    away = (rough - exact).norm(dim=1)
    assert 0 < away.max() <= 2 * 2**-8 * head.weight_VH.norm(dim=1).max()


def test_equal_states_are_no_distance_apart():
    head = head_of_kind("all")
    states = torch.randn(3, 16)
    losses, gradient = divergences(head, states, told(head, states.clone(), OPEN[:3]), torch.zeros(3, dtype=torch.long), 0.0)
    assert losses.tolist() == [0, 0, 0]
    assert gradient is not None
    assert not gradient.any()


# ---- over a base ---------------------------------------------------------------------------------------------------

TEXT = (40, 41, 42, 43, 44, 45, 46)
QUESTIONS = ((10, 11, 12), (10, 11, 13, 14, 15), (10, 11, 16, 17), (10, 11, 18))
ANSWERS = ((60, 61, 2), (62, 2), (63, 64, 65, 66, 2), (67, 2))
ROWS = [
    Encoded((*question, *answer), (*(False,) * len(question), *(True,) * len(answer)))
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]


def logits_of(base, ids):
    """Those of the whole sequence, by transformers alone."""
    return base.model(torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_goes_towards_the_base_that_reads_the_text(family, tmp_path):
    """Loss and gradient, against concatenation by transformers and torch's divergence."""
    base = tiny_base(tmp_path / "base", family)
    teacher = Teacher(((no_prompt(base, 1), TEXT),), ROWS, [0] * len(ROWS))
    rows = base.drawn_rows(3, 0).requires_grad_()
    settings = StepSettings(16, loss=teacher.loss(range(len(ROWS))))
    losses, _ = step_gradients(base, [SoftPrompt(rows, "after_bos", 1)], [ROWS], settings)
    leaf, apart, count = rows.detach().clone().requires_grad_(), [], 0
    for row, question in zip(ROWS, QUESTIONS, strict=True):
        at = len(question) - 1
        wanted = log_softmax(logits_of(base, [1, *TEXT, *row.ids])[1 + len(TEXT) + at : -1], dim=1)
        embeds = torch.cat([base.embed_ids([1]), leaf, base.embed_ids(row.ids)])[None]
        own = log_softmax(base.model(inputs_embeds=embeds).logits[0].float()[1 + 3 + at : -1], dim=1)
        apart.append(kl_div(own, wanted, log_target=True, reduction="sum"))
        count += len(own)
    wanted_loss = torch.stack(apart).sum() / count
    wanted_loss.backward()
    assert losses.item() == pytest.approx(wanted_loss.item(), rel=1e-4)
    assert rows.grad.numpy() == pytest.approx(leaf.grad.numpy(), rel=1e-3, abs=1e-4 * leaf.grad.abs().max().item())


@pytest.mark.parametrize("tokens", [6, 16, 1000])
def test_the_cut_changes_nothing_and_chunks_keep_to_their_rows(tokens, tmp_path):
    base = tiny_base(tmp_path / "base")
    bare = no_prompt(base, 1)
    teacher = Teacher(((bare, TEXT), (bare, TEXT[::-1])), ROWS, [0, 1, 1, 0])
    rows = base.drawn_rows(3, 0).requires_grad_()
    prompt = SoftPrompt(rows, "after_bos", 1)
    settings = StepSettings(tokens, loss=teacher.loss([3, 1, 0, 2]))
    losses, _ = step_gradients(base, [prompt], [[ROWS[number] for number in (3, 1, 0, 2)]], settings)
    alone = [Teacher((teacher.contexts[teacher.which[n]],), [ROWS[n]], [0]) for n in range(4)]
    each = [likeness(base, one, prompt, [ROWS[n]], 1000).divergence * len(ANSWERS[n]) for n, one in enumerate(alone)]
    assert losses.item() == pytest.approx(sum(each) / sum(map(len, ANSWERS)), rel=1e-4)
    assert likeness(base, teacher, prompt, ROWS, tokens).divergence == pytest.approx(losses.item(), rel=1e-4)


def test_a_text_is_read_once(tmp_path, monkeypatch):
    base, read = tiny_base(tmp_path / "base"), []
    real = type(base).prefill
    monkeypatch.setattr(type(base), "prefill", lambda self, embeds: read.append([len(one) for one in embeds]) or real(self, embeds))
    teacher = Teacher(((no_prompt(base, 1), TEXT),), ROWS, [0] * len(ROWS))
    for _ in range(3):
        teacher.told(base, [0, 1])
    assert read == [[1 + len(TEXT)]]


def test_a_row_is_read_once_and_is_told_the_same_whoever_asks_first(tmp_path, monkeypatch):
    base, read = tiny_base(tmp_path / "base"), []
    bare = no_prompt(base, 1)
    real = type(base).continue_from
    monkeypatch.setattr(type(base), "continue_from", lambda *given: read.append(len(given[2])) or real(*given))
    one, other = (Teacher(((bare, TEXT), (bare, TEXT[::-1])), ROWS, [0, 1, 1, 0]) for _ in range(2))
    first = [one.told(base, [number]) for number in (2, 0, 3, 1, 2)]
    assert sorted(read) == [2, 2]  # those of one text together
    whole = other.told(base, range(4)).split([len(answer) for answer in ANSWERS])
    for said, number in zip(first, (2, 0, 3, 1, 2), strict=True):
        assert torch.equal(said.mean.rows_NH, whole[number].mean.rows_NH)
        assert torch.equal(said.mean.log_sum_N, whole[number].mean.log_sum_N)
    assert torch.cat([said.states_NH for said in whole]).numpy() == pytest.approx(one.states(base, range(4)).numpy(), abs=1e-5)


def test_what_would_take_too_much_memory_is_read_at_every_step(tmp_path, monkeypatch):
    base, read = tiny_base(tmp_path / "base"), []
    real = type(base).continue_from
    monkeypatch.setattr(type(base), "continue_from", lambda *given: read.append(len(given[2])) or real(*given))
    monkeypatch.setattr("softprompt.engine.teacher.SAID", sum(map(len, ANSWERS)) * base.hidden_size * 2 * 4 - 1)
    teacher = Teacher(((no_prompt(base, 1), TEXT),), ROWS, [0] * len(ROWS))
    for _ in range(2):
        teacher.told(base, [0, 1])
    assert read == [2, 2]
