"""A folder whose prompts come and go while a server runs.

It is looked at every second. A prompt is added when its files have stood still between two looks, so that one that is being copied is not
read half; what is wrong with one is said once, until its files change.
"""

import asyncio
import re
from pathlib import Path

from softprompt.atomic import remove_folder
from softprompt.errors import Error
from softprompt.serve.archive import FILES, unpack
from softprompt.serve.asking import Engine, Model
from softprompt.serve.log import logger
from softprompt.serve.refusals import Refused

SECONDS = 1.0
NAME = re.compile(r"\w[\w.-]*")
MOST_NAME = 200  # bytes: a file system takes 255, a draft's name is longer
Look = tuple[tuple[int, int], ...]  # (time of change, size) of each file


def check_name(name: str) -> None:
    """Raises Refused for what cannot be the name of a prompt: letters and digits of any script, "_", "-" and "." are."""
    if not NAME.fullmatch(name) or len(name.encode()) > MOST_NAME:
        message = "a prompt's name has letters, digits, _, - and ., begins with a letter or digit, and is not longer than 200 bytes"
        raise Refused(message, param="name", code="invalid_name")


class Folder:
    """`path`: where prompts lie: folders of prompts, or runs that have finished."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path, self.engine = path, engine
        self._served: dict[str, Look] = {}
        self._refused: dict[str, Look] = {}
        self._last: dict[str, Look] = {}
        self._changing = asyncio.Lock()

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(SECONDS)
            try:
                await self.look()
            except Exception:  # a share that is away, say: the prompts that are served stay
                logger.exception("%s could not be looked at", self.path)

    async def look(self, *, at_once: bool = False) -> None:
        """Adds what has come and stands still, replaces what has changed, removes what has gone. `at_once`: without a second look."""
        async with self._changing:
            found = await asyncio.to_thread(prompts_in, self.path)
            for name in [name for name in self._served if name not in found]:
                del self._served[name]
                await self._remove(name)
            for name, (folder, look) in found.items():
                if (at_once or self._last.get(name) == look) and look not in (self._served.get(name), self._refused.get(name)):
                    await self._add(name, folder, look)
            self._last = {name: look for name, (_, look) in found.items()}
            self._refused = {name: look for name, look in self._refused.items() if name in found}

    async def _add(self, name: str, folder: Path, look: Look) -> None:
        try:
            check_name(name)
            if name not in self._served and name in self._names():
                raise Refused("something else is served by this name")
            await self.engine.add(name, folder)
        except Error as error:
            self._refused[name] = look
            logger.error("%s is not served: %s", folder, error)
        else:
            self._served[name] = look
            logger.info("%s is served as %s", folder, name)

    async def _remove(self, name: str) -> None:
        try:
            await self.engine.remove(name)
            logger.info("%s is no longer served: its folder has gone", name)
        except Error as error:
            logger.error("%s: %s", name, error)

    def _names(self) -> set[str]:
        return {model.name for model in self.engine.models()}

    async def put(self, name: str, archive: bytes, most: int) -> Model:
        """Unpacks a prompt into a folder of its own and serves it. Raises Refused, ArtifactError, and OSError where there is no room; then
        all is as before."""
        check_name(name)
        async with self._changing:
            place = self.path / name
            if name in self._names() or place.exists():
                raise Refused(f"there is something of this name already: {name}", status=409, param="name", code="name_taken")
            await asyncio.to_thread(unpack, archive, place, most)
            try:
                model = await self.engine.add(name, place)
            except BaseException:
                await asyncio.to_thread(remove_folder, place)
                raise
            _, self._served[name] = (await asyncio.to_thread(prompts_in, self.path))[name]
            return model

    async def drop(self, name: str) -> None:
        """Takes a prompt away with its folder. Raises NotServed, and Refused for one that was not put here as a folder of its own."""
        async with self._changing:
            if name not in self._served or not _holds(self.path / name):
                message = "not a prompt folder of --folder: whoever put it there, or named it at the start, takes it away"
                raise Refused(message, status=409 if name in self._names() else 404, param="name", code="not_removable")
            await self.engine.remove(name)
            del self._served[name]
            await asyncio.to_thread(remove_folder, self.path / name)


def _holds(folder: Path) -> bool:
    """Whether a folder is a prompt's."""
    return all((folder / name).is_file() for name in FILES[:2])


def prompts_in(path: Path) -> dict[str, tuple[Path, Look]]:
    """The prompt folders below, by name. Raises OSError."""
    found = {}
    for child in sorted(path.iterdir()):
        folder = next((place for place in (child, child / "prompt") if not child.name.startswith(".") and _holds(place)), None)
        if folder is not None:
            stats = [(folder / name).stat() for name in FILES[:2]]
            found[child.name] = folder, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
    return found
