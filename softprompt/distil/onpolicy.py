"""The last steps of a distillation, where the prompt answers and the teacher says at every token how it would have gone on (on-policy
distillation, Agarwal et al. 2024): a prompt that runs free is then held to what it says itself."""

from collections.abc import Sequence

from softprompt.distil.lessons import Answered, Read
from softprompt.distil.study import Studied
from softprompt.engine.decode import Question, decode_whole
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt
from softprompt.sampling import Sampling


def replies(
    base: FrozenBase, study: Studied, soft: Prompt, numbers: Sequence[int], max_new_tokens: int, seed: int
) -> list[tuple[str, bool]]:
    """What a prompt answers to the questions of the lessons of these numbers, sampled, and whether it came to its end."""
    rows = study.lessons.rows
    sampling = Sampling(temperature=1.0, max_new_tokens=max_new_tokens, seed=seed)
    questions = [Question(((soft, ()),), (rows.encoded[number].question,), sampling, stop_ids=study.encoder.end_ids) for number in numbers]
    found = {index: (base.tokenizer.decode(ids, skip_special_tokens=True), ended) for index, ids, ended in decode_whole(base, questions)}
    return [found[index] for index in range(len(numbers))]


def own_answers(study: Studied, numbers: Sequence[int], answers: Sequence[tuple[str, bool]]) -> list[Read]:
    """The lessons of these numbers with these answers; where one is empty, with the teacher's."""
    answered = []
    for number, (text, ended) in zip(numbers, answers, strict=True):
        given = study.read[number].answered
        own = Answered(given.example.answered(text), ended, given.teacher)
        answered.append(own if text.strip() else given)
    return study.classroom.read(answered)[0]
