"""A base from a folder, the hub or a GGUF file: its configuration, its tokenizer, its weights in the precision asked for."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from softprompt.config import ModelConfig
from softprompt.engine.family import class_of, empty_model
from softprompt.engine.gguf_reader import quick_reader
from softprompt.engine.model import FrozenBase, freeze
from softprompt.engine.offload import from_files
from softprompt.engine.places import device_map, free_memory
from softprompt.engine.quantized import bits_of, computed_in, method_of, settle
from softprompt.engine.tried import warn_of_newer
from softprompt.engine.unpack import keep_unpacked, note_fingerprint, unpacked_folder
from softprompt.errors import ConfigError, ModelError, first_line
from softprompt.extras import need
from softprompt.hub import hub

NO_MEMORY = 'the device ran out of memory: try model.quantization = "nf4" or a smaller base; softprompt plan says what a run needs'
SMALL = 10**9  # bytes of files
MOVED = "if the base was moved, model.name=FOLDER says where it lies; its weights decide whether it is the same"


def load_base(config: ModelConfig, *, layers_in_files: Path | None = None) -> FrozenBase:
    """Loads, freezes and checks a base. Raises ModelError when it cannot be found, loaded or used with a soft prompt.

    `layers_in_files`: a folder to spare; the layers are then read from the base's files at every forward (offload.py). A
    quantised base is loaded whole, and so is a GGUF file for the first time.
    """
    warn_of_newer()
    name, gguf_file = config.location
    settings = load_settings(config)
    refuse_unsupported(settings)
    tokenizer = load_tokenizer(config)
    how = {"config": settings, "dtype": load_dtype(config), **_quantization(config, settings)}
    packed = gguf_file is not None and not _unpacked(config).is_dir()
    whole = config.quantization or method_of(settings) or packed
    if layers_in_files and not whole:
        how |= from_files(settings, device_of(config.device), layers_in_files, trust_remote_code=config.trust_remote_code)
    else:
        how |= _place(config, settings)
    model, info = _from_pretrained(class_of(settings), config, output_loading_info=True, **how)
    if info["missing_keys"]:
        raise ModelError(
            f"{name}: the files lack weights ({', '.join(sorted(info['missing_keys'])[:3])} ...): the base would be partly random"
        )
    if packed:
        if getattr(model, "hf_quantizer", None) is not None:  # transformers 5.15 has none for GGUF yet
            model.hf_quantizer.remove_quantization_config(model)  # the weights are plain numbers by now
        keep_unpacked(model, tokenizer, _unpacked(config))
    settle(model, load_dtype(config))
    try:
        base = freeze(model, tokenizer, name if gguf_file is None else f"{name}/{gguf_file}")
    except torch.OutOfMemoryError:
        raise ModelError(f"{name}: {NO_MEMORY}") from None
    if gguf_file is not None and load_dtype(config) != torch.float16:
        note_fingerprint(_unpacked(config), base.fingerprint)
    return base


def _quantization(config: ModelConfig, settings: Any) -> dict[str, Any]:
    """What transformers is told to load a base in 8 or 4 bits, or one that was saved in few bits: these are computed with in the
    precision of the rest. Raises ConfigError for a GGUF file and for a base that is quantised already, and MissingPackage."""
    saved_by = method_of(settings)
    if saved_by is None and config.quantization is None:
        return {}
    if config.location[1] is not None and config.quantization is not None:
        raise ConfigError(
            "model.quantization: a GGUF file is unpacked to full precision: name the base's Hugging Face folder or id instead"
        )
    if saved_by is not None and config.quantization is not None:
        raise ConfigError(f"model.quantization: {config.location[0]} is quantised already, by {saved_by}: leave it out")
    if (saved_by or "bitsandbytes") == "bitsandbytes":
        need("bitsandbytes", "a base in few bits")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every product that 8-bit inputs are float16
    dtype = load_dtype(config)
    if config.quantization is None:
        computed_in(settings, dtype)
        return {}
    four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    kinds: dict[str, dict[str, Any]] = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, **four_bit}}
    return {"quantization_config": BitsAndBytesConfig(**kinds[config.quantization])}


def _place(config: ModelConfig, settings: Any) -> dict[str, Any]:
    """On which device, or devices, transformers is told to put the weights. Raises ModelError where they do not fit."""
    device = device_of(config.device)
    if _is_small(config.location[0]):
        return {"device_map": {"": device}}
    with torch.device("meta"):
        model = empty_model(settings, load_dtype(config), trust_remote_code=config.trust_remote_code)
    free = free_memory(device, all_gpus=config.device == "auto")
    places = device_map(model, load_dtype(config), bits_of(settings, config.quantization), free, config.location[0])
    return {"device_map": {"": device} if len(places) == 1 else places}


def _is_small(name: str) -> bool:
    """Whether a folder's files are so small that they fit anywhere."""
    return Path(name).is_dir() and sum(file.stat().st_size for file in Path(name).iterdir()) < SMALL


