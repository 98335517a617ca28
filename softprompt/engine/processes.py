"""Several processes that compute one run: who they are, what they tell each other, and how all of them end when one does.

torchrun, accelerate launch or SLURM starts them; gloo carries what they say, from CPU to CPU. The base is frozen and never crosses: of a
step only the gradients by what the layers keep of the prompts do.
"""

import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from softprompt.config import ModelConfig
from softprompt.engine.launched import Launched, launched
from softprompt.engine.watch import Watch, watching
from softprompt.engine.world import Item, Value, World, add
from softprompt.errors import ConfigError, Error, RunError, first_line

JOIN = timedelta(minutes=10)  # until all of them are there
PATIENCE = timedelta(days=1)  # for what one of them computes alone; that one has ended is noticed at once
HELD = 2**26  # numbers of gradients that a process keeps until they are added up, where those of one micro-batch are not more
SHORT, HEAD = 1016, 8  # bytes of a word that is said in one go, and of the number before it
NAMED = 2.0  # seconds until it is known which process is gone, and how


@contextmanager
def joined() -> Iterator[World]:
    """The processes that were started together with this one, or this one alone. Where the block ends well, all of them wait for each
    other; where it ends otherwise, the others end too.

    Raises ConfigError when they do not come together.
    """
    here = launched()
    if dist.is_available() and dist.is_initialized():  # by the caller, or for an earlier run
        here = replace(here, rank=dist.get_rank(), size=dist.get_world_size())
    if here.size == 1:
        yield World()
        return
    world = Processes(here, _group(here))
    with watching(here.rank, here.size, here.address, world.told, world.farewell) as world.watch:
        try:
            yield world
            world.end()
        except Error as error:  # as a rule all of them find it, or the first one does and tells nobody why
            error.said = world.rank > 0 and world.watch.failed(NAMED)
            raise


