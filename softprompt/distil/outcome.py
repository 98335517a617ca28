"""What a distillation has come to: for the prompt's card, and in the numbers that `softprompt distil --json` writes."""

from typing import Any, Literal

from softprompt.card import DistilledCard
from softprompt.config import DistilConfig
from softprompt.distil.study import Studied
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt, no_prompt
from softprompt.engine.teacher import likeness
from softprompt.engine.world import World


def distilled_card(config: DistilConfig, study: Studied) -> DistilledCard:
    """What a prompt's card says of its teacher: never the text itself, unless `distil.keep_text` asks for that."""
    kind: Literal["text", "file", "examples"] = "examples" if config.examples else "file" if config.file is not None else "text"
    text = "\n\n".join(study.context.texts) if config.keep_text and study.context.texts else None
    return DistilledCard(kind=kind, tokens=len(study.context_ids), sha256=study.context.digest, text=text)


def outcome(base: FrozenBase, study: Studied, soft: Prompt, tokens_per_batch: int, world: World = World()) -> dict[str, Any]:
    """How like its teacher the base is on the held-out questions, with the prompt and without: KL divergence in nats per answer token, and
    the share of these where both hold the same token for the likeliest."""
    rows, teacher = study.held.rows.encoded, study.held.teacher
    before, after = (likeness(base, teacher, one, rows, tokens_per_batch, world) for one in (no_prompt(base, study.encoder.bos_id), soft))
    return {
        "kl_before": before.divergence,
        "kl_after": after.divergence,
        "same_first_before": before.same_first,
        "same_first_after": after.same_first,
        "teacher_tokens": len(study.context_ids),
        "positions": soft.length,
        "questions": len(study.lessons.rows.encoded) + len(rows),
    }