def load_settings(config: ModelConfig) -> Any:
    """The base's transformers configuration alone, without weights. Raises ModelError when it cannot be had."""
    return _from_pretrained(AutoConfig, config)


def load_tokenizer(config: ModelConfig) -> Any:
    """The base's tokenizer alone. Raises ModelError when it cannot be had."""
    return _from_pretrained(AutoTokenizer, config)


def _from_pretrained(kind: Any, wanted: ModelConfig, **how: Any) -> Any:
    name, gguf_file = wanted.location
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with nullcontext("") if Path(name).exists() else hub() as address:  # a local folder needs no hub
        try:
            places = {"revision": wanted.revision, "gguf_file": gguf_file}
            if gguf_file is not None and _unpacked(wanted).is_dir():
                name, places = str(_unpacked(wanted)), {}
            given = {key: value for key, value in places.items() if value is not None}
            with quick_reader(vocabulary=kind is AutoTokenizer) if "gguf_file" in given else nullcontext():
                return kind.from_pretrained(name, trust_remote_code=wanted.trust_remote_code, **given, **how)
        except torch.OutOfMemoryError:
            raise ModelError(f"{name}: {NO_MEMORY}") from None
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            raise ModelError(_cannot_load(name, gguf_file, address, error)) from None


def folder_of(config: ModelConfig) -> Path:
    """Where a base's files lie in Hugging Face's form: the folder itself, the hub's copy in the cache, or a GGUF file unpacked.

    Raises ModelError when there is no such folder.
    """
    name, gguf_file = config.location
    if gguf_file is not None:
        if not _unpacked(config).is_dir():
            raise ModelError(f"{name}/{gguf_file} could not be kept unpacked in the cache, whose disk is too full: make room and try again")
        return _unpacked(config)
    if Path(name).is_dir():
        return Path(name)
    with hub() as address:
        try:
            return Path(snapshot_download(name, revision=config.revision))
        except (OSError, ValueError) as error:
            raise ModelError(_cannot_load(name, None, address, error)) from None


def gguf_place(config: ModelConfig) -> tuple[Path, Path] | None:
    """(a GGUF base's file, the folder that it is unpacked to); None for a base in Hugging Face's form."""
    name, gguf_file = config.location
    if gguf_file is None:
        return None
    file = Path(cached_file(name, gguf_file, revision=config.revision))
    return file, unpacked_folder(file, str(load_dtype(config)).removeprefix("torch."))


def _unpacked(config: ModelConfig) -> Path:
    place = gguf_place(config)
    assert place is not None, "asked of GGUF bases alone"
    return place[1]


def refuse_unsupported(settings: Any) -> None:
    """Raises ModelError for bases that a soft prompt cannot stand before."""
    text = settings.get_text_config(decoder=True)
    if settings.is_encoder_decoder:
        raise ModelError(f"{settings.model_type} is an encoder-decoder model: softprompt works with decoder-only language models")
    if getattr(text, "hidden_size_per_layer_input", 0):
        raise ModelError(
            f"{settings.model_type} looks up embeddings again in every layer, by token id: "
            "a soft prompt has no ids, so it cannot be used here"
        )


def load_dtype(config: ModelConfig) -> torch.dtype:
    """The precision that a base is loaded in. auto: bfloat16 where the hardware multiplies in it, else float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if multiplies_in("bfloat16", config.device) else torch.float32


def multiplies_in(precision: str, device: str) -> bool:
    """Whether a device, as `model.device` names it, has instructions for products in a precision: without them a CPU takes many times
    longer than in float32 (LOG.md)."""
    kind = device_of(device).type
    if precision == "float32":
        return True
    if kind == "cpu":  # torch 2.9 knows no other names
        return precision == "bfloat16" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return precision == "float16" or (kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def within_reach(stored: ModelConfig) -> ModelConfig:
    """A base that a run or prompt remembers, in the precision of then where the device multiplies in it; elsewhere the machine decides."""
    if stored.dtype == "auto" or multiplies_in(stored.dtype, stored.device):
        return stored
    return stored.model_copy(update={"dtype": "auto"})


def _cannot_load(name: str, gguf_file: str | None, address: str, error: Exception) -> str:
    path, reason = Path(name), first_line(error)
    if gguf_file is not None and path.is_dir() and not (path / gguf_file).is_file():
        return f"{path / gguf_file}: no such GGUF file; {MOVED}"
    if "trust_remote_code" in str(error):
        return f"{name} comes with code of its own: read it, then allow it on the command line with model.trust_remote_code=true"
    if path.exists():
        return f"{name}: cannot be loaded as a model: {reason}"
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        return f"{name}: no such model folder; {MOVED}"
    return f"{name}: no such folder here, and as a hub id it cannot be loaded from {address} (HF_ENDPOINT sets a mirror): {reason}; {MOVED}"


def device_of(name: str) -> torch.device:
    """The device that `model.device` means. Raises ConfigError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device = {name!r} cannot be used here: {first_line(error)}") from None
    return torch.device(name)