def _group(here: Launched) -> Any:
    """What they talk over: a group of our own, also where the caller has one."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise ConfigError("this build of torch has no gloo: several processes cannot talk to each other")
    try:
        if not dist.is_initialized():
            address = f"[{here.address}]" if ":" in here.address else here.address
            dist.init_process_group("gloo", f"tcp://{address}:{here.port}", timeout=JOIN, rank=here.rank, world_size=here.size)
        return dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"process {here.rank} of {here.size} has not met the others at {here.address}:{here.port}: {first_line(error)}; "
            "docs/scale.md says what to look at"
        ) from None


class Processes(World):
    """See World."""

    def __init__(self, here: Launched, group: Any) -> None:
        self.rank, self.size, self.beside = here.rank, here.size, here.beside
        self.watch: Watch | None = None
        self._local, self._group, self._ended = here.local, group, False
        self._hosts = self.gathered(socket.gethostname())
        if torch.cuda.is_available():
            torch.cuda.set_device(here.local % torch.cuda.device_count())

    def placed(self, config: ModelConfig) -> ModelConfig:
        if self.beside == 1 or config.device != "auto" or not torch.cuda.is_available():
            return config
        return config.model_copy(update={"device": f"cuda:{torch.cuda.current_device()}"})

    def owners(self, costs: Sequence[int]) -> list[int]:
        """The dearest first, each to whoever has least to do."""
        load, owners = [0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
            owner = load.index(min(load))
            load[owner] += costs[number]
            owners[number] = owner
        return owners

    # ---- sums ------------------------------------------------------------------------------------------------------

    def added_up(self, table_KD: Tensor, items: Sequence[Item], of: Callable[[int], Tensor]) -> Tensor:
        """Each process adds up a share of the columns, all items in their order, and is then told the others'."""
        ends = [table_KD.shape[1] * part // self.size for part in range(self.size + 1)]
        own_KD = table_KD[:, ends[self.rank] : ends[self.rank + 1]].to("cpu", copy=True)
        for group in self._groups(items, table_KD.shape[1]):
            dealt = list(zip(group, self.owners([items[number].cost for number in group]), strict=True))
            mine = [of(number).cpu() for number, owner in dealt if owner == self.rank]
            rows = [[len(items[number].rows) for number, owner in dealt if owner == rank] for rank in range(self.size)]
            parts = self._exchanged(torch.cat(mine) if mine else own_KD.new_zeros(0, ends[-1]), rows, ends)
            for number, owner in dealt:
                add(own_KD, items[number].rows, next(parts[owner]))
        return self._whole(own_KD, ends).to(table_KD.device)

    def _groups(self, items: Sequence[Item], width: int) -> Iterator[list[int]]:
        """Items that are computed before anything is added up: as many as can be held, and one for each process."""
        group: list[int] = []
        held = 0
        for number, item in enumerate(items):
            group.append(number)
            held += width * len(item.rows)
            if held >= HELD * self.size and len(group) >= self.size:
                yield group
                group, held = [], 0
        if group:
            yield group

    def _exchanged(self, mine_RD: Tensor, rows: Sequence[Sequence[int]], ends: Sequence[int]) -> list[Iterator[Tensor]]:
        """This process's columns of what each of them has computed: `rows[r]`, the numbers of rows of the items of process r."""
        widths = [end - begin for begin, end in pairwise(ends)]
        counts, own = [sum(each) for each in rows], widths[self.rank]
        sent = torch.cat([mine_RD[:, begin:end].flatten() for begin, end in pairwise(ends)])
        received = torch.empty(sum(counts) * own)
        with self._talking():
            dist.all_to_all_single(
                received, sent, [count * own for count in counts], [len(mine_RD) * width for width in widths], group=self._group
            )
        blocks = received.split([count * own for count in counts])
        return [iter(block.view(sum(each), own).split(list(each))) for block, each in zip(blocks, rows, strict=True)]

    def _whole(self, own_KD: Tensor, ends: Sequence[int]) -> Tensor:
        widths = [end - begin for begin, end in pairwise(ends)]
        padded = pad(own_KD, (0, max(widths) - own_KD.shape[1]))
        parts = [torch.empty_like(padded) for _ in widths]
        with self._talking():
            dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def total(self, sums: Tensor) -> Tensor:
        with self._talking():
            dist.all_reduce(sums, group=self._group)
        return sums

    def as_first(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.detach().flatten().cpu() for tensor in tensors])
        self._broadcast(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    # ---- words -----------------------------------------------------------------------------------------------------

    def told(self, make: Callable[[], Value]) -> Value:
        said = _bytes(make()) if self.first else b""
        head = _block(said)
        self._broadcast(head)
        size = _size(head)
        if size <= SHORT:
            return _value(head[HEAD : HEAD + size])
        whole = _tensor(said) if self.first else torch.empty(size, dtype=torch.uint8)
        self._broadcast(whole)
        return _value(whole)

    def tensors(self, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()} if self.first else {}
        kinds = self.told(lambda: [(name, list(tensor.shape), str(tensor.dtype).split(".")[1]) for name, tensor in found.items()])
        for name, shape, kind in kinds:
            tensor = found.setdefault(name, torch.empty(shape, dtype=getattr(torch, kind)))
            self._broadcast(tensor.reshape(-1).view(torch.uint8))
        return found

    def gathered(self, value: Value) -> list[Value]:
        said = _bytes(value)
        heads = self._gather(_block(said))
        sizes = [_size(head) for head in heads]
        if max(sizes) > SHORT:
            heads = self._gather(_block(said, max(sizes)))
        return [_value(head[HEAD : HEAD + size]) for head, size in zip(heads, sizes, strict=True)]

    def each(self, count: int, make: Callable[[int], Value]) -> list[Value]:
        own = [(number, make(number)) for number in range(self.rank, count, self.size)]
        found = {number: value for part in self.gathered(own) for number, value in part}
        return [found[number] for number in range(count)]

    def agree(self, facts: Mapping[str, Any]) -> None:
        theirs = self.gathered(dict(facts))
        for rank, other in enumerate(theirs):
            for name, value in theirs[0].items():
                if other[name] != value:
                    raise RunError(
                        f"{name} of process {rank}, on {self._hosts[rank]}, are not those of the first, on {self._hosts[0]}: "
                        "every machine must have the same files and settings"
                    )

    def end(self) -> None:
        if not self._ended:
            self.gathered(None)
            self._ended = True
            if self.watch is not None:
                self.watch.close(well=True)

    def farewell(self, rank: int | None) -> str:
        """What is said when a process is gone."""
        which = "another process" if rank is None else f"process {rank} of {self.size}, on {self._hosts[rank]},"
        return f"{which} has ended, so this one ends too: softprompt train --resume RUN goes on, with any number of processes"

    def _gather(self, block: Tensor) -> list[Tensor]:
        blocks = [torch.empty_like(block) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(blocks, block, group=self._group)
        return blocks

    def _broadcast(self, tensor: Tensor) -> None:
        if tensor.numel():
            with self._talking():
                dist.broadcast(tensor, src=0, group=self._group)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # gloo's, whose words are about sockets
            rank = self.watch.gone(NAMED) if self.watch else None
            if self.watch:
                self.watch.close(well=False)
            raise RunError(self.farewell(rank)) from None


def _bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _block(said: bytes, room: int = SHORT) -> Tensor:
    """The number of bytes, then as many of these as there is room for."""
    return _tensor((len(said).to_bytes(HEAD, "little") + said)[: HEAD + room].ljust(HEAD + room, b"\0"))


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _size(block: Tensor) -> int:
    return int.from_bytes(bytes(block[:HEAD].tolist()), "little")


def _value(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
