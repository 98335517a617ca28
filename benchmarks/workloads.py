"""What is compared: the workloads, and the manners in which PEFT is used. Plain numbers; nothing heavy is imported."""

from dataclasses import dataclass

PROMPT_TEXT = "Below is a conversation between a person and a helpful assistant, who answers every question."


@dataclass(frozen=True)
class Profile:
    """Lengths of rows in tokens, BOS included: log-normal around `mean`, cut at both ends. `sigma`: spread of the logarithm.

    Supervised tokens (EOS included) are `share` of a row, or evenly one of `labels` for rows that end with a label word.
    """

    mean: int
    shortest: int
    longest: int
    sigma: float
    share: float = 0.0
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Workload:
    """`takes_data`: rows come from --data where it is given; `joined`: several of its answers make one row.

    `manners`: how PEFT is used, keys of MANNERS; the last one gives the result its top-level numbers. Without any, a bank of
    `num_prompts` is compared with as many runs of ours, one after another.
    """

    virtual_tokens: int
    examples_per_step: int
    profile: Profile
    manners: tuple[str, ...]
    num_prompts: int = 1
    takes_data: bool = True
    joined: bool = False


@dataclass(frozen=True)
class Manner:
    """A way to use PEFT. `dtype`: None is whatever ours computes in. Of several batch sizes, a trial picks the fastest."""

    dtype: str | None
    batch_sizes: tuple[int, ...]
    grouped: bool


INSTRUCTIONS = Profile(mean=136, shortest=20, longest=256, sigma=0.6, share=113 / 136)
LABELS = Profile(mean=40, shortest=20, longest=60, sigma=0.25, labels=(2, 3))  # a label word of one or two tokens, and EOS
TEXTS = Profile(mean=980, shortest=900, longest=1024, sigma=0.04, share=0.8)

WORKLOADS = {
    "tutorial": Workload(virtual_tokens=17, examples_per_step=16, profile=INSTRUCTIONS, manners=("tutorial",)),
    "tuned": Workload(virtual_tokens=17, examples_per_step=16, profile=INSTRUCTIONS, manners=("best",)),
    "classify": Workload(virtual_tokens=100, examples_per_step=32, profile=LABELS, manners=("tutorial", "best"), takes_data=False),
    "long": Workload(virtual_tokens=17, examples_per_step=4, profile=TEXTS, manners=("best",), joined=True),
    "bank": Workload(virtual_tokens=16, examples_per_step=8, profile=LABELS, manners=(), num_prompts=8, takes_data=False),
}

MANNERS = {
    "tutorial": Manner(dtype="float32", batch_sizes=(2,), grouped=False),
    "best": Manner(dtype=None, batch_sizes=(1, 2, 4, 8, 16), grouped=True),
}
